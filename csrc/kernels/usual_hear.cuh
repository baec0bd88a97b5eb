// A usual dispatch hears what all ranks bring to all experts, and judges it (kernels/stage_hear.cuh): all that a thread
// needs of notices is asked for together, and stays in its registers.
//
// defines: UsualHearing
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "kernels/enter.cuh"
#include "kernels/notices.cuh"
#include "kernels/stage_hear.cuh"
#include "kernels/stage_tables.cuh"
#include "kernels/usual.cuh"

namespace ep::kernels {

// Of a thread: a column of counts, should there be so many, and its lane's words of heads.
template <class F>
struct UsualHearing {
    static constexpr int kTurns = 256;

    const DispatchJob& job;
    const StageTables& tables;
    Entering& in;
    int column = first_column();
    uint32_t counts[kUsualRanks] = {};
    uint32_t head = 0;  // of the rank that this warp judges
    LaneLimits limits = {};

    __device__ __forceinline__ int num_ranks() const { return tables.shape.num_ranks; }
    __device__ __forceinline__ bool has_column() const { return column < tables.columns(); }

    // As long as it takes in most calls. One warp. False: something has not come.
    __device__ __forceinline__ bool wait() {
        using L = NoticeLayout;
        const RankView& view = job.view;
        const NoticeLayout layout(view.shape);
        const int ranks = num_ranks(), lane = ptx::lane_id(), judged = first_head<true>();
        const int apart = view.layout.notice_words;
        const uint64_t* notices = NoticeWords(view, in.slot, 0).words;
        const bool is_rank = column < ranks, has = has_column();
        const uint64_t* of_column =
            notices + (is_rank ? L::kRows + column : layout.selections + column - ranks);
        const uint64_t* of_head = notices + judged * apart + lane;
        const uint64_t* of_lane = notices + lane * apart + L::kTokens;
        const uint64_t* of_rank = notices + column * apart;
        const auto seq = static_cast<uint32_t>(in.seq);
        const uint64_t none = device::pack(0, seq);  // who waits for nothing has it
#pragma unroll 1
        for (int turn = 0; turn < kTurns; ++turn) {
            uint64_t count[kUsualRanks], word[4] = {none, none, none, none};
#pragma unroll
            for (uint64_t& c : count) c = none;
#pragma unroll
            for (int p = 0; p < kUsualRanks; ++p) {
                if (p >= ranks) break;
                if (has) count[p] = ptx::ld_relaxed_sys(of_column + p * apart);
            }
            if (judged < ranks) word[0] = ptx::ld_relaxed_sys(of_head);
            if (lane < ranks) word[1] = ptx::ld_relaxed_sys(of_lane);
            if (is_rank) {
                word[2] = ptx::ld_relaxed_sys(of_rank + L::kMaxRows);
                word[3] = ptx::ld_relaxed_sys(of_rank + L::kMaxRecv);
            }
            bool here = true;
#pragma unroll
            for (const uint64_t w : count) here &= device::is_of(w, seq);
#pragma unroll
            for (const uint64_t w : word) here &= device::is_of(w, seq);
            if (!__all_sync(~0u, here)) continue;
#pragma unroll
            for (int p = 0; p < kUsualRanks; ++p) counts[p] = device::bits_of(count[p]);
            head = device::bits_of(word[0]);
            limits = {device::bits_of(word[1]), device::bits_of(word[2]), device::bits_of(word[3])};
            return true;
        }
        return false;
    }

    // What has come becomes what the tables hold of it. One warp; false: there is an objection.
    __device__ __forceinline__ bool judge() {
        const DispatchArgs& a = job.args;
        const auto max_tokens = static_cast<uint32_t>(tables.shape.max_tokens);
        const int ranks = num_ranks(), columns = tables.columns();
        const bool compact = is_compact<F>(a.layout), is_rank = column < ranks, has = has_column();
        const uint32_t most = is_rank ? 1 : a.num_topk;  // of a token
        uint32_t before[kUsualRanks];
        int sum = 0;
        bool fine = true;
#pragma unroll
        for (int p = 0; p < kUsualRanks; ++p) {
            if (p >= ranks) break;
            const uint32_t tokens = __shfl_sync(~0u, limits.num_tokens, p);
            fine &= tokens <= max_tokens && counts[p] <= tokens * most;  // none is negative
            before[p] = static_cast<uint32_t>(sum);
            sum += static_cast<int>(counts[p]);
        }
        if (compact == is_rank && a.capacity >= 0) fine &= sum <= a.capacity;
        if (is_rank) {
            fine &= sum <= limits.max_recv(column) &&
                    (compact ? sum : rows_of<F>(job, tables, column)) <= limits.max_rows(column);
        }
        if (__any_sync(~0u, has && !fine)) {
            put(counts);
            judge_slowly<F>(job, tables.spread, in, column, has, limits);
            return judge_head() && false;
        }
        put(before);
        if (has) tables.prefix()[ranks * columns + column] = sum;
        return judge_head();
    }

private:
    __device__ __forceinline__ void put(const uint32_t (&of_rank)[kUsualRanks]) const {
        int32_t* prefix = tables.prefix() + column;
#pragma unroll
        for (int p = 0; p < kUsualRanks; ++p) {
            if (p >= num_ranks()) break;
            if (has_column()) prefix[p * tables.columns()] = static_cast<int32_t>(of_rank[p]);
        }
    }
    __device__ __forceinline__ bool judge_head() const {
        using L = NoticeLayout;
        const int p = first_head<true>(), lane = ptx::lane_id();
        if (p >= num_ranks()) return true;
        const uint32_t bad = kernels::judge(in, p, Head{head}, false);
        if (bad != kNoObjection) {
            if (lane == 0) atomicMin(&in.first_bad, bad);
            return false;
        }
        Heard& heard = tables.heard()[p];
        if (lane == L::kTokens) heard.num_tokens = static_cast<int32_t>(head);
        if (lane == L::kMaxRows) heard.max_rows = static_cast<int32_t>(head);
        if (lane == L::kMaxRecv) heard.max_recv = static_cast<int32_t>(head);
        if (lane == L::kFreePages) heard.free_pages = head;
        return true;
    }
};

}  // namespace ep::kernels
