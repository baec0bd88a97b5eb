// What every block of a dispatch does before rows move: it counts its own tokens, hears what everybody
// brings, and works out where its rows go. One block tells the others, and what came of it.
//
// defines: spread_of, Role, clear_tables, take_counts, count, publish, explain_failure, tell_host, fill_outputs,
// take_back_load, place_block
//
// Functions are for all threads of a block unless they say otherwise; `false` means: leave.
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "device/ptx.cuh"
#include "kernels/count.cuh"
#include "kernels/enter.cuh"
#include "kernels/leave.cuh"
#include "kernels/notices.cuh"
#include "kernels/place.cuh"
#include "kernels/tables.cuh"

namespace ep::kernels {

// How a block's shared memory and its tokens are divided, `share` blocks to `tokens` of them.
inline Spread spread_of(const DispatchJob& job, int num_movers, int stage_bytes, int64_t tokens,
                        int share) {
    Spread spread(job.view.shape, job.args, num_movers);
    spread.over(tokens, share, stage_bytes);
    if (!spread.fits()) {
        spread = Spread(job.view.shape, job.args, num_movers, false);
        spread.over(tokens, share, stage_bytes);
    }
    spread.state_lines = static_cast<int32_t>(StateLayout(job.view.shape).tables_end / 128);
    return spread;
}

// What a block does of a phase.
struct Role {
    bool tells;      // decides the call with the others
    bool moves;      // moves rows
    bool publishes;  // speaks for the rank
};

// ---- counting ----

__device__ __forceinline__ void clear_tables(const DispatchJob& job, const Spread& spread) {
    const int least = bad_column(job.view.shape) + 1, others = (spread.others - spread.counts) / 4;
    int32_t* at = Tables(spread).counts;
#pragma unroll 1
    for (int i = threadIdx.x; i < (spread.end - spread.counts) / 4; i += blockDim.x) {
        at[i] = i == least || i == others + least ? kNoBadId : 0;
    }
}

// What nobody tells us: a handle knows it.
__device__ __forceinline__ void take_counts(const DispatchJob& job, const Tables& tables) {
    const RankView& view = job.view;
    if (!job.args.cached) return;
    const int first = view.state.first[view.peers.rank];
    const int num_local = view.state.first[view.peers.rank + 1] - first;
#pragma unroll 1
    for (int e = threadIdx.x; e < num_local; e += blockDim.x) {
        tables.experts[first + e] = job.args.expert_counts[e];
    }
}

// What of a count is asked for.
struct Counting {
    bool asks;        // what comes before our block
    bool experts[2];  // selections of every expert: in our block, before it
    bool load;        // of logical experts
};

__device__ __forceinline__ Counting counting_of(const DispatchJob& job, const Role& role) {
    const bool fresh = !job.args.cached, selects = gives_selections(job.args);
    const bool alone = job.num_chunks == 1 && role.tells && role.moves;
    return {
        role.moves || role.publishes,
        {selects || (fresh && (role.publishes || !alone)), selects || (fresh && role.publishes)},
        role.tells && fresh && job.args.logical_load != nullptr};
}

// By votes: this block's tokens, then those before it in its chunk.
__device__ __forceinline__ void count_votes(const DispatchJob& job, const Spread& spread,
                                            const BlockSpan& span, const Counting& what) {
    const Tables tables(spread);
    const int num_ranks = job.view.shape.num_ranks, bad = bad_column(job.view.shape);
    const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32, lane = ptx::lane_id();
    const int num_votes = (span.own.end - span.own.begin + 31) / 32;
    int before = 0;  // for the rank of this lane
    // One loop for both, since its code is what takes long.
    const int num_before = what.asks ? (span.own.begin - span.chunk_begin + 31) / 32 : 0;
#pragma unroll 1
    for (int g = warp; g < num_votes + num_before; g += num_warps) {
        const bool ours = g < num_votes;
        int32_t* columns = ours ? tables.counts : tables.others;
        const Voter voter{job, columns + num_ranks, columns + bad, what.experts[ours ? 0 : 1],
                          ours && what.load};
        const int t0 = ours ? span.own.begin + 32 * g : span.chunk_begin + 32 * (g - num_votes);
        const uint32_t mine = voter.votes(t0, ours ? span.own.end : span.own.begin);
        if (ours && lane < num_ranks) tables.votes[g * num_ranks + lane] = mine;
        if (!ours) before += __popc(mine);
    }
    if (before != 0 && lane < num_ranks) atomicAdd(&tables.others[lane], before);
    __syncthreads();
    sum_votes(tables, num_ranks, num_votes);
    __syncthreads();
}

// By warps: each its own tokens, then all those before the block in its chunk.
__device__ __noinline__ inline void count_by_warps(const DispatchJob& job, const Spread& spread,
                                                   BlockSpan span, Counting what) {
    const Tables tables(spread);
    const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
    const int ranks = job.view.shape.num_ranks, bad = bad_column(job.view.shape);
    Counter counter(job, spread);
    const Span own = span.of_warp(warp, spread.tokens_per_warp);
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
        const bool ours = pass == 0;
        int32_t* columns = ours ? tables.counts : tables.others;
        counter.tokens = ours ? tables.of_warp(warp) : columns;
        counter.selections =
            (ours && gives_selections(job.args) ? counter.tokens : columns) + ranks;
        counter.bad = columns + bad;
        counter.selects = what.experts[pass];
        counter.load = ours && what.load;
        const int step = ours ? counter.per_turn : num_warps * counter.per_turn;
        const int first = ours ? own.begin : span.chunk_begin + warp * counter.per_turn;
        const bool counts = ours ? warp < spread.num_movers : what.asks;
        counter.count(first, !counts ? first : ours ? own.end : span.own.begin, step);
    }
    __syncthreads();
    sum_warps(tables, spread.num_movers);
    __syncthreads();
}

