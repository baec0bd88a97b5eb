// Which rows a token is the sum of, and in which order they are added.
//
// defines: Source, Selection, Plan, Planner
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"

namespace ep::kernels {

// Where the rows of an owner lie; one for each rank, in shared memory.
struct Source {
    const std::byte* y;
    int64_t num_rows;
    const float* weights;  // of y, or null
};

// What a lane knows of its slot of a token, read ahead.
struct Selection {
    int64_t id = -1;
    int32_t row = -1;
};

// The rows of a lane's token; each held by the lane of its slot.
struct Plan {
    bool ok = true;  // false: leave
    int count = 0;   // of all
    int place = -1;  // of this lane's row in the order they are added, -1 = it adds none
    const std::byte* row = nullptr;
    float weight = 1.0f;
};

// Of one warp, which plans several tokens at once: as many as it has lanes for.
struct Planner {
    const CombineJob& job;
    const uint64_t& seq;  // in shared memory, so that it needs no register
    const Source* sources;
    int per_turn;     // tokens at once
    int token, slot;  // of this lane

    __device__ Planner(const CombineJob& j, const uint64_t& number, const Source* s)
        : job(j), seq(number), sources(s), per_turn(32 / j.args.num_topk) {
        const int lane = ptx::lane_id(), num_topk = j.args.num_topk;
        token = lane / num_topk;
        slot = lane % num_topk;
    }

    __device__ Operation op() const { return {OpKind::kCombine, seq}; }

    // Lanes of its token; made anew each time, so that they need no register.
    __device__ uint32_t mates() const {
        return static_cast<uint32_t>((uint64_t{1} << job.args.num_topk) - 1)
               << (ptx::lane_id() - slot);
    }

    // Tokens first, first + step, ...
    __device__ int64_t token_at(int64_t first, int64_t step) const { return first + token * step; }

    __device__ Selection select(int64_t first, int64_t step) const {
        const CombineArgs& a = job.args;
        const int64_t t = token_at(first, step);
        Selection s;
        if (token < per_turn && t < a.num_tokens) {
            s.id = a.topk_idx[t * a.num_topk + slot];
            s.row = a.send_row[t * a.num_topk + slot];
        }
        return s;
    }

    __device__ Plan plan(int64_t first, int64_t step, const Selection& choice) const {
        const CombineArgs& a = job.args;
        const RankView& view = job.view;
        const int64_t at = token_at(first, step) * a.num_topk + slot;
        const bool chosen = choice.id >= 0 && choice.id < view.shape.num_experts && choice.row >= 0;
        const int owner = chosen ? __ldg(view.state.owner + choice.id) : -1;
        const float weight = chosen && a.source_weighs() ? a.topk_weights[at] : 1.0f;
        const Plan plan = arrange(owner, choice.row, weight);
        if (plan.ok && a.out_weights != nullptr) {
            const float back = weights_back(plan, owner, choice.row);
            if (token < per_turn && token_at(first, step) < a.num_tokens) a.out_weights[at] = back;
        }
        return plan;
    }

    // Of a lane whose row is at `owner`, -1 = it has none.
    __device__ Plan arrange(int owner, int64_t row, float weight) const {
        const uint32_t same = __match_any_sync(~0u, owner) & mates();
        bool adds = owner >= 0;
        if (job.args.one_per_rank()) adds = adds && (same & ptx::lanemask_lt()) == 0;
        Plan plan;
        plan.ok = in_bounds(adds, owner, row);
        if (!plan.ok) return plan;
        plan.count = __popc(__ballot_sync(~0u, adds) & mates());
        const int place = place_of(adds, owner);
        if (!adds) return plan;
        plan.place = place;
        plan.row = sources[owner].y + row * job.args.row_bytes();
        plan.weight = weight;
        return plan;
    }

    // What comes back beside the rows, for the slot of this lane.
    __device__ float weights_back(const Plan& plan, int owner, int64_t row) const {
        if (job.args.sum_weights) return sum_weights(plan, owner, row);
        return owner >= 0 ? weight_back(owner, row, slot) : 0.0f;
    }

    // A handle's rows are a tensor that anybody may have changed.
    __device__ bool in_bounds(bool adds, int owner, int64_t row) const {
        const bool stale = adds && row >= sources[owner].num_rows;
        if (stale) {
            device::give_up(job.view.watch, op(), kMiscount,
                            {Site::kPulled, owner, uint64_t(sources[owner].num_rows)},
                            uint64_t(row), 0);
        }
        return !__any_sync(~0u, stale);
    }

    // Lower owners first, lower slots first; or by slots alone. Looks only at slots that add, of all tokens at
    // once.
    __device__ int place_of(bool adds, int owner) const {
        const int lane = ptx::lane_id();
        const bool by_slots = job.args.topk_order;
        int place = 0;
#pragma unroll 1
        for (uint32_t left = __ballot_sync(~0u, adds) & mates(); __any_sync(~0u, left != 0);
             left &= left - 1) {
            const int from = left != 0 ? __ffs(left) - 1 : lane;
            const int other = __shfl_sync(~0u, owner, from);
            const bool earlier =
                by_slots ? from < lane : other < owner || (other == owner && from < lane);
            if (left != 0 && earlier) ++place;
        }
        return place;
    }

    __device__ float weight_back(int owner, int64_t row, int k) const {
        const int64_t index =
            job.args.layout == RecvLayout::kCompact ? row * job.args.num_topk + k : row;
        const float* weights = sources[owner].weights;
        return weights != nullptr ? weights[index] : 0.0f;
    }

    // Compact: every rank of the token holds a value for every slot, also of experts elsewhere.
    __device__ float sum_weights(const Plan& plan, int owner, int64_t row) const {
        float sum = 0.0f;
        const int most = __reduce_max_sync(~0u, plan.count);
        for (int i = 0; i < most; ++i) {
            const uint32_t holder = __ballot_sync(~0u, plan.place == i) & mates();
            const int from = max(__ffs(holder) - 1, 0);
            const int their = __shfl_sync(~0u, owner, from);
            const int64_t their_row = __shfl_sync(~0u, row, from);
            if (holder != 0) sum = __fadd_rn(sum, weight_back(their, their_row, slot));
        }
        return sum;
    }
};

}  // namespace ep::kernels
