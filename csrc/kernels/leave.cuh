// How an operation ends: its blocks are through, the slot is left, the host hears of it; or it has failed.
//
// defines: count_block, await_blocks, release_slot, advance, leave_slot, report, fail_call
#pragma once

#include <cstddef>
#include <cstdint>

#include "contract/gpu.h"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"

namespace ep::kernels {

using device::ends_communicator;

// A block has read all it will of the notices; a barrier of the block came before. One thread.
__device__ __forceinline__ void count_block(const RankView& view) {
    ptx::red_release_gpu_add(view.state.finished, 1);  // pairs with await_blocks
}

// Until all blocks have, each `times` over. One warp of the block that ends the operation. False: leave.
__device__ __forceinline__ bool await_blocks(const RankView& view, Operation op, int times = 1) {
    const uint32_t* finished = view.state.finished;
    const auto all = [=] { return ptx::ld_acquire_gpu(finished) == gridDim.x * times; };
    if (!all() && !device::wait_own(view.watch, op, view.peers.rank, all)) return false;
    __syncwarp();
    if (ptx::lane_id() == 0) *view.state.finished = 0;
    return true;
}

// All blocks have read all there is in this slot. One warp. Nobody needs more than the value: a rank that
// hears our next notice knows as much.
__device__ __forceinline__ void release_slot(const RankView& view, std::byte* const* control,
                                             uint64_t seq, int slot) {
#pragma unroll 1
    for (int p = view.peers.near_begin + ptx::lane_id(); p < view.peers.near_end; p += 32) {
        // pairs with the acquire in acquire_slot; what we have read there has come long ago
        std::byte* word = control[p] + view.layout.released_word(slot, view.peers.rank);
        ptx::st_relaxed_sys(reinterpret_cast<uint64_t*>(word), seq);
    }
    // for sentences only
    if (ptx::lane_id() == 0) at_own<ControlHeader>(view, 0)->finished_seq = seq;
}

// The next operation has the next number and slot. One thread, once all blocks have read theirs.
__device__ __forceinline__ void advance(const RankView& view, uint64_t seq, int slot) {
    view.state.seq[0] = seq;
    view.state.seq[1] = slot + 1 == view.shape.num_slots ? 0 : slot + 1;
}

// The operation is over here. One warp.
__device__ __forceinline__ void leave_slot(const RankView& view, uint64_t seq, int slot) {
    release_slot(view, view.peers.control, seq, slot);
    if (ptx::lane_id() == 0) advance(view, seq, slot);
}

// One thread. Tells our host what came of the call.
__device__ inline void report(const RankView& view, const Begin& begin, uint64_t seq,
                              const Outcome* failure, const OpState& state) {
    const bool later = begin.call == 0 && begin.report_later && failure != nullptr;
    if (begin.call == 0 && !later) return;
    HostPage& page = *view.watch.page;
    HostPage::Report& out = later ? page.deferred : page.sync[begin.call % kMaxReports];
    if (later && ptx::ld_acquire_sys(&page.deferred_seen) != out.call)
        return;  // the first one stays
    out.seq = seq;
    out.outcome.incident.code = kOk;
    if (failure != nullptr) out.outcome = *failure;
    out.num_recv = state.num_recv;
    out.num_rows = state.num_rows;
    out.index_rows = state.index_rows;
    out.num_logged = state.num_logged;
    ptx::st_release_sys(&out.call, later ? seq : begin.call);  // the host acquires it
}

// The call fails here as it does everywhere; the next one works, unless the ranks are out of step. One
// warp, once all blocks have read.
__device__ __noinline__ inline void fail_call(const RankView& view, const Begin& begin,
                                              Entering& in, bool advances = true) {
    const Incident& incident = in.outcome.incident;
    if (!ends_communicator(incident.code)) {
        // Lines that nobody will load (contract/stage.h), before anybody's next ones to the same places.
        __syncwarp();
        ptx::fence_acq_rel_sys();
        release_slot(view, view.peers.control, in.seq, in.slot);
    }
    if (ptx::lane_id() != 0) return;
    if (!ends_communicator(incident.code) && advances) advance(view, in.seq, in.slot);
    if (ends_communicator(incident.code)) {
        device::give_up(view.watch, {kind_of(begin.head.what), in.seq}, incident.code,
                        {incident.site, incident.peer, uint64_t(incident.want)},
                        uint64_t(incident.have), 0);
        return;
    }
    report(view, begin, in.seq, &in.outcome, {});
}

}  // namespace ep::kernels
