// Shared memory of a block of a dispatch, in front of the stages of its warps: what it counts, what it hears,
// and where that puts its rows. One walk, for the host that sizes it and the kernel that uses it.
//
// defines: counts_tokens, gives_selections, columns_of, Target, Spread, Tables
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "contract/calls.h"
#include "contract/gpu.h"
#include "device/ptx.cuh"

namespace ep::kernels {

// A handle of compact rows has all rows already.
__host__ __device__ constexpr bool counts_tokens(const DispatchArgs& a) {
    return !a.cached || a.layout != RecvLayout::kCompact;
}
// Rows of grouped and slab are given selection by selection.
__host__ __device__ constexpr bool gives_selections(const DispatchArgs& a) {
    return !a.cached && a.layout != RecvLayout::kCompact;
}
// What is counted: tokens for every rank, selections of every expert by position, then ids that name no
// expert, and the first of them (an index, so it is no sum but the least).
__host__ __device__ constexpr int bad_column(const Shape& s) { return s.num_ranks + s.num_experts; }
__host__ __device__ constexpr int columns_of(const Shape& s) { return bad_column(s) + 2; }
constexpr int32_t kNoBadId = 0x7fffffff;

// Where a rank wants our rows: its extents, as we have them mapped.
struct Target {
    std::byte* at[Grant::kExtents];  // null = not wanted
    int32_t max_rows, max_recv;
    int32_t min_row;  // ours begin there; grouped, slab: 0
    uint32_t free_pages, wide_ids;
    int32_t code;  // when it cannot take what comes
    int64_t want, have;

    __device__ std::byte* x() const { return at[Grant::kX]; }
    __device__ std::byte* ids() const { return at[Grant::kIds]; }
    __device__ float* weights() const { return reinterpret_cast<float*>(at[Grant::kWeights]); }
    __device__ int32_t* src() const { return reinterpret_cast<int32_t*>(at[Grant::kSrc]); }
    __device__ int32_t* rows() const { return reinterpret_cast<int32_t*>(at[Grant::kRows]); }
    __device__ std::byte* scales() const { return at[Grant::kScales]; }
};

// Tokens for a rank are bits of words when a lane has a rank, and a block has not too many tokens.
constexpr int kMostVotes = 64;  // of 32 tokens, in a block
__host__ __device__ constexpr bool can_vote(const Shape& s, const DispatchArgs& a) {
    return a.layout == RecvLayout::kCompact && !a.cached && s.num_ranks <= 32;
}

// Byte offsets of Tables, and how tokens are spread. The host works it out: divisions are long.
struct Spread {
    int32_t targets, counts, others, total, base, arriving, pushed, experts, first_row, groups,
        next, votes, before, end;
    bool votes_tokens;   // compact, few ranks: tokens are counted by votes of warps
    int32_t width;       // columns that every warp counts for itself
    int32_t num_movers;  // warps of a block that move rows; one more concludes
    int32_t stage_bytes;
    int32_t blocks_of_chunk;  // that share a chunk
    int32_t tokens_per_block, tokens_per_warp;
    uint32_t slot_magic;            // lane / num_topk == lane * slot_magic >> 16
    int64_t unit[Grant::kExtents];  // bytes of an item of each extent, ids aside
    uint32_t of_recv;               // extents that have an item per received token, not per row
    uint32_t needed;                // extents without which nobody can be sent anything
    int32_t state_lines;            // cache lines of the tables that never change

