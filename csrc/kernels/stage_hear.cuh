// In a small dispatch every block hears what all ranks bring to all experts, and comes to the verdict by
// itself.
//
// defines: HeadListener, first_column, CountsListener, HeardLimits, LaneLimits, FirstLook, judge_slowly, judge_stage,
// explain_stage
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"
#include "kernels/notices.cuh"
#include "kernels/stage_masks.cuh"
#include "kernels/stage_tables.cuh"
#include "kernels/usual.cuh"

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

// The counts of all ranks, untrusted until they are judged.
template <class F>
struct CountsListener {
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

    // The counts of some sources. False: not all are there.
    __device__ __forceinline__ bool look(int first, int column, int32_t (&count)[kAtOnce]) const {
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
            count[u] = static_cast<int32_t>(device::bits_of(word[u]));
            all = all && device::is_of(word[u], in.seq);
        }
        return all;
    }
    // What was seen of them, to be judged.
    __device__ __forceinline__ void put(int first, int column,
                                        const int32_t (&count)[kAtOnce]) const {
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            if (first + u >= tables.shape.num_ranks) break;
            tables.prefix()[(first + u) * tables.columns() + column] = count[u];
        }
    }

    // Those of all that heads were heard of; whom the call goes without, and who is masked meanwhile, brings
    // nothing. All threads, each for its columns. False: leave.
    __device__ __forceinline__ bool take(const F& far) const {
        const Operation op{OpKind::kDispatch, in.seq};
        const uint64_t gone = in.masked | in.unheard;
        bool ok = true;
#pragma unroll 1
        for (int c = first_column(); ok && c < tables.columns();
             c += static_cast<int>(blockDim.x)) {
#pragma unroll 1
            for (int src = 0; ok && src < tables.shape.num_ranks; ++src) {
                bool here = gone == 0 || !device::has_rank(gone, src);
                uint64_t word = 0;
                if (here) {
                    here = device::wait_packed_word(watch_of(job.view, far), op, src,
                                                    word_of(src, c), word);
                    ok = here || device::goes_on(job.view.watch);
                    if (!here) atomicOr(&in.unheard, 1ull << src);
                }
                tables.prefix()[src * tables.columns() + c] =
                    here ? static_cast<int32_t>(device::bits_of(word)) : 0;
            }
        }
        return ok;
    }
};

// Rows that rank p's x has.
template <class F = NoFar>
__device__ __forceinline__ int64_t rows_of(const DispatchJob& job, const StageTables& tables,
                                           int p) {
    const int32_t* first = tables.first();
    if (is_compact<F>(job.args.layout)) return tables.total_rows(p);
    return (first[p + 1] - first[p]) * job.args.capacity;
}

// What ranks say of themselves, as warps of this block have heard it.
struct HeardLimits {
    const StageTables& tables;

    __device__ __forceinline__ int tokens(int p) const { return tables.heard()[p].num_tokens; }
    __device__ __forceinline__ int max_rows(int p) const { return tables.heard()[p].max_rows; }
    __device__ __forceinline__ int max_recv(int p) const { return tables.heard()[p].max_recv; }
};

// What lanes of a warp have heard: what rank `lane` brings, and what the rank of a lane's column can take.
struct LaneLimits {
    uint32_t num_tokens = 0, rows = 0, recv = 0;

    // Of any rank, by all lanes; of that of this thread's column.
    __device__ __forceinline__ int tokens(int p) const {
        return static_cast<int>(__shfl_sync(~0u, num_tokens, p));
    }
    __device__ __forceinline__ int max_rows(int) const { return static_cast<int>(rows); }
    __device__ __forceinline__ int max_recv(int) const { return static_cast<int>(recv); }
};

// All that a warp waits for, looked at together, as long as it takes in most calls: else each load would wait
// for the one before. Only while nobody is masked, and where each thread has at most one column.
template <class F>
struct FirstLook {
    static constexpr int kTurns = 256;
    static constexpr int kPeeks = 8;  // at a piece: more take bandwidth from what comes

    const DispatchJob& job;
    const StageTables& tables;
    Entering& in;
    uint32_t head = 0;  // a lane's word of the first head
    LaneLimits limits = {};

    __device__ __forceinline__ bool is_enough() const {
        return in.masked == 0 && job.view.shape.num_ranks <= 32 &&
               tables.columns() <= static_cast<int>(blockDim.x);
    }

