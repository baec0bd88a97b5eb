// The rings of a block that belong to channels of other ranks: dispatch empties them, combine fills them. A
// warp looks at all of them and goes on with whichever it can.
//
// defines: RingOfBlock, RingWalk
//
// Warps share every ring, chunk by chunk or record by record, so one ring that carries everything keeps all
// of them busy. None waits for a ring while another one could go on; so whoever waits for them is never
// waited for.
#pragma once

#include <cstdint>

#include "contract/rail.h"
#include "device/ptx.cuh"
#include "device/rail.cuh"
#include "kernels/enter.cuh"
#include "kernels/rail_tables.cuh"

namespace ep::kernels {

// Ring q of a block: of node q / channels_of_block, of every num_blocks-th channel.
struct RingOfBlock {
    int node, channel;

    __device__ RingOfBlock(int q, const RailSpread& spread)
        : node(q / spread.channels_of_block),
          channel(static_cast<int>(blockIdx.x) +
                  q % spread.channels_of_block * static_cast<int>(gridDim.x)) {}
};

template <device::Rail R>
struct RingWalk {
    const R& rail;
    const RankView& view;
    const RailView& rails;
    const RailSpread& spread;
    const RailChunks& chunks;
    Operation op;
    Site site;   // of what it waits for
    int number;  // of the warps that share the rings
    int shares;  // of a chunk: its records, where each is for the next warp

    // Addresses again each time, so that they need no registers.
    __device__ RailTables tables() const { return RailTables(spread); }
    __device__ const NodeShape& nodes() const { return rails.shape.nodes; }
    __device__ int my_node() const { return nodes().node(view.peers.rank); }
    __device__ int peer_on(int node) const {
        return nodes().rank(node, nodes().local(view.peers.rank));
    }
    __device__ int index_of(const RingOfBlock& ring) const {
        return ring.node * rails.shape.num_channels + ring.channel;
    }
    __device__ int records_of(const RingOfBlock& ring) const {
        return tables().records[index_of(ring)];
    }
    // The next share of ring q that is this warp's; the chunk it is of, in this operation and ever.
    __device__ int share_of(int q) const { return next()[q]; }
    __device__ int chunk_of(int q) const { return next()[q] / shares; }
    __device__ uint64_t count_of(int q) const {
        return tables().theirs[index_of(RingOfBlock(q, spread))] +
               static_cast<uint64_t>(chunk_of(q));
    }
    __device__ bool has_next(int q) const { return next()[q] < shares_in(q); }
    // This warp is through with its share.
    __device__ void step(int q) const {
        __syncwarp();
        if (ptx::lane_id() == 0) next()[q] += spread.num_walkers;
        __syncwarp();
    }

    // Calls go_on(q), which steps, while shares of ring q are left, once word_of(ring, count) of the chunk
    // has been reached. A warp. False: leave.
    template <class WordOf, class GoOn>
    __device__ bool run(WordOf word_of, GoOn go_on) const {
        const int lane = ptx::lane_id(), rings = spread.channels_of_block * nodes().num_nodes;
#pragma unroll 1
        for (int q = lane; q < rings; q += 32) next()[q] = (number + q) % spread.num_walkers;
        __syncwarp();
        const auto wanted = [&](int q) { return word_of(RingOfBlock(q, spread), count_of(q)); };
        const auto have = [&](int q) {
            return ptx::ld_acquire_sys(reinterpret_cast<const uint64_t*>(rail.own(wanted(q).at)));
        };
        device::Patience patience;
        bool ok = true;
        while (ok) {
            bool found = false;
            int missing = -1;
#pragma unroll 1
            for (int q0 = 0; ok && q0 < rings; q0 += 32) {
                const int q = q0 + lane;
                const bool waits = q < rings && has_next(q);
                uint32_t ready = __ballot_sync(~0u, waits && have(q) >= wanted(q).amount);
                const uint32_t absent = __ballot_sync(~0u, waits) & ~ready;
                if (absent != 0) missing = q0 + __ffs(absent) - 1;
#pragma unroll 1
                for (; ok && ready != 0; ready &= ready - 1) {
                    found = true;
                    ptx::fence_proxy_async_global();  // what we acquired, before our bulk copies
                    __syncwarp();
                    ok = go_on(q0 + __ffs(ready) - 1);
                }
            }
            if (found && lane == 0) patience.found(view.watch);
            if (found) continue;
            if (!ok || missing < 0) break;
            rail.flush();
            if (lane == 0) {
                ok = patience.look_again(
                    view.watch, op,
                    {site, peer_on(RingOfBlock(missing, spread).node), wanted(missing).amount},
                    have(missing));
            }
            ok = __shfl_sync(~0u, ok, 0);
        }
        return ok;
    }

private:
    __device__ int32_t* next() const {
        return tables().next + number * spread.channels_of_block * nodes().num_nodes;
    }
    __device__ int shares_in(int q) const {
        const RingOfBlock ring(q, spread);
        if (ring.channel >= rails.shape.num_channels) return 0;
        const int records = records_of(ring);
        return shares > 1 ? records : static_cast<int>(chunks.chunks(records));
    }
};

}  // namespace ep::kernels
