// Counts first: where every row of a dispatch will lie is known before any row moves.
//
// A block walks one range of tokens (a chunk), once to count and once to give every token its turn
// at each rank; prefix sums over chunks, then over sources, make rows of turns. No atomics decide an
// order, so the same routing gives the same rows. The base a receiver publishes is the credit.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "contract/gpu.h"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.h"

namespace ep::kernels {
namespace {

constexpr int kAhead = 4;  // loads of ids a thread has in flight

// Counters in shared memory: a row for each warp or chunk, [num_ranks] tokens, then [num_experts]
// selections by position. Padded to an odd length, so that a warp may walk down a column.
struct Counters {
    int32_t* data;
    int num_rows, num_columns, stride;

    __device__ int32_t* row(int r) const { return data + r * stride; }
    __device__ int32_t* totals() const { return data + num_rows * stride; }
};

__host__ __device__ constexpr int columns_of(const Shape& s) { return s.num_ranks + s.num_experts; }
__host__ __device__ constexpr int stride_of(const Shape& s) { return columns_of(s) | 1; }

// One token of each group of num_topk lanes: counts it, or gives it its turn at every rank. For the
// latter the counters start from what comes before.
template <bool kGivesTurns>
struct Walk {
    const DispatchJob& job;
    int32_t* rows;        // [num_ranks] of this warp
    int32_t* selections;  // [num_experts]
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
        const int position = chosen ? __ldg(view.state.position + id) : -1;
        const int leader = first_at(dst);
        const bool first = chosen && leader == static_cast<int>(ptx::lane_id());
        const uint32_t rivals = going_to(first ? dst : -1);
        int turn = first ? rows[dst] + __popc(rivals & before) : 0;
        __syncwarp();
        if (first && (rivals & before) == 0) rows[dst] += __popc(rivals);
        turn = __shfl_sync(~0u, turn, leader);
        if (kGivesTurns && chosen) view.state.turn[at] = turn;
        if (!kGivesTurns) {
            if (chosen) atomicAdd(&selections[position], 1);
        } else if (job.args.layout != RecvLayout::kCompact && !job.args.cached) {
            count_selection(at, chosen, position, before);
        }
        __syncwarp();
    }

    // The lane of this token's first slot at the same rank.
    __device__ int first_at(int dst) const {
        const int own = ptx::lane_id(), start = own - slot;
        int leader = own;
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
        for (int r = 0; r < num_ranks; ++r) {
            const uint32_t lanes = __ballot_sync(~0u, dst == r);
            if (dst == r) mine = lanes;
        }
        return mine;
    }

    // Rows of grouped and slab are given selection by selection, in the order (token, slot).
    __device__ void count_selection(int64_t at, bool chosen, int position, uint32_t before) const {
        const uint32_t rivals = __match_any_sync(~0u, position);
        const int turn = chosen ? selections[position] + __popc(rivals & before) : -1;
        __syncwarp();
        if (chosen && (rivals & before) == 0) selections[position] += __popc(rivals);
        if (chosen) job.args.send_row[at] = turn;
    }
};

// The warps of a block share the chunk; `counters` has a row for each.
template <bool kGivesTurns>
__device__ void walk_chunk(const DispatchJob& job, const Counters& counters, int chunk,
                           BadIds* bad) {
    const int lane = ptx::lane_id(), num_topk = job.args.num_topk;
    const int warp = threadIdx.x / 32, num_warps = counters.num_rows;
    const int per_turn = 32 / num_topk;
    int32_t* own = counters.row(warp);
    const Walk<kGivesTurns> walk{
        job, own, own + job.view.shape.num_ranks, bad, lane / num_topk, lane % num_topk};
    const int turns = (job.tokens_per_chunk + per_turn - 1) / per_turn;
    const int share = (turns + num_warps - 1) / num_warps * per_turn;
    const int64_t first = int64_t{chunk} * job.tokens_per_chunk;
    const int64_t chunk_end = min(first + job.tokens_per_chunk, job.args.num_tokens);
    const int64_t begin = first + int64_t{warp} * share, end = min(begin + share, chunk_end);
    const bool active = lane < per_turn * num_topk;
    for (int64_t t0 = begin; t0 < end; t0 += kAhead * per_turn) {
        int64_t ids[kAhead];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            const int64_t t = t0 + u * per_turn + walk.token;
            ids[u] = active && t < end ? job.args.topk_idx[t * num_topk + walk.slot] : -1;
        }
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            const int64_t t = t0 + u * per_turn + walk.token;
            if (t0 + u * per_turn < end) walk.turn(t, active && t < end, ids[u]);
        }
    }
}

