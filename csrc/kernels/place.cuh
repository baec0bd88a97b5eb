// The receiver's half of notify: what arrives is read and checked, every source gets its rows, and
// the bases say where they are. The base a receiver publishes is the credit.
//
// defines: Placing, CountsReader, judge_counts, place, judge_size, publish_bases, await_bases
//
// All functions are for all threads of the one block, unless they say otherwise.
//
// Loops stay loops: this runs once, out of cold caches, and waits for nothing as long as for its code.
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"

namespace ep::kernels {

// In shared memory. The arrays lie behind the counters, see placing_bytes.
struct Placing {
    int64_t num_recv, num_rows, index_rows;
    int64_t want, have;
    int32_t num_local, max_count, code;
    uint32_t bad_source;   // lowest rank whose counts cannot be
    int32_t* first;        // [num_ranks + 1] position of each rank's first expert
    int32_t* arriving;     // [num_ranks] rows of each source
    int32_t* first_row;    // [num_ranks + 1] of each source
    int32_t* base_row;     // [num_ranks] our first row at each rank
    int32_t* selections;   // [num_ranks][num_local]
    int32_t* counts;       // [num_local]
    int32_t* group_start;  // [num_local + 1]
};

__host__ __device__ constexpr int placing_bytes(const Shape& s) {
    return 4 * (4 * s.num_ranks + 2 + (s.num_ranks + 2) * s.max_local_experts + 1);
}

// One thread.
__device__ inline void init_placing(const RankView& view, Placing& p, int32_t* data) {
    const int num_ranks = view.shape.num_ranks, most = view.shape.max_local_experts;
    p = {};
    p.code = kOk;
    p.bad_source = kNoObjection;
    p.first = data;
    p.arriving = p.first + num_ranks + 1;
    p.first_row = p.arriving + num_ranks;
    p.base_row = p.first_row + num_ranks + 1;
    p.counts = p.base_row + num_ranks;
    p.group_start = p.counts + most;
    p.selections = p.group_start + most + 1;
}

__device__ __forceinline__ int64_t limit_of(const RankView& view, const EntryRecord& entry) {
    return min(entry.num_tokens, view.shape.max_tokens);
}

// A warp takes over what a source announced. Counts of peers are untrusted: nothing is computed from
// a number that cannot be.
struct CountsReader {
    const DispatchJob& job;
    int slot;
    Placing& placing;

    __device__ void operator()(int src) const {
        const RankView& view = job.view;
        const int lane = threadIdx.x % 32;
        const auto* counts =
            at<const int32_t>(view, view.peers.rank, view.layout.count_row(slot, src));
        const EntryRecord& entry = entry_of(view, slot, src);
        const int64_t limit = limit_of(view, entry);
        bool bad = entry.num_rows < 0 || entry.num_rows > limit;
#pragma unroll 4
        for (int e = lane; e < placing.num_local && !job.args.cached; e += 32) {
            const int count = counts[e];
            bad = bad || count < 0 || count > limit * job.args.num_topk;
            placing.selections[src * placing.num_local + e] = count;
        }
        if (__any_sync(~0u, bad) && lane == 0) atomicMin(&placing.bad_source, uint32_t(src));
        if (lane == 0) placing.arriving[src] = static_cast<int32_t>(entry.num_rows);
    }
};

// Of entries that agree with ours.
__device__ inline void judge_counts(const DispatchJob& job, Entering& in, Placing& placing) {
    const RankView& view = job.view;
    const int num_ranks = view.shape.num_ranks;
    // Our own handle is not the one the peers use: refuse, as a receiver.
#pragma unroll 1
    for (int src = threadIdx.x; job.args.cached && src < num_ranks; src += blockDim.x) {
        if (placing.arriving[src] != job.args.rank_counts[num_ranks + src]) {
            placing.code = kStaleHandle;
        }
    }
    if (threadIdx.x == 0 && placing.bad_source != kNoObjection) {
        const int src = static_cast<int>(placing.bad_source);
        const EntryRecord& entry = entry_of(view, in.slot, src);
        set_outcome(in.outcome, kBadCount, src, limit_of(view, entry), entry.num_rows);
    }
    __syncthreads();
}

// out[i] = in[0] + ... + in[i - 1] for i in [0, n]; one warp. `get` makes in[i].
template <class Get>
__device__ int warp_prefix(int n, int32_t* out, Get get) {
    const int lane = threadIdx.x % 32;
    int total = 0;
#pragma unroll 1
    for (int i0 = 0; i0 < n; i0 += 32) {
        const int mine = i0 + lane < n ? get(i0 + lane) : 0;
        int sum = mine;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += other;
        }
        if (i0 + lane < n) out[i0 + lane] = total + sum - mine;
        total += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) out[n] = total;
    __syncwarp();
    return total;
}

