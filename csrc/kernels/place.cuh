// Every rank hears what every source brings to every rank, and what every rank has granted. So every
// block works out by itself where its rows go at every rank, and comes to the verdict on all of them.
//
// defines: Experts, CountsReader, place_groups, judge_sizes, explain_numbers
//
// Loops stay loops: this runs once, out of cold caches, and waits for nothing as long as for its code.
#pragma once

#include <cstdint>

#include "contract/calls.h"
#include "contract/gpu.h"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"
#include "kernels/notices.cuh"
#include "kernels/tables.cuh"

namespace ep::kernels {

// Whose experts a block wants to know of.
enum class Experts { kNone, kOwn, kAll };

// A number for "src sends dst so many rows": sums of different ones differ, or somebody wins a lottery.
__device__ __forceinline__ uint32_t mixed(int src, int dst, uint32_t rows) {
    uint32_t h =
        (static_cast<uint32_t>(src) * 1024 + static_cast<uint32_t>(dst)) * 0x9e3779b1u ^ rows;
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    return h ^ h >> 16;
}

// A warp takes over what a source announced. Numbers of peers are untrusted: nothing is computed from
// one that cannot be.
struct CountsReader {
    const DispatchJob& job;
    const Spread& spread;
    Tables tables;
    Entering& in;
    Experts experts;

    __device__ bool operator()(int p, const NoticeWords& words, const Head& head) const {
        const bool bad = !read_target(p, head);
        if (bad && ptx::lane_id() == 0) atomicMin(&in.first_bad, objection(kExtentObjection, p));
        const NoticeLayout layout(job.view.shape);
        const int tokens =
            min(static_cast<int64_t>(head.word(NoticeLayout::kTokens)), job.view.shape.max_tokens);
        return read_rows(p, words, layout, tokens) &&
               (experts == Experts::kNone || job.args.cached ||
                read_selections(p, words, layout, tokens * job.args.num_topk));
    }

private:
    // A lane takes an extent.
    __device__ bool read_target(int p, const Head& head) const {
        using L = NoticeLayout;
        const RankView& view = job.view;
        const int lane = ptx::lane_id(), i = lane - L::kGrant;
        const auto max_rows = static_cast<int32_t>(head.word(L::kMaxRows));
        const auto max_recv = static_cast<int32_t>(head.word(L::kMaxRecv));
        const uint32_t wide = head.word(L::kWideIds);
        Target& target = tables.targets[p];
        bool fine = true;
        if (i >= 0 && i < Grant::kExtents) {
            const int64_t offset = int64_t{head.own} * kExtentAlign;
            const int64_t unit = spread.unit[i] << (i == Grant::kIds && wide != 0 ? 1 : 0);
            const int count = (spread.of_recv >> i & 1) != 0 ? max_recv : max_rows;
            const bool wanted = head.own != Grant::kNone;
            const bool may_lack = count <= 0 || (spread.needed >> i & 1) == 0;
            fine = wanted ? lies_in_arena(view, p, offset, count, unit) : may_lack;
            target.at[i] = wanted ? view.peers.arena[p] + offset : nullptr;
        } else if (lane == L::kMaxRows) {
            target.max_rows = max_rows, target.max_recv = max_recv, target.wide_ids = wide;
        } else if (lane == L::kFreePages) {
            target.free_pages = head.own;
        }
        return __all_sync(~0u, fine);
    }

