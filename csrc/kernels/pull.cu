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
#include "device/wait.cuh"
#include "kernels/contribution.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.cuh"
#include "kernels/leave.cuh"
#include "kernels/notices.cuh"
#include "kernels/outputs.cuh"
#include "kernels/stage_ring.cuh"
#include "kernels/tuned.h"

namespace ep::kernels {
namespace {

// ---- the warp that feeds a ring ----

class Feeder {
public:
    __device__ Feeder(const Planner& planner, const StageRing& ring)
        : planner_(planner),
          piece_bytes_(ring.piece_bytes),
          ring_(planner.job.view, planner.seq, ring) {}

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
        ok = ok && ring_.stop();
        if (!ok) ring_.drain();
        return ok;
    }

private:
    // Token t, the i-th of those that were planned together.
    __device__ bool feed(int64_t t, int i, const Plan& plan) {
        const int num_topk = planner_.job.args.num_topk;
        const int64_t row_bytes = planner_.job.args.row_bytes();
        const int count = __shfl_sync(~0u, plan.count, i * num_topk);
#pragma unroll 1
        for (int64_t offset = 0; offset < row_bytes; offset += piece_bytes_) {
            const auto bytes = static_cast<int32_t>(min(int64_t{piece_bytes_}, row_bytes - offset));
            const int64_t at = t * row_bytes + offset;
            if (count == 0 &&
                !ring_.put({at, bytes, Piece::kFirst | Piece::kLast, 0.0f}, nullptr)) {
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
                if (!ring_.put({at, bytes, flags, weight}, src)) return false;
            }
        }
        return true;
    }

    const Planner& planner_;
    const int piece_bytes_;
    RingFeeder ring_;
};

// ---- the warps that add ----

// Until the feeder says stop. False: leave.
template <DType kDtype>
__device__ bool add_pieces(const Planner& p, const StageRing& ring, int adder) {
    const CombineArgs& a = p.job.args;
    Sums<kDtype> sums;
    sums.first = adder * kSliceBytes + 16 * static_cast<int>(ptx::lane_id());
    for (Lap lap;; lap.next(ring.num_stages)) {
        if (!await_barrier(p.job.view, p.op(), ring.loaded + lap.stage, lap.parity)) return false;
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
        // We have read: pairs with await_barrier in RingFeeder::put, whose fence is for the next load.
        ptx::mbarrier_arrive(ring.used + lap.stage);
        if (piece.flags & Piece::kLast) sums.finish(a.out + piece.at, piece.bytes);
    }
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
    const StageRing ring{shared + group * ring_bytes, pieces[group],    loaded[group], used[group],
                         groups.piece_bytes,          groups.num_stages};
    auto* sources = reinterpret_cast<Source*>(shared + groups.count * ring_bytes);
    init_told(job.begin, in);
    if (threadIdx.x == 0) init_entering(view, job.begin, in);
    if (adder < 0) init_stages(ring, groups.adders);
    bool ok = !__syncthreads_or(device::gave_up(view.watch));
    Planner planner(job, in.seq, sources);
    const int64_t first = blockIdx.x + int64_t{group} * gridDim.x;
    const int64_t step = int64_t{groups.count} * gridDim.x;
    const Selection ahead = adder < 0 ? planner.select(first, step) : Selection{};
    if (blockIdx.x == 0) {
        if (ok && warp == 0) ok = acquire_slot(view, NoFar{}, {OpKind::kCombine, in.seq}, in.slot);
        ptx::griddepcontrol_wait();  // what stage has copied, before it is announced
        ok = __syncthreads_and(ok);
        if (ok) publish_head(view, view.peers.control, job.begin, in);
        if (ok && warp == 0 && job.args.wait_stats != nullptr) {
            time_notices(view, NoFar{}, in, {OpKind::kCombine, in.seq}, job.args.wait_stats);
        }
    }
    ok = ok && await_notices(view, NoFar{}, job.begin, in, OutputReader{job, sources, in});
    if (!ok) return;
    const bool good = in.first_bad == kNoObjection;
    if (good && adder < 0) {
        ok = Feeder(planner, ring).run(first, step, ahead);
    } else if (good) {
        ok = add_pieces<kDtype>(planner, ring, adder);
    }
    if (!__syncthreads_and(ok) || warp != 0) return;
    if (ptx::lane_id() == 0) count_block(view);
    if (blockIdx.x != 0 || !await_blocks(view, planner.op())) return;
    if (!good) return fail_outputs(job, in, sources);
    if (await_pulled(view, planner.op(), in.slot)) leave_slot(view, in.seq, in.slot);
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