// Selections of every local expert, over all sources.
__device__ inline void sum_selections(const DispatchJob& job, Placing& placing) {
    const RankView& view = job.view;
#pragma unroll 1
    for (int e = threadIdx.x; e < placing.num_local; e += blockDim.x) {
        int sum = 0;
        if (job.args.cached) {
            sum = job.args.expert_counts[e];
        } else {
#pragma unroll 1
            for (int src = 0; src < view.shape.num_ranks; ++src) {
                sum += placing.selections[src * placing.num_local + e];
            }
            job.args.expert_counts[e] = sum;
        }
        placing.counts[e] = view.state.counts[e] = sum;
        atomicMax(&placing.max_count, sum);
    }
}

// Warp 0: prefix sums over sources.
__device__ inline void place_sources(const DispatchJob& job, Placing& placing) {
    const RankView& view = job.view;
    const int num_ranks = view.shape.num_ranks, lane = threadIdx.x % 32;
    const int total =
        warp_prefix(num_ranks, placing.first_row, [&](int src) { return placing.arriving[src]; });
#pragma unroll 1
    for (int src = lane; src <= num_ranks; src += 32) {
        view.state.first_row[src] = placing.first_row[src];
        if (src < num_ranks && !job.args.cached) {
            job.args.rank_counts[num_ranks + src] = placing.arriving[src];
        }
    }
    if (lane == 0) placing.num_recv = placing.num_rows = total;
}

// Warp 0: prefix sums over local experts, for rows of grouped and slab, or of the row index.
__device__ inline void place_groups(const DispatchJob& job, Placing& placing) {
    const DispatchArgs& a = job.args;
    const int lane = threadIdx.x % 32;
    const int total = warp_prefix(placing.num_local, placing.group_start, [&](int e) {
        if (a.layout == RecvLayout::kSlab) return static_cast<int>(a.capacity);
        return (placing.counts[e] + a.alignment - 1) / a.alignment * a.alignment;
    });
#pragma unroll 1
    for (int e = lane; e <= placing.num_local; e += 32) {
        job.view.state.group_start[e] = placing.group_start[e];
    }
    if (lane != 0) return;
    placing.index_rows = total;
    if (a.layout != RecvLayout::kCompact) placing.num_rows = total;
}

// Whether rows depend on the groups; if not, these are told later.
__device__ __forceinline__ bool needs_groups(const DispatchArgs& a) {
    return a.layout != RecvLayout::kCompact || a.index_capacity >= 0;
}

__device__ inline void place(const DispatchJob& job, Placing& placing) {
    sum_selections(job, placing);
    if (threadIdx.x < 32) place_sources(job, placing);
    __syncthreads();
    if (!needs_groups(job.args)) return;
    if (threadIdx.x < 32) place_groups(job, placing);
    __syncthreads();
}

// One thread: does what arrives fit what was allowed, and what was granted?
__device__ inline void judge_size(const DispatchJob& job, Placing& placing, int64_t meta_bytes) {
    const DispatchArgs& a = job.args;
    const bool slab = a.layout == RecvLayout::kSlab;
    const int64_t arriving = slab ? placing.max_count : placing.num_rows;
    if (a.capacity >= 0 && arriving > a.capacity) {
        placing.code = kOverCapacity;
        placing.want = a.capacity;
        placing.have = arriving;
    } else if (a.index_capacity >= 0 && placing.index_rows > a.index_capacity) {
        placing.code = kOverCapacity;
        placing.want = a.index_capacity;
        placing.have = placing.index_rows;
    } else if (placing.num_rows > job.grant.max_rows ||
               (meta_bytes > 0 && placing.num_recv > job.grant.max_recv)) {
        placing.code = kOutOfArena;
        placing.want = placing.num_rows * a.row_bytes() + placing.num_recv * meta_bytes;
        placing.have = job.grant.free_bytes;
    }
}

