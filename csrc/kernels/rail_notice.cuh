// Notices across nodes: ours goes to the ranks of our rail, theirs come to us, and we tell our node. With
// direct mode ours goes to every rank of the other nodes, and slots are released there, too.
//
// defines: missed_word, open_outbox, acquire_far, await_puts, leave_far, put_notices, hear_notice, exchange_notices,
// Traffic, leave_rails
//
// `far`: Far, where an operation goes on without ranks that are masked, else NoFar.
//
// A notice has the counts of its source for every rank, so once a node has heard all of them its ranks
// place all rows by themselves, as on one node. Each crosses once per rail: 2 (nodes - 1) messages a rank.
#pragma once

#include <cstdint>

#include "contract/rail.h"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "device/rail.cuh"
#include "kernels/enter.cuh"
#include "kernels/notices.cuh"
#include "kernels/rail_tables.cuh"

namespace ep::kernels {

// What masked ranks are not told they are owed, should they be unmasked.
__device__ __forceinline__ uint64_t* missed_word(const RailView& rails, Missed what, int slot,
                                                 int p) {
    const DirectShape& d = rails.shape.direct;
    return rails.state.missed + (static_cast<int>(what) * d.num_slots + slot) * d.num_ranks + p;
}

// One thread, before the notice is published: it is written there, too.
template <device::Rail R>
__device__ __forceinline__ void open_outbox(const R& rail, const RailView& rails, Entering& in) {
    in.outbox = reinterpret_cast<uint64_t*>(rail.own(rails.layout.outbox_at(in.seq)));
}

// Direct mode: a rank of another node has left what it did in our memory, and in our slot, num_slots
// operations ago. One warp. False: leave.
template <device::Rail R, class F>
__device__ __noinline__ bool acquire_far(const R& rail, const RankView& view, const RailView& rails,
                                         const F& far, Operation op, const Entering& in) {
    const RailShape& s = rails.shape;
    const uint64_t want = releases_until(s, op.seq);
    bool ok = true;
#pragma unroll 1
    for (int i = ptx::lane_id(); s.is_direct() && ok && i < s.num_correspondents(); i += 32) {
        const int p = s.correspondent(view.peers.rank, i);
        if (without(in, p)) continue;
        const device::RailWord word{rails.layout.released_word(in.slot, p), want};
        // pairs with the signal in leave_far
        ok = device::wait_word(watch_of(view, far), op, {Site::kSlot, p, want},
                               reinterpret_cast<const uint64_t*>(rail.own(word.at)));
        if (ok && want > 0) rail.acquired(word);
        ok = ok || device::goes_on(view.watch);
    }
    return __all_sync(~0u, ok);
}

// Direct mode: all that rank p, of another node, had put into this slot of ours when it told of operation
// `op` is there. One thread. False: leave.
template <device::Rail R, class F>
__device__ __forceinline__ bool await_puts(const R& rail, const RankView& view,
                                           const RailView& rails, const F& far, Operation op,
                                           int slot, int p) {
    const uint64_t* told = rails.state.coming + p;
    if (!device::is_of(ptx::ld_relaxed_gpu(told), op.seq) &&
        !device::wait_packed_own(view.watch, op, told)) {
        return false;
    }
    const uint32_t low = device::bits_of(ptx::ld_relaxed_gpu(told));
    const int64_t at = rails.layout.came_word(slot, p);
    const auto* came = reinterpret_cast<const uint64_t*>(rail.own(at));
    const uint64_t have = ptx::ld_acquire_sys(came);  // pairs with the signals of put_signal
    const auto missing = static_cast<int32_t>(low - static_cast<uint32_t>(have));
    const uint64_t want = have + static_cast<uint64_t>(int64_t{missing});
    if (missing > 0 &&
        !device::wait_word(watch_of(view, far), op, {Site::kRailChunk, p, want}, came)) {
        return false;
    }
    if (want > 0) rail.acquired({at, want});
    return true;
}

// Direct mode: the slot is left to other nodes once all is there that they have put, also of a call that
// failed, whose records nobody looks at: so who has all releases may put to the same places, from the same
// places. One warp; nothing of this slot is looked at after it. False: leave.
template <device::Rail R, class F>
__device__ __noinline__ bool leave_far(const R& rail, const RankView& view, const RailView& rails,
                                       const F& far, Operation op, const Entering& in) {
    const RailShape& s = rails.shape;
    const int me = view.peers.rank, slot = in.slot;
    bool ok = true;
    if (!s.is_direct() || in.first_bad >> 16 == kEpochObjection) return true;  // that is the end
    uint64_t masked = in.masked | device::masked_ranks(view.watch);
    const auto is_masked = [&](int p) { return masked != 0 && device::has_rank(masked, p); };
#pragma unroll 1
    for (int i = ptx::lane_id(); ok && i < s.num_correspondents(); i += 32) {
        const int p = s.correspondent(me, i);
        if (is_masked(p)) continue;
        ok = await_puts(rail, view, rails, far, op, slot, p) || device::goes_on(view.watch);
    }
    if (!__all_sync(~0u, ok)) return false;
    masked |= device::masked_ranks(view.watch);
#pragma unroll 1
    for (int i = ptx::lane_id(); i < s.num_correspondents(); i += 32) {
        const int p = s.correspondent(me, i);
        if (is_masked(p)) {
            ++*missed_word(rails, Missed::kReleases, slot, p);
            continue;
        }
        // pairs with the wait in acquire_far
        rail.signal_add(p, {rails.layout.released_word(slot, me), 1});
    }
    return true;
}

// How many records each channel brings to each node, and what we have ever put to each rank, behind our
// notice. All threads. False: leave.
__device__ __forceinline__ bool write_records(const RankView& view, const RailView& rails,
                                              const Entering& in, Operation op, bool counted) {
    const RailShape& s = rails.shape;
    const RailNoticeLayout notice(view.shape, s.nodes.num_nodes, s.num_channels);
    bool ok = true;
#pragma unroll 1
    for (int i = threadIdx.x; i < s.nodes.num_nodes * s.num_channels; i += blockDim.x) {
        const int node = i % s.nodes.num_nodes, channel = i / s.nodes.num_nodes;
        const uint64_t* word = rails.state.brings + i;
        uint32_t records = 0;
        if (counted && channel < rails.num_blocks) {
            if (!device::is_of(ptx::ld_relaxed_gpu(word), op.seq)) {
                ok = ok && device::wait_packed_own(view.watch, op, word);
            }
            records = device::bits_of(ptx::ld_relaxed_gpu(word));
        }
        in.outbox[notice.record_word(node, channel)] = device::pack(records, op.seq);
    }
#pragma unroll 1
    for (int p = threadIdx.x; p < s.direct.num_ranks; p += blockDim.x) {
        const uint64_t ever = rails.state.puts[in.slot * s.direct.num_ranks + p];
        in.outbox[notice.puts_word(p)] = device::pack(static_cast<uint32_t>(ever), op.seq);
    }
    return __syncthreads_and(ok);
}

// The notice in our outbox to ranks of other nodes: each `apart`-th of them, from `first` on. One warp.
template <device::Rail R>
__device__ __forceinline__ void put_notices(const R& rail, const RankView& view,
                                            const RailView& rails, const Entering& in, int first,
                                            int apart) {
    const RailShape& s = rails.shape;
    const RailLayout& layout = rails.layout;
    const uint64_t seq = in.seq;
    const int me = view.peers.rank;
    device::fence_stage();
#pragma unroll 1
    for (int i = first; i < s.num_correspondents(); i += apart) {
        const int p = s.correspondent(me, i);
        if (without(in, p)) {
            if (ptx::lane_id() == 0) ++*missed_word(rails, Missed::kNotices, in.slot, p);
            continue;
        }
        rail.put_signal(p, layout.inbox_at(seq, s.sender(me)), layout.outbox_at(seq),
                        s.notice_bytes, {layout.entered_word(seq, s.sender(me)), 1});
    }
}

// A part of the notice of rank `src` once it has come, to every rank of our node, or with direct mode, where
// each hears for itself, to ourselves; and how much comes to us. One warp. False: leave.
template <device::Rail R, class F>
__device__ __forceinline__ bool hear_notice(const R& rail, const RankView& view,
                                            const RailView& rails, const F& far, Operation op,
                                            int slot, int src, int part = 0, int parts = 1) {
    const RailShape& s = rails.shape;
    const int me = view.peers.rank, sender = s.sender(src), node = s.nodes.node(src);
    if (!device::rail_wait(rail, watch_of(view, far), op, Site::kRailNotice, src,
                           {rails.layout.entered_word(op.seq, sender), notices_until(s, op.seq)})) {
        return false;
    }
    const RailNoticeLayout notice(view.shape, s.nodes.num_nodes, s.num_channels);
    const auto* words =
        reinterpret_cast<const uint64_t*>(rail.own(rails.layout.inbox_at(op.seq, sender)));
    const int64_t offset = view.layout.notice(slot, src);
    const int begin = s.is_direct() ? me : view.peers.near_begin;
    const int end = s.is_direct() ? me + 1 : view.peers.near_end;
#pragma unroll 1
    for (int i = 32 * part + ptx::lane_id(); i < notice.records; i += 32 * parts) {
        const uint64_t word = words[i];
#pragma unroll 1
        for (int p = begin; p < end; ++p) {
            ptx::st_relaxed_sys(at<uint64_t>(view, p, offset) + i, word);
        }
    }
    if (part != 0) return true;
    const bool is_on_rail = s.nodes.local(src) == s.nodes.local(me);
#pragma unroll 1
    for (int c = ptx::lane_id(); is_on_rail && c < s.num_channels; c += 32) {
        ptx::st_relaxed_gpu(rails.state.incoming + node * s.num_channels + c,
                            words[notice.record_word(s.nodes.node(me), c)]);
    }
    if (s.is_direct() && ptx::lane_id() == 0) {
        ptx::st_relaxed_gpu(rails.state.coming + src, words[notice.puts_word(me)]);
    }
    return true;
}

// Once the notice is in the outbox. `counted`: with what channels bring, else with nothing. All threads of
// the block that publishes; also of one that refuses the call, as its node hears of its rail through it
// alone. `stats`: adds how long each rank takes to enter, or null. False: leave.
template <device::Rail R, class F>
__device__ __forceinline__ bool exchange_notices(const R& rail, const RankView& view,
                                                 const RailView& rails, const F& far,
                                                 const Entering& in, Operation op, bool counted,
                                                 int64_t* stats) {
    // The last warp only looks, while the others bring what it sees.
    const int peers = rails.shape.num_correspondents();
    const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32 - 1;
    const bool looks = warp == num_warps;
    bool ok = write_records(view, rails, in, op, counted);
    if (!ok || peers == 0) return ok;
    put_notices(rail, view, rails, in, looks ? peers : warp, num_warps);
    // Warps share a notice when there are more of them.
    const int parts = max(num_warps / peers, 1);
#pragma unroll 1
    for (int i = looks ? peers * parts : warp; ok && i < peers * parts; i += num_warps) {
        const int src = rails.shape.correspondent(view.peers.rank, i % peers);
        if (without(in, src)) continue;
        ok = hear_notice(rail, view, rails, far, op, in.slot, src, i / peers, parts) ||
             __all_sync(~0u, device::goes_on(view.watch));
    }
    rail.flush();
    if (looks && stats != nullptr) time_notices(view, far, in, op, stats);
    return __syncthreads_and(ok);
}

// What rings have carried counts from now on. One warp of the block that ends the operation, once all
// blocks are through.
struct Traffic {
    RailCounter ours, theirs;  // what went through rings of our channels, and of others'
    uint64_t *ours_before, *theirs_before;  // [nodes][channels] chunks
};
__device__ __noinline__ inline void leave_rails(const RailView& rails, const RailSpread& spread,
                                                const RailChunks& chunks, int my_node,
                                                int64_t num_tokens, const Traffic& traffic) {
    const RailTables tables(spread);
    const RailShape& s = rails.shape;
    int ours = 0, theirs = 0, home = 0;
#pragma unroll 1
    for (int i = ptx::lane_id(); i < s.nodes.num_nodes * s.num_channels; i += 32) {
        const int node = i / s.num_channels, channel = i % s.num_channels;
        const uint64_t* word = rails.state.brings + int64_t{channel} * s.nodes.num_nodes + node;
        const bool used = channel < rails.num_blocks;
        const auto brought =
            static_cast<int>(used ? device::bits_of(ptx::ld_relaxed_gpu(word)) : 0);
        if (node == my_node) home += brought;
        if (node == my_node) continue;
        traffic.ours_before[i] += static_cast<uint64_t>(chunks.chunks(brought));
        traffic.theirs_before[i] += static_cast<uint64_t>(chunks.chunks(tables.records[i]));
        ours += brought;
        theirs += tables.records[i];
    }
    ours = __reduce_add_sync(~0u, ours);
    theirs = __reduce_add_sync(~0u, theirs);
    home = __reduce_add_sync(~0u, home);
    if (ptx::lane_id() != 0) return;
    const auto add = [&](RailCounter counter, int64_t n) {
        rails.state.ever[static_cast<int>(counter)] += static_cast<uint64_t>(n);
    };
    add(traffic.ours, ours);
    add(traffic.theirs, theirs);
    if (traffic.ours != RailCounter::kRecordsOut) return;
    add(RailCounter::kTokens, num_tokens);
    add(RailCounter::kHomeVisits, home);
}

}  // namespace ep::kernels
