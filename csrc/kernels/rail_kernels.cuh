// Makes the table of rail_kernels.h for a rail; whoever calls it compiles the kernels.
//
// defines: rail_kernels
#pragma once

#include "device/rail.cuh"
#include "kernels/direct.cuh"
#include "kernels/hybrid_combine.cuh"
#include "kernels/hybrid_dispatch.cuh"
#include "kernels/hybrid_refuse.cuh"
#include "kernels/rail_kernels.h"
#include "kernels/rail_masks.cuh"
#include "kernels/stage_combine.cuh"
#include "kernels/stage_dispatch.cuh"

namespace ep::kernels {

template <device::Rail R>
Far<R> far_of(const void* rail, const RankView& view, const RailView& rails) {
    return {rails, *static_cast<const R*>(rail), view.watch};
}

// `rail` outlives the table.
template <device::Rail R>
RailKernels rail_kernels(const R* rail) {
    RailKernels table{};
    table.rail = rail;
    table.load = [](int smem_bytes, RailRoom& room) {
        room = {smem_bytes, smem_bytes};
        for (const auto load : {load_hybrid_dispatch<R>, load_hybrid_combine<R>}) {
            if (const int error = load(smem_bytes, room)) return error;
        }
        for (const auto load : {load_hybrid_refuse<R>, load_rail_masks<R>,
                                load_staged_dispatch<Far<R>>, load_staged_combine<Far<R>>}) {
            if (const int error = load(smem_bytes)) return error;
        }
        return 0;
    };
    table.dispatch = [](const void* any, const DispatchJob& job, const RailView& rails,
                        const LaunchPlan& plan, int smem_bytes, Stream stream) {
        return launch_hybrid_dispatch(*static_cast<const R*>(any), job, rails, plan, smem_bytes,
                                      stream);
    };
    table.combine = [](const void* any, const CombineJob& job, const RailView& rails,
                       const LaunchPlan& plan, int smem_bytes, Stream stream) {
        return launch_hybrid_combine(*static_cast<const R*>(any), job, rails, plan, smem_bytes,
                                     stream);
    };
    table.direct_dispatch = [](const void* any, const DispatchJob& job, const RailView& rails,
                               Half half, int num_blocks, Stream stream) {
        return launch_staged_dispatch(far_of<R>(any, job.view, rails), job, half, num_blocks,
                                      stream);
    };
    table.direct_combine = [](const void* any, const CombineJob& job, const RailView& rails,
                              Half half, int num_blocks, Stream stream) {
        return launch_staged_combine(far_of<R>(any, job.view, rails), job, half, num_blocks,
                                     stream);
    };
    table.refuse = [](const void* any, const RankView& view, const Begin& begin,
                      const RailView& rails, Stream stream) {
        return launch_hybrid_refuse(far_of<R>(any, view, rails), view, begin, stream);
    };
    table.hear_masks = [](const void* any, const RankView& view, const RailView& rails,
                          Stream stream) {
        return launch_hear_masks(far_of<R>(any, view, rails), stream);
    };
    table.mask = [](const void* any, const RankView& view, const RailView& rails, int rank,
                    Stream stream) {
        return launch_mask_far(far_of<R>(any, view, rails), rank, stream);
    };
    table.unmask = [](const void* any, const RankView& view, const RailView& rails, uint64_t seq,
                      uint64_t gone, Stream stream) {
        return launch_unmask_far(far_of<R>(any, view, rails), view, seq, gone, stream);
    };
    return table;
}

}  // namespace ep::kernels
