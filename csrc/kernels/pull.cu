// Pull: rows are bulk-loaded from their owners into a ring of stages and added up on the way out.
//
// The warps of a block form groups, each with a ring of its own. One warp of a group feeds the ring,
// a piece of a row at a time, in the order in which pieces are added; each of the others adds up one
// slice of every piece in its registers. An owner leaves when every source has pulled.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "contract/gpu.h"
#include "device/copy.cuh"
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "device/wait.cuh"
#include "kernels/contribution.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.cuh"

namespace ep::kernels {
namespace {

constexpr int kSliceBytes = 2048;  // of a piece: what a warp holds as sums in its registers
constexpr int kMaxPieceBytes = 8 * kSliceBytes;
constexpr int kMaxPullWarps = 18, kMaxGroups = 8;  // of a block
constexpr int kMaxStages = 16;                     // of a ring

// What a stage holds.
struct Piece {
    enum Flag : int32_t {
        kRow = 1,    // bytes of a row; otherwise the token has none
        kFirst = 2,  // sums start here
        kLast = 4,   // and end here
        kStop = 8,   // no more pieces
    };
    int64_t at;  // its bytes in out
    int32_t bytes, flags;
    float weight;
};

// A group's stages, and who waits for them: `loaded` until the piece is there, `used` until all
// adders have read it.
struct Ring {
    std::byte* data;  // [num_stages][piece_bytes]
    Piece* pieces;    // [num_stages]
    uint64_t *loaded, *used;
    int piece_bytes, num_stages;
};

// A walk around a ring.
struct Lap {
    int stage = 0;
    uint32_t parity = 0;

    __device__ void next(int num_stages) {
        if (++stage < num_stages) return;
        stage = 0;
        parity ^= 1;
    }
};

__device__ __forceinline__ bool await_barrier(const Planner& p, uint64_t* barrier,
                                              uint32_t parity) {
    if (ptx::mbarrier_try_wait_parity(barrier, parity)) return true;
    const RankView& view = p.job.view;
    return device::wait_own(view.watch, p.op, view.peers.rank, [barrier, parity] {
        return ptx::mbarrier_try_wait_parity(barrier, parity);
    });
}

// ---- the warp that feeds a ring ----

class Feeder {
public:
    __device__ Feeder(const Planner& planner, const Ring& ring) : planner_(planner), ring_(ring) {}

    // Tokens first, first + step, ... False: leave; no load is under way then.
    __device__ bool run(int64_t first, int64_t step) {
        const int64_t num_tokens = planner_.job.args.num_tokens, turn = planner_.per_turn * step;
        bool ok = true;
        Selection ahead = planner_.select(first, step);
        for (; ok && first < num_tokens; first += turn) {
            const Selection slots = ahead;
            ahead = planner_.select(first + turn, step);
            const Plan plan = planner_.plan(first, step, slots);
            ok = plan.ok;
            for (int i = 0; ok && i < planner_.per_turn; ++i) {
                const int64_t t = first + i * step;
                if (t < num_tokens) ok = feed(t, i, plan);
            }
        }
        ok = ok && put({0, 0, Piece::kStop, 0.0f}, nullptr);
        if (!ok) drain();
        return ok;
    }

private:
    // Token t, the i-th of those that were planned together.
    __device__ bool feed(int64_t t, int i, const Plan& plan) {
        const int num_topk = planner_.job.args.num_topk;
        const int64_t row_bytes = planner_.job.args.row_bytes();
        const int count = __shfl_sync(~0u, plan.count, i * num_topk);
        for (int64_t offset = 0; offset < row_bytes; offset += ring_.piece_bytes) {
            const auto bytes =
                static_cast<int32_t>(min(int64_t{ring_.piece_bytes}, row_bytes - offset));
            const int64_t at = t * row_bytes + offset;
            if (count == 0 && !put({at, bytes, Piece::kFirst | Piece::kLast, 0.0f}, nullptr)) {
                return false;
            }
            for (int place = 0; place < count; ++place) {
                const bool ours = plan.place == place && planner_.token == i;
                const int from = __ffs(__ballot_sync(~0u, ours)) - 1;
                const auto row = __shfl_sync(~0u, reinterpret_cast<uint64_t>(plan.row), from);
                const float weight = __shfl_sync(~0u, plan.weight, from);
                const int32_t flags = Piece::kRow | (place == 0 ? Piece::kFirst : 0) |
                                      (place == count - 1 ? Piece::kLast : 0);
                const auto* src = reinterpret_cast<const std::byte*>(row) + offset;
                if (!put({at, bytes, flags, weight}, src)) return false;
            }
        }
        return true;
    }

