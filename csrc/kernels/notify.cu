// Counts first: where every row of a dispatch will lie is known before any row moves.
//
// Blocks count ranges of tokens side by side (count.cuh); one block adds them up, tells every peer
// what it brings, places what arrives (place.cuh), and folds the bases it gets into its counts. Prefix
// sums over chunks, then over sources, make rows of turns.
//
// Loops stay loops: this runs once, out of cold caches, and waits for nothing as long as for its code.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "contract/gpu.h"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/count.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.cuh"
#include "kernels/place.cuh"

namespace ep::kernels {
namespace {

constexpr int kMaxNotifyWarps = 24;

// A call with a handle of compact rows has all rows already; what the handle says is checked by push.
__host__ __device__ bool counts_tokens(const DispatchArgs& a) {
    return !a.cached || a.layout != RecvLayout::kCompact;
}

// Brings the totals of all chunks together: one thread, one column, several loads at once.
__device__ void gather_columns(const DispatchJob& job, const Counters& counters) {
    constexpr int kAtOnce = 8;
    const int32_t* found = job.view.state.chunk_counts;
#pragma unroll 1
    for (int c = threadIdx.x; c < counters.num_columns; c += blockDim.x) {
        int sum = 0;
#pragma unroll 1
        for (int r0 = 0; r0 < counters.num_rows; r0 += kAtOnce) {
            int count[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const bool here = r0 + i < counters.num_rows;
                count[i] = here ? found[(r0 + i) * counters.num_columns + c] : 0;
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const bool here = r0 + i < counters.num_rows;
                if (here && c < counters.width) counters.row(r0 + i)[c] = sum;
                sum += count[i];
            }
        }
        counters.totals[c] = sum;
    }
}

// The last warp: ids that name no expert fail the call.
__device__ void gather_bad_ids(const DispatchJob& job, Entering& in, int num_chunks) {
    static_assert(kMaxChunks <= 32);
    const int lane = ptx::lane_id();
    const BadIds mine = lane < num_chunks ? job.view.state.bad_ids[lane] : BadIds{0, 0};
    const uint32_t bad = __ballot_sync(~0u, mine.count > 0);
    const int total = __reduce_add_sync(~0u, mine.count);
    if (bad == 0) return;
    const int64_t at = __shfl_sync(~0u, static_cast<int64_t>(mine.first), __ffs(bad) - 1);
    if (lane != 0) return;
    in.entry.code = kBadExpertId;
    in.entry.detail[0] = total;
    in.entry.detail[1] = at / job.args.num_topk;
    in.entry.detail[2] = at % job.args.num_topk;
    in.entry.detail[3] = job.args.topk_idx[at];
}

// What we bring, and what is wrong with it.
__device__ void gather(const DispatchJob& job, const Counters& counters, Entering& in) {
    const DispatchArgs& a = job.args;
    const int num_ranks = job.view.shape.num_ranks;
    if (!counts_tokens(a)) {
#pragma unroll 1
        for (int p = threadIdx.x; p < num_ranks; p += blockDim.x) {
            counters.totals[p] = static_cast<int>(a.rank_counts[p]);
        }
        return __syncthreads();
    }
    gather_columns(job, counters);
    if (threadIdx.x / 32 == blockDim.x / 32 - 1) gather_bad_ids(job, in, counters.num_rows);
    __syncthreads();
#pragma unroll 1
    for (int p = threadIdx.x; p < num_ranks; p += blockDim.x) {
        if (!a.cached) {
            a.rank_counts[p] = counters.totals[p];
        } else if (a.rank_counts[p] != counters.totals[p]) {
            in.entry.code = kStaleHandle;  // a tensor of the handle was changed since
        }
    }
    if (a.cached) __syncthreads();
}

// From turns in a chunk to rows at the owner: push adds what is left here.
__device__ void fold_bases(const DispatchJob& job, int slot, const Counters& counters,
                           const Placing& placing) {
    const RankView& view = job.view;
    const int num_ranks = view.shape.num_ranks, num_experts = view.shape.num_experts;
    const int me = view.peers.rank;
    if (!counts_tokens(job.args)) return;
#pragma unroll 1
    for (int i = threadIdx.x; i < counters.num_rows * num_ranks; i += blockDim.x) {
        const int chunk = i / num_ranks, dst = i % num_ranks;
        view.state.chunk_row[i] = placing.base_row[dst] + counters.row(chunk)[dst];
    }
    if (counters.width <= num_ranks) return;
#pragma unroll 1
    for (int i = threadIdx.x; i < counters.num_rows * num_experts; i += blockDim.x) {
        const int chunk = i / num_experts, position = i % num_experts;
        const int row = *at<int32_t>(view, me, view.layout.expert_row(slot, position));
        view.state.chunk_slot[i] = row + counters.row(chunk)[num_ranks + position];
    }
}

// What kernels behind this one, and the host, need to know; push tells the host.
__device__ void conclude(const DispatchJob& job, const Entering& in, const Placing& placing) {
    const RankView& view = job.view;
    const int slot = in.slot;
    auto* expected = reinterpret_cast<unsigned long long*>(view.state.expected);
#pragma unroll 1
    for (int src = threadIdx.x; src < view.shape.num_ranks; src += blockDim.x) {
        // Nobody else adds: no load to wait for.
        atomicAdd(&expected[slot * view.shape.num_ranks + src],
                  static_cast<unsigned long long>(placing.arriving[src]));
    }
    if (threadIdx.x != 0) return;
    OpState& state = *view.state.op;
    state.num_recv = placing.num_recv;
    state.num_rows = placing.num_rows;
    state.index_rows = placing.index_rows;
    state.code = kOk;
}

// A call that failed everywhere leaves a valid, empty result.
__device__ __noinline__ void conclude_failed(const DispatchJob& job, Entering& in,
                                             const Placing& placing) {
    const RankView& view = job.view;
    const DispatchArgs& a = job.args;
    if (!a.cached) {
#pragma unroll 1
        for (int e = threadIdx.x; e < placing.num_local; e += blockDim.x) a.expert_counts[e] = 0;
#pragma unroll 1
        for (int i = threadIdx.x; i < 2 * view.shape.num_ranks; i += blockDim.x) {
            a.rank_counts[i] = 0;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) fail_call(view, job.begin, in);
}

// One block for each chunk.
__global__ void __launch_bounds__(kMaxNotifyWarps * 32, 1)
    count_kernel(const __grid_constant__ DispatchJob job) {
    extern __shared__ int32_t shared_counters[];
    __shared__ BadIds bad;
    ptx::griddepcontrol_launch_dependents();  // notify acquires its slot meanwhile
    if (__syncthreads_or(device::gave_up(job.view.watch))) return;
    count_chunk(job, counters_of(job, shared_counters, blockDim.x / 32), blockIdx.x, bad);
}

__global__ void __launch_bounds__(kMaxNotifyWarps * 32, 1)
    notify_kernel(const __grid_constant__ DispatchJob job) {
    extern __shared__ int32_t shared_counters[];
    __shared__ Entering in;
    __shared__ BadIds bad;
    __shared__ Placing placing;
    const RankView& view = job.view;
    const DispatchArgs& a = job.args;
    if (threadIdx.x == 0) init_placing(view, placing, shared_counters);
    if (__syncthreads_or(device::gave_up(view.watch))) return;
    int32_t* shared = shared_counters + placing_bytes(view.shape) / 4;
#pragma unroll 1
    for (int i = threadIdx.x; i <= view.shape.num_ranks; i += blockDim.x) {
        placing.first[i] = view.state.first[i];
    }
    if (counts_tokens(a) && job.num_chunks == 1) {  // few tokens: not worth a kernel of their own
        count_chunk(job, counters_of(job, shared, blockDim.x / 32), 0, bad);
    }
    if (!acquire_slot(view, job.begin, in)) return;
    ptx::griddepcontrol_wait();  // for count, if it runs
    if (threadIdx.x == 0) {
        const int me = view.peers.rank;
        placing.num_local = placing.first[me + 1] - placing.first[me];
    }
    const Counters counters = counters_of(job, shared, job.num_chunks);
    gather(job, counters, in);
    publish_entries(view, in, {counters.totals, placing.first, !a.cached});
    if (!await_entries(view, in, CountsReader{job, in.slot, placing})) return;
    // Everybody's notify is resident by now, so push may take its SMs.
    ptx::griddepcontrol_launch_dependents();
    if (in.outcome.ok()) judge_counts(job, in, placing);
    if (!in.outcome.ok()) return conclude_failed(job, in, placing);
    const int64_t meta_bytes = meta_layout(a).bytes;
    if (placing.code == kOk) {
        place(job, placing);
        if (threadIdx.x == 0) judge_size(job, placing, meta_bytes);
        __syncthreads();
    }
    publish_bases(job, in.seq, in.slot, placing);
    if (!needs_groups(a) && threadIdx.x < 32) place_groups(job, placing);
    if (!await_bases(job, in, placing, counters.totals, meta_bytes)) return;
    if (!in.outcome.ok()) return conclude_failed(job, in, placing);
    fold_bases(job, in.slot, counters, placing);
    conclude(job, in, placing);
}

__global__ void __launch_bounds__(128, 1)
    refuse_kernel(const __grid_constant__ RankView view, const __grid_constant__ Begin begin) {
    __shared__ Entering in;
    if (__syncthreads_or(device::gave_up(view.watch))) return;
    if (!acquire_slot(view, begin, in)) return;
    publish_entries(view, in, {});
    if (threadIdx.x == 0) release_slot(view, in.seq, in.slot);  // we read nothing there
}

__global__ void leave_kernel(const __grid_constant__ RankView view) {
    ControlHeader* own = at<ControlHeader>(view, view.peers.rank, 0);
    if (own->life == static_cast<uint32_t>(Life::kAlive)) {
        ptx::st_release_sys(&own->life, static_cast<uint32_t>(Life::kLeft));
    }
}

int smem_limit = 48 * 1024;  // of a block, set by load_kernels

}  // namespace

int notify_warps(const Shape& shape, int smem_bytes) {
    const int columns = columns_of(shape);
    const int room = smem_bytes - 2048 - placing_bytes(shape) - 4 * columns;  // the rest is static
    return std::clamp(room / counters_bytes(0, columns, 1), 0, kMaxNotifyWarps);
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
    job.num_chunks = counts_tokens(job.args) ? static_cast<int>(chunks) : 0;
}

int launch_notify(const DispatchJob& job, Stream stream) {
    const int warps = notify_warps(job.view.shape, smem_limit);
    const int counters =
        counters_bytes(columns_of(job.view.shape), width_of(job.view.shape, job.args), warps);
    if (job.num_chunks > 1) count_kernel<<<job.num_chunks, warps * 32, counters, stream>>>(job);
    constexpr int kWarpsThatGather = 16;
    const int threads = 32 * (job.num_chunks == 1 ? warps : std::min(warps, kWarpsThatGather));
    return launch_dependent(notify_kernel, {1, threads, counters + placing_bytes(job.view.shape)},
                            job.num_chunks > 1, stream, job);
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
#pragma unroll 1
    for (const void* kernel : {reinterpret_cast<const void*>(&refuse_kernel),
                               reinterpret_cast<const void*>(&leave_kernel),
                               reinterpret_cast<const void*>(&count_kernel),
                               reinterpret_cast<const void*>(&notify_kernel)}) {
        if (const int error = load_kernel(kernel, smem_bytes)) return error;
    }
    return 0;
}

}  // namespace ep::kernels
