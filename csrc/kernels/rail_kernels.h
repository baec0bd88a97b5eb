// The kernels of operations across nodes, compiled for one rail. The core has them for the loopback, the
// plugin for NVSHMEM; host code calls through this and does not know which it has.
#pragma once

#include "contract/gpu.h"
#include "contract/rail.h"
#include "kernels/launch.h"

namespace ep::kernels {

// Shared memory that a block of dispatch and of combine may have beside what its kernel has by itself.
struct RailRoom {
    int dispatch = 0, combine = 0;
};

// As in kernels/launch.h: each returns a cudaError_t as an int, 0 = launched; none waits, allocates or loads
// a module, but `load`.
struct RailKernels {
    const void* rail;  // the device's rail, which goes into every launch

    // `smem_bytes` is what one block may have; of `room` a call gets what is its own.
    int (*load)(int smem_bytes, RailRoom& room);
    // plan: num_blocks; num_warps of a block, 0 = as many as there is room for.
    int (*dispatch)(const void* rail, const DispatchJob& job, const RailView& rails,
                    const LaunchPlan& plan, int smem_bytes, Stream stream);
    int (*combine)(const void* rail, const CombineJob& job, const RailView& rails,
                   const LaunchPlan& plan, int smem_bytes, Stream stream);
    // Small batches in direct mode, whole or in halves, see contract/direct.h: is_direct.
    int (*direct_dispatch)(const void* rail, const DispatchJob& job, const RailView& rails,
                           Half half, int num_blocks, Stream stream);
    int (*direct_combine)(const void* rail, const CombineJob& job, const RailView& rails, Half half,
                          int num_blocks, Stream stream);
    int (*refuse)(const void* rail, const RankView& view, const Begin& begin, const RailView& rails,
                  Stream stream);
    // Direct mode, with masks, on a view of small operations. What other nodes have masked becomes known to
    // ours; a rank is masked; all that live, and none of `gone`, are where `seq` is over (before what
    // launch_unmask does inside the node).
    int (*hear_masks)(const void* rail, const RankView& view, const RailView& rails, Stream stream);
    int (*mask)(const void* rail, const RankView& view, const RailView& rails, int rank,
                Stream stream);
    int (*unmask)(const void* rail, const RankView& view, const RailView& rails, uint64_t seq,
                  uint64_t gone, Stream stream);
};

}  // namespace ep::kernels
