// Records on their way to other nodes: a warp takes a place in a chunk of the ring, waits for its credit,
// stages a head and a row there. Whoever completes a chunk hands it over.
//
// defines: Parcel, Crossing, RailOut
//
// Places are given in whatever order warps come, since a record says by itself where its row goes. So no
// warp waits for another one, only for credits; and it asks for a place when it has the row.
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

template <device::Rail R>
struct RailOut {
    const R& rail;
    const RankView& view;
    const RailView& rails;
    const Parcel& parcel;
    RailTables tables;
    Visits visits;
    Operation op;
    int channel;

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
    __device__ void take_place(Crossing& x) const { x.given = atomicAdd(&tables.given[x.node], 1); }

    __device__ uint64_t chunk_of(const Crossing& x, int piece) const {
        const RailChunks& c = parcel.chunks;
        const int j = c.pieces == 1 ? x.given / c.records : x.given * c.pieces + piece;
        return tables.ours[x.node] + static_cast<uint64_t>(j);
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
        const uint64_t count = chunk_of(x, piece);
        return at +
               device::rail_stage(rail, peer_on(x.node), there(x.node, count), here(x.node, count));
    }

    // Calls stage(lanes) for lanes whose places are free, until all of `wanted` have had their turn.
    // A warp. False: leave.
    template <class Stage>
    __device__ bool when_free(uint32_t wanted, const Crossing& x, int piece, Stage stage) const {
        const uint32_t lane = ptx::lane_id();
        const bool mine = (wanted >> lane & 1) != 0;
        const uint64_t count = mine ? chunk_of(x, piece) : 0;
        const uint64_t until = credits_until(rails.shape, count);
        const auto* word = reinterpret_cast<const uint64_t*>(
            rail.own(rails.layout.head_word(mine ? x.node : 0, channel, count)));
        device::Patience patience;
        while (wanted != 0) {
            const uint64_t have = (wanted >> lane & 1) != 0 ? ptx::ld_acquire_sys(word) : 0;
            const uint32_t free = __ballot_sync(~0u, (wanted >> lane & 1) != 0 && have >= until);
            if (free != 0) {
                ptx::fence_proxy_async();  // what was read there, before what we store
                __syncwarp();
                stage(free);
                wanted &= ~free;
                continue;
            }
            rail.flush();
            const int blamed = __ffs(wanted) - 1;
            bool again = true;
            const int peer = peer_on(__shfl_sync(~0u, x.node, blamed));
            const uint64_t want = __shfl_sync(~0u, until, blamed);
            const uint64_t seen = __shfl_sync(~0u, have, blamed);
            if (lane == 0) {
                again = patience.look_again(view.watch, op, {Site::kRailCredit, peer, want}, seen);
            }
            if (!__shfl_sync(~0u, again, 0)) return false;
        }
        if (lane == 0) patience.found(view.watch);
        return true;
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

    // What lanes of `bring` have staged is complete: chunks that are full now are handed over. A warp; every
    // lane has drained its stores.
    __device__ void hand_over(uint32_t bring, const Crossing& x, int piece) const {
        const RailChunks& chunks = parcel.chunks;
        const RailShape& s = rails.shape;
        __syncwarp();
        uint64_t count = 0;
        int records = 0;
        bool full = false;
        if ((bring >> ptx::lane_id() & 1) != 0) {
            count = chunk_of(x, piece);
            records = chunks.in_chunk(static_cast<int64_t>(count - tables.ours[x.node]),
                                      tables.total[x.node]);
            uint32_t* filled = tables.filled + x.node * s.ring_chunks() + place_in_ring(s, count);
            full = ptx::atom_acq_rel_cta_add(filled, 1) + 1 == static_cast<uint32_t>(records);
            if (full) *filled = 0;  // nobody comes here before the chunk has been credited
        }
        uint32_t left = __ballot_sync(~0u, full);
        if (left != 0) device::fence_stage();
#pragma unroll 1
        for (; left != 0; left &= left - 1) {
            const int leader = __ffs(left) - 1;
            const int node = __shfl_sync(~0u, x.node, leader);
            const uint64_t n = __shfl_sync(~0u, count, leader);
            const int64_t in_chunk = __shfl_sync(~0u, records, leader);
            const int64_t bytes = chunks.pieces == 1 ? in_chunk * chunks.record_bytes()
                                                     : chunks.head_bytes + chunks.piece_end(piece) -
                                                           chunks.piece_begin(piece);
            device::rail_hand_over(rail, peer_on(node), there(node, n), here(node, n), bytes,
                                   {rails.layout.tail_word(my_node(), channel, n), 1});
        }
    }
};

}  // namespace ep::kernels
