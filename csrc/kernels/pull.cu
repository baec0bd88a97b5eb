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
#include "kernels/tuned.h"

namespace ep::kernels {
namespace {

constexpr int kSliceBytes = 2048;  // of a piece: what a warp holds as sums in its registers
constexpr int kMaxPieceBytes = 7 * kSliceBytes;
constexpr int kMaxPullWarps = 16, kMaxGroups = 8;  // of a block
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

    // Tokens first, first + step, ..., of which `ahead` is the first selection. False: leave; no load is
    // under way then.
    __device__ bool run(int64_t first, int64_t step, Selection ahead) {
        const int64_t num_tokens = planner_.job.args.num_tokens, turn = planner_.per_turn * step;
        bool ok = true;
#pragma unroll 1
        for (; ok && first < num_tokens; first += turn) {
            const Selection slots = ahead;
            ahead = planner_.select(first + turn, step);
            const Plan plan = planner_.plan(first, step, slots);
            ok = plan.ok;
#pragma unroll 1
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
#pragma unroll 1
        for (int64_t offset = 0; offset < row_bytes; offset += ring_.piece_bytes) {
            const auto bytes =
                static_cast<int32_t>(min(int64_t{ring_.piece_bytes}, row_bytes - offset));
            const int64_t at = t * row_bytes + offset;
            if (count == 0 && !put({at, bytes, Piece::kFirst | Piece::kLast, 0.0f}, nullptr)) {
                return false;
            }
#pragma unroll 1
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
            if (a.source_weighs()) {
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

// Who gave up may have let its user write to y while we read it. Our loads come before; it told everybody
// before its user could.
__device__ __forceinline__ bool owners_are_healthy(const RankView& view, Operation op) {
    bool ok = true;
#pragma unroll 1
    for (int p = ptx::lane_id(); p < view.shape.num_ranks; p += 32) {
        if (device::life_of(view.watch, p) != static_cast<uint64_t>(Life::kFailed)) continue;
        if (p == view.peers.rank) continue;
        device::adopt_failure(view.watch, op, {Site::kPulled, p, op.seq}, 0, 0);
        ok = false;
    }
    return ok;
}

// Once all blocks have read: we tell every owner, and wait until everybody has read ours. One warp.
__device__ __forceinline__ void leave(const RankView& view, Operation op, const Entering& in) {
    const int num_ranks = view.shape.num_ranks, me = view.peers.rank;
    bool ok = owners_are_healthy(view, op);
    if (!__all_sync(~0u, ok)) return;
#pragma unroll 1
    for (int p = ptx::lane_id(); p < num_ranks; p += 32) {
        // Pairs with the wait below at rank p. Our loads of y have come, and what came has been added up:
        // nothing is left to be ordered.
        ptx::st_relaxed_sys(at<uint64_t>(view, p, view.layout.pulled_word(in.slot, me)), op.seq);
    }
#pragma unroll 1
    for (int p = ptx::lane_id(); p < num_ranks; p += 32) {
        const auto* word = at<uint64_t>(view, me, view.layout.pulled_word(in.slot, p));
        ok = ok && device::wait_word(view.watch, op, {Site::kPulled, p, op.seq}, word);
    }
    if (__all_sync(~0u, ok)) leave_slot(view, in.seq, in.slot);
}

// ---- the beginning ----

// A warp takes over where a rank's y lies, once all we may load of it is found to lie in its arena.
struct OutputReader {
    const CombineJob& job;
    Source* sources;
    Entering& in;

    __device__ bool operator()(int p, const NoticeWords&, const Head& head) const {
        using L = NoticeLayout;
        const CombineArgs& a = job.args;
        const RankView& view = job.view;
        const int64_t y = head.word64(L::kOutput), weights = head.word64(L::kYWeights);
        const auto num_rows = static_cast<int32_t>(head.word(L::kNumRows));
        if (ptx::lane_id() != 0) return true;
        if (p == view.peers.rank) {
            sources[p] = {a.per_rank ? job.staged : a.x, num_rows, a.y_weights};
            return true;
        }
        const int64_t per_row = a.layout == RecvLayout::kCompact ? a.num_topk : 1;
        const bool fine =
            num_rows == 0 ||
            (lies_in_arena(view, p, y, num_rows, a.row_bytes()) && y % kRowAlign == 0 &&
             (weights == -1 || lies_in_arena(view, p, weights, num_rows, 4 * per_row)));
        if (!fine) atomicMin(&in.first_bad, objection(kExtentObjection, p));
        const std::byte* arena = view.peers.arena[p];
        sources[p] = {arena + y, num_rows,
                      weights == -1 ? nullptr : reinterpret_cast<const float*>(arena + weights)};
        return true;
    }
};

// The verdict, when it is bad. One warp, once all blocks have read.
__device__ __noinline__ void fail(const CombineJob& job, Entering& in, const Source* sources) {
    if (ptx::lane_id() == 0 && in.first_bad < objection(kExtentObjection, 0)) {
        explain(job.view, job.begin, in);
    } else if (ptx::lane_id() == 0) {
        const auto p = static_cast<int>(in.first_bad & 0xffff);
        clear_outcome(job.view, job.begin, in);
        set_outcome(in.outcome, kBadCount, p, job.view.peers.arena_bytes[p], sources[p].num_rows);
    }
    __syncwarp();
    fail_call(job.view, job.begin, in);
}

// How the shared memory and the warps of a block are divided.
struct Groups {
    int count, adders, num_stages, piece_bytes;
};

template <DType kDtype>
__global__ void __launch_bounds__(kMaxPullWarps * 32, 1)
    pull_kernel(const __grid_constant__ CombineJob job, const __grid_constant__ Groups groups) {
    __shared__ uint64_t loaded[kMaxGroups][kMaxStages], used[kMaxGroups][kMaxStages];
    __shared__ Piece pieces[kMaxGroups][kMaxStages];
    __shared__ Uninitialized<Entering> entering;
    Entering& in = entering.get();
    const RankView& view = job.view;
    std::byte* shared = ptx::dynamic_shared();
    const int warp = threadIdx.x / 32, group = warp / (groups.adders + 1);
    const int adder = warp % (groups.adders + 1) - 1;  // -1: feeds
    const int64_t ring_bytes = int64_t{groups.num_stages} * groups.piece_bytes;
    const Ring ring{shared + group * ring_bytes, pieces[group],    loaded[group], used[group],
                    groups.piece_bytes,          groups.num_stages};
    auto* sources = reinterpret_cast<Source*>(shared + groups.count * ring_bytes);
    if (threadIdx.x == 0) init_entering(view, job.begin, in);
    if (adder < 0 && static_cast<int>(ptx::lane_id()) < groups.num_stages) {
        ptx::mbarrier_init(ring.loaded + ptx::lane_id(), 1);
        ptx::mbarrier_init(ring.used + ptx::lane_id(), groups.adders);
        ptx::fence_mbarrier_init_release_cluster();
    }
    bool ok = !__syncthreads_or(device::gave_up(view.watch));
    Planner planner(job, in.seq, sources);
    const int64_t first = blockIdx.x + int64_t{group} * gridDim.x;
    const int64_t step = int64_t{groups.count} * gridDim.x;
    const Selection ahead = adder < 0 ? planner.select(first, step) : Selection{};
    if (blockIdx.x == 0) {
        if (ok && warp == 0) ok = acquire_slot(view, {OpKind::kCombine, in.seq}, in.slot);
        ptx::griddepcontrol_wait();  // what stage has copied, before it is announced
        ok = __syncthreads_and(ok);
        if (ok) publish_head(view, job.begin, in);
        if (ok && warp == 0 && job.args.wait_stats != nullptr) {
            time_notices(view, in, {OpKind::kCombine, in.seq}, job.args.wait_stats);
        }
    }
    ok = ok && await_notices(view, job.begin, in, OutputReader{job, sources, in});
    if (!ok) return;
    const bool good = in.first_bad == kNoObjection;
    if (good && adder < 0) {
        ok = Feeder(planner, ring).run(first, step, ahead);
    } else if (good) {
        ok = add_pieces<kDtype>(planner, ring, adder);
    }
    if (!__syncthreads_and(ok) || warp != 0) return;
    if (ptx::lane_id() == 0) count_block(view);
    if (blockIdx.x != 0 || !await_blocks(view, planner.op)) return;
    if (good) return leave(view, planner.op, in);
    fail(job, in, sources);
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
    constexpr int kTables = kMaxGroups * kMaxStages * (2 * 8 + static_cast<int>(sizeof(Piece))) +
                            static_cast<int>(sizeof(Entering)) + 1024;
    const int room = smem_bytes - kTables - static_cast<int>(sizeof(Source)) * num_ranks;
    const int aligned = (piece + 127) / 128 * 128;
    const int fits = std::clamp(room / (plan.num_groups * aligned), 1, kMaxStages);
    plan.num_stages = tuned(kPullStages, piece, fits);
    return plan;
}

int launch_pull(const CombineJob& job, const LaunchPlan& plan, bool early, Stream stream) {
    const Groups groups{plan.num_groups, adders_of(plan.stage_bytes), plan.num_stages,
                        (plan.stage_bytes + 127) / 128 * 128};
    const int smem = groups.count * groups.num_stages * groups.piece_bytes +
                     static_cast<int>(sizeof(Source)) * job.view.shape.num_ranks;
    return launch_dependent(pull_kernel_for(job.args.dtype),
                            {plan.num_blocks, plan.num_warps * 32, smem}, early, stream, job,
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