// Down every column: counts become exclusive sums over the rows, and a total below.
__device__ void sum_columns(const Counters& counters) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
    for (int column = warp; column < counters.num_columns; column += num_warps) {
        int32_t* cell = counters.row(lane) + column;
        const int mine = lane < counters.num_rows ? *cell : 0;
        int sum = mine;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += other;
        }
        if (lane < counters.num_rows) *cell = sum - mine;
        if (lane == 31) counters.totals()[column] = sum;
    }
}

// Counts a chunk and gives its turns; leaves its totals where notify finds them.
__device__ void count_chunk(const DispatchJob& job, const Counters& counters, int chunk,
                            BadIds& bad) {
    for (int i = threadIdx.x; i < counters.num_rows * counters.stride; i += blockDim.x) {
        counters.data[i] = 0;
    }
    if (threadIdx.x == 0) bad = {0, ~0ull};
    __syncthreads();
    walk_chunk<false>(job, counters, chunk, &bad);
    __syncthreads();
    sum_columns(counters);
    __syncthreads();
    int32_t* counts = job.view.state.chunk_counts + chunk * counters.num_columns;
    for (int i = threadIdx.x; i < counters.num_columns; i += blockDim.x) {
        counts[i] = counters.totals()[i];
    }
    if (threadIdx.x == 0) job.view.state.bad_ids[chunk] = bad;
    walk_chunk<true>(job, counters, chunk, nullptr);
    __syncthreads();
}

// Brings the totals of all chunks together; what is wrong with them goes into the entry.
__device__ void gather_chunks(const DispatchJob& job, const Counters& counters, Entering& in) {
    const State& state = job.view.state;
    const DispatchArgs& a = job.args;
    for (int i = threadIdx.x; i < counters.num_rows * counters.num_columns; i += blockDim.x) {
        const int chunk = i / counters.num_columns, column = i % counters.num_columns;
        counters.row(chunk)[column] = state.chunk_counts[i];
    }
    static_assert(kMaxChunks <= 32);
    if (threadIdx.x < 32) {
        const bool mine = int(threadIdx.x) < counters.num_rows;
        const int count = mine ? state.bad_ids[threadIdx.x].count : 0;
        const uint32_t bad = __ballot_sync(~0u, count > 0);
        const int total = __reduce_add_sync(~0u, count);
        if (bad != 0 && threadIdx.x == 0) {
            const auto at = static_cast<int64_t>(state.bad_ids[__ffs(bad) - 1].first);
            in.entry.code = kBadExpertId;
            in.entry.detail[0] = total;
            in.entry.detail[1] = at / a.num_topk;
            in.entry.detail[2] = at % a.num_topk;
            in.entry.detail[3] = a.topk_idx[at];
        }
    }
    __syncthreads();
    sum_columns(counters);
    __syncthreads();
    for (int p = threadIdx.x; p < job.view.shape.num_ranks; p += blockDim.x) {
        if (!a.cached) {
            a.rank_counts[p] = counters.totals()[p];
        } else if (a.rank_counts[p] != counters.totals()[p]) {
            in.entry.code = kStaleHandle;  // a tensor of the handle was changed since
        }
    }
    __syncthreads();
}

