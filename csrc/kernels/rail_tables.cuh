// Shared memory of a block on rails: what its channel brings to every node, and what every other ring
// carries. One walk, for the host that sizes it and the kernel that uses it.
//
// defines: RailSpread, RailTables, num_incoming, hear_rings
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "contract/rail.h"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "device/rail.cuh"
#include "kernels/enter.cuh"

namespace ep::kernels {

// Byte offsets of RailTables in the dynamic shared memory of a block.
struct RailSpread {
    int32_t mapped, theirs, ours, records, base, total, given, filled, credits, read, stored, next,
        end;
    int32_t num_walkers;        // that share the rings of others' channels in a block
    int32_t channels_of_block;  // of which it has these

    // From `begin` on. `num_blocks` divide the channels.
    constexpr RailSpread(const RailShape& s, int begin, int num_blocks, int walkers)
        : num_walkers(walkers), channels_of_block((s.num_channels + num_blocks - 1) / num_blocks) {
        int at = begin;
        const auto take = [&at](int64_t bytes) {
            const int offset = at;
            at += static_cast<int>((bytes + 15) / 16 * 16);
            return offset;
        };
        const int64_t nodes = s.nodes.num_nodes, rings = nodes * s.num_channels;
        mapped = take(8 * nodes);
        theirs = take(8 * rings);
        ours = take(8 * nodes);
        records = take(4 * rings);
        base = take(4 * rings);
        total = take(4 * nodes);
        given = take(4 * nodes);
        filled = take(4 * nodes * s.ring_chunks());
        credits = take(4 * nodes * s.ring_chunks());
        read = take(4 * nodes * channels_of_block * s.ring_chunks());
        stored = take(4 * nodes * s.nodes.ranks_per_node);
        next = take(4 * nodes * channels_of_block * walkers);
        end = (at + 127) / 128 * 128;
    }
};
static_assert(std::is_trivially_copyable_v<RailSpread>);

// Rings of other ranks' channels are theirs: dispatch empties them, combine fills them. Those of our own
// channel are ours: the other way round.
struct RailTables {
    std::byte**
        mapped;        // [nodes] segment of our peer on each, null where our stores do not reach it
    uint64_t* theirs;  // [nodes][channels] chunks that went through each before this operation
    uint64_t* ours;    // [nodes] the same
    int32_t* records;  // [nodes][channels] theirs, in this operation
    int32_t* base;     // [nodes][channels] records of the rings before
    int32_t* total;    // [nodes] records of our channel
    int32_t* given;    // [nodes] of these, how many have a place in a chunk
    uint32_t* filled;  // [nodes][places] of a chunk of ours, how much is there, or has been read
    uint32_t*
        credits;      // [nodes][places] of a ring of ours, lower half, as somebody has acquired it
    uint32_t* read;   // [rings of the block][places] of a chunk of theirs, how much has been read
    int32_t* stored;  // [nodes][ranks_per_node] rows that came from each node and were forwarded
    int32_t* next;    // [walkers][rings of the block] the next chunk of each

    __device__ __forceinline__ explicit RailTables(const RailSpread& l)
        : mapped(at<std::byte*>(l.mapped)),
          theirs(at<uint64_t>(l.theirs)),
          ours(at<uint64_t>(l.ours)),
          records(at<int32_t>(l.records)),
          base(at<int32_t>(l.base)),
          total(at<int32_t>(l.total)),
          given(at<int32_t>(l.given)),
          filled(at<uint32_t>(l.filled)),
          credits(at<uint32_t>(l.credits)),
          read(at<uint32_t>(l.read)),
          stored(at<int32_t>(l.stored)),
          next(at<int32_t>(l.next)) {}

private:
    template <class T>
    __device__ static T* at(int offset) {
        return reinterpret_cast<T*>(ptx::dynamic_shared() + offset);
    }
};

// Records of all rings that are theirs.
__device__ __forceinline__ int num_incoming(const RailView& rails, const RailTables& tables) {
    const int last = rails.shape.nodes.num_nodes * rails.shape.num_channels - 1;
    return tables.base[last] + tables.records[last];
}

// Exclusive prefix sums of records. One warp.
__device__ __forceinline__ void sum_records(const RailTables& tables, int rings) {
    const int lane = ptx::lane_id();
    int before = 0;
#pragma unroll 1
    for (int i0 = 0; i0 < rings; i0 += 32) {
        const int count = i0 + lane < rings ? tables.records[i0 + lane] : 0;
        int sum = count;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += other;
        }
        if (i0 + lane < rings) tables.base[i0 + lane] = before + sum - count;
        before += __shfl_sync(~0u, sum, 31);
    }
}

// A block hears what all rings carry, once the call is known to be good; `theirs`, `ours`: what they have
// carried, [nodes][channels]. All threads. False: leave.
template <device::Rail R>
__device__ __forceinline__ bool hear_rings(const R& rail, const RankView& view,
                                           const RailView& rails, const RailSpread& spread,
                                           Operation op, const uint64_t* theirs,
                                           const uint64_t* ours) {
    const RailTables tables(spread);
    const RailShape& s = rails.shape;
    const int rings = s.nodes.num_nodes * s.num_channels, channel = blockIdx.x;
    const int my_node = s.nodes.node(view.peers.rank);
    bool ok = true;
#pragma unroll 1
    for (int i = threadIdx.x; i < rings; i += blockDim.x) {
        const int node = i / s.num_channels;
        uint64_t records = 0;
        if (node != my_node) {
            const uint64_t* word = rails.state.incoming + i;
            if (!device::is_of(ptx::ld_relaxed_gpu(word), op.seq)) {
                ok = ok && device::wait_packed_own(view.watch, op, word);
            }
            records = device::bits_of(ptx::ld_relaxed_gpu(word));
        }
        if (ok && records > static_cast<uint64_t>(view.shape.max_tokens)) {
            const int peer = s.nodes.rank(node, s.nodes.local(view.peers.rank));
            device::give_up(view.watch, op, kBadCount,
                            {Site::kRailNotice, peer, uint64_t(view.shape.max_tokens)}, records, 0);
            ok = false;
        }
        tables.records[i] = static_cast<int32_t>(records);
        tables.theirs[i] = theirs[i];
    }
#pragma unroll 1
    for (int n = threadIdx.x; n < s.nodes.num_nodes; n += blockDim.x) {
        const uint64_t* word = rails.state.brings + int64_t{channel} * s.nodes.num_nodes + n;
        tables.total[n] = static_cast<int32_t>(device::bits_of(ptx::ld_relaxed_gpu(word)));
        tables.ours[n] = ours[n * s.num_channels + channel];
        tables.given[n] = 0;
        tables.mapped[n] = rail.peer_ptr(0, s.nodes.rank(n, s.nodes.local(view.peers.rank)));
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < s.nodes.num_nodes * s.ring_chunks(); i += blockDim.x) {
        const uint64_t before = ours[i / s.ring_chunks() * s.num_channels + channel];
        tables.filled[i] = 0;
        tables.credits[i] = static_cast<uint32_t>(credits_until(s, before)) - 1;  // not enough
    }
    const int places = s.nodes.num_nodes * spread.channels_of_block * s.ring_chunks();
#pragma unroll 1
    for (int i = threadIdx.x; i < places; i += blockDim.x) tables.read[i] = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < s.nodes.num_nodes * s.nodes.ranks_per_node; i += blockDim.x) {
        tables.stored[i] = 0;
    }
    ok = __syncthreads_and(ok);
    if (ok && threadIdx.x < 32) sum_records(tables, rings);
    __syncthreads();
    return ok;
}

}  // namespace ep::kernels
