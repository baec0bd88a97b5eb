// The second half of a small dispatch: what follows from counts alone is filled in.
//
// defines: StagePadder, settle_rows
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "contract/stage.h"
#include "device/ptx.cuh"
#include "kernels/enter.cuh"
#include "kernels/stage_tables.cuh"
#include "kernels/usual.cuh"

namespace ep::kernels {

// What nobody sent: rows of fixed shapes that are in no use. Of a warp, one of `step` of the grid.
template <class F>
struct StagePadder {
    const DispatchJob& job;
    int first, step;

    // `good`: the call did not fail; else nothing has come.
    __device__ __forceinline__ void run(const StageTables& tables, bool good) const {
        const DispatchArgs& a = job.args;
        const StageSpread& spread = tables.spread;
        const UnpackArgs& out = job.out;
        const int lane = ptx::lane_id(), me = job.view.peers.rank;
        const int recv = good ? tables.total_rows(me) : 0;
#pragma unroll 1
        for (int n = 0; n < spread.num_fillings; ++n) {
            const Filling& f = spread.fillings[n];
            const int64_t begin = int64_t{recv} * f.words, end = int64_t{f.items} * f.words;
#pragma unroll 1
            for (int64_t i = begin + 32 * first + lane; i < end; i += 32 * step) f.at[i] = f.value;
        }
        if (is_compact<F>(a.layout) || out.max_rows == 0) return;
        const int first_expert = tables.first()[me];
        const int num_local = tables.first()[me + 1] - first_expert;
        const auto capacity = static_cast<int>(a.capacity);
#pragma unroll 1
        for (int e = first; e < num_local; e += step) {
            const int used = good ? tables.total(first_expert + e) : 0;
#pragma unroll 1
            for (int i = lane; i < capacity; i += 32) {
                const bool is_used = i < used;
                const int row = e * capacity + i, id = is_used ? e : -1;
                if (out.idx_is_int64) {
                    static_cast<int64_t*>(out.topk_idx)[row] = id;
                } else {
                    static_cast<int32_t*>(out.topk_idx)[row] = id;
                }
                if (is_used) continue;
                if (a.with_weights) out.topk_weights[row] = 0.0f;
                if (!F::kIsUsual && out.row_token != nullptr) out.row_token[row] = -1;
            }
        }
    }
};

// Of our own tokens, which know by now only their turn among ours: their rows at their owners. A thread
// takes a selection. Of a call that failed, or at a rank that is masked: none.
template <class F>
__device__ __forceinline__ void settle_rows(const DispatchJob& job, const StageTables& tables,
                                            int begin, int end, const Entering& in, bool good) {
    const DispatchArgs& a = job.args;
    const RankView& view = job.view;
    const bool is_routed = !F::kIsUsual && a.routed_idx != nullptr;
    const int64_t* ids = is_routed ? a.routed_idx : a.topk_idx;
    const int last = end * a.num_topk;
    // From the last warp but one downwards: first warps are those that take rows, the last one tells.
    const auto threads = static_cast<int>(blockDim.x), back = threads - 33;
    const int turn = back - static_cast<int>(threadIdx.x), first = turn < 0 ? turn + threads : turn;
#pragma unroll 1
    for (int i = begin * a.num_topk + first; i < last; i += threads) {
        const int number = a.send_row[i];
        const int64_t id = ids[i];
        const Expert expert = tables.expert(id);
        if (number < 0 || expert.position < 0) continue;
        if (!good || without<F>(in, staged_rank(expert.code))) {
            a.send_row[i] = -1;
        } else if (is_compact<F>(a.layout)) {
            a.send_row[i] = tables.rows(view.peers.rank, staged_rank(expert.code)) + number;
        } else {
            const auto slab = static_cast<int>(staged_local(expert.code) * a.capacity);
            a.send_row[i] = slab + tables.selections(view.peers.rank, expert.position) + number;
        }
    }
}

}  // namespace ep::kernels
