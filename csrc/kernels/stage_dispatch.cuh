// Dispatch of a small batch, bound by latency: rows leave before anybody is heard (kernels/stage.cuh).
//
// Its halves are in kernels/stage_first_half.cuh and kernels/stage_second_half.cuh: one kernel, or two with
// nothing of ours on the GPU in between.
//
// defines: conclude, launch_staged_dispatch, load_staged_dispatch
#pragma once

#include <cuda_runtime_api.h>

#include "contract/gpu.h"
#include "contract/stage.h"
#include "device/copy.cuh"
#include "device/ptx.cuh"
#include "device/quantize.cuh"
#include "kernels/direct_notes.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.cuh"
#include "kernels/leave.cuh"
#include "kernels/stage.cuh"
#include "kernels/stage_first_half.cuh"
#include "kernels/stage_masks.cuh"
#include "kernels/stage_second_half.cuh"
#include "kernels/stage_tables.cuh"
#include "kernels/usual.cuh"
#include "kernels/usual_receive.cuh"
#include "kernels/usual_send.cuh"

namespace ep::kernels {

// How blocks end that do not count their warps one by one (Readers). All threads.
template <Half kHalf, class F>
__device__ __forceinline__ void conclude(const DispatchJob& job, const StageSpread& spread,
                                         const StageTables& tables, const F& far, Entering& in) {
    const RankView& view = job.view;
    __syncthreads();
    if (in.leaves || threadIdx.x >= 32 || !last_block(view)) return;
    const Operation op{OpKind::kDispatch, in.seq};
    if constexpr (kHalf != Half::kSend) {
        if (const uint64_t lost = take_lost(view, in)) {
            forget_rows(job, spread, lost);
            if constexpr (F::kAny) {
                const StageView<F> stage{view, spread.record, tables.control(), op, in.slot, far};
                forget_logged(job, stage, in, lost);
            }
        }
    }
    if (min(in.first_bad, in.size_bad) == kNoObjection) {
        return end_half<kHalf>(view, tables.control(), job.begun, far, op, in);
    }
    explain_any(job, spread, in);
    if constexpr (F::kAny) {
        if (!far.leave(view, op, in)) return;
    }
    fail_call(view, job.begin, in, kHalf == Half::kBoth);
}

// The same, out of the way of code that runs in most calls: instructions are fetched when they are needed, some
// lines ahead, and behind what is stored.
template <Half kHalf, class F>
__device__ __noinline__ void conclude_slowly(const DispatchJob& job, const StageSpread& spread,
                                             const F& far, Entering& in) {
    conclude<kHalf>(job, spread, StageTables{spread, job.view.shape}, far, in);
}

template <class Config, Half kHalf, class F>
__global__ void __launch_bounds__(F::kWarps * 32, 1)
    stage_dispatch_kernel(const __grid_constant__ DispatchJob job,
                          const __grid_constant__ StageSpread spread,
                          const __grid_constant__ F far) {
    __shared__ uint64_t loaded[F::kWarps][2];
    __shared__ Uninitialized<Entering> entering;
    Entering& in = entering.get();
    const RankView& view = job.view;
    const StageTables tables{spread, view.shape};
    const int warp = threadIdx.x / 32;
    constexpr bool kScales = F::kIsUsual && Config::kQuantizes;
    __shared__ device::Bf16Scales::Entry entries[kScales ? device::Bf16Scales::kCount : 1];
    const device::Bf16Scales scales{entries};
    ptx::griddepcontrol_launch_dependents();
    const Prepared prepared(job);
    if (starts_early(view)) {
        if (warp == F::kWarps - 2) fetch_parameter(job, in.sinks[0]);
        if (warp == F::kWarps - 3) fetch_parameter(spread, in.sinks[1]);
    }
    init_told(job.begin, in);
    if (ptx::lane_id() < 2) device::init_stage({nullptr, &loaded[warp][ptx::lane_id()]});
    if constexpr (F::kIsUsual) {
        if (kScales && threadIdx.x < device::Bf16Scales::kCount) scales.fill(threadIdx.x);
        const UsualTurns turns(spread, job.args, uniform_warp(), F::kWarps);
        OwnSlot own;
        if (!send_usual<Config>(job, spread, tables, far, in, prepared, loaded[warp], scales,
                                own)) {
            return;
        }
        if (!receive_usual<Config>(job, spread, tables, far, in, turns, own)) return;
        return conclude_slowly<kHalf>(job, spread, far, in);
    }
    prepared.store(job, tables);
    __syncthreads();
    bool ok = true;
    if constexpr (kHalf == Half::kReceive) {
        ptx::griddepcontrol_wait();
        if (threadIdx.x == 0) in.sends = true;
        if (warp == 0) ok = resume_half(view, job.begin, far, job.begun, in);
        if (warp == 1) ok = !device::gave_up(view.watch);
        if (!__syncthreads_and(ok)) return;
    } else {
        if (!send<Config, kHalf>(job, spread, tables, far, in, loaded[warp], ok)) return;
    }
    if constexpr (kHalf == Half::kSend) {
        if (!ok) in.leaves = true;
    } else {
        if (!receive<Config, kHalf>(job, spread, tables, far, in, ok)) return;
    }
    if constexpr (F::kAny || kHalf == Half::kSend) {
        conclude<kHalf>(job, spread, tables, far, in);
    } else {
        conclude_slowly<kHalf>(job, spread, far, in);
    }
}

template <class F>
using StageDispatchKernel = void (*)(DispatchJob, StageSpread, F);

// Every kernel that exists, in one place.
template <Half kHalf, class F>
StageDispatchKernel<F> stage_dispatch_of(Quantize quantize, DType dtype) {
    if (quantize == Quantize::kNone) return stage_dispatch_kernel<Verbatim, kHalf, F>;
    switch (dtype) {
        case DType::kBF16:
            return stage_dispatch_kernel<Quantized<DType::kBF16>, kHalf, F>;
        case DType::kF16:
            return stage_dispatch_kernel<Quantized<DType::kF16>, kHalf, F>;
        default:
            return stage_dispatch_kernel<Quantized<DType::kF32>, kHalf, F>;
    }
}

template <class F>
StageDispatchKernel<F> stage_dispatch_for(const DispatchArgs& a, Half half) {
    if constexpr (F::kIsUsual) {
        if (a.quantize == Quantize::kNone) return stage_dispatch_kernel<Verbatim, Half::kBoth, F>;
        return stage_dispatch_kernel<Quantized<DType::kBF16>, Half::kBoth, F>;
    } else {
        switch (half) {
            case Half::kBoth:
                return stage_dispatch_of<Half::kBoth, F>(a.quantize, a.dtype);
            case Half::kSend:
                return stage_dispatch_of<Half::kSend, F>(a.quantize, a.dtype);
            default:
                return stage_dispatch_kernel<Verbatim, Half::kReceive, F>;
        }
    }
}

// Calls that kernels with Usual are for, but for their layout.
inline bool is_usual(const DispatchJob& job, Half half, int num_blocks) {
    const DispatchArgs& a = job.args;
    const UnpackArgs& out = job.out;
    const Shape& s = job.view.shape;
    const bool wants_more =
        a.replicas.num_logical != 0 || a.routed_idx != nullptr || a.logical_load != nullptr ||
        a.rank_ends != nullptr || a.wait_stats != nullptr || a.index_capacity >= 0 ||
        out.offsets != nullptr || out.row_token != nullptr || out.source_range != nullptr;
    const bool is_small = a.num_tokens <= num_blocks &&
                          record_of(a).num_pieces <= NoFar::kWarps - 3 &&
                          s.num_ranks <= kUsualRanks && record_of(a).scale_bytes <= 4 * 32 &&
                          s.num_ranks + s.num_experts <= NoFar::kWarps * 32;
    const bool quantizes = a.quantize != Quantize::kNone;
    return half == Half::kBoth && !job.view.watch.can_mask && !wants_more && is_small &&
           (!quantizes || (a.scale_block == 128 && a.dtype == DType::kBF16));
}

template <class F>
int launch_staged_dispatch(const F& far, const DispatchJob& job, Half half, int num_blocks,
                           Stream stream) {
    const StageSpread spread(job.view.shape, job.args, job.out, num_blocks);
    return launch_dependent(stage_dispatch_for<F>(job.args, half),
                            {num_blocks, F::kWarps * 32, spread.end}, job.view.overlaps, stream,
                            job, spread, far);
}

template <class F>
int load_staged_dispatch(int smem_bytes) {
    for (const Half half : {Half::kBoth, Half::kSend, Half::kReceive}) {
        for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
            for (const Quantize quantize : {Quantize::kNone, Quantize::kFp8}) {
                DispatchArgs a;
                a.dtype = dtype, a.quantize = quantize;
                const auto kernel = reinterpret_cast<const void*>(stage_dispatch_for<F>(a, half));
                if (const int error = load_kernel(kernel, smem_bytes)) return error;
            }
        }
    }
    return 0;
}

}  // namespace ep::kernels
