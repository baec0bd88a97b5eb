// Combine: every source pulls the rows of its tokens from the ranks that hold them and adds them in
// fp32, in ascending (rank, slot) order, rounding once (pull.cu). Here is what may come before: rows of
// an ordinary tensor are copied to where peers can read them, or an owner adds up its rows of a token.
#include <cuda_runtime_api.h>

#include "contract/gpu.h"
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "device/wait.cuh"
#include "kernels/launch.cuh"

namespace ep::kernels {
namespace {

constexpr int kStageThreads = 1024;
constexpr int kUnitsAtOnce = 4;  // 16 bytes each, that a thread has in flight

// Units first, first + step, ... below n.
__device__ void copy_units(uint4* to, const uint4* from, int64_t first, int64_t step, int64_t n) {
    for (int64_t i = first; i < n; i += kUnitsAtOnce * step) {
        uint4 unit[kUnitsAtOnce];
#pragma unroll
        for (int u = 0; u < kUnitsAtOnce; ++u) {
            if (i + u * step < n) unit[u] = from[i + u * step];
        }
#pragma unroll
        for (int u = 0; u < kUnitsAtOnce; ++u) {
            if (i + u * step < n) to[i + u * step] = unit[u];
        }
    }
}

__global__ void __launch_bounds__(kStageThreads, 1)
    stage_kernel(const __grid_constant__ CombineJob job) {
    const RankView& view = job.view;
    const CombineArgs& a = job.args;
    ptx::griddepcontrol_launch_dependents();  // pull acquires its slot meanwhile
    if (__syncthreads_or(device::gave_up(view.watch))) return;
    const int num_ranks = view.shape.num_ranks, me = view.peers.rank;
    const int64_t units = a.row_bytes() / 16;  // of a row
    const auto* from = reinterpret_cast<const uint4*>(a.x);
    auto* to = reinterpret_cast<uint4*>(job.staged);
    int64_t num_recv = 0, own_begin = 0, own_end = 0;  // rows of our own tokens are read in place
    for (int src = 0; src < num_ranks; ++src) {
        if (src == me) own_begin = num_recv;
        num_recv += a.rank_counts[num_ranks + src];
        if (src == me) own_end = num_recv;
    }
    num_recv = min(num_recv, a.num_recv);
    if (a.layout == RecvLayout::kCompact) {
        const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
        const int64_t threads = int64_t{gridDim.x} * blockDim.x;
        copy_units(to, from, thread, threads, min(own_begin, num_recv) * units);
        return copy_units(to, from, own_end * units + thread, threads, num_recv * units);
    }
    const int warps = blockDim.x / 32;
    for (int64_t i = blockIdx.x + int64_t{threadIdx.x / 32} * gridDim.x; i < num_recv;
         i += int64_t{warps} * gridDim.x) {
        if (i >= own_begin && i < own_end) continue;
        for (int k = 0; k < a.num_topk; ++k) {
            const int64_t row = a.recv_row[i * a.num_topk + k];
            if (row < 0 || row >= a.num_rows) continue;
            copy_units(to + row * units, from + row * units, ptx::lane_id(), 32, units);
        }
    }
}

// ---- sums of owners ----

constexpr int kSumUnits = 2;  // 16 bytes each, that a lane adds up at once
constexpr int kSumStep = 32 * kSumUnits;

// A lane's slot of a received token.
struct OwnRow {
    int64_t row = -1;
    float weight = 1.0f;
};

__device__ __forceinline__ OwnRow own_row(const CombineArgs& a, int64_t token) {
    OwnRow own;
    const int slot = ptx::lane_id();
    if (slot < a.num_topk) own.row = a.recv_row[token * a.num_topk + slot];
    if (own.row >= a.num_rows) own.row = -1;
    if (a.weighted && own.row >= 0) own.weight = a.row_weights[own.row];
    return own;
}

// Units [begin, end) of what the rows of a token come to, in the order of slots. They go where the first
// of the rows has its place: a source knows that one. One warp.
template <DType kDtype>
__device__ void add_own(const CombineJob& job, const OwnRow& own, int64_t begin, int64_t end) {
    const CombineArgs& a = job.args;
    const int64_t row_units = a.row_bytes() / 16;
    const auto* x = reinterpret_cast<const uint4*>(a.x);
    const uint32_t slots = __ballot_sync(~0u, own.row >= 0);
    if (slots == 0) return;
    const int64_t first = __shfl_sync(~0u, own.row, __ffs(slots) - 1) * row_units;
    auto* to = reinterpret_cast<uint4*>(job.staged) + first;
#pragma unroll 1
    for (int64_t at = begin + ptx::lane_id(); at - ptx::lane_id() < end; at += kSumStep) {
        device::Unit<kDtype> sum[kSumUnits];
        for (auto& s : sum) s.clear();
#pragma unroll 1
        for (uint32_t left = slots; left != 0; left &= left - 1) {
            const int slot = __ffs(left) - 1;
            const uint4* row = x + __shfl_sync(~0u, own.row, slot) * row_units;
            const float weight = __shfl_sync(~0u, own.weight, slot);
#pragma unroll
            for (int u = 0; u < kSumUnits; ++u) {
                if (at + 32 * u >= end) continue;
                const uint4 bits = row[at + 32 * u];
                if (a.weighted) {
                    sum[u].add(bits, weight);
                } else {
                    sum[u].add(bits);
                }
            }
        }
#pragma unroll
        for (int u = 0; u < kSumUnits; ++u) {
            if (at + 32 * u < end) to[at + 32 * u] = sum[u].rounded();
        }
    }
}

// Of every received token, our own included. A token is cut in as many parts as there are warps for it.
template <DType kDtype>
__global__ void __launch_bounds__(kStageThreads, 1)
    add_kernel(const __grid_constant__ CombineJob job) {
    const RankView& view = job.view;
    const CombineArgs& a = job.args;
    ptx::griddepcontrol_launch_dependents();  // pull acquires its slot meanwhile
    if (__syncthreads_or(device::gave_up(view.watch))) return;
    int64_t num_recv = 0;
    for (int src = 0; src < view.shape.num_ranks; ++src) {
        num_recv += a.rank_counts[view.shape.num_ranks + src];
    }
    num_recv = min(num_recv, a.num_recv);
    if (num_recv <= 0) return;
    const int64_t units = a.row_bytes() / 16;
    const int64_t warps = int64_t{gridDim.x} * (blockDim.x / 32);
    const int64_t most = min((units + kSumStep - 1) / kSumStep, max(warps / num_recv, int64_t{1}));
    const int64_t width = ((units + most - 1) / most + kSumStep - 1) / kSumStep * kSumStep;
    const int64_t parts = (units + width - 1) / width;
#pragma unroll 1
    for (int64_t i = blockIdx.x + int64_t{threadIdx.x / 32} * gridDim.x; i < num_recv * parts;
         i += warps) {
        const int64_t token = i / parts, begin = i % parts * width;
        add_own<kDtype>(job, own_row(a, token), begin, min(begin + width, units));
    }
}

using AddKernel = void (*)(CombineJob);

AddKernel add_kernel_for(DType dtype) {
    switch (dtype) {
        case DType::kBF16:
            return add_kernel<DType::kBF16>;
        case DType::kF16:
            return add_kernel<DType::kF16>;
        default:
            return add_kernel<DType::kF32>;
    }
}

}  // namespace

int launch_pull(const CombineJob& job, const LaunchPlan& plan, bool early, Stream stream);
int load_pull(int smem_bytes);

int launch_stage(const CombineJob& job, int num_blocks, Stream stream) {
    const auto kernel = job.args.per_rank ? add_kernel_for(job.args.dtype) : stage_kernel;
    return launch(kernel, {num_blocks, kStageThreads, 0}, stream, job);
}

int launch_combine(const CombineJob& job, const LaunchPlan& plan, Stream stream) {
    if (job.staged == nullptr) return launch_pull(job, plan, false, stream);
    const int error = launch_stage(job, plan.all_blocks, stream);
    return error != 0 ? error : launch_pull(job, plan, job.view.overlaps, stream);
}

int load_combine(int smem_bytes) {
    for (const auto kernel : {&stage_kernel, add_kernel_for(DType::kBF16),
                              add_kernel_for(DType::kF16), add_kernel_for(DType::kF32)}) {
        const auto address = reinterpret_cast<const void*>(kernel);
        if (const int error = load_kernel(address, smem_bytes)) return error;
    }
    return load_pull(smem_bytes);
}

}  // namespace ep::kernels
