// Counts first: one block learns where every row of a dispatch will lie, before any row moves.
//
// A warp walks one range of tokens (a chunk) and gives every token its turn at each rank; prefix
// sums over chunks, then over sources, make rows of turns. No atomics decide an order, so the same
// routing gives the same rows. What a receiver publishes here is the credit: nobody pushes before.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "contract/gpu.h"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.h"

namespace ep::kernels {
namespace {

constexpr int kAhead = 8;  // loads of ids a thread has in flight

// Ids that name no expert: how many, and the lowest t * num_topk + k.
struct BadIds {
    int32_t count;
    unsigned long long first;
};

// Counters of the block: for each chunk one row, [num_ranks] tokens, then [num_experts] selections
// by position. Padded to an odd length, so that a warp may walk down a column.
struct Counters {
    int32_t* data;
    int num_columns, stride;

    __device__ int32_t* chunk(int c) const { return data + c * stride; }
    __device__ int32_t* totals(int num_chunks) const { return data + num_chunks * stride; }
};

__host__ __device__ constexpr int columns_of(const Shape& s) { return s.num_ranks + s.num_experts; }
__host__ __device__ constexpr int stride_of(const Shape& s) { return columns_of(s) | 1; }

// One token of each group of num_topk lanes: counts it, and notes its turn at every rank.
struct Walk {
    const DispatchJob& job;
    int32_t* rows;        // [num_ranks] of this chunk
    int32_t* selections;  // [num_experts]
    BadIds* bad;
    int token, slot;  // of this lane within a turn

