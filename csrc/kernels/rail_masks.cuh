// Across nodes a rank is masked by its host, and all are unmasked together, between operations: what
// kernels/mask.cu does inside a node, for other nodes.
//
// defines: launch_hear_masks, launch_mask_far, launch_unmask_far, load_rail_masks
#pragma once

#include <cuda_runtime_api.h>

#include "contract/gpu.h"
#include "contract/rail.h"
#include "device/rail.cuh"
#include "device/wait.cuh"
#include "kernels/direct.cuh"
#include "kernels/launch.cuh"
#include "kernels/rail_notice.cuh"

namespace ep::kernels {

template <device::Rail R>
__global__ void __launch_bounds__(32, 1) hear_masks_kernel(const __grid_constant__ Far<R> far) {
    far.hear_masks();
}

template <device::Rail R>
__global__ void mask_far_kernel(const __grid_constant__ Far<R> far, int rank) {
    device::mask(far.watch, rank);
    far.tell_far(rank);
}

// Words of other nodes that count operations get what they lack of us: those we took no part in, and those in
// which the other was masked. Who waits for them may be told late. Bits told from now on are of another age, so
// one that comes late from before is nobody's.
template <device::Rail R>
__global__ void __launch_bounds__(128, 1)
    unmask_far_kernel(const __grid_constant__ Far<R> far, const __grid_constant__ RankView view,
                      uint64_t seq, uint64_t gone) {
    const RailShape& s = far.shape();
    const RailLayout& layout = far.rails.layout;
    const int others = s.num_correspondents(), me = view.peers.rank;
    const uint64_t last = view.state.seq[0];
#pragma unroll 1
    for (int i = threadIdx.x; i < s.direct.num_slots * others; i += blockDim.x) {
        const int slot = i / others, p = s.correspondent(me, i - slot * others);
        if (device::has_rank(gone, p)) continue;
        const uint64_t absent = operations_in(s, slot, seq) - operations_in(s, slot, last);
        const auto catch_up = [&](Missed what, int64_t word) {
            uint64_t& missed = *missed_word(far.rails, what, slot, p);
            if (absent + missed > 0) far.rail.signal_add(p, {word, absent + missed});
            missed = 0;
        };
        catch_up(Missed::kNotices, layout.entered_word(static_cast<uint64_t>(slot), s.sender(me)));
        catch_up(Missed::kReleases, layout.released_word(slot, me));
    }
    uint64_t* masks = far.rails.state.masks;
    uint64_t& age = masks[static_cast<int>(MaskWord::kAge)];
#pragma unroll 1
    for (int p = threadIdx.x; p < s.direct.num_ranks; p += blockDim.x) {
        const int64_t word = layout.masks_word(age + 1 + kMaskAges / 2, p);
        *reinterpret_cast<uint64_t*>(far.rail.own(word)) = 0;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    masks[static_cast<int>(MaskWord::kTold)] = 0;
    ++age;
}

template <device::Rail R>
int launch_hear_masks(const Far<R>& far, Stream stream) {
    return launch(hear_masks_kernel<R>, {1, 32, 0}, stream, far);
}

template <device::Rail R>
int launch_mask_far(const Far<R>& far, int rank, Stream stream) {
    return launch(mask_far_kernel<R>, {1, 1, 0}, stream, far, rank);
}

template <device::Rail R>
int launch_unmask_far(const Far<R>& far, const RankView& view, uint64_t seq, uint64_t gone,
                      Stream stream) {
    return launch(unmask_far_kernel<R>, {1, 128, 0}, stream, far, view, seq, gone);
}

template <device::Rail R>
int load_rail_masks(int smem_bytes) {
    for (const void* kernel : {reinterpret_cast<const void*>(hear_masks_kernel<R>),
                               reinterpret_cast<const void*>(mask_far_kernel<R>),
                               reinterpret_cast<const void*>(unmask_far_kernel<R>)}) {
        if (const int error = load_kernel(kernel, smem_bytes)) return error;
    }
    return 0;
}

}  // namespace ep::kernels
