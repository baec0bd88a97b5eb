// Combine: every source pulls the rows of its tokens from the ranks that hold them and adds them in
// fp32, in ascending (rank, slot) order, rounding once. An owner leaves when every source has pulled.
//
// A warp takes a token at a time. Its rows come in pieces through a ring of stages, piece by piece
// and row by row, so that the next loads are under way while this piece is added.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "contract/gpu.h"
#include "device/copy.cuh"
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.h"

namespace ep::kernels {
namespace {

using device::Stage;

// ---- stage: rows of remote sources, out of an ordinary tensor into the arena ----

constexpr int kStageThreads = 1024;

__global__ void __launch_bounds__(kStageThreads, 1)
    stage_kernel(const __grid_constant__ CombineJob job) {
    const RankView& view = job.view;
    const CombineArgs& a = job.args;
    if (__syncthreads_or(device::gave_up(view.watch))) return;
    const int lane = ptx::lane_id(), num_ranks = view.shape.num_ranks, me = view.peers.rank;
    const int64_t row_bytes = a.row_bytes();
    const auto copy = [&](int64_t row) {
        if (row < 0 || row >= a.num_rows) return;
        const auto* from = reinterpret_cast<const uint4*>(a.x + row * row_bytes);
        auto* to = reinterpret_cast<uint4*>(job.staged + row * row_bytes);
#pragma unroll 4
        for (int64_t u = lane; u < row_bytes / 16; u += 32) to[u] = from[u];
    };
    int64_t num_recv = 0, own_begin = 0, own_end = 0;
    for (int src = 0; src < num_ranks; ++src) {
        if (src == me) own_begin = num_recv;
        num_recv += a.rank_counts[num_ranks + src];
        if (src == me) own_end = num_recv;
    }
    num_recv = min(num_recv, a.num_recv);
    const int warps = blockDim.x / 32;
    for (int64_t i = blockIdx.x + int64_t{threadIdx.x / 32} * gridDim.x; i < num_recv;
         i += int64_t{warps} * gridDim.x) {
        if (i >= own_begin && i < own_end) continue;  // read in place
        if (a.layout == RecvLayout::kCompact) {
            copy(i);
            continue;
        }
        for (int k = 0; k < a.num_topk; ++k) copy(a.recv_row[i * a.num_topk + k]);
    }
}

// ---- enter ----

// Whether all we may load of a peer lies in its arena.
__device__ bool is_sane(const CombineJob& job, const EntryRecord& entry, int p) {
    const CombineArgs& a = job.args;
    if (entry.num_rows == 0 || p == job.view.peers.rank) return entry.num_rows >= 0;
    const int64_t per_row = a.layout == RecvLayout::kCompact ? a.num_topk : 1;
    return lies_in_arena(job.view, p, entry.y_offset, entry.num_rows, a.row_bytes()) &&
           (entry.weights_offset == -1 ||
            lies_in_arena(job.view, p, entry.weights_offset, entry.num_rows, 4 * per_row));
}

__global__ void __launch_bounds__(1024, 1)
    enter_combine_kernel(const __grid_constant__ CombineJob job) {
    __shared__ Entering in;
    const RankView& view = job.view;
    if (__syncthreads_or(device::gave_up(view.watch))) return;
    if (!acquire_slot(view, job.begin, in)) return;
    publish_entries(view, in, nullptr);
    if (!await_entries(view, in)) return;
    for (int p = threadIdx.x; in.outcome.ok() && p < view.shape.num_ranks; p += blockDim.x) {
        if (!is_sane(job, entry_of(view, in.seq, p), p)) {
            atomicMin(&in.first_bad, objection(kEpochObjection, p));
        }
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (in.outcome.ok() && in.first_bad != kNoObjection) {
        const int p = static_cast<int>(in.first_bad & 0xffff);
        set_outcome(in.outcome, kBadCount, p, view.peers.arena_bytes[p],
                    entry_of(view, in.seq, p).y_offset);
    }
    if (!in.outcome.ok()) return fail_call(view, job.begin, in);
    view.state.op->code = kOk;
    report(view, job.begin, in, 0, 0, 0);
}

// ---- pull ----

constexpr int kPieceBytes = 2048;  // of a row: what a warp holds as sums in its registers
constexpr int kMaxStages = 16;     // of a warp
constexpr int kMaxPullWarps = 16;

// The rows of a token in the order they are added.
struct Contributions {
    const std::byte* row[kMaxTopk];
    float weight[kMaxTopk];
};

// Where the rows of an owner lie; one for each rank, in shared memory.
struct Source {
    const std::byte* y;
    int64_t num_rows;
};

// What a lane knows of its slot, read one token ahead.
struct Choice {
    int64_t id = -1;
    int32_t row = -1;
};

// One warp's view of the work; `turn` counts its tokens.
struct Puller {
    const CombineJob& job;
    Operation op;
    const Source* sources;
    Contributions* plans;  // [2] by parity of the turn
    int64_t row_bytes;
    int64_t first, step;  // token of turn n is first + n * step

    __device__ int64_t token(int64_t turn) const { return first + turn * step; }

    __device__ Choice choice(int64_t turn) const {
        const int lane = ptx::lane_id();
        Choice c;
        if (token(turn) < job.args.num_tokens && lane < job.args.num_topk) {
            const int64_t at = token(turn) * job.args.num_topk + lane;
            c.id = job.args.topk_idx[at];
            c.row = job.args.send_row[at];
        }
        return c;
    }

    __device__ float weight_back(int owner, int64_t row, int slot) const {
        const RankView& view = job.view;
        const int64_t index =
            job.args.layout == RecvLayout::kCompact ? row * job.args.num_topk + slot : row;
        if (owner == view.peers.rank) {
            return job.args.y_weights != nullptr ? job.args.y_weights[index] : 0.0f;
        }
        const int64_t offset = entry_of(view, op.seq, owner).weights_offset;
        if (offset < 0) return 0.0f;
        return reinterpret_cast<const float*>(view.peers.arena[owner] + offset)[index];
    }

    // Compact: every rank of the token holds a value for every slot, also of experts elsewhere.
    __device__ float sum_weights(int place, int owner, int64_t row, int count) const {
        const int lane = ptx::lane_id();
        float sum = 0.0f;
        for (int i = 0; i < count; ++i) {
            const int from = __ffs(__ballot_sync(~0u, place == i)) - 1;
            const int their = __shfl_sync(~0u, owner, from);
            const int64_t their_row = __shfl_sync(~0u, row, from);
            if (lane < job.args.num_topk) sum = __fadd_rn(sum, weight_back(their, their_row, lane));
        }
        return sum;
    }

    // Fills the plan of a turn; returns how many rows it has, or -1: leave.
    __device__ int plan(int64_t turn, const Choice& slot) const {
        const CombineArgs& a = job.args;
        const RankView& view = job.view;
        const int lane = ptx::lane_id();
        const int64_t t = token(turn);
        if (t >= a.num_tokens) return 0;
        const int64_t at = t * a.num_topk + lane;
        const int64_t id = slot.id, row = slot.row;
        const bool chosen = id >= 0 && id < view.shape.num_experts && row >= 0;
        const int owner = chosen ? __ldg(view.state.owner + id) : -1;
        const uint32_t same = __match_any_sync(~0u, owner);
        bool adds = chosen;
        if (a.layout == RecvLayout::kCompact) adds = chosen && (same & ptx::lanemask_lt()) == 0;
        const bool stale = adds && row >= sources[owner].num_rows;
        if (stale) {
            device::give_up(view.watch, op, kMiscount,
                            {Site::kPulled, owner, uint64_t(sources[owner].num_rows)},
                            uint64_t(row), 0);
        }
        if (__any_sync(~0u, stale)) return -1;
        // Place among the rows: lower owners first, lower slots first.
        int place = 0;
        for (int k = 0; k < a.num_topk; ++k) {
            const int other = __shfl_sync(~0u, adds ? owner : -1, k);
            const bool earlier =
                a.topk_order ? k < lane : other < owner || (other == owner && k < lane);
            if (other >= 0 && earlier) ++place;
        }
        Contributions& rows = plans[turn & 1];
        if (adds) {
            rows.row[place] = sources[owner].y + row * row_bytes;
            if (a.weighted) rows.weight[place] = a.topk_weights[at];
        }
        const int count = __popc(__ballot_sync(~0u, adds));
        if (a.out_weights != nullptr) {
            float weight = chosen ? weight_back(owner, row, lane) : 0.0f;
            if (a.sum_weights) weight = sum_weights(adds ? place : -1, owner, row, count);
            if (lane < a.num_topk) a.out_weights[at] = weight;
        }
        __syncwarp();
        return count;
    }
};

// Runs ahead of the sums by as many pieces as there are stages, into the next token at most.
struct Feed {
    std::byte* data;   // [num_stages][kPieceBytes]
    uint64_t* loaded;  // [num_stages]
    int num_stages;
    int64_t turn = 0;    // of the token it loads for
    int64_t offset = 0;  // of the piece in its row
    int row = 0;
    int next = 0, oldest = 0, in_flight = 0;  // stages
    uint32_t parity = 0;                      // of the oldest one's load

    // Starts loads until all stages are in use or the planned tokens have no more pieces.
    __device__ void run(const Puller& p, int64_t current, int count, int next_count) {
        while (in_flight < num_stages) {
            const int rows = turn == current ? count : turn == current + 1 ? next_count : 0;
            if (row >= rows) {
                // A token without rows, or one that is done.
                if (turn > current || next_count == 0) return;
                ++turn;
                continue;
            }
            const int bytes = static_cast<int>(min(int64_t{kPieceBytes}, p.row_bytes - offset));
            if (ptx::lane_id() == 0) {
                ptx::fence_proxy_async_shared();  // the reads before it, which all lanes have done
                device::load_stage({data + next * kPieceBytes, loaded + next},
                                   p.plans[turn & 1].row[row] + offset, bytes);
            }
            if (++next == num_stages) next = 0;
            ++in_flight;
            advance(p, rows);
        }
    }

    __device__ void advance(const Puller& p, int rows) {
        if (++row < rows) return;
        row = 0;
        offset += kPieceBytes;
        if (offset < p.row_bytes) return;
        offset = 0;
        ++turn;
    }

    __device__ Stage piece() const {
        return {data + oldest * kPieceBytes, loaded + oldest, parity};
    }

    __device__ void give_back() {
        --in_flight;
        if (++oldest < num_stages) return;
        oldest = 0;
        parity ^= 1;
    }
};

// A piece of the result in the registers of a warp. kFull: a whole piece, nothing to check.
template <DType kDtype, bool kFull>
struct Sums {
    static constexpr int kUnits = kPieceBytes / (16 * 32);
    device::Unit<kDtype> unit[kUnits];
    int bytes;

    // f(unit, byte offset in the piece) for the units of this lane that lie in the piece.
    template <class F>
    __device__ __forceinline__ void each(F f) {
        const int first = 16 * static_cast<int>(ptx::lane_id());
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            const int at = first + 16 * 32 * u;
            if (kFull || at < bytes) f(unit[u], at);
        }
    }

    // The first bias replaces the zero, so that a bias of -0.0 stays what it is.
    __device__ __forceinline__ void start(const CombineArgs& a, int64_t offset) {
        for (auto& u : unit) u.clear();
        const std::byte* first = a.bias0 != nullptr ? a.bias0 : a.bias1;
        if (first == nullptr) return;
        each([&](auto& u, int at) {
            u.set(*reinterpret_cast<const uint4*>(first + offset + at));
            if (a.bias0 == nullptr || a.bias1 == nullptr) return;
            u.add(*reinterpret_cast<const uint4*>(a.bias1 + offset + at));
        });
    }

    __device__ __forceinline__ void add(const std::byte* piece) {
        each([&](auto& u, int at) { u.add(ptx::ld_shared_v4(piece + at)); });
    }
    __device__ __forceinline__ void add(const std::byte* piece, float weight) {
        each([&](auto& u, int at) { u.add(ptx::ld_shared_v4(piece + at), weight); });
    }
    __device__ __forceinline__ void finish(std::byte* out) {
        each([&](auto& u, int at) { *reinterpret_cast<uint4*>(out + at) = u.rounded(); });
    }
};

// One piece of one token: all its rows, in order. False: leave.
template <DType kDtype, bool kFull>
__device__ __forceinline__ bool add_piece(const Puller& p, Feed& feed, int64_t turn, int count,
                                          int next_count, int64_t offset, int bytes) {
    const CombineArgs& a = p.job.args;
    const int64_t at = p.token(turn) * p.row_bytes + offset;
    Sums<kDtype, kFull> sums;
    sums.bytes = bytes;
    sums.start(a, at);
    for (int i = 0; i < count; ++i) {
        feed.run(p, turn, count, next_count);
        Stage piece = feed.piece();
        if (!device::await_stage(p.job.view.watch, p.op, piece, p.job.view.peers.rank)) {
            return false;
        }
        if (a.weighted) {
            sums.add(piece.data, p.plans[turn & 1].weight[i]);
        } else {
            sums.add(piece.data);
        }
        __syncwarp();  // all have read; the fence that follows is in Feed::run
        feed.give_back();
    }
    sums.finish(a.out + at);
    return true;
}

// One token, piece by piece. False: leave.
template <DType kDtype>
__device__ bool add_token(const Puller& p, Feed& feed, int64_t turn, int count, int next_count) {
    int64_t offset = 0;
    bool ok = true;
    for (; ok && offset + kPieceBytes <= p.row_bytes; offset += kPieceBytes) {
        ok = add_piece<kDtype, true>(p, feed, turn, count, next_count, offset, kPieceBytes);
    }
    const int rest = static_cast<int>(p.row_bytes - offset);
    if (!ok || rest <= 0) return ok;
    return add_piece<kDtype, false>(p, feed, turn, count, next_count, offset, rest);
}

// Who gave up may have let its user write to y while we read it. Our loads come before.
__device__ __noinline__ bool owners_are_healthy(const RankView& view, const Operation& op) {
    bool ok = true;
    for (int p = threadIdx.x; p < view.shape.num_ranks; p += blockDim.x) {
        const uint32_t life = ptx::ld_acquire_sys(&device::header_of(view.watch, p)->life);
        if (p == view.peers.rank || life != static_cast<uint32_t>(Life::kFailed)) continue;
        device::adopt_failure(view.watch, op, {Site::kPulled, p, op.seq}, 0, 0);
        ok = false;
    }
    return ok;
}

// The last block tells every owner that we have read its y, and waits until everybody has read ours.
__device__ void leave(const RankView& view, const Operation& op) {
    const int num_ranks = view.shape.num_ranks, me = view.peers.rank;
    const int slot = static_cast<int>(op.seq % view.shape.num_slots);
    bool ok = true;
    if (!__syncthreads_and(owners_are_healthy(view, op))) return;
    for (int p = threadIdx.x; p < num_ranks; p += blockDim.x) {
        // Our loads of y are done; pairs with the wait below at rank p.
        ptx::st_release_sys(at<uint64_t>(view, p, view.layout.pulled_word(slot, me)), op.seq);
    }
    for (int p = threadIdx.x; p < num_ranks; p += blockDim.x) {
        const auto* word = at<uint64_t>(view, me, view.layout.pulled_word(slot, p));
        ok = ok && device::wait_word(view.watch, op, {Site::kPulled, p, op.seq}, word);
    }
    if (__syncthreads_and(ok) && threadIdx.x == 0) release_slot(view, op.seq);
}

template <DType kDtype>
__global__ void __launch_bounds__(kMaxPullWarps * 32, 1)
    pull_kernel(const __grid_constant__ CombineJob job, int num_stages) {
    extern __shared__ __align__(128) std::byte shared[];
    __shared__ uint64_t loaded[kMaxPullWarps * kMaxStages];
    __shared__ Contributions plans[kMaxPullWarps][2];
    __shared__ bool is_last;
    const RankView& view = job.view;
    const OpState& state = *view.state.op;
    if (__syncthreads_or(device::gave_up(view.watch) || state.code != kOk)) return;

    const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
    const Operation op{OpKind::kCombine, state.seq};
    auto* sources =
        reinterpret_cast<Source*>(shared + int64_t{num_warps} * num_stages * kPieceBytes);
    for (int p = threadIdx.x; p < view.shape.num_ranks; p += blockDim.x) {
        const EntryRecord& entry = entry_of(view, op.seq, p);
        const bool own = p == view.peers.rank;
        sources[p] = {own ? job.args.x : view.peers.arena[p] + entry.y_offset, entry.num_rows};
    }
    const Puller puller{job,
                        op,
                        sources,
                        plans[warp],
                        job.args.row_bytes(),
                        blockIdx.x + int64_t{warp} * gridDim.x,
                        int64_t{num_warps} * gridDim.x};
    Feed feed{shared + int64_t{warp} * num_stages * kPieceBytes, loaded + warp * kMaxStages,
              num_stages};
    if (threadIdx.x % 32 == 0) {
        for (int s = 0; s < num_stages; ++s) device::init_stage({nullptr, feed.loaded + s});
        ptx::fence_proxy_async();  // what enter_combine acquired, before we bulk-load it
    }
    __syncthreads();

    bool ok = true;
    int count = puller.plan(0, puller.choice(0));
    Choice ahead = puller.choice(1);
    for (int64_t turn = 0; ok && puller.token(turn) < job.args.num_tokens; ++turn) {
        const int next_count = count < 0 ? -1 : puller.plan(turn + 1, ahead);
        ahead = puller.choice(turn + 2);
        ok = count >= 0 && next_count >= 0;
        if (ok) ok = add_token<kDtype>(puller, feed, turn, count, next_count);
        count = next_count;
        __syncwarp();
        if (ok && feed.turn == turn) {  // a token without rows
            ++feed.turn;
        }
    }
    if (!__syncthreads_and(ok)) return;
    if (threadIdx.x == 0) {
        const uint32_t last = gridDim.x - 1;
        is_last = ptx::atom_acq_rel_gpu_inc(&view.state.op->finished, last) == last;
    }
    __syncthreads();
    if (is_last) leave(view, op);
}

using PullKernel = void (*)(CombineJob, int);

PullKernel pull_kernel_for(DType dtype) {
    switch (dtype) {
        case DType::kBF16:
            return pull_kernel<DType::kBF16>;
        case DType::kF16:
            return pull_kernel<DType::kF16>;
        default:
            return pull_kernel<DType::kF32>;
    }
}

}  // namespace

LaunchPlan combine_plan(int num_ranks, int num_blocks, int smem_bytes) {
    constexpr int kTables =
        kMaxPullWarps * (kMaxStages * 8 + 2 * static_cast<int>(sizeof(Contributions)));
    const int room = smem_bytes - kTables - static_cast<int>(sizeof(Source)) * num_ranks - 1024;
    const int stages = std::clamp(room / (kMaxPullWarps * kPieceBytes), 1, kMaxStages);
    return {num_blocks, kMaxPullWarps, stages * kPieceBytes};
}

int launch_combine(const CombineJob& job, const LaunchPlan& plan, Stream stream) {
    if (job.staged != nullptr) {
        stage_kernel<<<plan.all_blocks, kStageThreads, 0, stream>>>(job);
        if (const int error = cudaGetLastError()) return error;
    }
    const int ranks = job.view.shape.num_ranks;
    enter_combine_kernel<<<1, 32 * std::clamp(ranks, 4, 32), 0, stream>>>(job);
    if (const int error = cudaGetLastError()) return error;
    const int smem = plan.num_warps * plan.stage_bytes + static_cast<int>(sizeof(Source)) * ranks;
    pull_kernel_for(job.args.dtype)<<<plan.num_blocks, plan.num_warps * 32, smem, stream>>>(
        job, plan.stage_bytes / kPieceBytes);
    return cudaGetLastError();
}

int load_combine(int smem_bytes) {
    cudaFuncAttributes attributes;
    for (const void* kernel : {reinterpret_cast<const void*>(&stage_kernel),
                               reinterpret_cast<const void*>(&enter_combine_kernel)}) {
        if (const int error = cudaFuncGetAttributes(&attributes, kernel)) return error;
    }
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
        const PullKernel kernel = pull_kernel_for(dtype);
        if (const int error = cudaFuncGetAttributes(&attributes, kernel)) return error;
        const int dynamic = smem_bytes - static_cast<int>(attributes.sharedSizeBytes);
        if (const int error = cudaFuncSetAttribute(
                kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic)) {
            return error;
        }
    }
    return 0;
}

}  // namespace ep::kernels
