// Unpack: what came beside the rows becomes the tensors a caller gets.
//
// Of a compact layout that is done while the rows still travel, on SMs that push left free; the last
// block then waits for the rows. Grouped and slab get their padding and further rows afterwards, on all
// SMs: only the first row of a token was sent.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "contract/calls.h"
#include "contract/gpu.h"
#include "device/copy.cuh"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.cuh"
#include "kernels/unpacker.cuh"

namespace ep::kernels {
namespace {

using device::Stage;

// Everything announced to us has arrived: rows, or the records beside them.
enum class What { kRows, kRecords };

__device__ bool await_arrival(const RankView& view, What what) {
    const OpState& state = *view.state.op;
    const int num_ranks = view.shape.num_ranks, slot = state.slot;
    const Operation op{OpKind::kDispatch, state.seq};
    bool ok = true;
    for (int src = threadIdx.x; src < num_ranks; src += blockDim.x) {
        const uint64_t want = view.state.expected[slot * num_ranks + src];
        const int64_t word = what == What::kRows ? view.layout.arrived_word(slot, src)
                                                 : view.layout.described_word(slot, src);
        ok = ok && device::wait_word(view.watch, op, {Site::kRows, src, want},
                                     at<uint64_t>(view, view.peers.rank, word));
    }
    return __syncthreads_and(ok);
}

constexpr int kUnpackThreads = 640, kChunkBytes = 10 * 1024;  // of records that a warp holds
constexpr int kFewRanks = 64;

// Warps of the whole grid, as one team.
struct Team {
    int64_t first, step;
};

// Records of a compact layout, a chunk of them at a time in the shared memory of a warp.
__device__ bool unpack_records(const Unpacker& u, const Operation& op, Stage stage, Team team) {
    const int bytes = static_cast<int>(u.meta.bytes);
    if (bytes == 0) return true;
    const bool fits = bytes <= kChunkBytes;
    const int per_chunk = fits ? min(kChunkBytes / bytes, 32) : 1;
    for (int64_t first = team.first * per_chunk; first < u.num_recv;
         first += team.step * per_chunk) {
        const int n = static_cast<int>(min(int64_t{per_chunk}, u.num_recv - first));
        if (fits) {
            if (ptx::lane_id() == 0) {
                ptx::fence_proxy_async_shared();  // our reads of the chunk before it
                device::load_stage(stage, u.record(first), n * bytes);
            }
            __syncwarp();
            const RankView& view = u.job.view;
            if (!device::await_stage(view.watch, op, stage, view.peers.rank)) return false;
        }
        u.flat_records(first, n, fits ? stage.data : u.record(first));
        __syncwarp();
    }
    return true;
}

// Rows nobody was given: behind the last one of compact, behind every group of grouped and slab.
__device__ void pad_rows(const Unpacker& u, Team team) {
    const DispatchArgs& a = u.job.args;
    const State& state = u.job.view.state;
    const bool failed = state.op->code != kOk;
    if (a.layout == RecvLayout::kCompact) {
        for (int64_t row = u.num_recv + team.first; row < u.out.max_rows; row += team.step) {
            u.pad(row, a.num_topk, false);
        }
        return;
    }
    const bool grouped = a.layout == RecvLayout::kGrouped;
    for (int e = 0; e < u.num_local && !failed; ++e) {
        const int64_t end = state.group_start[e + 1];
        for (int64_t row = state.group_start[e] + state.counts[e] + team.first; row < end;
             row += team.step) {
            u.pad(row, 1, grouped);
        }
    }
    const int64_t total = grouped ? u.out.max_rows : u.out.max_rows * u.num_local;
    const int64_t used = failed ? 0 : state.group_start[u.num_local];
    for (int64_t row = used + team.first; row < total; row += team.step) u.pad(row, 1, false);
}

// What else a static call returns: shapes that did not follow from what arrived are filled up.
__device__ void pad_handle(const Unpacker& u, Team team) {
    if (u.job.args.cached) return;
    const int lane = ptx::lane_id(), num_topk = u.job.args.num_topk;
    for (int64_t i = u.num_recv + team.first; i < u.out.max_recv; i += team.step) {
        if (lane < 2) u.out.recv_src[2 * i + lane] = -1;
        if (u.out.recv_row != nullptr && lane < num_topk) u.out.recv_row[i * num_topk + lane] = -1;
    }
    const OpState& state = *u.job.view.state.op;
    if (state.code == kOk) return;
    const int64_t selections = u.job.args.num_tokens * num_topk;
    for (int64_t i = team.first * 32 + lane; i < selections; i += team.step * 32) {
        u.job.args.send_row[i] = -1;
    }
}

// One thread.
__device__ void put_numbers(const Unpacker& u) {
    const OpState& state = *u.job.view.state.op;
    if (u.job.status != nullptr) *u.job.status = state.code;
    if (u.job.num_recv != nullptr) *u.job.num_recv = static_cast<int32_t>(u.num_recv);
    if (u.out.offsets == nullptr) return;
    const int align = u.job.args.alignment;
    int32_t at = 0;
    for (int e = 0; e < u.num_local; ++e) {
        u.out.offsets[e] = at;
        if (state.code == kOk) at += (u.job.view.state.counts[e] + align - 1) / align * align;
    }
    u.out.offsets[u.num_local] = at;
}

// All that does not need the rows. False: leave.
__device__ bool unpack_all(const Unpacker& u, const Operation& op, const Stage& stage) {
    const int warps = blockDim.x / 32;
    const Team team{blockIdx.x + int64_t{threadIdx.x / 32} * gridDim.x, int64_t{warps} * gridDim.x};
    bool ok = true;
    if (u.job.args.layout == RecvLayout::kCompact) {
        ok = unpack_records(u, op, stage, team);
    } else {
        for (int64_t i = team.first; i < u.num_recv; i += team.step) u.token(i);
    }
    pad_rows(u, team);
    pad_handle(u, team);
    if (blockIdx.x == 0 && threadIdx.x == 0) put_numbers(u);
    return ok;
}

// Whether we are the block that leaves last.
__device__ bool is_last_block(const RankView& view) {
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        const uint32_t last = gridDim.x - 1;
        is_last = ptx::atom_acq_rel_gpu_inc(&view.state.op->finished, last) == last;
    }
    __syncthreads();
    return is_last;
}

// True in the block that releases the slot. A failed call was left by notify.
__device__ bool unpack_and_await(const UnpackJob& unpack, const Stage& stage, int32_t* first_row) {
    const DispatchJob& job = unpack.dispatch;
    const RankView& view = job.view;
    const OpState& state = *view.state.op;
    const bool ok = state.code == kOk;
    const bool few_ranks = view.shape.num_ranks <= kFewRanks;
    for (int i = threadIdx.x; few_ranks && i <= view.shape.num_ranks; i += blockDim.x) {
        first_row[i] = view.state.first_row[i];
    }
    if (__syncthreads_or(device::gave_up(view.watch))) return false;
    // Scales that were made on the way come with the rows.
    const What first = job.args.quantize == Quantize::kNone ? What::kRecords : What::kRows;
    if (ok && !await_arrival(view, first)) return false;
    ptx::fence_proxy_async();  // what we acquired, before we bulk-load it
    const int me = view.peers.rank;
    const Unpacker unpacker{job,
                            unpack.out,
                            meta_layout(job.args),
                            view.state.first[me + 1] - view.state.first[me],
                            ok ? state.num_recv : 0,
                            job.args.row_bytes(),
                            view.peers.arena[me] + job.grant.meta_offset,
                            few_ranks ? first_row : view.state.first_row};
    const bool unpacked = unpack_all(unpacker, {OpKind::kDispatch, state.seq}, stage);
    if (!__syncthreads_and(unpacked)) return false;
    return is_last_block(view) && ok && await_arrival(view, What::kRows);
}

__global__ void __launch_bounds__(kUnpackThreads, 1)
    unpack_kernel(const __grid_constant__ UnpackJob unpack) {
    extern __shared__ __align__(128) std::byte shared[];
    __shared__ uint64_t loaded[kUnpackThreads / 32];
    __shared__ int32_t first_row[kFewRanks + 1];
    const RankView& view = unpack.dispatch.view;
    const int warp = threadIdx.x / 32;
    const Stage stage{shared + warp * kChunkBytes, &loaded[warp]};
    if (threadIdx.x % 32 == 0) device::init_stage(stage);
    __syncwarp();
    const bool releases = unpack_and_await(unpack, stage, first_row);
    ptx::griddepcontrol_wait();  // what follows us may overwrite x: our push has read it
    if (releases && threadIdx.x == 0) release_slot(view, view.state.op->seq, view.state.op->slot);
}

// ---- duplicates: grouped and slab have a row for every slot, but only the first one was sent ----

// One warp, one token: its row is loaded once and stored to all its other slots.
__global__ void __launch_bounds__(1024, 1)
    duplicate_kernel(const __grid_constant__ UnpackJob unpack, int stage_bytes) {
    extern __shared__ __align__(128) std::byte shared[];
    __shared__ uint64_t loaded[32];
    const DispatchJob& job = unpack.dispatch;
    const OpState& state = *job.view.state.op;
    if (__syncthreads_or(device::gave_up(job.view.watch) || state.code != kOk)) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
    const int num_topk = job.args.num_topk, me = job.view.peers.rank;
    const int64_t row_bytes = job.args.row_bytes();
    std::byte* x = job.view.peers.arena[me] + job.grant.x_offset;
    Stage stage{shared + int64_t{warp} * stage_bytes, &loaded[warp]};
    if (lane == 0) {
        device::init_stage(stage);
        ptx::fence_proxy_async();  // what unpack acquired, before we bulk-load it
    }
    __syncthreads();
    for (int64_t i = blockIdx.x + int64_t{warp} * gridDim.x; i < state.num_recv;
         i += int64_t{num_warps} * gridDim.x) {
        const int64_t row = lane < num_topk ? unpack.out.recv_row[i * num_topk + lane] : -1;
        const uint32_t here = __ballot_sync(~0u, row >= 0 && row < job.grant.max_rows);
        const int64_t source = __shfl_sync(~0u, row, max(__ffs(here) - 1, 0));
        const bool extra = (here >> lane & 1) != 0 && row != source;
        if (!__any_sync(~0u, extra)) continue;
        for (int64_t offset = 0; offset < row_bytes; offset += stage_bytes) {
            const int bytes = static_cast<int>(min(int64_t{stage_bytes}, row_bytes - offset));
            if (lane == 0) device::load_stage(stage, x + source * row_bytes + offset, bytes);
            const Operation op{OpKind::kDispatch, state.seq};
            if (!device::await_stage(job.view.watch, op, stage, me)) return;
            if (extra) device::store_stage(x + row * row_bytes + offset, stage.data, bytes);
            device::drain_reads();
            __syncwarp();
        }
    }
    device::drain_stores();
}

// ---- the row index: which compact row every selection of an expert has ----

// One block per local expert; its warps take consecutive ranges of rows.
__global__ void __launch_bounds__(1024, 1)
    index_rows_kernel(const __grid_constant__ UnpackJob unpack) {
    __shared__ int32_t counts[33];
    const UnpackArgs& out = unpack.out;
    const int e = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const OpState& state = *unpack.dispatch.view.state.op;
    if (__syncthreads_or(device::gave_up(unpack.dispatch.view.watch))) return;
    const int64_t total = (state.code == kOk ? state.num_recv : 0) * unpack.dispatch.args.num_topk;
    const int64_t share = ((total + 31) / 32 + 31) / 32 * 32;
    const int64_t begin = warp * share, end = min(begin + share, total);
    const auto chosen = [&](int64_t i) {
        if (i >= end) return false;
        return out.idx_is_int64 ? static_cast<const int64_t*>(out.topk_idx)[i] == e
                                : static_cast<const int32_t*>(out.topk_idx)[i] == e;
    };
    int count = 0;
    for (int64_t i = begin; i < end; i += 32) count += __popc(__ballot_sync(~0u, chosen(i + lane)));
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    int at = out.offsets[e];
    for (int w = 0; w < warp; ++w) at += counts[w];
    for (int64_t i = begin; i < end; i += 32) {
        const bool here = chosen(i + lane);
        const uint32_t found = __ballot_sync(~0u, here);
        if (here) {
            out.row_index[at + __popc(found & ptx::lanemask_lt())] =
                static_cast<int32_t>((i + lane) / unpack.dispatch.args.num_topk);
        }
        at += __popc(found);
    }
    if (warp != 31) return;  // the last one stands behind the last selection
    const int64_t group_end = e + 1 < gridDim.x ? out.offsets[e + 1] : out.max_index;
    for (int64_t i = at + lane; i < group_end; i += 32) out.row_index[i] = -1;
}

}  // namespace

