// Rows that have been stored are counted at their receiver; it waits for all that was announced.
//
// defines: announce, time_rows, await_rows, note_sent, check_sent
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"
#include "kernels/notices.cuh"

namespace ep::kernels {

// `count(p)` rows that went to rank p become visible there, for every rank p that we reach; of `step`
// threads this is number `first`. All stores are complete, in the order that a barrier gives.
template <class Count>
__device__ __forceinline__ void announce(const RankView& view, int slot, int first, int step,
                                         Count count) {
#pragma unroll 1
    for (int p = view.peers.near_begin + first; p < view.peers.near_end; p += step) {
        const auto rows = static_cast<uint64_t>(count(p));
        if (rows == 0) continue;
        // pairs with the acquire in await_rows
        ptx::red_release_sys_add(
            at<uint64_t>(view, p, view.layout.arrived_word(slot, view.peers.rank)), rows);
    }
}

// Before await_rows: adds how long each source's rows take. One warp.
__device__ __noinline__ inline void time_rows(const RankView& view, Operation op, int slot,
                                              int64_t* stats) {
    const int num_ranks = view.shape.num_ranks, me = view.peers.rank;
#pragma unroll 1
    for (int first = 0; first < num_ranks; first += 32) {
        const int lane = ptx::lane_id(), src = min(first + lane, num_ranks - 1);
        const uint64_t want = view.state.expected[slot * num_ranks + src] +
                              NoticeWords(view, slot, src).get(NoticeLayout::kRows + me);
        device::time_waits(view.watch, op, {Site::kRows, src, want},
                           at_own<uint64_t>(view, view.layout.arrived_word(slot, src)), nullptr,
                           device::Word::kNumber, first + lane < num_ranks ? stats + src : nullptr);
    }
}

// All that was announced to us has arrived. stats: see time_rows, or null. One warp; false: leave.
__device__ __forceinline__ bool await_rows(const RankView& view, Operation op, int slot,
                                           int64_t* stats) {
    const int num_ranks = view.shape.num_ranks, me = view.peers.rank;
    if (stats != nullptr) time_rows(view, op, slot, stats);
    bool ok = true;
#pragma unroll 1
    for (int src = ptx::lane_id(); src < num_ranks; src += 32) {
        uint64_t* expected = view.state.expected + slot * num_ranks + src;
        const uint64_t want =
            *expected + NoticeWords(view, slot, src).get(NoticeLayout::kRows + me);
        // pairs with the release in announce
        ok = ok && device::wait_word(view.watch, op, {Site::kRows, src, want},
                                     at_own<uint64_t>(view, view.layout.arrived_word(slot, src)));
        *expected = want;
    }
    return __all_sync(~0u, ok);
}

// A handle tells rows and counts. Should they not be the same, a receiver would wait for what never
// comes: what all blocks have found is compared at the end.
__device__ inline void note_sent(const DispatchJob& job, const int32_t* pushed, int first,
                                 int step) {
#pragma unroll 1
    for (int p = first; job.args.cached && p < job.view.shape.num_ranks; p += step) {
        atomicAdd(&job.view.state.sent[p], pushed[p]);
    }
}

// One warp, once all blocks have noted. False: leave.
__device__ inline bool check_sent(const DispatchJob& job, Operation op) {
    bool ok = true;
#pragma unroll 1
    for (int p = ptx::lane_id(); job.args.cached && p < job.view.shape.num_ranks; p += 32) {
        const int64_t want = job.args.rank_counts[p];
        const int64_t have = atomicExch(&job.view.state.sent[p], 0);
        if (want == have) continue;
        ok = false;
        device::give_up(job.view.watch, op, kMiscount, {Site::kNone, p, uint64_t(want)},
                        uint64_t(have), 0);
    }
    return __all_sync(~0u, ok);
}

}  // namespace ep::kernels
