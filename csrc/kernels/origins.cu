// Who sent what: where the rows of every source end, and the source token of each row. Only for
// calls that ask for it.
//
// Ranges are read from everybody's entries after the bases are there and before we release the slot:
// a peer that published its base has all its entries, and none of them changes in between.
#include <cuda_runtime_api.h>

#include "contract/gpu.h"
#include "kernels/enter.cuh"
#include "kernels/launch.h"

namespace ep::kernels {
namespace {

constexpr int kThreads = 1024;

// One block. `rank_ends`: one thread, one owner; `source_range`: one thread, one local expert.
__global__ void __launch_bounds__(kThreads, 1)
    ranges_kernel(const __grid_constant__ UnpackJob unpack) {
    const DispatchJob& job = unpack.dispatch;
    const RankView& view = job.view;
    if (__syncthreads_or(device::gave_up(view.watch))) return;
    const OpState& state = *view.state.op;
    const bool ok = state.code == kOk;
    const int num_ranks = view.shape.num_ranks, me = view.peers.rank;
    for (int dst = threadIdx.x; job.args.rank_ends != nullptr && dst < num_ranks;
         dst += blockDim.x) {
        uint32_t end = 0;  // of numbers nobody checked for us, so it may wrap
        for (int src = 0; src < num_ranks; ++src) {
            const auto* entry =
                at<const EntryRecord>(view, dst, view.layout.entry(state.slot, src));
            if (ok) end += static_cast<uint32_t>(entry->num_rows);
            job.args.rank_ends[src * num_ranks + dst] = static_cast<int32_t>(end);
        }
    }
    for (int e = threadIdx.x; unpack.out.source_range != nullptr && e < unpack.num_local;
         e += blockDim.x) {
        uint32_t first = 0;
        for (int src = 0; src < num_ranks; ++src) {
            const uint32_t count =
                ok ? at<const uint32_t>(view, me, view.layout.count_row(state.slot, src))[e] : 0;
            unpack.out.source_range[int64_t{e} * num_ranks + src] =
                count == 0 ? 0 : static_cast<int64_t>(uint64_t{first} << 32 | count);
            first += count;
        }
    }
}

// Rows nobody was given name no token; the others are filled by fill_row_tokens_kernel, behind us.
__global__ void __launch_bounds__(kThreads, 1)
    clear_row_tokens_kernel(const __grid_constant__ UnpackJob unpack) {
    const int slabs = unpack.dispatch.args.layout == RecvLayout::kSlab ? unpack.num_local : 1;
    const int64_t rows = unpack.out.max_rows * slabs, step = int64_t{blockDim.x} * gridDim.x;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < rows; i += step) {
        unpack.out.row_token[i] = -1;
    }
}

// Of what unpack has just written: recv_src, and recv_row unless a token has one row here.
__global__ void __launch_bounds__(kThreads, 1)
    fill_row_tokens_kernel(const __grid_constant__ UnpackJob unpack) {
    const DispatchJob& job = unpack.dispatch;
    const UnpackArgs& out = unpack.out;
    const OpState& state = *job.view.state.op;
    if (__syncthreads_or(device::gave_up(job.view.watch) || state.code != kOk)) return;
    const bool compact = job.args.layout == RecvLayout::kCompact;
    const int per_token = compact ? 1 : job.args.num_topk;
    const int64_t limit =
        out.max_rows * (job.args.layout == RecvLayout::kSlab ? unpack.num_local : 1);
    const int64_t total = state.num_recv * per_token, step = int64_t{blockDim.x} * gridDim.x;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += step) {
        const int64_t token = i / per_token;
        const int64_t row = compact ? token : out.recv_row[i];
        if (row >= 0 && row < limit) out.row_token[row] = out.recv_src[2 * token + 1];
    }
}

}  // namespace

int launch_ranges(const UnpackJob& job, Stream stream) {
    ranges_kernel<<<1, kThreads, 0, stream>>>(job);
    return cudaGetLastError();
}

int launch_row_tokens(const UnpackJob& job, int num_blocks, Stream stream) {
    clear_row_tokens_kernel<<<num_blocks, kThreads, 0, stream>>>(job);
    if (const int error = cudaGetLastError()) return error;
    fill_row_tokens_kernel<<<num_blocks, kThreads, 0, stream>>>(job);
    return cudaGetLastError();
}

int load_origins(int) {
    cudaFuncAttributes attributes;
    for (const void* kernel : {reinterpret_cast<const void*>(&ranges_kernel),
                               reinterpret_cast<const void*>(&clear_row_tokens_kernel),
                               reinterpret_cast<const void*>(&fill_row_tokens_kernel)}) {
        if (const int error = cudaFuncGetAttributes(&attributes, kernel)) return error;
    }
    return 0;
}

}  // namespace ep::kernels
