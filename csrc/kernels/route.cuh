// Where a token goes: from what notify left, or from a handle, to final rows at every rank.
//
// defines: Target, Choice, Route, Router
#pragma once

#include <cstdint>

#include "contract/calls.h"
#include "contract/gpu.h"
#include "device/wait.cuh"
#include "kernels/count.cuh"
#include "kernels/enter.cuh"

namespace ep::kernels {

// Where a rank wants our rows; one for each rank, in shared memory.
struct Target {
    std::byte* x;
    std::byte* records;
    int64_t num_rows;
};

// What a lane knows of its slot of a token, read ahead of time.
struct Choice {
    int64_t id = -1;
    int32_t turn = 0;  // of the token at the slot's rank
    int32_t row = 0;   // of a handle; or the selection's turn at its expert
};

// Where one slot of a token goes; held by the lane of that slot.
struct Route {
    int32_t dst = -1;     // rank, -1 = none
    bool first = false;   // the slot that brings the token to that rank
    int32_t row = -1;     // final row of the slot
    int32_t record = -1;  // row of the token's record
};

struct Router {
    const DispatchJob& job;
    Operation op;
    int32_t slot;
    const Target* targets;

    __device__ Target target(int dst) const {
        const RankView& view = job.view;
        const auto& base =
            *at<const BaseRecord>(view, view.peers.rank, view.layout.base(slot, dst));
        std::byte* arena = view.peers.arena[dst];
        int64_t num_rows = base.num_rows;
        if (job.args.layout == RecvLayout::kCompact) {  // also the number of records there
            num_rows = min(num_rows, view.shape.num_ranks * view.shape.max_tokens);
        }
        return {arena + base.x_offset, arena + base.meta_offset, num_rows};
    }

    // A warp, one lane for each slot. Loads only, so that they are under way early.
    __device__ Choice choose(int t) const {
        const DispatchArgs& a = job.args;
        const int lane = ptx::lane_id();
        Choice c;
        if (t >= a.num_tokens || lane >= a.num_topk) return c;
        const int64_t at = int64_t{t} * a.num_topk + lane;
        const bool compact = a.layout == RecvLayout::kCompact;
        c.id = a.topk_idx[at];
        if (!(compact && a.cached)) c.turn = job.view.state.turn[at];
        if (a.cached) {
            c.row = a.send_row[at];
        } else if (!compact) {
            c.row = selection_turns(job)[at];
        }
        return c;
    }

    __device__ Route route(int t, const Choice& c) const {
        const DispatchArgs& a = job.args;
        const State& state = job.view.state;
        Route r;
        if (c.id >= 0 && c.id < job.view.shape.num_experts) {
            const int chunk = t / job.tokens_per_chunk;
            r.dst = __ldg(state.owner + c.id);
            if (a.cached && a.layout == RecvLayout::kCompact) {
                r.row = r.record = c.row;
            } else {
                const int num_ranks = job.view.shape.num_ranks;
                r.record = state.chunk_row[chunk * num_ranks + r.dst] + c.turn;
                r.row = a.cached ? c.row : r.record;
            }
            if (!a.cached && a.layout != RecvLayout::kCompact) {
                const int position = __ldg(state.position + c.id);
                r.row = c.row + state.chunk_slot[chunk * job.view.shape.num_experts + position];
            }
        }
        const uint32_t same = __match_any_sync(~0u, r.dst);
        r.first = r.dst >= 0 && (same & ptx::lanemask_lt()) == 0;
        return r;
    }

    // A handle's rows are a tensor that anybody may have changed.
    __device__ bool in_bounds(const Route& r) const {
        if (!job.args.cached) return true;
        const bool bad = r.dst >= 0 && (r.row < 0 || r.row >= targets[r.dst].num_rows);
        if (bad) {
            device::give_up(job.view.watch, op, kMiscount,
                            {Site::kNone, r.dst, uint64_t(targets[r.dst].num_rows)},
                            uint64_t(r.row), 0);
        }
        return !__any_sync(~0u, bad);
    }

    __device__ std::byte* row_of(const Route& r) const {
        return targets[r.dst].x + int64_t{r.row} * job.args.row_bytes();
    }
    __device__ std::byte* record_of(const Route& r) const {
        return targets[r.dst].records + int64_t{r.record} * meta_layout(job.args).bytes;
    }
};

}  // namespace ep::kernels
