// Chunks that came from other nodes: a warp spreads the records of one over the ranks of its node. Their
// rows are final, so it only looks whether they lie where they may.
//
// defines: Forwarder, announce_forwarded
//
// Which chunks, and when: rail_walk.cuh.
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
            [this](const RingOfBlock& ring, uint64_t count) {
                return device::RailWord{rails().layout.tail_word(ring.node, ring.channel, count),
                                        chunks_until(rails().shape, count)};
            },
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

    __device__ void load(const std::byte* src, int64_t bytes) {
        loading = true;
        if (ptx::lane_id() == 0) device::load_stage(stage, src, static_cast<int>(bytes));
    }

    // A chunk of ring q, which is there.
    __device__ bool take(int q) {
        const RailChunks& chunks = parcel.chunks;
        const RailLayout& layout = rails().layout;
        const RingOfBlock ring(q, walk.spread);
        const int j = walk.next_of(q), lane = ptx::lane_id();
        const int my_node = walk.my_node(), peer = walk.peer_on(ring.node);
        const uint64_t count = walk.count_of(q);
        if (lane == 0) {
            walk.rail.acquired({layout.tail_word(ring.node, ring.channel, count),
                                chunks_until(rails().shape, count)});
        }
        __syncwarp();
        const std::byte* chunk =
            walk.rail.own(layout.recv_chunk(my_node, ring.node, ring.channel, count));
        const int piece = j % chunks.pieces;
        const int records = chunks.in_chunk(j, walk.records_of(ring));
        const int64_t begin = chunks.piece_begin(piece), end = chunks.piece_end(piece);
        const auto row = [&](int i) {
            return chunk + i * chunks.record_bytes() + chunks.head_bytes;
        };
        const auto part = [&](int64_t at) { return min(int64_t{stage_bytes}, end - at); };
        const Describer out{job, tables, peer};
        load(row(0), part(begin));
        Head ahead = read_head(chunk);
#pragma unroll 1
        for (int i = 0; i < records; ++i) {
            Head head = ahead;
            const std::byte* record = chunk + i * chunks.record_bytes();
            if (!is_right(ring, head)) return false;
            if (i + 1 < records) ahead = read_head(record + chunks.record_bytes());
#pragma unroll 1
            for (int64_t at = begin; at < end; at += stage_bytes) {
                if (!device::await_stage(view().watch, walk.op, stage, view().peers.rank)) {
                    return false;
                }
                loading = false;
                if (head.r.first) {
                    device::store_stage(out.row_of(head.c, head.r) + at, stage.data,
                                        static_cast<int>(part(at)));
                }
                if (at == 0) spread_head(ring, out, head, record);
                const bool more = at + stage_bytes < end;
                if (!more && i + 1 == records) break;
                device::drain_reads();
                __syncwarp();
                load(more ? row(i) + at + stage_bytes - begin : row(i + 1),
                     part(more ? at + stage_bytes : begin));
            }
        }
        __syncwarp();  // all have read: the place is free, whatever our stores are doing
        if (lane == 0) {
            walk.rail.signal_add(peer, {layout.head_word(my_node, ring.channel, count), 1});
        }
        device::drain_reads();
        return true;
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
            atomicAdd(&walk.tables.stored[at], 1);
        }
        const int64_t index = int64_t{walk.tables.base[walk.index_of(ring)]} + head.turn;
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
