// Records on their way to other nodes: a warp takes a place in a chunk of the ring, waits for its credit,
// stages a head and a row there. Whoever completes a chunk hands it over.
//
// defines: Parcel, Crossing, Pending, RailOut
//
// Places are given in whatever order warps come, since a record says by itself where its row goes. So no
// warp waits for another one, only for credits; and it asks for a place when it has the row. That a row is
// complete takes a trip to the peer and back: a warp counts its record when the next one is under way, but
// before it waits for a credit, which may depend on the chunk of that record.
#pragma once

#include <cstdint>

#include "contract/calls.h"
#include "contract/rail.h"
#include "device/copy.cuh"
#include "device/ptx.cuh"
#include "device/rail.cuh"
#include "kernels/describe.cuh"
#include "kernels/rail_tables.cuh"
#include "kernels/visits.cuh"

namespace ep::kernels {

// How records of one operation lie in chunks.
struct Parcel {
    RailHeadLayout head;
    RailChunks chunks;
};

// The node that a lane brings its token to; one lane for each node that the token visits.
struct Crossing {
    int node = -1;  // -1 = none
    int turn = 0;   // of the token among those of its channel that visit the node
    int given = 0;  // its place among the records of the ring
};

// The record of a lane that is staged, but not counted yet.
struct Pending {
    int node = -1;  // -1 = none
    int given = 0;
};

// Lanes whose places are free, 0 = leave; and whether what was pending has been counted.
struct Credits {
    uint32_t free;
    bool settled;
};

template <device::Rail R>
struct RailOut {
    const R& rail;
    const RankView& view;
    const RailView& rails;
    const Parcel& parcel;
    const RailSpread& spread;
    Visits visits;
    Operation op;
    int channel;

    // Addresses again each time, so that they need no registers.
    __device__ RailTables tables() const { return RailTables(spread); }
    __device__ const NodeShape& nodes() const { return rails.shape.nodes; }
    __device__ int my_node() const { return nodes().node(view.peers.rank); }
    __device__ int peer_on(int node) const {
        return nodes().rank(node, nodes().local(view.peers.rank));
    }
    __device__ bool is_far(int rank) const {
        return rank >= 0 && (rank < view.peers.near_begin || rank >= view.peers.near_end);
    }

    // Of token t, whose slots go to ranks `dst`. A warp, ahead of time.
    __device__ Crossing crossing(int t, int dst) const {
        Crossing x;
        const int node = is_far(dst) ? nodes().node(dst) : -1;
        const uint32_t same = __match_any_sync(~0u, node);
        if (node < 0 || (same & ptx::lanemask_lt()) != 0) return x;
        x.node = node;
        x.turn = visits.turn(t, node);
        return x;
    }

    // A lane that brings a record gets a place for it, which it has to fill.
    __device__ void take_place(Crossing& x) const {
        x.given = atomicAdd(&tables().given[x.node], 1);
    }

    __device__ uint64_t chunk_of(int node, int given, int piece) const {
        const RailChunks& c = parcel.chunks;
        const int j = c.pieces == 1 ? given / c.records : given * c.pieces + piece;
        return tables().ours[node] + static_cast<uint64_t>(j);
    }
    // A chunk in the ring of the node, and in ours.
    __device__ int64_t there(int node, uint64_t count) const {
        return rails.layout.recv_chunk(node, my_node(), channel, count);
    }
    __device__ int64_t here(int node, uint64_t count) const {
        return rails.layout.send_chunk(my_node(), node, channel, count);
    }
    // Where a lane's record, or a piece of it, is staged.
    __device__ std::byte* place_of(const Crossing& x, int piece) const {
        const RailChunks& c = parcel.chunks;
        const int64_t at = c.pieces == 1 ? x.given % c.records * c.record_bytes() : 0;
        const uint64_t count = chunk_of(x.node, x.given, piece);
        return at + device::rail_stage(rail, tables().mapped[x.node], there(x.node, count),
                                       here(x.node, count));
    }

    // Calls stage(lanes) for lanes whose places are free, until all of `wanted` have had their turn; `late`
    // is counted before it waits. A warp. False: leave.
    template <class Stage>
    __device__ bool when_free(uint32_t wanted, const Crossing& x, int piece, Pending& late,
                              Stage stage) const {
        const bool mine = (wanted >> ptx::lane_id() & 1) != 0;
        const uint64_t count = mine ? chunk_of(x.node, x.given, piece) : 0;
        // Most chunks are known to be free: a warp that stored to them has found out.
        const uint32_t have = ptx::ld_acquire_cta(known(mine ? x.node : 0, count));
        const auto missing = static_cast<uint32_t>(credits_until(rails.shape, count)) - have;
        uint32_t free = __ballot_sync(~0u, mine && static_cast<int32_t>(missing) <= 0);
        while (true) {
            if (free != 0) stage(free);
            wanted &= ~free;
            if (wanted == 0) return true;
            const Credits found = await_credits(wanted, x.node, count, late);
            if (found.settled) late.node = -1;
            free = found.free;
            if (free == 0) return false;
        }
    }

    // The credits of a chunk's place in our ring, lower half, as somebody of the block has acquired them.
    __device__ uint32_t* known(int node, uint64_t count) const {
        return tables().credits + node * rails.shape.ring_chunks() +
               place_in_ring(rails.shape, count);
    }