// out[i] = get(0) + ... + get(i - 1) for i in [0, n]; one warp. Returns out[n].
template <class Get>
__device__ int warp_prefix(int n, int32_t* out, Get get) {
    const int lane = threadIdx.x % 32;
    int total = 0;
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
    return total;
}

__device__ __forceinline__ int round_up(int n, int multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// The receiver's half, in shared memory.
struct Placing {
    int64_t num_recv, num_rows, index_rows;
    int32_t num_local, max_count, code;
    int64_t want, have;
};

__device__ __forceinline__ const int32_t* counts_from(const RankView& view, uint64_t seq, int src) {
    const int slot = static_cast<int>(seq % view.shape.num_slots);
    return at<int32_t>(view, view.peers.rank, view.layout.count_row(slot, src));
}

// Counts of peers are untrusted: nothing is computed from a number that cannot be.
__device__ void check_counts(const DispatchJob& job, Entering& in, Placing& placing) {
    const RankView& view = job.view;
    const int num_ranks = view.shape.num_ranks, num_local = placing.num_local;
    for (int src = threadIdx.x / 32; src < num_ranks; src += blockDim.x / 32) {
        const EntryRecord& entry = entry_of(view, in.seq, src);
        const int64_t limit = min(entry.num_tokens, view.shape.max_tokens);
        bool bad = entry.num_rows < 0 || entry.num_rows > limit;
        const bool stale =
            job.args.cached && entry.num_rows != job.args.rank_counts[num_ranks + src];
        for (int e = threadIdx.x % 32; !job.args.cached && e < num_local; e += 32) {
            const int64_t selections = counts_from(view, in.seq, src)[e];
            bad = bad || selections < 0 || selections > limit * job.args.num_topk;
        }
        bad = __any_sync(~0u, bad);
        if (threadIdx.x % 32 == 0 && bad) {
            atomicMin(&in.first_bad, objection(kEpochObjection, src));
        }
        // Our own handle is not the one the peers use: refuse, as a receiver.
        if (threadIdx.x % 32 == 0 && stale) placing.code = kStaleHandle;
    }
    __syncthreads();
    if (threadIdx.x != 0 || in.first_bad == kNoObjection) return;
    const int src = static_cast<int>(in.first_bad & 0xffff);
    const EntryRecord& entry = entry_of(view, in.seq, src);
    set_outcome(in.outcome, kBadCount, src, min(entry.num_tokens, view.shape.max_tokens),
                entry.num_rows);
}

// Prefix sums over sources, and over local experts, give every source its rows.
__device__ void place(const DispatchJob& job, const Entering& in, Placing& placing) {
    const RankView& view = job.view;
    const DispatchArgs& a = job.args;
    const int num_ranks = view.shape.num_ranks, num_local = placing.num_local;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int e = threadIdx.x; e < num_local; e += blockDim.x) {
        int sum = 0;
        if (a.cached) {
            sum = a.expert_counts[e];
        } else {
            for (int src = 0; src < num_ranks; ++src) sum += counts_from(view, in.seq, src)[e];
            a.expert_counts[e] = sum;
        }
        view.state.counts[e] = sum;
        atomicMax(&placing.max_count, sum);
    }
    if (warp == 0) {
        const int total = warp_prefix(num_ranks, view.state.first_row, [&](int src) {
            return static_cast<int>(entry_of(view, in.seq, src).num_rows);
        });
        if (lane == 0) placing.num_recv = total;
        for (int src = lane; !a.cached && src < num_ranks; src += 32) {
            a.rank_counts[num_ranks + src] = entry_of(view, in.seq, src).num_rows;
        }
    }
    __syncthreads();
    if (warp == 0) {
        const int32_t* counts = view.state.counts;
        const int total = warp_prefix(num_local, view.state.group_start, [&](int e) {
            return a.layout == RecvLayout::kSlab ? static_cast<int>(a.capacity)
                                                 : round_up(counts[e], a.alignment);
        });
        if (lane == 0) {
            placing.index_rows = total;
            placing.num_rows = a.layout == RecvLayout::kCompact ? placing.num_recv : total;
        }
    }
    __syncthreads();
}