// This block's tokens, and what comes before them. False: leave.
__device__ __forceinline__ bool count(const DispatchJob& job, Operation op, const Spread& spread,
                                      const BlockSpan& span, const Role& role) {
    const Counting what = counting_of(job, role);
    if (spread.votes_tokens) {
        count_votes(job, spread, span, what);
    } else {
        count_by_warps(job, spread, span, what);
    }
    if (job.num_chunks == 1 && role.tells && role.moves) return true;
    const Tables tables(spread);
    if (role.tells) tell_chunk(job, op, tables, span.chunk);
    if (!what.asks) return true;
    const int columns = role.publishes               ? columns_of(job.view.shape)
                        : gives_selections(job.args) ? bad_column(job.view.shape)
                                                     : job.view.shape.num_ranks;
    return add_chunks(job, op, tables, columns, 0, span.chunk);
}

// ---- telling ----

// What this rank brings: the block that publishes is the last, so all comes before it.
__device__ __forceinline__ int brings(const DispatchJob& job, const Tables& tables, int column) {
    if (!counts_tokens(job.args)) return static_cast<int>(job.args.rank_counts[column]);
    const int here = tables.counts[column], before = tables.others[column];
    return column == bad_column(job.view.shape) + 1 ? min(here, before) : here + before;
}

// What is wrong with what we bring.
__device__ __noinline__ inline void find_fault(const DispatchJob& job, const Spread& spread,
                                               Entering& in) {
    const Tables tables(spread);
    const DispatchArgs& a = job.args;
    const int bad = bad_column(job.view.shape);
    for (int p = threadIdx.x; a.cached && p < job.view.shape.num_ranks; p += blockDim.x) {
        // A tensor of the handle was changed since.
        if (a.rank_counts[p] != brings(job, tables, p)) in.code = kStaleHandle;
    }
    if (threadIdx.x == 0 && !a.cached && brings(job, tables, bad) > 0) {
        const int64_t at = brings(job, tables, bad + 1);
        in.code = kBadExpertId;
        in.detail[0] = brings(job, tables, bad);
        in.detail[1] = at / a.num_topk;
        in.detail[2] = at % a.num_topk;
        in.detail[3] = a.topk_idx[at];
    } else if (threadIdx.x == 0) {
        for (int i = 0; i < 4; ++i) in.detail[i] = job.begin.refusal.detail[i];
    }
    __syncthreads();
}

__device__ __forceinline__ void publish(const DispatchJob& job, const Spread& spread,
                                        Entering& in) {
    using L = NoticeLayout;
    const Tables tables(spread);
    const DispatchArgs& a = job.args;
    const Shape& shape = job.view.shape;
    const bool counted = counts_tokens(a), compares = a.cached && counted;
    const bool is_bad = counted && !a.cached && brings(job, tables, bad_column(shape)) > 0;
    const bool is_refused = code_of(job.begin.head.what) != kOk;  // in.code may be written by now
    if (is_bad || compares || is_refused) find_fault(job, spread, in);
    std::byte* const* control = job.view.peers.control;
    publish_head(job.view, control, job.begin, in);
    const NoticeLayout layout(shape);
    const int end = a.cached ? layout.selections : layout.end;
    publish_words(job.view, control, in, L::kRows, end, [&](int i) {
        if (i >= layout.expected && i < layout.selections) {  // of a handle, see judge_handles
            return static_cast<uint32_t>(a.cached ? a.rank_counts[i - L::kRows] : 0);
        }
        const int c = i < layout.expected ? i - L::kRows : shape.num_ranks + i - layout.selections;
        const int number = brings(job, tables, c);
        if (c < shape.num_ranks && !a.cached) a.rank_counts[c] = number;
        return static_cast<uint32_t>(number);
    });
}

// ---- the verdict ----