    // The head of token t for lane `leader`'s node. A warp; `scales`: words, wherever they are.
    __device__ void write_head(const Crossing& x, int leader, int piece, int t, const Choice& c,
                               const Route& r, int num_topk, const std::byte* scales) const {
        const RailHeadLayout& head = parcel.head;
        const int lane = ptx::lane_id(), node = __shfl_sync(~0u, x.node, leader);
        const auto address = __shfl_sync(
            ~0u, lane == leader ? reinterpret_cast<uint64_t>(place_of(x, piece)) : 0, leader);
        const int turn = __shfl_sync(~0u, x.turn, leader);
        auto* at = reinterpret_cast<std::byte*>(address);
        const auto ints = [at](const Region& region) {
            return reinterpret_cast<int32_t*>(at + region.offset);
        };
        if (lane < num_topk) {
            const bool there = is_far(c.dst) && nodes().node(c.dst) == node;
            ints(head.experts)[lane] = there ? expert_at(nodes().local(c.dst), c.local) : -1;
            ints(head.rows)[lane] = there ? r.row : -1;
            if (head.records.bytes > 0) ints(head.records)[lane] = there ? r.record : -1;
            if (head.weights.bytes > 0) ints(head.weights)[lane] = __float_as_int(c.weight);
        }
        if (lane == 0) {
            ints(head.token)[0] = t;
            ints(head.token)[1] = turn;
        }
        const auto words = static_cast<int>(head.scales.bytes / 4);
        for (int w = lane; w < words; w += 32) {
            reinterpret_cast<uint32_t*>(at + head.scales.offset)[w] =
                reinterpret_cast<const uint32_t*>(scales)[w];
        }
    }

    // What lanes have staged is complete: chunks that are full now are handed over. A warp; every lane has
    // drained its stores.
    __device__ void hand_over(const Pending& staged, int piece) const {
        const RailChunks& chunks = parcel.chunks;
        const RailShape& s = rails.shape;
        __syncwarp();
        uint64_t count = 0;
        int records = 0;
        bool full = false;
        if (staged.node >= 0) {
            count = chunk_of(staged.node, staged.given, piece);
            records = chunks.in_chunk(static_cast<int64_t>(count - tables().ours[staged.node]),
                                      tables().total[staged.node]);
            uint32_t* filled =
                tables().filled + staged.node * s.ring_chunks() + place_in_ring(s, count);
            full = ptx::atom_acq_rel_cta_add(filled, 1) + 1 == static_cast<uint32_t>(records);
            if (full) *filled = 0;  // nobody comes here before the chunk has been credited
        }
        const uint32_t left = __ballot_sync(~0u, full);
        if (left != 0) hand_over_chunks(left, staged.node, count, records, piece);
    }

    // The same once all that this warp has stored is complete.
    __device__ void settle(const Pending& late) const {
        device::drain_stores();
        hand_over(late, 0);
    }

private:
    // Chunks of lanes `full`, each with so many records. A warp.
    __device__ void hand_over_chunks(uint32_t full, int to, uint64_t count, int records,
                                     int piece) const {
        const RailChunks& chunks = parcel.chunks;
#pragma unroll 1
        for (; full != 0; full &= full - 1) {
            const int leader = __ffs(full) - 1;
            const int node = __shfl_sync(~0u, to, leader);
            const uint64_t n = __shfl_sync(~0u, count, leader);
            const int64_t in_chunk = __shfl_sync(~0u, records, leader);
            const int64_t bytes = chunks.pieces == 1 ? in_chunk * chunks.record_bytes()
                                                     : chunks.head_bytes + chunks.piece_end(piece) -
                                                           chunks.piece_begin(piece);
            device::rail_hand_over(rail, tables().mapped[node], peer_on(node), there(node, n),
                                   here(node, n), bytes,
                                   {rails.layout.tail_word(my_node(), channel, n), 1});
        }
    }

    // Until some place of `wanted` lanes is free, in chunk `count` of the ring to `node`; before it waits,
    // `late` is counted. A warp.
    __device__ Credits await_credits(uint32_t wanted, int node, uint64_t count,
                                     const Pending& late) const {
        const int lane = static_cast<int>(ptx::lane_id());
        const bool mine = (wanted >> lane & 1) != 0;
        const uint64_t until = credits_until(rails.shape, count);
        const auto* word = reinterpret_cast<const uint64_t*>(
            rail.own(rails.layout.head_word(mine ? node : 0, channel, count)));
        device::Patience patience;
        bool waits = false;
        while (true) {
            const uint64_t have = mine ? ptx::ld_acquire_sys(word) : 0;
            const uint32_t free = __ballot_sync(~0u, mine && have >= until);
            if (free != 0) {
                if (lane == 0) patience.found(view.watch);
                ptx::fence_proxy_async_global();  // what was read there, before what we store
                if ((free >> lane & 1) != 0) {
                    ptx::st_release_cta(known(node, count), static_cast<uint32_t>(have));
                }
                __syncwarp();
                return {free, waits};
            }
            if (!waits && __any_sync(~0u, late.node >= 0)) settle(late);
            waits = true;
            rail.flush();
            const int blamed = __ffs(wanted) - 1;
            bool again = true;
            const int peer = peer_on(__shfl_sync(~0u, node, blamed));
            const uint64_t want = __shfl_sync(~0u, until, blamed);
            const uint64_t seen = __shfl_sync(~0u, have, blamed);
            if (lane == 0) {
                again = patience.look_again(view.watch, op, {Site::kRailCredit, peer, want}, seen);
            }
            if (!__shfl_sync(~0u, again, 0)) return {0, waits};
        }
    }
};

}  // namespace ep::kernels
