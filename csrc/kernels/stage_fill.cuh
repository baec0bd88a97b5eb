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

namespace ep::kernels {

// What nobody sent: rows of fixed shapes that are in no use. Of a warp, one of `step` of the grid.
struct StagePadder {
    const DispatchJob& job;
    int64_t first, step;

    // `good`: the call did not fail; else nothing has come.
    __device__ __forceinline__ void run(const StageTables& tables, bool good) const {
        const DispatchArgs& a = job.args;
        const int me = job.view.peers.rank, first_expert = tables.first()[me];
        const int num_local = tables.first()[me + 1] - first_expert;
        const int recv = good ? tables.total_rows(me) : 0;
        const UnpackArgs& out = job.out;
        const int lane = ptx::lane_id();
#pragma unroll 1
        for (int64_t i = recv + first * 32 + lane; i < out.max_recv; i += step * 32) {
            *reinterpret_cast<int2*>(out.recv_src + 2 * i) = make_int2(-1, -1);
        }
        if (a.layout == RecvLayout::kCompact) return pad_compact(recv);
        const int64_t slots = (out.max_recv - recv) * a.num_topk;
#pragma unroll 1
        for (int64_t i = first * 32 + lane; i < slots; i += step * 32) {
            out.recv_row[int64_t{recv} * a.num_topk + i] = -1;
        }
        if (out.max_rows == 0) return;  // there was no memory for them
#pragma unroll 1
        for (int64_t e = first; e < num_local; e += step) {
            const int used = good ? tables.total(first_expert + static_cast<int>(e)) : 0;
#pragma unroll 2
            for (int64_t i = lane; i < a.capacity; i += 32) {
                const bool is_used = i < used;
                const int64_t row = e * a.capacity + i;
                if (out.idx_is_int64) {
                    static_cast<int64_t*>(out.topk_idx)[row] = is_used ? e : -1;
                } else {
                    static_cast<int32_t*>(out.topk_idx)[row] = is_used ? static_cast<int>(e) : -1;
                }
                if (is_used) continue;
                if (a.with_weights) out.topk_weights[row] = 0.0f;
                if (out.row_token != nullptr) out.row_token[row] = -1;
            }
        }
    }

private:
    __device__ __forceinline__ void pad_compact(int recv) const {
        const DispatchArgs& a = job.args;
        const UnpackArgs& out = job.out;
        const int lane = ptx::lane_id();
#pragma unroll 1
        for (int64_t row = recv + first; row < out.max_rows; row += step) {
            if (lane < a.num_topk) {
                const int64_t at = row * a.num_topk + lane;
                if (out.idx_is_int64) {
                    static_cast<int64_t*>(out.topk_idx)[at] = -1;
                } else {
                    static_cast<int32_t*>(out.topk_idx)[at] = -1;
                }
                if (a.with_weights) out.topk_weights[at] = 0.0f;
            }
            if (out.row_token != nullptr && lane == 0) out.row_token[row] = -1;
#pragma unroll 1
            for (int64_t w = lane; w < a.scale_bytes / 4; w += 32) {
                reinterpret_cast<uint32_t*>(out.scales)[row * (a.scale_bytes / 4) + w] = 0;
            }
        }
    }
};

// Of our own tokens, which know by now only their turn among ours: their rows at their owners. A thread
// takes a selection. Of a call that failed, or at a rank that is masked: none.
__device__ __forceinline__ void settle_rows(const DispatchJob& job, const StageTables& tables,
                                            int begin, int end, const Entering& in, bool good) {
    const DispatchArgs& a = job.args;
    const RankView& view = job.view;
    const int64_t* ids = a.routed_idx != nullptr ? a.routed_idx : a.topk_idx;
    const int64_t last = int64_t{end} * a.num_topk;
    // From the last warp but one downwards: first warps are those that take rows, the last one tells.
    const auto threads = static_cast<int>(blockDim.x), back = threads - 33;
    const int turn = back - static_cast<int>(threadIdx.x), first = turn < 0 ? turn + threads : turn;
#pragma unroll 1
    for (int64_t i = int64_t{begin} * a.num_topk + first; i < last; i += threads) {
        const int number = a.send_row[i];
        const int64_t id = ids[i];
        const Expert expert = tables.expert(id);
        if (number < 0 || expert.position < 0) continue;
        if (!good || without(in, staged_rank(expert.code))) {
            a.send_row[i] = -1;
        } else if (a.layout == RecvLayout::kCompact) {
            a.send_row[i] = tables.rows(view.peers.rank, staged_rank(expert.code)) + number;
        } else {
            const auto slab = static_cast<int>(staged_local(expert.code) * a.capacity);
            a.send_row[i] = slab + tables.selections(view.peers.rank, expert.position) + number;
        }
    }
}

}  // namespace ep::kernels
