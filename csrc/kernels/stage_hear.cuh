// In a small dispatch every block hears what all ranks bring to all experts, and comes to the verdict by
// itself.
//
// defines: HeadListener, CountsListener, judge_stage, explain_stage
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"
#include "kernels/stage_masks.cuh"
#include "kernels/stage_tables.cuh"

namespace ep::kernels {

// A warp takes over what a rank says of itself.
struct HeadListener {
    const StageTables& tables;

    __device__ __forceinline__ bool operator()(int p, const NoticeWords&, const Head& head) const {
        using L = NoticeLayout;
        const Heard heard{static_cast<int32_t>(head.word(L::kTokens)),
                          static_cast<int32_t>(head.word(L::kMaxRows)),
                          static_cast<int32_t>(head.word(L::kMaxRecv)), head.word(L::kFreePages)};
        if (ptx::lane_id() == 0) tables.heard()[p] = heard;
        return true;
    }
};

// The counts of all ranks, a word a thread; they are untrusted until judge_stage has seen them. Who refuses
// a call, or is at another, tells no counts: so while heads are awaited one only looks for them. Whom the
// call goes without, and who is masked meanwhile, brings nothing.
struct CountsListener {
    const DispatchJob& job;
    const StageTables& tables;
    Entering& in;

    // Word c of all that is listened for.
    __device__ __forceinline__ const uint64_t* word_of(int c, int& src, int& column) const {
        const RankView& view = job.view;
        const NoticeLayout layout(view.shape);
        src = c / tables.columns();
        column = c - src * tables.columns();
        const int at = column < tables.shape.num_ranks
                           ? NoticeLayout::kRows + column
                           : layout.selections + column - tables.shape.num_ranks;
        return NoticeWords(view, in.slot, src).words + at;
    }

    // The first word of this thread, if it comes in time.
    __device__ __forceinline__ uint64_t look() const {
        constexpr int kTurns = 256;
        int src, column;
        const auto c = static_cast<int>(threadIdx.x);
        if (c >= tables.shape.num_ranks * tables.columns()) return 0;
        const uint64_t* addr = word_of(c, src, column);
        uint64_t word = ptx::ld_relaxed_sys(addr);
#pragma unroll 1
        for (int turn = 0; turn < kTurns && !device::is_of(word, in.seq); ++turn) {
            word = ptx::ld_relaxed_sys(addr);
        }
        return word;
    }

    // All of them; the first has been looked for. False: leave.
    __device__ __forceinline__ bool take(uint64_t word) const {
        const Operation op{OpKind::kDispatch, in.seq};
        const int all = tables.shape.num_ranks * tables.columns();
        const uint64_t gone = in.masked | in.unheard;
        bool ok = true;
#pragma unroll 1
        for (int c = threadIdx.x; ok && c < all; c += blockDim.x) {
            int src, column;
            const uint64_t* addr = word_of(c, src, column);
            if (c >= static_cast<int>(blockDim.x)) word = ptx::ld_relaxed_sys(addr);
            bool here = !device::has_rank(gone, src);
            if (here && !device::is_of(word, in.seq)) {
                here = device::wait_packed(job.view.watch, op, src, addr, word);
                ok = here || device::goes_on(job.view.watch);
                if (!here) atomicOr(&in.unheard, 1ull << src);
            }
            tables.prefix()[c] = here ? static_cast<int32_t>(device::bits_of(word)) : 0;
        }
        return ok;
    }
};

// Rows that rank p's x has.
__device__ __forceinline__ int64_t rows_of(const DispatchJob& job, const StageTables& tables,
                                           int p) {
    const int32_t* first = job.view.state.first;
    if (job.args.layout == RecvLayout::kCompact) return tables.total_rows(p);
    return (first[p + 1] - first[p]) * job.args.capacity;
}

// Counts become what comes before each source, and the sums; what is wrong with them becomes the verdict.
// All threads, once everybody has been heard; a barrier of the block follows.
__device__ __forceinline__ void judge_stage(const DispatchJob& job, const StageTables& tables,
                                            Entering& in) {
    const DispatchArgs& a = job.args;
    const int num_ranks = job.view.shape.num_ranks;
    const bool compact = a.layout == RecvLayout::kCompact;
    const auto owner_of = [&](int c) {
        const int32_t* first = job.view.state.first;
        int p = 0;
        while (first[p + 1] <= c - num_ranks) ++p;
        return p;
    };
#pragma unroll 1
    for (int c = threadIdx.x; c < tables.columns(); c += blockDim.x) {
        const bool rows = c < num_ranks;
        int sum = 0;
#pragma unroll 1
        for (int p = 0; p < num_ranks; ++p) {
            int32_t& at = tables.prefix()[p * tables.columns() + c];
            const bool counts = !without(in, p);  // of some that do not, some words have come
            const int count = counts ? at : 0;
            const int tokens = counts ? tables.heard()[p].num_tokens : 0;
            const bool fine = tokens >= 0 && tokens <= job.view.shape.max_tokens && count >= 0 &&
                              count <= tokens * (rows ? 1 : a.num_topk);
            if (!fine) atomicMin(&in.first_bad, objection(kNumberObjection, p));
            at = sum;
            sum += count;
        }
        tables.prefix()[num_ranks * tables.columns() + c] = sum;
        const bool over = compact ? rows && sum > a.capacity : !rows && sum > a.capacity;
        if (over && a.capacity >= 0) {
            const int owner = rows ? c : owner_of(c);
            if (!without(in, owner)) atomicMin(&in.size_bad, objection(kSizeObjection, owner));
        }
        if (!rows || without(in, c)) continue;
        const bool fits = sum <= tables.heard()[c].max_recv &&
                          (compact ? sum : rows_of(job, tables, c)) <= tables.heard()[c].max_rows;
        if (!fits) atomicMin(&in.size_bad, objection(kSizeObjection, c));
    }
}

// One thread: an objection to numbers as an outcome.
__device__ __forceinline__ void explain_stage(const DispatchJob& job, const StageTables& tables,
                                              Entering& in) {
    const DispatchArgs& a = job.args;
    const RankView& view = job.view;
    const uint32_t bad = min(in.first_bad, in.size_bad);
    const auto p = static_cast<int>(bad & 0xffff);
    clear_outcome(view, job.begin, in);
    if (bad >> 16 == kNumberObjection) {
        return set_outcome(in.outcome, kBadCount, p, view.shape.max_tokens,
                           tables.heard()[p].num_tokens);
    }
    int64_t arriving = tables.total_rows(p);
    if (a.layout == RecvLayout::kSlab) {
        arriving = 0;
        for (int e = view.state.first[p]; e < view.state.first[p + 1]; ++e) {
            arriving = max(arriving, int64_t{tables.total(e)});
        }
    }
    if (a.capacity >= 0 && arriving > a.capacity) {
        return set_outcome(in.outcome, kOverCapacity, p, a.capacity, arriving);
    }
    const int64_t rows = rows_of(job, tables, p), recv = tables.total_rows(p);
    set_outcome(in.outcome, kOutOfArena, p,
                rows * a.row_bytes() + recv * (8 + int64_t{12} * a.num_topk + a.scale_bytes),
                int64_t{tables.heard()[p].free_pages} * kExtentAlign);
}

}  // namespace ep::kernels
