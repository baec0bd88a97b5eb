// Chunks that came from other nodes: warps spread the records of each over the ranks of their node. Their
// rows are final, so they only look whether these lie where they may.
//
// defines: Forwarder, announce_forwarded
//
// Which records, and when: rail_walk.cuh. Warps take those of a chunk side by side, so that its place is free
// again soon; whoever has read the last one says so.
#pragma once

#include <cstdint>

#include "contract/calls.h"
#include "contract/rail.h"
#include "device/copy.cuh"
#include "device/ptx.cuh"
#include "device/rail.cuh"
#include "kernels/describe.cuh"
#include "kernels/rail_out.cuh"
#include "kernels/rail_tables.cuh"
#include "kernels/rail_walk.cuh"

namespace ep::kernels {

template <device::Rail R>
struct Forwarder {
    const DispatchJob& job;
    const Parcel& parcel;
    Tables tables;
    RingWalk<R> walk;
    device::Stage stage;
    int stage_bytes;
    bool loading = false;  // the stage is being filled

    // False: leave; nothing of ours is under way then.
    __device__ bool run() {
        const bool ok = walk.run(
            [this](const RingOfBlock& ring, uint64_t count) { return word_of(ring, count); },
            [this](int q) { return take(q); });
        device::drain_stores();
        if (loading) device::drain_stage(stage);
        return ok;
    }

private:
    // What a lane reads of its slot in the head of a record.
    struct Head {
        int token, turn;
        Choice c;
        Route r;
    };

    __device__ const RankView& view() const { return job.view; }
    __device__ const RailView& rails() const { return walk.rails; }
    __device__ const NodeShape& nodes() const { return walk.nodes(); }

    // Where a share of a ring lies: a record, or a piece of one, which is all of its chunk.
    struct Share {
        const std::byte* record;
        int64_t begin, end;  // of the row
        uint64_t count;      // of the chunk
        int in_chunk;
    };
    __device__ Share share_of(int q, const RingOfBlock& ring) const {
        const RailChunks& chunks = parcel.chunks;
        const int j = walk.chunk_of(q), piece = chunks.pieces == 1 ? 0 : j % chunks.pieces;
        Share s;
        s.count = walk.count_of(q);
        s.record = walk.rail.own(rails().layout.recv_chunk(walk.my_node(), ring.node, ring.channel,
                                                           s.count)) +
                   (walk.share_of(q) - j * walk.shares) * chunks.record_bytes();
        s.begin = chunks.piece_begin(piece), s.end = chunks.piece_end(piece);
        s.in_chunk = chunks.in_chunk(j, walk.records_of(ring));
        return s;
    }
    __device__ device::RailWord word_of(const RingOfBlock& ring, uint64_t count) const {
        return {rails().layout.tail_word(ring.node, ring.channel, count),
                chunks_until(rails().shape, count)};
    }

    __device__ int part(const Share& share, int64_t at) const {
        return static_cast<int>(min(int64_t{stage_bytes}, share.end - at));
    }
    // The piece of a row at `at`.
    __device__ void load(const Share& share, int64_t at) {
        loading = true;
        if (ptx::lane_id() != 0) return;
        device::load_stage(stage, share.record + parcel.chunks.head_bytes + at - share.begin,
                           part(share, at));
    }

    // All lanes have read it. The last one of a chunk frees its place, whatever our stores are doing.
    __device__ void leave(int q, const RingOfBlock& ring, const Share& share) const {
        __syncwarp();
        if (ptx::lane_id() != 0) return;
        const RailShape& s = rails().shape;
        uint32_t* read = walk.tables().read + q * s.ring_chunks() + place_in_ring(s, share.count);
        if (ptx::atom_acq_rel_cta_add(read, 1) + 1 != static_cast<uint32_t>(share.in_chunk)) return;
        *read = 0;  // nobody comes here before the next chunk is there
        walk.rail.signal_add(
            walk.peer_on(ring.node),
            {rails().layout.head_word(walk.my_node(), ring.channel, share.count), 1});
    }

    // A share of ring q, which is there, and those after it which are there by the time it is stored.
    __device__ bool take(int q) {
        constexpr int kInARow = 8;  // then other rings have their turn
        const RingOfBlock ring(q, walk.spread);
        const Describer out{job, tables, walk.peer_on(ring.node)};
        Share share = share_of(q, ring);
        if (ptx::lane_id() == 0) walk.rail.acquired(word_of(ring, share.count));
        __syncwarp();
        load(share, share.begin);
        Head ahead = read_head(share.record);
#pragma unroll 1
        for (int i = 1;; ++i) {
            const Head head = ahead;
            const Share now = share;
            walk.step(q);
            // While the row comes: whether the next one may follow.
            bool goes_on = i < kInARow && walk.has_next(q);
            if (goes_on) {
                share = share_of(q, ring);
                goes_on = share.count == now.count ||
                          device::rail_ready(walk.rail, word_of(ring, share.count));
            }
            if (!forward(ring, out, head, now)) return false;
            device::drain_reads();
            __syncwarp();
            if (goes_on) {
                ptx::fence_proxy_async_global();  // what we acquired, before the load
                load(share, share.begin);
                ahead = read_head(share.record);
            }
            leave(q, ring, now);
            if (!goes_on) return true;
        }
    }