// One thread: does what arrives fit what was allowed, and what was granted?
__device__ void judge_size(const DispatchJob& job, Placing& placing, int64_t meta_bytes) {
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
__device__ void publish_bases(const DispatchJob& job, const Entering& in, const Placing& placing) {
    const RankView& view = job.view;
    const int num_ranks = view.shape.num_ranks, me = view.peers.rank;
    const int slot = static_cast<int>(in.seq % view.shape.num_slots);
    if (placing.code == kOk && !job.args.cached && job.args.layout != RecvLayout::kCompact) {
        const int first = view.state.first[me];
        for (int e = threadIdx.x; e < placing.num_local; e += blockDim.x) {
            int next = view.state.group_start[e];
            for (int src = 0; src < num_ranks; ++src) {
                *at<int32_t>(view, src, view.layout.expert_row(slot, first + e)) = next;
                next += counts_from(view, in.seq, src)[e];
            }
        }
    }
    __syncthreads();
    for (int src = threadIdx.x; src < num_ranks; src += blockDim.x) {
        BaseRecord& base = *at<BaseRecord>(view, src, view.layout.base(slot, me));
        base.code = placing.code;
        base.x_offset = job.grant.x_offset;
        base.meta_offset = job.grant.meta_offset;
        base.row = view.state.first_row[src];
        base.num_rows = job.grant.max_rows;
        base.detail[0] = placing.have;
        base.detail[1] = placing.want;
        ptx::st_release_sys(&base.seq, in.seq);  // pairs with the acquire in await_bases
    }
}

// Whether the rows and records we bring fit where this peer says.
__device__ __noinline__ bool is_sane(const DispatchJob& job, const BaseRecord& base, int p,
                                     int64_t meta_bytes) {
    if (base.code != kOk) return may_poison_base(base.code);
    const RankView& view = job.view;
    const int64_t rows = job.args.rank_counts[p];
    const bool row_ok = base.row >= 0 && base.row <= view.peers.arena_bytes[p];
    return row_ok && lies_in_arena(view, p, base.x_offset, base.num_rows, job.args.row_bytes()) &&
           (rows == 0 || meta_bytes == 0 ||
            lies_in_arena(view, p, base.meta_offset, base.row + rows, meta_bytes));
}

// All bases, not only those of ranks we send to: so all ranks learn of a refusal before a row moves.
__device__ bool await_bases(const DispatchJob& job, Entering& in, int64_t meta_bytes) {
    const RankView& view = job.view;
    const int slot = static_cast<int>(in.seq % view.shape.num_slots);
    const Operation op{OpKind::kDispatch, in.seq};
    bool ok = true;
    for (int p = threadIdx.x; p < view.shape.num_ranks; p += blockDim.x) {
        const auto* base = at<BaseRecord>(view, view.peers.rank, view.layout.base(slot, p));
        ok = ok && device::wait_word(view.watch, op, {Site::kBase, p, in.seq}, &base->seq);
        if (ok && !is_sane(job, *base, p, meta_bytes)) {
            atomicMin(&in.first_bad, objection(kEpochObjection, p));
        } else if (ok && base->code != kOk) {
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

// From turns in a chunk to rows at the owner: push adds what is left here.
__device__ void fold_bases(const DispatchJob& job, const Entering& in, const Counters& counters) {
    const RankView& view = job.view;
    const int num_ranks = view.shape.num_ranks, num_experts = view.shape.num_experts;
    const int me = view.peers.rank, slot = static_cast<int>(in.seq % view.shape.num_slots);
    for (int i = threadIdx.x; i < counters.num_rows * num_ranks; i += blockDim.x) {
        const int chunk = i / num_ranks, dst = i % num_ranks;
        const auto* base = at<BaseRecord>(view, me, view.layout.base(slot, dst));
        view.state.chunk_row[i] = static_cast<int>(base->row) + counters.row(chunk)[dst];
    }
    if (job.args.cached || job.args.layout == RecvLayout::kCompact) return;
    for (int i = threadIdx.x; i < counters.num_rows * num_experts; i += blockDim.x) {
        const int chunk = i / num_experts, position = i % num_experts;
        const int row = *at<int32_t>(view, me, view.layout.expert_row(slot, position));
        view.state.chunk_slot[i] = row + counters.row(chunk)[num_ranks + position];
    }
}

// What kernels behind this one, and the host, need to know.
__device__ void conclude(const DispatchJob& job, Entering& in, const Placing& placing) {
    const RankView& view = job.view;
    const int slot = static_cast<int>(in.seq % view.shape.num_slots);
    for (int src = threadIdx.x; src < view.shape.num_ranks; src += blockDim.x) {
        view.state.expected[slot * view.shape.num_ranks + src] +=
            static_cast<uint64_t>(entry_of(view, in.seq, src).num_rows);
    }
    if (threadIdx.x != 0) return;
    OpState& state = *view.state.op;
    state.num_recv = placing.num_recv;
    state.num_rows = placing.num_rows;
    state.code = kOk;
    report(view, job.begin, in, placing.num_recv, placing.num_rows, placing.index_rows);
}

// A call that failed everywhere leaves a valid, empty result.
__device__ void conclude_failed(const DispatchJob& job, Entering& in) {
    const RankView& view = job.view;
    const DispatchArgs& a = job.args;
    const int num_local = view.state.first[view.peers.rank + 1] - view.state.first[view.peers.rank];
    if (!a.cached) {
        for (int e = threadIdx.x; e < num_local; e += blockDim.x) a.expert_counts[e] = 0;
        for (int i = threadIdx.x; i < 2 * view.shape.num_ranks; i += blockDim.x) {
            a.rank_counts[i] = 0;
        }
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    OpState& state = *view.state.op;
    state.num_recv = 0;
    state.num_rows = 0;
    fail_call(view, job.begin, in);
}

__device__ Counters counters_of(const Shape& shape, int32_t* data, int num_rows) {
    return {data, num_rows, columns_of(shape), stride_of(shape)};
}

// One block for each chunk.
__global__ void __launch_bounds__(1024, 1) count_kernel(const __grid_constant__ DispatchJob job) {
    extern __shared__ int32_t shared_counters[];
    __shared__ BadIds bad;
    if (__syncthreads_or(device::gave_up(job.view.watch))) return;
    const int num_warps = blockDim.x / 32;
    count_chunk(job, counters_of(job.view.shape, shared_counters, num_warps), blockIdx.x, bad);
}

__global__ void __launch_bounds__(1024, 1) notify_kernel(const __grid_constant__ DispatchJob job) {
    extern __shared__ int32_t shared_counters[];
    __shared__ Entering in;
    __shared__ BadIds bad;
    __shared__ Placing placing;
    const RankView& view = job.view;
    if (__syncthreads_or(device::gave_up(view.watch))) return;
    const MetaLayout meta = meta_layout(job.args);

    if (job.num_chunks == 1) {  // few tokens: not worth a kernel of their own
        const int num_warps = blockDim.x / 32;
        count_chunk(job, counters_of(view.shape, shared_counters, num_warps), 0, bad);
    }
    if (!acquire_slot(view, job.begin, in)) return;
    const Counters counters = counters_of(view.shape, shared_counters, job.num_chunks);
    gather_chunks(job, counters, in);
    publish_entries(view, in, counters.totals());
    if (threadIdx.x == 0) {
        const int me = view.peers.rank;
        placing = {0, 0, 0, view.state.first[me + 1] - view.state.first[me], 0, kOk, 0, 0};
    }
    if (!await_entries(view, in)) return;
    if (in.outcome.ok()) {
        check_counts(job, in, placing);
        __syncthreads();
    }
    if (!in.outcome.ok()) return conclude_failed(job, in);
    if (placing.code == kOk) place(job, in, placing);
    __syncthreads();
    if (threadIdx.x == 0 && placing.code == kOk) judge_size(job, placing, meta.bytes);
    __syncthreads();
    publish_bases(job, in, placing);
    if (!await_bases(job, in, meta.bytes)) return;
    if (!in.outcome.ok()) return conclude_failed(job, in);
    fold_bases(job, in, counters);
    conclude(job, in, placing);
}

__global__ void __launch_bounds__(128, 1)
    refuse_kernel(const __grid_constant__ RankView view, const __grid_constant__ Begin begin) {
    __shared__ Entering in;
    if (__syncthreads_or(device::gave_up(view.watch))) return;
    if (!acquire_slot(view, begin, in)) return;
    publish_entries(view, in, nullptr);
    if (threadIdx.x == 0) release_slot(view, in.seq);  // we read nothing there
}

__global__ void leave_kernel(const __grid_constant__ RankView view) {
    ControlHeader* own = at<ControlHeader>(view, view.peers.rank, 0);
    ptx::atom_acq_rel_gpu_exch(view.watch.abort, 1);  // replays of old graphs return at entry
    if (own->life == static_cast<uint32_t>(Life::kAlive)) {
        ptx::st_release_sys(&own->life, static_cast<uint32_t>(Life::kLeft));
    }
}

int notify_smem(const Shape& shape, int num_rows) { return 4 * (num_rows + 1) * stride_of(shape); }

int smem_limit = 48 * 1024;  // of a block, set by load_kernels

}  // namespace

int notify_warps(const Shape& shape, int smem_bytes) {
    const int room = smem_bytes - 2048;  // the rest is static
    return std::clamp(room / (4 * stride_of(shape)) - 1, 0, 32);
}

void divide_tokens(DispatchJob& job, int max_blocks) {
    constexpr int kTurnsPerWarp = 2;
    const int warps = notify_warps(job.view.shape, smem_limit);
    const int per_turn = 32 / job.args.num_topk;
    const int64_t few = int64_t{kTurnsPerWarp} * warps * per_turn;
    const int64_t most = std::min({kMaxChunks, max_blocks, warps});
    const int64_t chunks = std::clamp<int64_t>((job.args.num_tokens + few - 1) / few, 1, most);
    const int64_t tokens = std::max<int64_t>((job.args.num_tokens + chunks - 1) / chunks, 1);
    job.tokens_per_chunk = static_cast<int>((tokens + per_turn - 1) / per_turn * per_turn);
    job.num_chunks = static_cast<int>(chunks);
}

int launch_notify(const DispatchJob& job, Stream stream) {
    const int warps = notify_warps(job.view.shape, smem_limit);
    const int smem = notify_smem(job.view.shape, warps);
    if (job.num_chunks > 1) count_kernel<<<job.num_chunks, warps * 32, smem, stream>>>(job);
    notify_kernel<<<1, warps * 32, smem, stream>>>(job);
    return cudaGetLastError();
}

int launch_refuse(const RankView& view, const Begin& begin, Stream stream) {
    refuse_kernel<<<1, 128, 0, stream>>>(view, begin);
    return cudaGetLastError();
}

int launch_leave(const RankView& view, Stream stream) {
    leave_kernel<<<1, 1, 0, stream>>>(view);
    return cudaGetLastError();
}

int load_notify(int smem_bytes) {
    smem_limit = smem_bytes;
    cudaFuncAttributes attributes;
    for (const void* kernel : {reinterpret_cast<const void*>(&refuse_kernel),
                               reinterpret_cast<const void*>(&leave_kernel),
                               reinterpret_cast<const void*>(&count_kernel),
                               reinterpret_cast<const void*>(&notify_kernel)}) {
        if (const int error = cudaFuncGetAttributes(&attributes, kernel)) return error;
        const int dynamic = smem_bytes - static_cast<int>(attributes.sharedSizeBytes);
        if (const int error = cudaFuncSetAttribute(
                kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic)) {
            return error;
        }
    }
    return 0;
}

}  // namespace ep::kernels