    // The next stage gets a piece once its adders are through with the last one.
    __device__ bool put(const Piece& piece, const std::byte* src) {
        if (!await_barrier(planner_, ring_.used + lap_.stage, lap_.parity ^ 1)) return false;
        if (ptx::lane_id() == 0) {
            ring_.pieces[lap_.stage] = piece;
            uint64_t* loaded = ring_.loaded + lap_.stage;
            if (src == nullptr) {
                ptx::mbarrier_arrive(loaded);
            } else {
                ptx::fence_proxy_async_shared();  // reads of the piece before it
                device::load_stage({ring_.data + lap_.stage * ring_.piece_bytes, loaded}, src,
                                   piece.bytes);
            }
        }
        __syncwarp();
        lap_.next(ring_.num_stages);
        ++num_put_;
        return true;
    }

    // What was loaded for nobody arrives all the same, before the memory of the block goes.
    __device__ void drain() {
        Lap lap;
        for (int64_t i = 0; i < num_put_; ++i) {
            while (!ptx::mbarrier_try_wait_parity(ring_.loaded + lap.stage, lap.parity) &&
                   i + ring_.num_stages >= num_put_) {
            }
            lap.next(ring_.num_stages);
        }
    }

    const Planner& planner_;
    const Ring& ring_;
    Lap lap_;
    int64_t num_put_ = 0;
};

// ---- the warps that add ----

// A slice of the result in the registers of a warp.
template <DType kDtype>
struct Sums {
    static constexpr int kUnits = kSliceBytes / (16 * 32);
    device::Unit<kDtype> unit[kUnits];
    int first;  // byte of this lane's first unit in a piece

    // f(unit, byte offset in the piece) for the units of this lane that lie in it.
    template <class F>
    __device__ __forceinline__ void each(int bytes, F f) {
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            const int at = first + 16 * 32 * u;
            if (at < bytes) f(u, at);
        }
    }

    // The first bias replaces the zero, so that a bias of -0.0 stays what it is.
    __device__ __forceinline__ void start(const CombineArgs& a, const Piece& piece) {
        for (auto& u : unit) u.clear();
        const std::byte* bias = a.bias0 != nullptr ? a.bias0 : a.bias1;
        if (bias == nullptr) return;
        each(piece.bytes, [&](int u, int at) {
            unit[u].set(*reinterpret_cast<const uint4*>(bias + piece.at + at));
            if (a.bias0 == nullptr || a.bias1 == nullptr) return;
            unit[u].add(*reinterpret_cast<const uint4*>(a.bias1 + piece.at + at));
        });
    }

