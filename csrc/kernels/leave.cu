// How a rank leaves: one operation, by refusing it; or the buffer.
#include <cuda_runtime_api.h>

#include "contract/gpu.h"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.cuh"
#include "kernels/leave.cuh"

namespace ep::kernels {
namespace {

__global__ void __launch_bounds__(128, 1)
    refuse_kernel(const __grid_constant__ RankView view, const __grid_constant__ Begin begin) {
    __shared__ Uninitialized<Entering> entering;
    Entering& in = entering.get();
    init_told(begin, in);
    if (threadIdx.x == 0) init_entering(view, begin, in);
    bool ok = !__syncthreads_or(device::gave_up(view.watch));
    if (ok && threadIdx.x < 32)
        ok = acquire_slot<true>(view, NoFar{}, {kind_of(begin.head.what), in.seq}, in.slot,
                                in.masked);
    if (!__syncthreads_and(ok)) return;
    publish_head(view, view.peers.control, begin, in);
    if (threadIdx.x < 32) leave_slot(view, in.seq, in.slot);  // we read nothing there
}

__global__ void leave_kernel(const __grid_constant__ RankView view) {
    ControlHeader* own = at_own<ControlHeader>(view, 0);
    if (own->life == static_cast<uint32_t>(Life::kAlive)) {
        device::tell_life(view.watch, Life::kLeft);
    }
}

}  // namespace

int launch_refuse(const RankView& view, const Begin& begin, Stream stream) {
    return launch(refuse_kernel, {1, 128, 0}, stream, view, begin);
}

int launch_leave(const RankView& view, Stream stream) {
    return launch(leave_kernel, {1, 1, 0}, stream, view);
}

int load_leave(int smem_bytes) {
    for (const void* kernel : {reinterpret_cast<const void*>(&refuse_kernel),
                               reinterpret_cast<const void*>(&leave_kernel)}) {
        if (const int error = load_kernel(kernel, smem_bytes)) return error;
    }
    return 0;
}

}  // namespace ep::kernels
