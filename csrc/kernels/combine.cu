// Combine: every source pulls the rows of its tokens from the ranks that hold them and adds them in
// fp32, in ascending (rank, slot) order, rounding once (pull.cu). Here is what may come before: rows of
// an ordinary tensor are copied to where peers can read them.
#include <cuda_runtime_api.h>

#include "contract/gpu.h"
#include "device/ptx.cuh"
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

}  // namespace

int launch_pull(const CombineJob& job, const LaunchPlan& plan, bool early, Stream stream);
int load_pull(int smem_bytes);

int launch_combine(const CombineJob& job, const LaunchPlan& plan, Stream stream) {
    if (job.staged == nullptr) return launch_pull(job, plan, false, stream);
    const int error = launch(stage_kernel, {plan.all_blocks, kStageThreads, 0}, stream, job);
    return error != 0 ? error : launch_pull(job, plan, true, stream);
}

int load_combine(int smem_bytes) {
    const auto kernel = reinterpret_cast<const void*>(&stage_kernel);
    if (const int error = load_kernel(kernel, smem_bytes)) return error;
    return load_pull(smem_bytes);
}

}  // namespace ep::kernels
