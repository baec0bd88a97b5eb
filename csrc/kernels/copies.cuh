// What is different when rows travel by copy engine: the host is told where they go, and the kernel that
// moves them lays them together, rank after rank.
//
// defines: tell_places, pack_targets
//
// A source's compact rows at a destination lie together, in the order of its tokens. So packed rows need
// one copy for each destination and piece, straight to their final place.
#pragma once

#include <cstdint>

#include "contract/pack.h"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "kernels/enter.cuh"
#include "kernels/tables.cuh"

namespace ep::kernels {

// How many rows the tokens before `t` have at a rank, of a handle; nobody counted them. Rows follow the
// tokens, so the next token that goes there knows. One warp.
__device__ inline int rows_before(const DispatchJob& job, int64_t t, int dst, int first_row,
                                  int num_rows) {
    const DispatchArgs& a = job.args;
    const int lane = ptx::lane_id();
    for (int64_t t0 = t; t0 < a.num_tokens; t0 += 32) {
        int row = -1;
        for (int k = 0; t0 + lane < a.num_tokens && row < 0 && k < a.num_topk; ++k) {
            const int64_t at = (t0 + lane) * a.num_topk + k, id = a.topk_idx[at];
            const bool there = id >= 0 && id < job.view.shape.num_experts &&
                               __ldg(job.view.state.owner + id) == dst;
            if (there) row = max(0, a.send_row[at] - first_row);
        }
        const uint32_t found = __ballot_sync(~0u, row >= 0);
        if (found != 0) return min(__shfl_sync(~0u, row, __ffs(found) - 1), num_rows);
    }
    return num_rows;
}

// Where our rows go at each rank, and how many of each piece. One warp of the block that publishes, before
// it adds its own; the report that follows releases it.
__device__ inline void tell_places(const PackJob& pack, const Spread& spread) {
    const Tables tables(spread);
    const DispatchJob& job = pack.dispatch;
    const RankView& view = job.view;
    const int num_ranks = view.shape.num_ranks, columns = columns_of(view.shape);
    for (int p = ptx::lane_id(); p < num_ranks; p += 32) {
        Place& place = pack.places[p];
        place.x = tables.targets[p].x() - view.peers.arena[p];
        place.row = tables.base[p];
        place.num_rows = job.args.rank_counts[p];
        int rows = 0;
        for (int piece = 0; piece < kPieces && !job.args.cached; ++piece) {
            const int end = piece_begin(piece + 1, job.num_chunks);
            for (int c = piece_begin(piece, job.num_chunks); c < end; ++c) {
                const uint64_t* word = view.state.chunks + int64_t{c} * columns + p;
                rows += static_cast<int>(device::bits_of(ptx::ld_relaxed_gpu(word)));
            }
            place.until[piece] = rows;
        }
    }
    const int pairs = job.args.cached ? num_ranks * kPieces : 0;
    for (int i = 0; i < pairs; ++i) {
        const int p = i % num_ranks, piece = i / num_ranks;
        const int64_t t = int64_t{piece_begin(piece + 1, job.num_chunks)} * job.tokens_per_chunk;
        const int rows =
            rows_before(job, t, p, tables.base[p], static_cast<int>(job.args.rank_counts[p]));
        if (ptx::lane_id() == 0) pack.places[p].until[piece] = rows;
    }
    __syncwarp();
}

// Rows for others go where the copies take them from; our own to their place.
__device__ inline void pack_targets(const PackJob& pack, const Tables& tables) {
    const DispatchJob& job = pack.dispatch;
    const int me = job.view.peers.rank;
    for (int p = threadIdx.x; p < job.view.shape.num_ranks; p += blockDim.x) {
        int64_t start = -tables.base[p];
        for (int q = 0; q < p; ++q) start += q == me ? 0 : job.args.rank_counts[q];
        if (p == me || pack.rows == nullptr) continue;  // straight there when nothing is packed
        tables.targets[p].at[0] = pack.rows + start * job.args.row_bytes();
    }
    __syncthreads();
}

}  // namespace ep::kernels
