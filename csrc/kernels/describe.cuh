// What a token leaves at a rank it goes to, beside its row: ids, weights, scales, and whence it came, as
// the receiver's tensors want them.
//
// defines: Choice, Route, Describer
#pragma once

#include <cstdint>

#include "contract/calls.h"
#include "contract/gpu.h"
#include "device/ptx.cuh"
#include "kernels/tables.cuh"

namespace ep::kernels {

// What a lane knows of its slot of a token, read ahead of time.
struct Choice {
    int32_t dst = -1;                   // rank, -1 = none
    int32_t local = -1, position = -1;  // expert there, and among all
    int32_t row = 0;                    // of a handle
    float weight = 0.0f;
};

// Where one slot of a token goes; held by the lane of that slot.
struct Route {
    bool first = false;   // the slot that brings the token to its rank
    int32_t row = -1;     // final row of the slot
    int32_t record = -1;  // of the token among all that the rank receives
};

// Of the tokens of rank `source`. A warp describes one token, each lane its slot.
struct Describer {
    const DispatchJob& job;
    Tables tables;
    int source;

    __device__ const DispatchArgs& args() const { return job.args; }

    __device__ std::byte* row_of(const Choice& c, const Route& r) const {
        return tables.targets[c.dst].x() + int64_t{r.row} * args().row_bytes();
    }
    // Scales travel once a token: grouped and slab spread them at the receiver.
    __device__ std::byte* scales_of(const Choice& c, const Route& r) const {
        const bool compact = args().layout == RecvLayout::kCompact;
        return tables.targets[c.dst].scales() +
               int64_t{compact ? r.row : r.record} * args().scale_bytes;
    }

    // What goes beside the row, to every rank the token goes to.
    __device__ void describe(int t, const Choice& c, const Route& r) const {
        const DispatchArgs& a = args();
        if (a.cached && !a.with_weights) return;
        if (a.layout == RecvLayout::kCompact) {
            describe_token(t, c, r);
        } else {
            describe_selections(t, c, r);
        }
    }

    // Scales that are in no stage: words, from wherever they are.
    __device__ void copy_scales(const Choice& c, const Route& r, const std::byte* from) const {
        const auto words = static_cast<int>(args().scale_bytes / 4);
#pragma unroll 1
        for (uint32_t left = __ballot_sync(~0u, r.first); left != 0; left &= left - 1) {
            const int leader = __ffs(left) - 1;
            const auto out =
                __shfl_sync(~0u, r.first ? reinterpret_cast<uint64_t>(scales_of(c, r)) : 0, leader);
            for (int w = ptx::lane_id(); w < words; w += 32) {
                reinterpret_cast<uint32_t*>(out)[w] = reinterpret_cast<const uint32_t*>(from)[w];
            }
        }
    }

private:
    __device__ static void put_id(const Target& target, int64_t at, int32_t local) {
        if (target.ids() == nullptr) return;
        if (target.wide_ids != 0) {
            reinterpret_cast<int64_t*>(target.ids())[at] = local;
        } else {
            reinterpret_cast<int32_t*>(target.ids())[at] = local;
        }
    }

    // Compact: a line of slots at each rank, those of experts elsewhere empty.
    __device__ void describe_token(int t, const Choice& c, const Route& r) const {
        const DispatchArgs& a = args();
        const int lane = ptx::lane_id();
#pragma unroll 1
        for (uint32_t left = __ballot_sync(~0u, r.first); left != 0; left &= left - 1) {
            const int leader = __ffs(left) - 1;
            const int dst = __shfl_sync(~0u, c.dst, leader);
            const int64_t row = __shfl_sync(~0u, r.row, leader);
            const Target& target = tables.targets[dst];
            const bool here = c.dst == dst;
            if (lane < a.num_topk) {
                const int64_t at = row * a.num_topk + lane;
                if (!a.cached) put_id(target, at, here ? c.local : -1);
                if (a.with_weights) target.weights()[at] = here ? c.weight : 0.0f;
            }
            if (lane == 0 && !a.cached) {
                reinterpret_cast<int2*>(target.src())[row] = make_int2(source, t);
            }
        }
    }

    // Grouped and slab: a row for each selection; the token says at each rank which rows are its.
    __device__ void describe_selections(int t, const Choice& c, const Route& r) const {
        const DispatchArgs& a = args();
        const int lane = ptx::lane_id();
        if (c.dst >= 0) {
            const Target& target = tables.targets[c.dst];
            if (!a.cached) put_id(target, r.row, c.local);
            if (a.with_weights) target.weights()[r.row] = c.weight;
        }
#pragma unroll 1
        for (uint32_t left = a.cached ? 0 : __ballot_sync(~0u, r.first); left != 0;
             left &= left - 1) {
            const int leader = __ffs(left) - 1;
            const int dst = __shfl_sync(~0u, c.dst, leader);
            const int64_t record = __shfl_sync(~0u, r.record, leader);
            const Target& target = tables.targets[dst];
            if (lane < a.num_topk) {
                target.rows()[record * a.num_topk + lane] = c.dst == dst ? r.row : -1;
            }
            if (lane == 0) reinterpret_cast<int2*>(target.src())[record] = make_int2(source, t);
        }
    }
};

}  // namespace ep::kernels
