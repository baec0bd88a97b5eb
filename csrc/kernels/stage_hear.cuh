// In a small dispatch every block hears what all ranks bring to all experts, and comes to the verdict by
// itself.
//
// defines: HeadListener, first_column, CountsListener, judge_stage, explain_stage
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

// A thread has columns of its own; the first ones are of the last warps, since the first warps hear heads.
__device__ __forceinline__ int first_column() {
    return static_cast<int>(blockDim.x - 1 - threadIdx.x);
}

// The counts of all ranks. They are untrusted until judge_stage has seen them.
// Who refuses a call, or is at another, tells no counts: so while heads are awaited one only looks for them.
// Whom the call goes without, and who is masked meanwhile, brings nothing.
struct CountsListener {
    static constexpr int32_t kNotYet = INT32_MIN;
    static constexpr int kAtOnce = 4;  // words of a thread on their way

    const DispatchJob& job;
    const StageTables& tables;
    Entering& in;

    __device__ __forceinline__ const uint64_t* word_of(int src, int column) const {
        const RankView& view = job.view;
        const NoticeLayout layout(view.shape);
        const int at = column < tables.shape.num_ranks
                           ? NoticeLayout::kRows + column
                           : layout.selections + column - tables.shape.num_ranks;
        return NoticeWords(view, in.slot, src).words + at;
    }

    // Counts that come in time. False: of this thread's some did not.
    __device__ __forceinline__ bool look() const {
        int turns = 256;
        bool all = true;
#pragma unroll 1
        for (int c = first_column(); c < tables.columns(); c += static_cast<int>(blockDim.x)) {
#pragma unroll 1
            for (int src = 0; src < tables.shape.num_ranks; src += kAtOnce) {
                bool here = look_at(src, c);
                while (!here && --turns > 0) here = look_at(src, c);
                all = all && here;
            }
        }
        return all;
    }

    // The counts of some sources. False: not all are there.
    __device__ __forceinline__ bool look_at(int first, int column) const {
        const int num = min(kAtOnce, tables.shape.num_ranks - first);
        uint64_t word[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            if (u < num) word[u] = ptx::ld_relaxed_sys(word_of(first + u, column));
        }
        bool all = true;
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            if (u >= num) break;
            const bool here = device::is_of(word[u], in.seq);
            tables.prefix()[(first + u) * tables.columns() + column] =
                here ? static_cast<int32_t>(device::bits_of(word[u])) : kNotYet;
            all = all && here;
        }
        return all;
    }

    // The others. False: leave.
    __device__ __forceinline__ bool take() const {
        const Operation op{OpKind::kDispatch, in.seq};
        const uint64_t gone = in.masked | in.unheard;
        bool ok = true;
#pragma unroll 1
        for (int c = first_column(); ok && c < tables.columns();
             c += static_cast<int>(blockDim.x)) {
#pragma unroll 1
            for (int src = 0; ok && src < tables.shape.num_ranks; ++src) {
                int32_t& count = tables.prefix()[src * tables.columns() + c];
                bool here = gone == 0 || !device::has_rank(gone, src);
                if (here && count != kNotYet) continue;
                uint64_t word = 0;
                if (here) {
                    here = device::wait_packed_word(job.view.watch, op, src, word_of(src, c), word);
                    ok = here || device::goes_on(job.view.watch);
                    if (!here) atomicOr(&in.unheard, 1ull << src);
                }
                count = here ? static_cast<int32_t>(device::bits_of(word)) : 0;
            }
        }
        return ok;
    }
};

// Rows that rank p's x has.
__device__ __forceinline__ int64_t rows_of(const DispatchJob& job, const StageTables& tables,
                                           int p) {
    const int32_t* first = tables.first();
    if (job.args.layout == RecvLayout::kCompact) return tables.total_rows(p);
    return (first[p + 1] - first[p]) * job.args.capacity;
}

// Counts become what comes before each source, and the sums; what is wrong with them becomes the verdict.
// All threads, each with the columns it has heard; a barrier of the block follows.
__device__ __forceinline__ void judge_stage(const DispatchJob& job, const StageTables& tables,
                                            Entering& in) {
    const DispatchArgs& a = job.args;
    const int num_ranks = job.view.shape.num_ranks;
    const bool compact = a.layout == RecvLayout::kCompact;
    const auto owner_of = [&](int c) {
        const int32_t* first = tables.first();
        int p = 0;
        while (first[p + 1] <= c - num_ranks) ++p;
        return p;
    };
#pragma unroll 1
    for (int c = first_column(); c < tables.columns(); c += static_cast<int>(blockDim.x)) {
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
        for (int e = tables.first()[p]; e < tables.first()[p + 1]; ++e) {
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