int unpack_share(const DispatchArgs& args, int num_blocks) {
    constexpr int kEnoughForOne = 12, kEnoughForTwo = 16;
    if (args.layout != RecvLayout::kCompact || num_blocks < kEnoughForOne) return 0;
    return num_blocks < kEnoughForTwo ? 1 : 2;
}

LaunchPlan unpack_plan(const DispatchArgs& args, int num_blocks, int all_blocks, int smem_bytes) {
    LaunchPlan plan;
    const int64_t stage = (std::min<int64_t>(args.row_bytes(), 32 * 1024) + 127) / 128 * 128;
    const int64_t warps =
        std::clamp<int64_t>((smem_bytes - 2048) / std::max<int64_t>(stage, 1), 1, 32);
    plan.num_warps = static_cast<int>(warps);
    plan.stage_bytes = static_cast<int>(stage);
    plan.all_blocks = all_blocks;
    const int share = unpack_share(args, num_blocks);
    plan.beside = share > 0;
    // Padding and duplicates of grouped and slab are a short step on all SMs.
    plan.num_blocks = args.layout != RecvLayout::kCompact ? all_blocks
                      : plan.beside                       ? share
                                                          : num_blocks;
    return plan;
}

int launch_unpack(const UnpackJob& job, const LaunchPlan& plan, Stream stream) {
    if (const int error = launch_dependent(
            unpack_kernel, {plan.num_blocks, kUnpackThreads, kUnpackThreads / 32 * kChunkBytes},
            plan.beside, stream, job)) {
        return error;
    }
    if (job.out.recv_row != nullptr && job.dispatch.args.layout != RecvLayout::kCompact) {
        duplicate_kernel<<<plan.all_blocks, plan.num_warps * 32, plan.num_warps * plan.stage_bytes,
                           stream>>>(job, plan.stage_bytes);
        if (const int error = cudaGetLastError()) return error;
    }
    if (job.out.row_index == nullptr || job.num_local == 0) return 0;
    index_rows_kernel<<<job.num_local, 1024, 0, stream>>>(job);
    return cudaGetLastError();
}

int load_unpack(int smem_bytes) {
    for (const void* kernel : {reinterpret_cast<const void*>(&unpack_kernel),
                               reinterpret_cast<const void*>(&duplicate_kernel),
                               reinterpret_cast<const void*>(&index_rows_kernel)}) {
        if (const int error = load_kernel(kernel, smem_bytes)) return error;
    }
    return 0;
}

}  // namespace ep::kernels