// What the host, and kernels behind this one, need to know: before rows move, since a fence of an SM waits
// for all that it stores. One warp of the block that publishes.
__device__ __noinline__ inline void tell_host(const DispatchJob& job, const Spread& spread,
                                              const Entering& in, bool ok, int64_t num_logged = 0) {
    const Tables tables(spread);
    const RankView& view = job.view;
    const int me = view.peers.rank, num_local = view.state.first[me + 1] - view.state.first[me];
    const bool compact = job.args.layout == RecvLayout::kCompact;
    const bool indexed = job.out.offsets != nullptr;
    if (ok && compact && indexed) (void)place_groups(job, tables, me);
    if (ptx::lane_id() != 0) return;
    OpState& state = *view.state.op;
    state = {in.seq, ok ? int{kOk} : int{in.outcome.incident.code}, in.slot, 0, 0, 0, 0};
    if (ok) {
        const int64_t groups = compact && !indexed ? 0 : tables.groups[num_local];
        state.num_recv = tables.total[me];
        state.num_rows = compact ? state.num_recv : groups;
        state.index_rows = groups;
        state.num_logged = num_logged;
        report(view, job.begin, in.seq, nullptr, state);
    }
    if (job.status != nullptr) *job.status = state.code;
    if (job.num_recv != nullptr) *job.num_recv = static_cast<int32_t>(state.num_recv);
}

// What callers read. One warp of the block that publishes.
__device__ __noinline__ inline void fill_outputs(const DispatchJob& job, const Spread& spread,
                                                 bool ok) {
    const Tables tables(spread);
    const RankView& view = job.view;
    const DispatchArgs& a = job.args;
    const int lane = ptx::lane_id(), num_ranks = view.shape.num_ranks, me = view.peers.rank;
    const int first = view.state.first[me], num_local = view.state.first[me + 1] - first;
#pragma unroll 1
    for (int e = lane; !a.cached && e < num_local; e += 32) {
        a.expert_counts[e] = ok ? tables.experts[first + e] : 0;
        if (ok && a.recv_stats != nullptr) a.recv_stats[e] += tables.experts[first + e];
    }
#pragma unroll 1
    for (int e = lane; job.out.offsets != nullptr && e <= num_local; e += 32) {
        job.out.offsets[e] = ok ? tables.groups[e] : 0;
    }
#pragma unroll 1
    for (int p = lane; !a.cached && p < num_ranks; p += 32) {
        a.rank_counts[num_ranks + p] = ok ? tables.arriving[p] : 0;
        if (!ok) a.rank_counts[p] = 0;
    }
}

// The verdict, when it is bad. One warp.
__device__ __noinline__ inline void explain_failure(const DispatchJob& job, const Spread& spread,
                                                    Entering& in) {
    if (ptx::lane_id() == 0 && in.first_bad < objection(kNumberObjection, 0)) {
        explain(job.view, job.begin, in);
    } else if (ptx::lane_id() == 0) {
        explain_numbers(job, spread, in);
    }
    __syncwarp();
}

// A call with an id that names no expert counts no load. Of tokens that were counted by this block; by
// its first `threads` threads.
__device__ __noinline__ inline void take_back_load(const DispatchJob& job, const Spread& spread,
                                                   const Entering& in, int threads) {
    const NoticeWords ours(job.view, in.slot, job.view.peers.rank);
    if (job.args.cached || code_of(ours.get(NoticeLayout::kWhat)) != kBadExpertId) return;
    const DispatchArgs& a = job.args;
    const Span own = block_span(job, spread, 0).own;
    const int64_t end = int64_t{own.end} * a.num_topk;
    for (int64_t i = int64_t{own.begin} * a.num_topk + threadIdx.x; i < end; i += threads) {
        const int64_t id = a.topk_idx[i];
        if (id < 0 || id >= a.replicas.num_logical) continue;
        atomicAdd(reinterpret_cast<unsigned long long*>(a.logical_load + id), ~0ull);
    }
}

// This block's first rows: behind those of lower ranks and of the blocks before it.
__device__ __forceinline__ void place_block(const DispatchJob& job, const Spread& spread) {
    const Tables tables(spread);
    const int num_ranks = job.view.shape.num_ranks;
    const bool bounded = job.args.cached && job.args.layout == RecvLayout::kCompact;
#pragma unroll 1
    for (int c = threadIdx.x; c < tables.width; c += blockDim.x) {
        if (c < num_ranks) {
            Target& target = tables.targets[c];
            target.min_row = bounded ? tables.base[c] : 0;
            if (bounded)
                target.max_rows = target.min_row + static_cast<int>(job.args.rank_counts[c]);
        }
        (c < num_ranks ? tables.base[c] : tables.first_row[c - num_ranks]) += tables.others[c];
    }
    __syncthreads();
}

}  // namespace ep::kernels