    __device__ void turn(int64_t t, bool here, int64_t id) const {
        const RankView& view = job.view;
        const uint32_t before = ptx::lanemask_lt();
        const bool chosen = here && id >= 0 && id < view.shape.num_experts;
        const int64_t at = t * job.args.num_topk + slot;
        if (here && !chosen && id != -1) {
            atomicAdd(&bad->count, 1);
            atomicMin(&bad->first, static_cast<unsigned long long>(at));
        }
        const int dst = chosen ? __ldg(view.state.owner + id) : -1;
        const int position = chosen ? __ldg(view.state.position + id) : -1;
        const uint32_t same_rank = __match_any_sync(~0u, chosen ? dst << 5 | token : -1);
        const bool first = chosen && (same_rank & before) == 0;
        const uint32_t rivals = __match_any_sync(~0u, first ? dst : -1);
        int turn = first ? rows[dst] + __popc(rivals & before) : 0;
        __syncwarp();
        if (first && (rivals & before) == 0) rows[dst] += __popc(rivals);
        turn = __shfl_sync(~0u, turn, __ffs(same_rank) - 1);
        if (chosen) view.state.turn[at] = turn;
        if (job.args.layout == RecvLayout::kCompact) {
            if (chosen) atomicAdd(&selections[position], 1);
        } else if (!job.args.cached) {
            count_selection(at, chosen, position, before);
        }
        __syncwarp();
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

__device__ void scan_chunk(const DispatchJob& job, int32_t* chunk, BadIds* bad,
                           int tokens_per_chunk) {
    const int lane = ptx::lane_id(), num_topk = job.args.num_topk;
    const int per_turn = 32 / num_topk;
    const Walk walk{job, chunk,           chunk + job.view.shape.num_ranks,
                    bad, lane / num_topk, lane % num_topk};
    const int64_t begin = int64_t{threadIdx.x / 32} * tokens_per_chunk;
    const int64_t end = min(begin + tokens_per_chunk, job.args.num_tokens);
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

// Down every column: counts become exclusive sums over chunks, and a total below.
__device__ void sum_chunks(const Counters& counters, int num_chunks) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
    for (int column = warp; column < counters.num_columns; column += num_warps) {
        int32_t* cell = counters.chunk(lane) + column;
        const int mine = lane < num_chunks ? *cell : 0;
        int sum = mine;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += other;
        }
        if (lane < num_chunks) *cell = sum - mine;
        if (lane == 31) counters.totals(num_chunks)[column] = sum;
    }
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

// All bases, not only those of ranks we send to: so all ranks learn of a refusal before a row moves.
__device__ bool await_bases(const DispatchJob& job, Entering& in) {
    const RankView& view = job.view;
    const int slot = static_cast<int>(in.seq % view.shape.num_slots);
    const Operation op{OpKind::kDispatch, in.seq};
    bool ok = true;
    for (int p = threadIdx.x; p < view.shape.num_ranks; p += blockDim.x) {
        const auto* base = at<BaseRecord>(view, view.peers.rank, view.layout.base(slot, p));
        ok = ok && device::wait_word(view.watch, op, {Site::kBase, p, in.seq}, &base->seq);
        if (ok && base->code != kOk) atomicMin(&in.first_bad, objection(kPoisonObjection, p));
    }
    ok = __syncthreads_and(ok);
    if (ok && threadIdx.x == 0 && in.first_bad != kNoObjection) {
        const int p = static_cast<int>(in.first_bad & 0xffff);
        const auto* base = at<BaseRecord>(view, view.peers.rank, view.layout.base(slot, p));
        set_outcome(in.outcome, base->code, p, base->detail[1], base->detail[0]);
    }
    __syncthreads();
    return ok;
}

// From turns in a chunk to rows at the owner: push adds what is left here.
__device__ void fold_bases(const DispatchJob& job, const Entering& in, const Counters& counters,
                           int num_chunks) {
    const RankView& view = job.view;
    const int num_ranks = view.shape.num_ranks, num_experts = view.shape.num_experts;
    const int me = view.peers.rank, slot = static_cast<int>(in.seq % view.shape.num_slots);
    for (int i = threadIdx.x; i < num_chunks * num_ranks; i += blockDim.x) {
        const int chunk = i / num_ranks, dst = i % num_ranks;
        const auto* base = at<BaseRecord>(view, me, view.layout.base(slot, dst));
        view.state.chunk_row[i] = static_cast<int>(base->row) + counters.chunk(chunk)[dst];
    }
    if (job.args.cached || job.args.layout == RecvLayout::kCompact) return;
    for (int i = threadIdx.x; i < num_chunks * num_experts; i += blockDim.x) {
        const int chunk = i / num_experts, position = i % num_experts;
        const int row = *at<int32_t>(view, me, view.layout.expert_row(slot, position));
        view.state.chunk_slot[i] = row + counters.chunk(chunk)[num_ranks + position];
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

__device__ void count_tokens(const DispatchJob& job, const Counters& counters, Entering& in,
                             BadIds& bad) {
    const DispatchArgs& a = job.args;
    const RankView& view = job.view;
    const int num_chunks = blockDim.x / 32, num_ranks = view.shape.num_ranks;
    for (int i = threadIdx.x; i < num_chunks * counters.stride; i += blockDim.x) {
        counters.data[i] = 0;
    }
    const int per_turn = 32 / a.num_topk;
    const int turns = static_cast<int>((a.num_tokens + per_turn - 1) / per_turn);
    const int tokens_per_chunk = (turns + num_chunks - 1) / num_chunks * per_turn;
    if (threadIdx.x == 0) {
        bad = {0, ~0ull};
        view.state.op->tokens_per_chunk = tokens_per_chunk;
    }
    __syncthreads();
    scan_chunk(job, counters.chunk(threadIdx.x / 32), &bad, tokens_per_chunk);
    __syncthreads();
    sum_chunks(counters, num_chunks);
    __syncthreads();
    const int32_t* totals = counters.totals(num_chunks);
    if (threadIdx.x == 0 && bad.count > 0) {
        in.entry.code = kBadExpertId;
        in.entry.detail[0] = bad.count;
        in.entry.detail[1] = static_cast<int64_t>(bad.first) / a.num_topk;
        in.entry.detail[2] = static_cast<int64_t>(bad.first) % a.num_topk;
        in.entry.detail[3] = a.topk_idx[bad.first];
    }
    for (int p = threadIdx.x; p < num_ranks; p += blockDim.x) {
        if (!a.cached) {
            a.rank_counts[p] = totals[p];
        } else if (a.rank_counts[p] != totals[p]) {
            in.entry.code = kStaleHandle;  // a tensor of the handle was changed since
        }
    }
    __syncthreads();
}

__global__ void __launch_bounds__(1024, 1) notify_kernel(const __grid_constant__ DispatchJob job) {
    extern __shared__ int32_t shared_counters[];
    __shared__ Entering in;
    __shared__ BadIds bad;
    __shared__ Placing placing;
    const RankView& view = job.view;
    if (__syncthreads_or(device::gave_up(view.watch))) return;
    const Counters counters{shared_counters, columns_of(view.shape), stride_of(view.shape)};
    const int num_chunks = blockDim.x / 32;
    const MetaLayout meta = meta_layout(job.args);

    if (!acquire_slot(view, job.begin, in)) return;
    count_tokens(job, counters, in, bad);
    publish_entries(view, in, counters.totals(num_chunks));
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
    if (!await_bases(job, in)) return;
    if (!in.outcome.ok()) return conclude_failed(job, in);
    fold_bases(job, in, counters, num_chunks);
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
    if (own->life == static_cast<uint32_t>(Life::kAlive)) {
        ptx::st_release_sys(&own->life, static_cast<uint32_t>(Life::kLeft));
    }
}

int notify_smem(const Shape& shape, int num_warps) {
    return 4 * (num_warps + 1) * stride_of(shape);
}

int smem_limit = 48 * 1024;  // of a block, set by load_kernels

}  // namespace

int notify_warps(const Shape& shape, int smem_bytes) {
    const int room = smem_bytes - 2048;  // the rest is static
    return std::clamp(room / (4 * stride_of(shape)) - 1, 0, kMaxChunks);
}

int launch_notify(const DispatchJob& job, Stream stream) {
    const int warps = notify_warps(job.view.shape, smem_limit);
    notify_kernel<<<1, warps * 32, notify_smem(job.view.shape, warps), stream>>>(job);
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
                               reinterpret_cast<const void*>(&notify_kernel)}) {
        if (const int error = cudaFuncGetAttributes(&attributes, kernel)) return error;
    }
    return cudaFuncSetAttribute(notify_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                smem_bytes - static_cast<int>(attributes.sharedSizeBytes));
}

}  // namespace ep::kernels