    constexpr Spread(const Shape& s, const DispatchArgs& a, int movers, bool may_vote = true)
        : width(gives_selections(a) ? bad_column(s) : s.num_ranks),
          num_movers(movers),
          slot_magic((65536u + a.num_topk - 1) / a.num_topk) {
        int at = 0;
        const auto take = [&at](int64_t bytes) {
            const int offset = at;
            at += static_cast<int>((bytes + 15) / 16 * 16);
            return offset;
        };
        // The stages of the warps follow, at `end`.
        const int64_t columns = columns_of(s);
        targets = take(s.num_ranks * int64_t{sizeof(Target)});
        counts = take(4 * columns);
        others = take(4 * columns);
        total = take(int64_t{4} * s.num_ranks);
        base = take(int64_t{4} * s.num_ranks);
        arriving = take(int64_t{4} * s.num_ranks);
        pushed = take(int64_t{4} * s.num_ranks);
        experts = take(int64_t{4} * s.num_experts);
        first_row = take(gives_selections(a) ? int64_t{4} * s.num_experts : 0);
        groups = take(int64_t{4} * (s.max_local_experts + 1));
        votes_tokens = may_vote && can_vote(s, a);
        next = take(votes_tokens ? 0 : int64_t{4} * movers * width);
        votes = take(votes_tokens ? int64_t{4} * kMostVotes * s.num_ranks : 0);
        before = take(votes_tokens ? int64_t{4} * kMostVotes * s.num_ranks : 0);
        end = (at + 127) / 128 * 128;
        const bool compact = a.layout == RecvLayout::kCompact;
        const int64_t slots = compact ? a.num_topk : 1;
        const int64_t units[] = {a.row_bytes(),  4 * slots,    4 * slots, 8,
                                 4 * a.num_topk, a.scale_bytes};
        for (int i = 0; i < Grant::kExtents; ++i) unit[i] = units[i];
        of_recv = 1u << Grant::kSrc | 1u << Grant::kRows | (compact ? 0u : 1u << Grant::kScales);
        needed = 1u << Grant::kX;
        if (a.with_weights) needed |= 1u << Grant::kWeights;
        if (a.scale_bytes > 0) needed |= 1u << Grant::kScales;
        if (!a.cached) needed |= 1u << Grant::kSrc | (compact ? 0u : 1u << Grant::kRows);
    }

    // Over tokens that `blocks` share, `blocks_of_chunk` a chunk.
    constexpr void over(int64_t tokens_of_chunk, int share, int stage) {
        blocks_of_chunk = share;
        stage_bytes = stage;
        tokens_per_block = static_cast<int32_t>((tokens_of_chunk + share - 1) / share);
        tokens_per_warp = (tokens_per_block + num_movers - 1) / num_movers;
    }
    constexpr bool fits() const { return !votes_tokens || tokens_per_block <= 32 * kMostVotes; }
};
static_assert(std::is_trivially_copyable_v<Spread>);

struct Tables {
    Target* targets;     // [num_ranks]
    int32_t* counts;     // [columns] of this block
    int32_t* others;     // [columns] of blocks before this one; block 0: of all others
    int32_t* total;      // [num_ranks] rows all sources bring to each rank
    int32_t* base;       // [num_ranks] our first row there, then this block's
    int32_t* arriving;   // [num_ranks] rows each source brings here
    int32_t* pushed;     // [num_ranks] rows this block has stored
    int32_t* experts;    // [num_experts] selections all sources bring, by position
    int32_t* first_row;  // [num_experts] row of this block's first selection
    int32_t* groups;     // [max_local_experts + 1] first row of our experts' groups
    int32_t* next;       // [num_movers][width] what a warp counted, then where its next one goes
    uint32_t* votes;     // [32 tokens each][num_ranks] which of them go there
    int32_t* before;     // the same: how many of the block's go there before these
    int width;

    __device__ __forceinline__ explicit Tables(const Spread& l)
        : targets(reinterpret_cast<Target*>(ptx::dynamic_shared() + l.targets)),
          counts(ints(l.counts)),
          others(ints(l.others)),
          total(ints(l.total)),
          base(ints(l.base)),
          arriving(ints(l.arriving)),
          pushed(ints(l.pushed)),
          experts(ints(l.experts)),
          first_row(ints(l.first_row)),
          groups(ints(l.groups)),
          next(ints(l.next)),
          votes(reinterpret_cast<uint32_t*>(ints(l.votes))),
          before(ints(l.before)),
          width(l.width) {}

    __device__ int32_t* of_warp(int warp) const { return next + warp * width; }

private:
    __device__ static int32_t* ints(int offset) {
        return reinterpret_cast<int32_t*>(ptx::dynamic_shared() + offset);
    }
};

}  // namespace ep::kernels
