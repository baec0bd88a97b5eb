// Which nodes the tokens of a channel visit: how many records it brings to each, and a token's turn among
// them. A block counts its own channel, by votes of warps.
//
// defines: Visits, count_visits
//
// Dispatch and combine count alike, from the ids of the call or of its handle, so nothing of this has to be
// kept between them.
#pragma once

#include <cstdint>

#include "contract/rail.h"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "kernels/count.cuh"

namespace ep::kernels {

// Of a channel's tokens, 32 to a word: who visits a node, and how many visited it before.
struct Visits {
    const RailView& rails;
    Span tokens;
    int channel;

    __device__ int num_nodes() const { return rails.shape.nodes.num_nodes; }
    // Address again each time, so that it needs no registers.
    __device__ uint64_t* word(int group, int node) const {
        const int before = channel * ((rails.tokens_per_block + 31) / 32);
        return rails.state.visits + (int64_t{before + group} * num_nodes() + node);
    }

    // Token t, which visits the node, is the turn-th of the channel that does.
    __device__ int turn(int t, int node) const {
        const int at = t - tokens.begin;
        const uint64_t votes = *word(at >> 5, node);
        const uint32_t earlier = (1u << (at & 31)) - 1;
        return static_cast<int>(votes >> 32) + __popc(static_cast<uint32_t>(votes) & earlier);
    }
    __device__ int groups() const { return (tokens.end - tokens.begin + 31) / 32; }
};

// `owner(t, k)`: the rank that slot k of token t goes to, or -1. Tells the other blocks. All threads of the
// block; a barrier must follow before anybody asks for a turn.
template <class Owner>
__device__ __forceinline__ void count_visits(const RailView& rails, const Visits& visits,
                                             int channel, int num_topk, uint64_t seq, Owner owner) {
    const NodeShape& nodes = rails.shape.nodes;
    const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32, lane = ptx::lane_id();
#pragma unroll 1
    for (int g = warp; g < visits.groups(); g += num_warps) {
        const int t = visits.tokens.begin + 32 * g + lane;
#pragma unroll 1
        for (int base = 0; base < nodes.num_nodes; base += 32) {
            uint32_t there = 0;
#pragma unroll 4
            for (int k = 0; t < visits.tokens.end && k < num_topk; ++k) {
                const int rank = owner(t, k);
                const int node = rank < 0 ? -1 : nodes.node(rank) - base;
                if (node >= 0 && node < 32) there |= 1u << node;
            }
            const int here = min(32, nodes.num_nodes - base);
            uint32_t mine = 0;
#pragma unroll 1
            for (int n = 0; n < here; ++n) {
                const uint32_t all = __ballot_sync(~0u, (there >> n & 1) != 0);
                if (lane == n) mine = all;
            }
            if (lane < here) *visits.word(g, base + lane) = mine;
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int n = threadIdx.x; n < nodes.num_nodes; n += blockDim.x) {
        uint64_t before = 0;
#pragma unroll 4
        for (int g = 0; g < visits.groups(); ++g) {
            uint64_t& word = *visits.word(g, n);
            const auto votes = static_cast<uint32_t>(word);
            word = before << 32 | votes;
            before += __popc(votes);
        }
        ptx::st_relaxed_gpu(rails.state.brings + int64_t{channel} * nodes.num_nodes + n,
                            device::pack(static_cast<uint32_t>(before), seq));
    }
}

}  // namespace ep::kernels
