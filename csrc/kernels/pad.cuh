// Rows nobody was given: ids -1 and weights 0, whatever memory held before; between groups also x and
// scales 0. And what else a call of fixed shapes returns in full.
//
// defines: Padder
#pragma once

#include <cstdint>

#include "contract/calls.h"
#include "contract/gpu.h"
#include "device/ptx.cuh"
#include "kernels/enter.cuh"
#include "kernels/tables.cuh"

namespace ep::kernels {

// Of a warp, one of `step` of the whole grid.
struct Padder {
    const DispatchJob& job;
    int64_t first, step;

    // `recv`, `groups`, `counts`: what has come; of nothing when the call failed.
    __device__ void run(int64_t recv, const int32_t* groups, const int32_t* counts,
                        bool failed) const {
        const DispatchArgs& a = job.args;
        const UnpackArgs& out = job.out;
        if (a.layout == RecvLayout::kCompact) {
#pragma unroll 1
            for (int64_t row = recv + first; a.is_static && row < out.max_rows; row += step) {
                pad(row, a.num_topk, false);
                if (a.scale_bytes > 0) clear(out.scales + row * a.scale_bytes, a.scale_bytes);
            }
        } else {
            pad_groups(groups, counts, failed);
        }
        if (!a.cached && (a.is_static || failed)) pad_routing(recv, failed);
    }

private:
    __device__ void pad_groups(const int32_t* groups, const int32_t* counts, bool failed) const {
        const DispatchArgs& a = job.args;
        const RankView& view = job.view;
        const int me = view.peers.rank;
        const int num_local = view.state.first[me + 1] - view.state.first[me];
        const bool grouped = a.layout == RecvLayout::kGrouped;
#pragma unroll 1
        for (int e = 0; e < num_local && !failed; ++e) {
#pragma unroll 1
            for (int64_t row = groups[e] + counts[e] + first; row < groups[e + 1]; row += step) {
                pad(row, 1, grouped);
            }
        }
        if (!a.is_static && !failed) return;
        const int64_t used = failed ? 0 : groups[num_local];
#pragma unroll 1
        for (int64_t row = used + first; row < job.out.max_rows; row += step) pad(row, 1, false);
    }

    // What follows from the number of tokens that came, in a shape that does not.
    __device__ void pad_routing(int64_t recv, bool failed) const {
        const UnpackArgs& out = job.out;
        const int lane = ptx::lane_id(), num_topk = job.args.num_topk;
#pragma unroll 1
        for (int64_t i = recv + first; i < out.max_recv; i += step) {
            if (lane < 2 && out.recv_src != nullptr) out.recv_src[2 * i + lane] = -1;
            if (out.recv_row != nullptr && lane < num_topk) out.recv_row[i * num_topk + lane] = -1;
        }
        if (!failed) return;
        const int64_t selections = job.args.num_tokens * num_topk;
#pragma unroll 1
        for (int64_t i = first * 32 + lane; i < selections; i += step * 32) {
            job.args.send_row[i] = -1;
        }
    }

    __device__ void pad(int64_t row, int64_t per_row, bool zero_x) const {
        const UnpackArgs& out = job.out;
        const int lane = ptx::lane_id();
        if (lane < per_row) {
            const int64_t at = row * per_row + lane;
            if (out.topk_idx != nullptr && out.idx_is_int64) {
                static_cast<int64_t*>(out.topk_idx)[at] = -1;
            } else if (out.topk_idx != nullptr) {
                static_cast<int32_t*>(out.topk_idx)[at] = -1;
            }
            if (out.topk_weights != nullptr) out.topk_weights[at] = 0.0f;
        }
        if (!zero_x) return;
        const int64_t bytes = job.args.row_bytes();
        const int64_t x = int64_t{job.begin.head.grant.page[Grant::kX]} * kExtentAlign;
        clear(job.view.peers.arena[job.view.peers.rank] + x + row * bytes, bytes);
    }

    __device__ void clear(std::byte* at, int64_t bytes) const {
#pragma unroll 1
        for (int64_t w = ptx::lane_id(); w < bytes / 4; w += 32) {
            reinterpret_cast<uint32_t*>(at)[w] = 0;
        }
    }
};

}  // namespace ep::kernels
