// Notices across nodes: ours goes to the ranks of our rail, theirs come to us, and we tell our node.
//
// defines: open_outbox, exchange_notices, Traffic, leave_rails
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
#include "kernels/rail_tables.cuh"

namespace ep::kernels {

// One thread, before the notice is published: it is written there, too.
template <device::Rail R>
__device__ __forceinline__ void open_outbox(const R& rail, const RailView& rails, Entering& in) {
    in.outbox = reinterpret_cast<uint64_t*>(rail.own(rails.layout.outbox_at(in.seq)));
}

// How many records each channel brings to each node, behind our notice. All threads. False: leave.
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
    return __syncthreads_and(ok);
}

// A part of a notice that has come, to every rank of our node; and how much comes to us. One warp.
template <device::Rail R>
__device__ __forceinline__ void relay(const R& rail, const RankView& view, const RailView& rails,
                                      const Entering& in, int node, int part, int parts) {
    const RailShape& s = rails.shape;
    const RailNoticeLayout notice(view.shape, s.nodes.num_nodes, s.num_channels);
    const auto* words =
        reinterpret_cast<const uint64_t*>(rail.own(rails.layout.inbox_at(in.seq, node)));
    const int src = s.nodes.rank(node, s.nodes.local(view.peers.rank));
    const int64_t offset = view.layout.notice(in.slot, src);
#pragma unroll 1
    for (int i = 32 * part + ptx::lane_id(); i < notice.records; i += 32 * parts) {
        const uint64_t word = words[i];
#pragma unroll 1
        for (int p = view.peers.near_begin; p < view.peers.near_end; ++p) {
            ptx::st_relaxed_sys(at<uint64_t>(view, p, offset) + i, word);
        }
    }
#pragma unroll 1
    for (int c = ptx::lane_id(); part == 0 && c < s.num_channels; c += 32) {
        ptx::st_relaxed_gpu(rails.state.incoming + node * s.num_channels + c,
                            words[notice.record_word(s.nodes.node(view.peers.rank), c)]);
    }
}

// Once the notice is in the outbox. `counted`: with what channels bring, else with nothing. All threads of
// the block that publishes; also of one that refuses the call, as its node hears of its rail through it
// alone. `stats`: adds how long each rank takes to enter, or null. False: leave.
template <device::Rail R>
__device__ __forceinline__ bool exchange_notices(const R& rail, const RankView& view,
                                                 const RailView& rails, const Entering& in,
                                                 Operation op, bool counted, int64_t* stats) {
    const RailShape& s = rails.shape;
    const RailLayout& layout = rails.layout;
    // The last warp only looks, while the others bring what it sees.
    const int peers = s.num_peers(), warp = threadIdx.x / 32, num_warps = blockDim.x / 32 - 1;
    const bool looks = warp == num_warps;
    const int me = view.peers.rank, my_node = s.nodes.node(me);
    // Each rank begins with another node.
    const auto node_of = [&](int peer) { return (my_node + 1 + peer) % s.nodes.num_nodes; };
    const auto rank_of = [&](int node) { return s.nodes.rank(node, s.nodes.local(me)); };
    bool ok = write_records(view, rails, in, op, counted);
    if (!ok || peers == 0) return ok;
    device::fence_stage();
#pragma unroll 1
    for (int peer = looks ? peers : warp; peer < peers; peer += num_warps) {
        rail.put_signal(rank_of(node_of(peer)), layout.inbox_at(in.seq, my_node),
                        layout.outbox_at(in.seq), s.notice_bytes,
                        {layout.entered_word(in.seq, my_node), 1});
    }
    // Warps share a notice when there are more of them.
    const int parts = max(num_warps / peers, 1);
#pragma unroll 1
    for (int i = looks ? peers * parts : warp; ok && i < peers * parts; i += num_warps) {
        const int node = node_of(i % peers);
        ok = device::rail_wait(rail, view.watch, op, Site::kRailNotice, rank_of(node),
                               {layout.entered_word(in.seq, node), notices_until(in.seq)});
        if (ok) relay(rail, view, rails, in, node, i / peers, parts);
    }
    rail.flush();
    if (looks && stats != nullptr) time_notices(view, in, op, stats);
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
