// Ranks are masked by their host, and unmasked by all of them together, between operations.
#include <cuda_runtime_api.h>

#include "contract/gpu.h"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.cuh"
#include "kernels/leave.cuh"

namespace ep::kernels {
namespace {

__global__ void mask_kernel(const __grid_constant__ RankView view, int rank) {
    device::mask(view.watch, rank);
}

// All that stay have done what was begun before, and begin nothing until all of them are here. So the words
// of a slot, which only grow, may all say that it was left after `seq`, the last number of any of them.
__global__ void __launch_bounds__(128, 1)
    unmask_kernel(const __grid_constant__ RankView view, uint64_t seq, uint64_t masked) {
    const int num_ranks = view.shape.num_ranks, num_slots = view.shape.num_slots;
    for (int i = threadIdx.x; i < num_slots * num_ranks; i += blockDim.x) {
        const int slot = i / num_ranks;
        *at_own<uint64_t>(view, view.layout.released_word(slot, i - slot * num_ranks)) = seq;
    }
    if (threadIdx.x != 0) return;
    *device::masks_of(view.watch, view.peers.rank) = masked;
    advance(view, seq, static_cast<int>(seq % num_slots));
}

}  // namespace

int launch_mask(const RankView& view, int rank, Stream stream) {
    return launch(mask_kernel, {1, 1, 0}, stream, view, rank);
}

int launch_unmask(const RankView& view, uint64_t seq, uint64_t masked, Stream stream) {
    return launch(unmask_kernel, {1, 128, 0}, stream, view, seq, masked);
}

int load_mask(int smem_bytes) {
    for (const void* kernel : {reinterpret_cast<const void*>(&mask_kernel),
                               reinterpret_cast<const void*>(&unmask_kernel)}) {
        if (const int error = load_kernel(kernel, smem_bytes)) return error;
    }
    return 0;
}

}  // namespace ep::kernels