    // All loads, then all sums.
    template <class Add>
    __device__ __forceinline__ void add(const std::byte* data, int bytes, Add add_to) {
        uint4 bits[kUnits];
        each(bytes, [&](int u, int at) { bits[u] = ptx::ld_shared_v4(data + at); });
        each(bytes, [&](int u, int) { add_to(unit[u], bits[u]); });
    }
    __device__ __forceinline__ void finish(std::byte* out, int bytes) {
        each(bytes,
             [&](int u, int at) { *reinterpret_cast<uint4*>(out + at) = unit[u].rounded(); });
    }
};

// Until the feeder says stop. False: leave.
template <DType kDtype>
__device__ bool add_pieces(const Planner& p, const Ring& ring, int adder) {
    const CombineArgs& a = p.job.args;
    Sums<kDtype> sums;
    sums.first = adder * kSliceBytes + 16 * static_cast<int>(ptx::lane_id());
    for (Lap lap;; lap.next(ring.num_stages)) {
        if (!await_barrier(p, ring.loaded + lap.stage, lap.parity)) return false;
        const Piece piece = ring.pieces[lap.stage];
        if (piece.flags & Piece::kStop) return true;
        const std::byte* data = ring.data + lap.stage * ring.piece_bytes;
        if (piece.flags & Piece::kFirst) sums.start(a, piece);
        if (piece.flags & Piece::kRow) {
            const float weight = piece.weight;
            if (a.weighted) {
                sums.add(data, piece.bytes,
                         [weight](auto& u, const uint4& b) { u.add(b, weight); });
            } else {
                sums.add(data, piece.bytes, [](auto& u, const uint4& b) { u.add(b); });
            }
        }
        __syncwarp();  // all have read; the fence that follows is the feeder's
        if (ptx::lane_id() == 0) ptx::mbarrier_arrive(ring.used + lap.stage);
        if (piece.flags & Piece::kLast) sums.finish(a.out + piece.at, piece.bytes);
    }
}

// ---- the end ----

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
__device__ void leave(const RankView& view, const Operation& op, int slot) {
    const int num_ranks = view.shape.num_ranks, me = view.peers.rank;
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
    if (__syncthreads_and(ok) && threadIdx.x == 0) release_slot(view, op.seq, slot);
}

// How the shared memory and the warps of a block are divided.
struct Groups {
    int count, adders, num_stages, piece_bytes;
};

template <DType kDtype>
__global__ void __launch_bounds__(kMaxPullWarps * 32, 1)
    pull_kernel(const __grid_constant__ CombineJob job, const __grid_constant__ Groups groups) {
    extern __shared__ __align__(128) std::byte shared[];
    __shared__ uint64_t loaded[kMaxGroups][kMaxStages], used[kMaxGroups][kMaxStages];
    __shared__ Piece pieces[kMaxGroups][kMaxStages];
    __shared__ bool is_last;
    const RankView& view = job.view;
    const int warp = threadIdx.x / 32, group = warp / (groups.adders + 1);
    const int adder = warp % (groups.adders + 1) - 1;  // -1: feeds
    const int64_t ring_bytes = int64_t{groups.num_stages} * groups.piece_bytes;
    const Ring ring{shared + group * ring_bytes, pieces[group],    loaded[group], used[group],
                    groups.piece_bytes,          groups.num_stages};
    auto* sources = reinterpret_cast<Source*>(shared + groups.count * ring_bytes);
    if (adder < 0 && ptx::lane_id() == 0) {
        for (int s = 0; s < groups.num_stages; ++s) {
            ptx::mbarrier_init(ring.loaded + s, 1);
            ptx::mbarrier_init(ring.used + s, groups.adders);
        }
        ptx::fence_mbarrier_init_release_cluster();
    }
    ptx::griddepcontrol_wait();
    const OpState& state = *view.state.op;
    const bool leaves = device::gave_up(view.watch) || state.code != kOk;
    const Planner planner(job, state, sources);
    for (int p = threadIdx.x; p < view.shape.num_ranks; p += blockDim.x) {
        const EntryRecord& entry = entry_of(view, planner.entries, p);
        const bool own = p == view.peers.rank;
        sources[p] = {own ? job.args.x : view.peers.arena[p] + entry.y_offset, entry.num_rows};
    }
    if (__syncthreads_or(leaves)) return;

    bool ok;
    if (adder < 0) {
        if (ptx::lane_id() == 0)
            ptx::fence_proxy_async();  // what enter acquired, before bulk loads
        __syncwarp();
        ok = Feeder(planner, ring)
                 .run(blockIdx.x + int64_t{group} * gridDim.x, int64_t{groups.count} * gridDim.x);
    } else {
        ok = add_pieces<kDtype>(planner, ring, adder);
    }
    if (!__syncthreads_and(ok)) return;
    if (threadIdx.x == 0) {
        const uint32_t last = gridDim.x - 1;
        is_last = ptx::atom_acq_rel_gpu_inc(&view.state.op->finished, last) == last;
    }
    __syncthreads();
    if (is_last) leave(view, planner.op, planner.entries);
}

using PullKernel = void (*)(CombineJob, Groups);

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

int adders_of(int piece_bytes) { return (piece_bytes + kSliceBytes - 1) / kSliceBytes; }

}  // namespace

LaunchPlan combine_plan(const CombineArgs& args, int num_ranks, int num_blocks, int smem_bytes) {
    // Rows in equal pieces; as many groups as there are warps for.
    const int64_t row_bytes = std::max<int64_t>(args.row_bytes(), 16);
    const int64_t pieces = (row_bytes + kMaxPieceBytes - 1) / kMaxPieceBytes;
    const auto piece = static_cast<int>((row_bytes / 16 + pieces - 1) / pieces * 16);
    LaunchPlan plan;
    plan.num_blocks = num_blocks;
    plan.stage_bytes = piece;
    plan.num_groups = std::min(kMaxGroups, kMaxPullWarps / (adders_of(piece) + 1));
    plan.num_warps = plan.num_groups * (adders_of(piece) + 1);
    constexpr int kTables =
        kMaxGroups * kMaxStages * (2 * 8 + static_cast<int>(sizeof(Piece))) + 1024;
    const int room = smem_bytes - kTables - static_cast<int>(sizeof(Source)) * num_ranks;
    const int aligned = (piece + 127) / 128 * 128;
    plan.num_stages = std::clamp(room / (plan.num_groups * aligned), 1, kMaxStages);
    return plan;
}

int launch_pull(const CombineJob& job, const LaunchPlan& plan, Stream stream) {
    const Groups groups{plan.num_groups, adders_of(plan.stage_bytes), plan.num_stages,
                        (plan.stage_bytes + 127) / 128 * 128};
    const int smem = groups.count * groups.num_stages * groups.piece_bytes +
                     static_cast<int>(sizeof(Source)) * job.view.shape.num_ranks;
    return launch_dependent(pull_kernel_for(job.args.dtype),
                            {plan.num_blocks, plan.num_warps * 32, smem}, true, stream, job,
                            groups);
}

int load_pull(int smem_bytes) {
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
        const auto kernel = reinterpret_cast<const void*>(pull_kernel_for(dtype));
        if (const int error = load_kernel(kernel, smem_bytes)) return error;
    }
    return 0;
}

}  // namespace ep::kernels
