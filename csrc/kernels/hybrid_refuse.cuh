// A rank that refuses a call across nodes still tells its rail and relays what comes from there: its node
// hears of other nodes through it alone. It goes without ranks that are masked, as small operations do.
//
// defines: launch_hybrid_refuse, load_hybrid_refuse
#pragma once

#include <cuda_runtime_api.h>

#include "contract/gpu.h"
#include "contract/rail.h"
#include "device/ptx.cuh"
#include "device/rail.cuh"
#include "kernels/direct.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.cuh"
#include "kernels/leave.cuh"
#include "kernels/rail_notice.cuh"

namespace ep::kernels {

template <device::Rail R>
struct HybridRefusal {
    RankView view;
    Begin begin;
    Far<R> far;
};

template <device::Rail R>
__global__ void __launch_bounds__(128, 1)
    hybrid_refuse_kernel(const __grid_constant__ HybridRefusal<R> h) {
    __shared__ Uninitialized<Entering> entering;
    Entering& in = entering.get();
    const Begin& begin = h.begin;
    const Far<R>& far = h.far;
    init_told(begin, in);
    if (threadIdx.x < 32) far.hear_masks();
    if (threadIdx.x == 0) init_entering(h.view, begin, in);
    bool ok = !__syncthreads_or(device::gave_up(h.view.watch));
    const Operation op{kind_of(begin.head.what), in.seq};
    if (ok && threadIdx.x < 32) {
        ok = acquire_slot<true>(h.view, far, op, in.slot, in.masked) && far.acquire(h.view, op, in);
    }
    if (!__syncthreads_and(ok)) return;
    publish_head(h.view, h.view.peers.control, begin, in);
    if (!exchange_notices(far.rail, h.view, far.rails, far, in, op, false, nullptr)) return;
    if (threadIdx.x >= 32 || !far.leave(h.view, op, in)) return;
    leave_slot(h.view, in.seq, in.slot);  // we read nothing there
}

template <device::Rail R>
int launch_hybrid_refuse(const Far<R>& far, const RankView& view, const Begin& begin,
                         Stream stream) {
    return launch(hybrid_refuse_kernel<R>, {1, 128, 0}, stream, HybridRefusal<R>{view, begin, far});
}

template <device::Rail R>
int load_hybrid_refuse(int smem_bytes) {
    return load_kernel(reinterpret_cast<const void*>(hybrid_refuse_kernel<R>), smem_bytes);
}

}  // namespace ep::kernels