    __device__ bool read_rows(int p, const NoticeWords& words, const NoticeLayout& layout,
                              int limit) const {
        const RankView& view = job.view;
        const int num_ranks = view.shape.num_ranks, me = view.peers.rank;
        const Operation op{OpKind::kDispatch, in.seq};
        bool ok = true, bad = false;
#pragma unroll 1
        for (int dst = ptx::lane_id(); ok && dst < num_ranks; dst += 32) {
            uint64_t word, expected = 0;
            ok = device::wait_packed(view.watch, op, p, words.words + layout.kRows + dst, word);
            if (ok && job.args.cached) {
                ok = device::wait_packed(view.watch, op, p, words.words + layout.expected + dst,
                                         expected);
            }
            const auto rows = static_cast<int32_t>(device::bits_of(word));
            bad = bad || rows < 0 || rows > limit;
            if (job.args.cached) {
                atomicAdd(&in.routings, mixed(p, dst, device::bits_of(word)) -
                                            mixed(dst, p, device::bits_of(expected)));
            }
            atomicAdd(&tables.total[dst], rows);
            if (p < me) atomicAdd(&tables.base[dst], rows);
            if (dst == me) tables.arriving[p] = rows;
        }
        if (bad) atomicMin(&in.first_bad, objection(kNumberObjection, p));
        return __all_sync(~0u, ok);
    }

    __device__ bool read_selections(int p, const NoticeWords& words, const NoticeLayout& layout,
                                    int limit) const {
        const RankView& view = job.view;
        const int me = view.peers.rank;
        const bool all = experts == Experts::kAll;
        const int first = all ? 0 : view.state.first[me];
        const int end = all ? view.shape.num_experts : view.state.first[me + 1];
        const Operation op{OpKind::kDispatch, in.seq};
        bool ok = true, bad = false;
#pragma unroll 1
        for (int e = first + ptx::lane_id(); ok && e < end; e += 32) {
            uint64_t word;
            ok = device::wait_packed(view.watch, op, p, words.words + layout.selections + e, word);
            const auto count = static_cast<int32_t>(device::bits_of(word));
            bad = bad || count < 0 || count > limit;
            atomicAdd(&tables.experts[e], count);
            if (gives_selections(job.args) && p < me) atomicAdd(&tables.first_row[e], count);
        }
        if (bad) atomicMin(&in.first_bad, objection(kNumberObjection, p));
        return __all_sync(~0u, ok);
    }
};

__device__ __forceinline__ int aligned_up(int count, int alignment) {
    return (count + alignment - 1) / alignment * alignment;
}

// A warp: the groups of rank p's experts one after the other. Every expert's first row is added to what
// comes before our own selections; returns the rows of all groups, and of the largest.
struct GroupSizes {
    int total, largest;
};
__device__ inline GroupSizes place_groups(const DispatchJob& job, const Tables& tables, int p) {
    const DispatchArgs& a = job.args;
    const RankView& view = job.view;
    const int lane = ptx::lane_id(), begin = view.state.first[p], end = view.state.first[p + 1];
    const bool own = p == view.peers.rank;
    GroupSizes sizes{0, 0};
#pragma unroll 1
    for (int e0 = begin; e0 < end; e0 += 32) {
        const int e = e0 + lane;
        const int count = e < end ? tables.experts[e] : 0;
        const int rows = e >= end                        ? 0
                         : a.layout == RecvLayout::kSlab ? static_cast<int>(a.capacity)
                                                         : aligned_up(count, a.alignment);
        int sum = rows;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += other;
        }
        const int before = sizes.total + sum - rows;
        if (e < end && gives_selections(a)) tables.first_row[e] += before;
        if (e < end && own) tables.groups[e - begin] = before;
        sizes.total += __shfl_sync(~0u, sum, 31);
        sizes.largest = max(sizes.largest, __reduce_max_sync(~0u, count));
    }
    if (own && lane == 0) tables.groups[end - begin] = sizes.total;
    __syncwarp();
    return sizes;
}

// Whether the sizes depend on every rank's groups.
__device__ __forceinline__ bool needs_groups(const DispatchArgs& a) {
    return a.layout != RecvLayout::kCompact || a.index_capacity >= 0;
}

