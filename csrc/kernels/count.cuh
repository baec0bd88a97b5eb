// One block counts a range of tokens (a chunk): how many go to every rank, how many selections every
// expert gets, and which turn every token has.
//
// defines: Counters, sum_columns, count_chunk
//
// A chunk is walked twice, once to count and once to give every token its turn at each rank, in the
// order of the tokens: no atomics decide an order, so the same routing gives the same rows.
//
// Loops stay loops: this runs once, out of cold caches, and waits for nothing as long as for its code.
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "device/ptx.cuh"

namespace ep::kernels {

constexpr int kAhead = 4;  // loads of ids a thread has in flight

// In shared memory. Columns: [num_ranks] tokens, then [num_experts] selections by position. The
// first `width` of them have a row for each warp, or chunk; all have a total.
struct Counters {
    int32_t* totals;  // [num_columns]
    int32_t* rows;    // [num_rows][stride]
    int num_rows, num_columns, width, stride;

    __device__ int32_t* row(int r) const { return rows + r * stride; }
};

__host__ __device__ constexpr int columns_of(const Shape& s) { return s.num_ranks + s.num_experts; }

// Rows of grouped and slab are given selection by selection, so selections have turns, too.
__host__ __device__ constexpr int width_of(const Shape& s, const DispatchArgs& a) {
    const bool selections = a.layout != RecvLayout::kCompact && !a.cached;
    return selections ? columns_of(s) : s.num_ranks;
}

__host__ __device__ constexpr int counters_bytes(int columns, int width, int num_rows) {
    return 4 * (columns + num_rows * (width | 1));
}

__device__ inline Counters counters_of(const DispatchJob& job, int32_t* data, int num_rows) {
    const int columns = columns_of(job.view.shape), width = width_of(job.view.shape, job.args);
    return {data, data + columns, num_rows, columns, width, width | 1};
}

// Where the turns of selections stand, behind those of tokens.
__device__ __forceinline__ int32_t* selection_turns(const DispatchJob& job) {
    return job.view.state.turn + job.args.num_tokens * job.args.num_topk;
}

// One token of each group of num_topk lanes: counts it, or gives it its turn at every rank. For the
// latter the counters start from what comes before.
template <bool kGivesTurns>
struct Walk {
    const DispatchJob& job;
    const Counters& counters;
    int32_t* row;  // of this warp
    BadIds* bad;
    int token, slot;  // of this lane within a turn

    __device__ void turn(int64_t t, bool here, int64_t id) const {
        const RankView& view = job.view;
        const uint32_t before = ptx::lanemask_lt();
        const bool chosen = here && id >= 0 && id < view.shape.num_experts;
        const int64_t at = t * job.args.num_topk + slot;
        if (!kGivesTurns && here && !chosen && id != -1) {
            atomicAdd(&bad->count, 1);
            atomicMin(&bad->first, static_cast<unsigned long long>(at));
        }
        const int dst = chosen ? __ldg(view.state.owner + id) : -1;
        const int column = chosen ? view.shape.num_ranks + __ldg(view.state.position + id) : -1;
        const int leader = first_at(dst);
        const bool first = chosen && leader == static_cast<int>(ptx::lane_id());
        const uint32_t rivals = going_to(first ? dst : -1);
        int turn = first ? row[dst] + __popc(rivals & before) : 0;
        __syncwarp();
        if (first && (rivals & before) == 0) row[dst] += __popc(rivals);
        if (kGivesTurns) {
            turn = __shfl_sync(~0u, turn, leader);
            if (chosen) view.state.turn[at] = turn;
            if (counters.width > view.shape.num_ranks) give_selection(at, chosen, column, before);
        } else if (chosen && !job.args.cached) {
            const bool turns = column < counters.width;
            atomicAdd(turns ? &row[column] : &counters.totals[column], 1);
        }
        __syncwarp();
    }

    // The lane of this token's first slot at the same rank.
    __device__ int first_at(int dst) const {
        const int own = ptx::lane_id(), start = own - slot;
        int leader = own;
#pragma unroll 1
        for (int k = job.args.num_topk - 1; k >= 0; --k) {
            const int other = __shfl_sync(~0u, dst, start + k);
            if (other == dst && k < slot) leader = start + k;
        }
        return leader;
    }