    // A share whose first bytes are on their way into the stage. False: leave.
    __device__ bool forward(const RingOfBlock& ring, const Describer& out, Head head,
                            const Share& share) {
        if (!is_right(ring, head)) return false;
#pragma unroll 1
        for (int64_t at = share.begin;; at += stage_bytes) {
            if (!device::await_stage(view().watch, walk.op, stage, view().peers.rank)) return false;
            loading = false;
            if (head.r.first) {
                device::store_stage(out.row_of(head.c, head.r) + at, stage.data, part(share, at));
            }
            if (at == 0) spread_head(ring, out, head, share.record);
            if (at + stage_bytes >= share.end) return true;
            device::drain_reads();
            __syncwarp();
            load(share, at + stage_bytes);
        }
    }

    __device__ Head read_head(const std::byte* record) const {
        const RailHeadLayout& layout = parcel.head;
        const int lane = ptx::lane_id();
        const auto ints = [record](const Region& region) {
            return reinterpret_cast<const int32_t*>(record + region.offset);
        };
        Head h{ints(layout.token)[0], ints(layout.token)[1], {}, {}};
        if (lane >= job.args.num_topk) return h;
        const int32_t expert = ints(layout.experts)[lane];
        h.r.row = ints(layout.rows)[lane];
        h.r.record = layout.records.bytes > 0 ? ints(layout.records)[lane] : h.r.row;
        if (layout.weights.bytes > 0) h.c.weight = __int_as_float(ints(layout.weights)[lane]);
        if (expert < 0) return h;
        h.c.dst = nodes().rank(walk.my_node(), rank_of_expert(expert));
        h.c.local = id_of_expert(expert);
        return h;
    }

    // Numbers of a peer become addresses only where they may. Completes the head.
    __device__ bool is_right(const RingOfBlock& ring, Head& head) const {
        const Choice& c = head.c;
        const bool is_rank = c.dst >= view().peers.near_begin && c.dst < view().peers.near_end;
        bool bad = c.dst >= 0 && !is_rank;
        if (is_rank) {
            const Target& target = tables.targets[c.dst];
            const int32_t* first = view().state.first + c.dst;
            // Of compact a row is a token's; there max_rows may bound our own rows only.
            const bool compact = job.args.layout == RecvLayout::kCompact;
            const int32_t max_rows = compact ? target.max_recv : target.max_rows;
            bad = head.r.row < 0 || head.r.row >= max_rows || head.r.record < 0 ||
                  head.r.record >= target.max_recv || c.local >= first[1] - first[0];
        }
        bad = bad || head.token < 0 || head.token >= view().shape.max_tokens || head.turn < 0 ||
              head.turn >= walk.records_of(ring);
        if (bad) {
            device::give_up(view().watch, walk.op, kBadCount,
                            {Site::kRailChunk, walk.peer_on(ring.node), 0},
                            static_cast<uint64_t>(head.r.row), 0);
        }
        const uint32_t same = __match_any_sync(~0u, c.dst);
        head.r.first = c.dst >= 0 && (same & ptx::lanemask_lt()) == 0;
        return !__any_sync(~0u, bad);
    }

    // What goes beside the row, once a record.
    __device__ void spread_head(const RingOfBlock& ring, const Describer& out, const Head& head,
                                const std::byte* record) const {
        const int lane = ptx::lane_id(), num_topk = job.args.num_topk;
        out.describe(head.token, head.c, head.r);
        if (job.args.scale_bytes > 0) {
            out.copy_scales(head.c, head.r, record + parcel.head.scales.offset);
        }
        if (head.r.first) {
            const int at = ring.node * nodes().ranks_per_node + nodes().local(head.c.dst);
            atomicAdd(&walk.tables().stored[at], 1);
        }
        const int64_t index = int64_t{walk.tables().base[walk.index_of(ring)]} + head.turn;
        if (rails().log == nullptr || lane >= num_topk || index >= rails().num_logged) return;
        const RailLog log{num_topk, rails().log_has_weights};
        int32_t* kept = rails().log + index * log.words();
        kept[log.expert(lane)] =
            head.c.dst >= 0 ? expert_at(nodes().local(head.c.dst), head.c.local) : -1;
        kept[log.row(lane)] = head.r.row;
        if (log.with_weights) kept[log.weight(lane)] = __float_as_int(head.c.weight);
    }
};

// Rows that forwarders of this block have stored count as their sources'. All of them, once all are stored;
// of `step` threads this is number `first`.
__device__ __forceinline__ void announce_forwarded(const RankView& view, const RailView& rails,
                                                   const RailTables& tables, int slot, int first,
                                                   int step) {
    const NodeShape& nodes = rails.shape.nodes;
#pragma unroll 1
    for (int i = first; i < nodes.num_nodes * nodes.ranks_per_node; i += step) {
        const auto rows = static_cast<uint64_t>(tables.stored[i]);
        if (rows == 0) continue;
        const int node = i / nodes.ranks_per_node, dst = i % nodes.ranks_per_node;
        const int src = nodes.rank(node, nodes.local(view.peers.rank));
        // pairs with the acquire in await_rows
        ptx::red_release_sys_add(at<uint64_t>(view, nodes.rank(nodes.node(view.peers.rank), dst),
                                              view.layout.arrived_word(slot, src)),
                                 rows);
    }
}

}  // namespace ep::kernels