    // `piece`: with load() and look(), what a warp would like to have as well. One warp. False: something has
    // not come.
    template <class Piece>
    __device__ __forceinline__ bool run(Piece& piece) {
        using L = NoticeLayout;
        const RankView& view = job.view;
        const CountsListener<F> heard{job, tables, in};
        const int num_ranks = view.shape.num_ranks, column = first_column();
        const int p = first_head<true>(), lane = static_cast<int>(ptx::lane_id());
        const bool has_column = column < tables.columns();
        const uint64_t* heads = NoticeWords(view, in.slot, p < num_ranks ? p : 0).words + lane;
        const uint64_t* of_lane = NoticeWords(view, in.slot, lane < num_ranks ? lane : 0).words;
        const uint64_t* own = NoticeWords(view, in.slot, column < num_ranks ? column : 0).words;
        bool all = false;
#pragma unroll 1
        for (int turn = 0, first = 0; turn < kTurns && !all; ++turn) {
            const uint64_t none = device::pack(0, in.seq);  // who waits for nothing has it
            uint64_t word[4] = {none, none, none, none};
            if (turn < kPeeks) piece.load();
            if (p < num_ranks) word[0] = ptx::ld_relaxed_sys(heads);
            if (lane < num_ranks) word[1] = ptx::ld_relaxed_sys(of_lane + L::kTokens);
            if (column < num_ranks) {
                word[2] = ptx::ld_relaxed_sys(own + L::kMaxRows);
                word[3] = ptx::ld_relaxed_sys(own + L::kMaxRecv);
            }
            int32_t counts[CountsListener<F>::kAtOnce];
            bool here = !has_column || heard.look(first, column, counts);
            if (has_column) heard.put(first, column, counts);
            const bool is_end = first + CountsListener<F>::kAtOnce >= num_ranks;
#pragma unroll
            for (const uint64_t w : word) here = here && (!is_end || device::is_of(w, in.seq));
            head = device::bits_of(word[0]);
            limits = {device::bits_of(word[1]), device::bits_of(word[2]), device::bits_of(word[3])};
            if (turn < kPeeks) piece.look();
            all = __all_sync(~0u, here);
            if (!all || is_end) continue;
            all = false;
            first += CountsListener<F>::kAtOnce;
        }
        return all;
    }
};

// The counts of a column become what comes before each source, and their sum; what is wrong with them becomes
// the verdict. All lanes of a warp, each with a column it `has` heard; a barrier of the block follows.
template <class F = NoFar, class Limits>
__device__ __forceinline__ void judge_column(const DispatchJob& job, const StageTables& tables,
                                             Entering& in, int c, bool has, const Limits& limits) {
    const DispatchArgs& a = job.args;
    const int num_ranks = job.view.shape.num_ranks;
    const bool compact = is_compact<F>(a.layout), rows = c < num_ranks;
    const auto owner_of = [&](int column) {
        const int32_t* first = tables.first();
        int p = 0;
        while (first[p + 1] <= column - num_ranks) ++p;
        return p;
    };
    int sum = 0;
#pragma unroll 1
    for (int p = 0; p < num_ranks; ++p) {
        const bool counts = !without<F>(in, p);  // of some that do not, some words have come
        const int told = limits.tokens(p), tokens = counts ? told : 0;
        if (!has) continue;
        int32_t& at = tables.prefix()[p * tables.columns() + c];
        const int count = counts ? at : 0;
        const bool fine = tokens >= 0 && tokens <= job.view.shape.max_tokens && count >= 0 &&
                          count <= tokens * (rows ? 1 : a.num_topk);
        if (!fine) atomicMin(&in.first_bad, objection(kNumberObjection, p));
        at = sum;
        sum += count;
    }
    if (!has) return;
    tables.prefix()[num_ranks * tables.columns() + c] = sum;
    const bool over = compact ? rows && sum > a.capacity : !rows && sum > a.capacity;
    if (over && a.capacity >= 0) {
        const int owner = rows ? c : owner_of(c);
        if (!without<F>(in, owner)) atomicMin(&in.size_bad, objection(kSizeObjection, owner));
    }
    if (!rows || without<F>(in, c)) return;
    const bool fits = sum <= limits.max_recv(c) &&
                      (compact ? sum : rows_of<F>(job, tables, c)) <= limits.max_rows(c);
    if (!fits) atomicMin(&in.size_bad, objection(kSizeObjection, c));
}

// The same, should a lane find something wrong: what, and with whom.
template <class F>
__device__ __noinline__ void judge_slowly(const DispatchJob& job, const StageSpread& spread,
                                          Entering& in, int c, bool has, LaneLimits limits) {
    judge_column<F>(job, StageTables{spread, job.view.shape}, in, c, has, limits);
}

// All columns of a thread.
__device__ __forceinline__ void judge_stage(const DispatchJob& job, const StageTables& tables,
                                            Entering& in) {
    const auto threads = static_cast<int>(blockDim.x);
#pragma unroll 1
    for (int first = 0; first < tables.columns(); first += threads) {
        const int c = first + first_column();
        judge_column(job, tables, in, c, c < tables.columns(), HeardLimits{tables});
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