// "You may write here." The last release of every source's base is the credit.
__device__ inline void publish_bases(const DispatchJob& job, uint64_t seq, int slot,
                                     const Placing& placing) {
    const RankView& view = job.view;
    const int num_ranks = view.shape.num_ranks, me = view.peers.rank;
    if (placing.code == kOk && !job.args.cached && job.args.layout != RecvLayout::kCompact) {
#pragma unroll 1
        for (int e = threadIdx.x; e < placing.num_local; e += blockDim.x) {
            int next = placing.group_start[e];
#pragma unroll 1
            for (int src = 0; src < num_ranks; ++src) {
                *at<int32_t>(view, src, view.layout.expert_row(slot, placing.first[me] + e)) = next;
                next += placing.selections[src * placing.num_local + e];
            }
        }
        __syncthreads();
    }
#pragma unroll 1
    for (int src = threadIdx.x; src < num_ranks; src += blockDim.x) {
        BaseRecord& base = *at<BaseRecord>(view, src, view.layout.base(slot, me));
        base.code = placing.code;
        base.x_offset = job.grant.x_offset;
        base.meta_offset = job.grant.meta_offset;
        base.row = placing.first_row[src];
        base.num_rows = job.grant.max_rows;
        base.detail[0] = placing.have;
        base.detail[1] = placing.want;
        ptx::st_release_sys(&base.seq, seq);  // pairs with the acquire in await_bases
    }
}

// Whether the rows and records we bring fit where this peer says.
__device__ __noinline__ inline bool is_sane(const DispatchJob& job, const BaseRecord& base, int p,
                                            int64_t rows, int64_t meta_bytes) {
    if (base.code != kOk) return may_poison_base(base.code);
    const RankView& view = job.view;
    const bool row_ok = base.row >= 0 && base.row <= view.peers.arena_bytes[p];
    return row_ok && lies_in_arena(view, p, base.x_offset, base.num_rows, job.args.row_bytes()) &&
           (rows == 0 || meta_bytes == 0 ||
            lies_in_arena(view, p, base.meta_offset, base.row + rows, meta_bytes));
}

// All bases, not only those of ranks we send to: so all ranks learn of a refusal before a row moves.
// `sent`: our rows for every rank.
__device__ inline bool await_bases(const DispatchJob& job, Entering& in, Placing& placing,
                                   const int32_t* sent, int64_t meta_bytes) {
    const RankView& view = job.view;
    const int slot = in.slot;
    const Operation op{OpKind::kDispatch, in.seq};
    bool ok = true;
#pragma unroll 1
    for (int p = threadIdx.x; p < view.shape.num_ranks; p += blockDim.x) {
        const auto* word = at<BaseRecord>(view, view.peers.rank, view.layout.base(slot, p));
        ok = ok && device::wait_word(view.watch, op, {Site::kBase, p, in.seq}, &word->seq);
        if (!ok) break;
        const BaseRecord base = *word;
        placing.base_row[p] = static_cast<int32_t>(base.row);
        if (!is_sane(job, base, p, sent[p], meta_bytes)) {
            atomicMin(&in.first_bad, objection(kEpochObjection, p));
        } else if (base.code != kOk) {
            atomicMin(&in.first_bad, objection(kPoisonObjection, p));
        }
    }
    ok = __syncthreads_and(ok);
    if (ok && threadIdx.x == 0 && in.first_bad != kNoObjection) {
        const int p = static_cast<int>(in.first_bad & 0xffff);
        const auto* base = at<BaseRecord>(view, view.peers.rank, view.layout.base(slot, p));
        if (in.first_bad >> 16 == kPoisonObjection) {
            set_outcome(in.outcome, base->code, p, base->detail[1], base->detail[0]);
        } else {
            const int64_t limit = view.peers.arena_bytes[p];
            set_outcome(in.outcome, kBadCount, p, limit,
                        base->code != kOk ? base->code : base->x_offset);
        }
    }
    __syncthreads();
    return ok;
}

}  // namespace ep::kernels