    // Lanes with the same rank. A vote for each rank costs less than matching, while they are few.
    __device__ uint32_t going_to(int dst) const {
        constexpr int kFewRanks = 16;
        const int num_ranks = job.view.shape.num_ranks;
        if (num_ranks > kFewRanks) return __match_any_sync(~0u, dst);
        uint32_t mine = 0;
#pragma unroll 1
        for (int r = 0; r < num_ranks; ++r) {
            const uint32_t lanes = __ballot_sync(~0u, dst == r);
            if (dst == r) mine = lanes;
        }
        return mine;
    }

    // In the order (token, slot).
    __device__ void give_selection(int64_t at, bool chosen, int column, uint32_t before) const {
        const uint32_t rivals = __match_any_sync(~0u, column);
        const int turn = chosen ? row[column] + __popc(rivals & before) : -1;
        __syncwarp();
        if (chosen && (rivals & before) == 0) row[column] += __popc(rivals);
        if (chosen) selection_turns(job)[at] = turn;
    }
};

// The warps of a block share the chunk; `counters` has a row for each.
template <bool kGivesTurns>
__device__ void walk_chunk(const DispatchJob& job, const Counters& counters, int chunk,
                           BadIds* bad) {
    const int lane = ptx::lane_id(), num_topk = job.args.num_topk;
    const int warp = threadIdx.x / 32, num_warps = counters.num_rows;
    const int per_turn = 32 / num_topk;
    const Walk<kGivesTurns> walk{job, counters,        counters.row(warp),
                                 bad, lane / num_topk, lane % num_topk};
    const int turns = (job.tokens_per_chunk + per_turn - 1) / per_turn;
    const int share = (turns + num_warps - 1) / num_warps * per_turn;
    const int64_t first = int64_t{chunk} * job.tokens_per_chunk;
    const int64_t chunk_end = min(first + job.tokens_per_chunk, job.args.num_tokens);
    const int64_t begin = first + int64_t{warp} * share, end = min(begin + share, chunk_end);
    const bool active = lane < per_turn * num_topk;
    // Ids are loaded some turns ahead. One copy of a turn: code that is not in the caches yet is
    // what this kernel waits for.
    const auto load = [&](int64_t t0) {
        const int64_t t = t0 + walk.token;
        return active && t < end ? job.args.topk_idx[t * num_topk + walk.slot] : -1;
    };
    int64_t ahead[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) ahead[u] = load(begin + u * per_turn);
#pragma unroll 1
    for (int64_t t0 = begin; t0 < end; t0 += per_turn) {
        const int64_t id = ahead[0];
#pragma unroll
        for (int u = 0; u + 1 < kAhead; ++u) ahead[u] = ahead[u + 1];
        ahead[kAhead - 1] = load(t0 + kAhead * per_turn);
        walk.turn(t0 + walk.token, active && t0 + walk.token < end, id);
    }
}

// Down every column that has rows: counts become exclusive sums, and a total.
__device__ inline void sum_columns(const Counters& counters) {
    constexpr int kAtOnce = 8;
#pragma unroll 1
    for (int c = threadIdx.x; c < counters.width; c += blockDim.x) {
        int sum = 0;
#pragma unroll 1
        for (int r0 = 0; r0 < counters.num_rows; r0 += kAtOnce) {
            int count[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                count[i] = r0 + i < counters.num_rows ? counters.row(r0 + i)[c] : 0;
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                if (r0 + i < counters.num_rows) counters.row(r0 + i)[c] = sum;
                sum += count[i];
            }
        }
        counters.totals[c] = sum;
    }
}

// Counts a chunk and gives its turns; leaves its totals where notify finds them.
__device__ inline void count_chunk(const DispatchJob& job, const Counters& counters, int chunk,
                                   BadIds& bad) {
    const int cells = counters.num_columns + counters.num_rows * counters.stride;
#pragma unroll 1
    for (int i = threadIdx.x; i < cells; i += blockDim.x) counters.totals[i] = 0;
    if (threadIdx.x == 0) bad = {0, ~0ull};
    __syncthreads();
    walk_chunk<false>(job, counters, chunk, &bad);
    __syncthreads();
    sum_columns(counters);
    __syncthreads();
    int32_t* counts = job.view.state.chunk_counts + chunk * counters.num_columns;
#pragma unroll 1
    for (int i = threadIdx.x; i < counters.num_columns; i += blockDim.x) {
        counts[i] = counters.totals[i];
    }
    if (threadIdx.x == 0) job.view.state.bad_ids[chunk] = bad;
    walk_chunk<true>(job, counters, chunk, nullptr);
    __syncthreads();
}

}  // namespace ep::kernels