// One thread: a rank that cannot take what comes to it. The sizes of a handle are known to their rank
// before it begins.
__device__ inline void judge_size(const DispatchJob& job, Entering& in, const Tables& tables, int p,
                                  const GroupSizes& groups) {
    const DispatchArgs& a = job.args;
    Target& target = tables.targets[p];
    const int64_t recv = tables.total[p];
    const int64_t rows = a.layout == RecvLayout::kCompact ? recv : groups.total;
    const int64_t arriving = a.layout == RecvLayout::kSlab ? groups.largest : rows;
    int code = kOk;
    if (a.cached) {
        if (recv > target.max_recv) code = kStaleHandle;
    } else if (a.capacity >= 0 && arriving > a.capacity) {
        code = kOverCapacity, target.want = a.capacity, target.have = arriving;
    } else if (a.index_capacity >= 0 && groups.total > a.index_capacity) {
        code = kOverCapacity, target.want = a.index_capacity, target.have = groups.total;
    } else if (rows > target.max_rows || recv > target.max_recv) {
        code = kOutOfArena, target.have = int64_t{target.free_pages} * kExtentAlign;
        target.want = rows * a.row_bytes() + recv * (8 + int64_t{12} * a.num_topk + a.scale_bytes);
    }
    target.code = code;
    if (code != kOk) atomicMin(&in.size_bad, objection(kSizeObjection, p));
}

// Of a cached call: every rank's handle has to expect what the others' bring.
__device__ __noinline__ inline void judge_handles(const DispatchJob& job, const Spread& spread,
                                                  Entering& in) {
    const Tables tables(spread);
    const RankView& view = job.view;
    const NoticeLayout layout(view.shape);
    const int num_ranks = view.shape.num_ranks;
#pragma unroll 1
    for (int i = threadIdx.x; i < num_ranks * num_ranks; i += blockDim.x) {
        const int src = i / num_ranks, dst = i % num_ranks;
        const uint32_t sent = NoticeWords(view, in.slot, src).get(layout.kRows + dst);
        const uint32_t wanted = NoticeWords(view, in.slot, dst).get(layout.expected + src);
        if (sent == wanted) continue;
        tables.targets[dst].code = kStaleHandle;
        atomicMin(&in.size_bad, objection(kSizeObjection, dst));
    }
}

// Of grouped and slab, and of a row index of fixed size: where every rank's groups begin.
__device__ __noinline__ inline void judge_groups(const DispatchJob& job, const Spread& spread,
                                                 Entering& in) {
    const Tables tables(spread);
    const int me = job.view.peers.rank;
#pragma unroll 1
    for (int p = threadIdx.x / 32; p < job.view.shape.num_ranks; p += blockDim.x / 32) {
        GroupSizes groups{0, 0};
        if (!job.args.cached || p == me) groups = place_groups(job, tables, p);
        if (ptx::lane_id() == 0) judge_size(job, in, tables, p, groups);
    }
}

// From everybody's numbers to the verdict on them: in.size_bad. All threads.
__device__ __forceinline__ void judge_sizes(const DispatchJob& job, const Spread& spread,
                                            Entering& in) {
    const Tables tables(spread);
    if (needs_groups(job.args)) {
        judge_groups(job, spread, in);
    } else {
#pragma unroll 1
        for (int p = threadIdx.x; p < job.view.shape.num_ranks; p += blockDim.x) {
            judge_size(job, in, tables, p, {0, 0});
        }
    }
    __syncthreads();
    if (in.routings == 0) return;
    judge_handles(job, spread, in);
    __syncthreads();
}

// One thread: an objection to numbers as an outcome.
__device__ __noinline__ inline void explain_numbers(const DispatchJob& job, const Spread& spread,
                                                    Entering& in) {
    const Tables tables(spread);
    const RankView& view = job.view;
    const uint32_t bad = min(in.first_bad, in.size_bad);
    const auto p = static_cast<int>(bad & 0xffff);
    const Target& target = tables.targets[p];
    clear_outcome(view, job.begin, in);
    switch (bad >> 16) {
        case kNumberObjection:
            return set_outcome(in.outcome, kBadCount, p, view.shape.max_tokens,
                               NoticeWords(view, in.slot, p).get(NoticeLayout::kTokens));
        case kExtentObjection:
            return set_outcome(in.outcome, kBadCount, p, view.peers.arena_bytes[p],
                               target.max_rows);
        default:
            return set_outcome(in.outcome, target.code, p, target.want, target.have);
    }
}

}  // namespace ep::kernels
