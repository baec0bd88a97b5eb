// Expert outputs of all ranks: where they lie, and until when they are read.
//
// defines: OutputReader, fail_outputs, await_pulled
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/contribution.cuh"
#include "kernels/enter.cuh"
#include "kernels/leave.cuh"
#include "kernels/notices.cuh"

namespace ep::kernels {

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
__device__ __noinline__ inline void fail_outputs(const CombineJob& job, Entering& in,
                                                 const Source* sources) {
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

// Who gave up may have let its user write to y while we read it. Our loads come before; it told everybody
// before its user could.
__device__ __forceinline__ bool owners_are_healthy(const RankView& view, Operation op) {
    bool ok = true;
#pragma unroll 1
    for (int p = view.peers.near_begin + ptx::lane_id(); p < view.peers.near_end; p += 32) {
        if (device::life_of(view.watch, p) != static_cast<uint64_t>(Life::kFailed)) continue;
        if (p == view.peers.rank) continue;
        device::adopt_failure(view.watch, op, {Site::kPulled, p, op.seq}, 0, 0);
        ok = false;
    }
    return ok;
}

// Once all blocks have read: we tell every owner, and wait until everybody has read ours. One warp. False:
// leave.
__device__ __forceinline__ bool await_pulled(const RankView& view, Operation op, int slot) {
    const int first = view.peers.near_begin + ptx::lane_id(), me = view.peers.rank;
    bool ok = owners_are_healthy(view, op);
    if (!__all_sync(~0u, ok)) return false;
#pragma unroll 1
    for (int p = first; p < view.peers.near_end; p += 32) {
        // Pairs with the wait below at rank p. Our loads of y have come, and what came has been added up:
        // nothing is left to be ordered.
        ptx::st_relaxed_sys(at<uint64_t>(view, p, view.layout.pulled_word(slot, me)), op.seq);
    }
#pragma unroll 1
    for (int p = first; p < view.peers.near_end; p += 32) {
        const auto* word = at_own<uint64_t>(view, view.layout.pulled_word(slot, p));
        ok = ok && device::wait_word(view.watch, op, {Site::kPulled, p, op.seq}, word);
    }
    return __all_sync(~0u, ok);
}

}  // namespace ep::kernels
