// A warp moves its tokens: each row is loaded once and bulk-copied straight into its final row at each
// rank that owns one of its experts; what goes beside it: kernels/describe.cuh.
//
// defines: Verbatim, Quantized, Mover, move_rows
//
// One token in flight a warp. Its stage is refilled when its stores have been read; rows count as arrived
// when all stores of the block are complete.
#pragma once

#include <cstdint>

#include "contract/calls.h"
#include "contract/gpu.h"
#include "device/copy.cuh"
#include "device/ptx.cuh"
#include "device/quantize.cuh"
#include "device/wait.cuh"
#include "kernels/count.cuh"
#include "kernels/describe.cuh"
#include "kernels/tables.cuh"

namespace ep::kernels {

// How rows leave: as they are, or quantized from kSource on the way.
struct Verbatim {
    static constexpr bool kQuantizes = false;
    static constexpr int kMaxMovers = 19;  // warps of a block, beside one that concludes
};
template <DType kDtype>
struct Quantized {
    static constexpr bool kQuantizes = true;
    static constexpr DType kSource = kDtype;
    static constexpr int kMaxMovers = 15;
};

// Scales that are moved with the row have to come in whole units of a bulk copy.
__device__ __forceinline__ bool in_units(const std::byte* address, int64_t bytes) {
    return bytes % 16 == 0 && reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// The tokens of a warp: begin, begin + step, ... below end.
struct Walk {
    int begin, end, step;
};
__device__ __forceinline__ Walk tokens_of(const BlockSpan& span, const Spread& spread, int warp) {
    if (spread.votes_tokens) return {span.own.begin + warp, span.own.end, spread.num_movers};
    const Span run = span.of_warp(warp, spread.tokens_per_warp);
    return {run.begin, run.end, 1};
}

struct Mover {
    const DispatchJob& job;
    const Entering& in;
    const Spread& spread;
    device::Stage stage;
    Walk tokens;           // of this warp
    int block_begin;       // first token of the block
    int32_t* next;         // of this warp: rows given, then selections
    bool loading = false;  // the stage is being filled

    // Addresses again each time, so that they need no registers.
    __device__ Tables tables() const { return Tables(spread); }
    __device__ const DispatchArgs& args() const { return job.args; }
    __device__ int64_t source_bytes() const { return args().hidden * dtype_bytes(args().dtype); }
    // Given scales go through registers, 16 bytes a lane: a bulk copy of so few costs as much as a large one.
    __device__ bool carries_scales() const {
        return args().quantize == Quantize::kNone && args().scale_bytes > 0 &&
               args().scale_bytes <= 16 * 32 && in_units(args().scales, args().scale_bytes);
    }
    __device__ bool holds_scales() const {
        return 16 * static_cast<int64_t>(ptx::lane_id()) < args().scale_bytes;
    }
    // Those of a token that is not moved yet.
    __device__ uint4 look_at_scales(int t) const {
        if (!carries_scales() || t >= tokens.end || !holds_scales()) return make_uint4(0, 0, 0, 0);
        const std::byte* from = args().scales + int64_t{t} * args().scale_bytes;
        return reinterpret_cast<const uint4*>(from)[ptx::lane_id()];
    }
    // Given scales of token t, of which `carried` has been looked at, to every rank it goes to.
    __device__ void put_scales(int t, const Choice& c, const Route& r, const uint4& carried) const {
        const DispatchArgs& a = args();
        if (a.scale_bytes == 0 || a.quantize != Quantize::kNone) return;
        if (!carries_scales()) {
            return out().copy_scales(c, r, a.scales + int64_t{t} * a.scale_bytes);
        }
#pragma unroll 1
        for (uint32_t left = __ballot_sync(~0u, r.first); left != 0; left &= left - 1) {
            const auto to =
                __shfl_sync(~0u, r.first ? reinterpret_cast<uint64_t>(out().scales_of(c, r)) : 0,
                            __ffs(left) - 1);
            if (holds_scales()) reinterpret_cast<uint4*>(to)[ptx::lane_id()] = carried;
        }
    }

    // The piece of a token's row at `offset`.
    __device__ void load(int t, int64_t offset) {
        loading = t < tokens.end;
        if (!loading || ptx::lane_id() != 0) return;
        const auto bytes =
            static_cast<uint32_t>(min(int64_t{spread.stage_bytes}, source_bytes() - offset));
        device::load_stage(stage, args().x + int64_t{t} * args().x_stride + offset, bytes);
    }

    __device__ bool await() {
        const RankView& view = job.view;
        const Operation op{OpKind::kDispatch, in.seq};
        if (!device::await_stage(view.watch, op, stage, view.peers.rank)) return false;
        loading = false;
        return true;
    }

    // Before we leave early: what is on its way into our stage arrives first.
    __device__ void abandon() {
        if (loading) device::drain_stage(stage);
        loading = false;
    }

    // The piece has been read by our stores: the next one may come.
    __device__ void refill(int t, int64_t offset) {
        device::drain_reads();
        __syncwarp();
        load(t, offset);
    }

    // One lane for each slot. Of a token that is not moved yet, so that nobody waits for the loads.
    __device__ Choice choose(int t) const {
        const DispatchArgs& a = args();
        const State& state = job.view.state;
        const int lane = ptx::lane_id();
        Choice c;
        if (t >= tokens.end || lane >= a.num_topk) return c;
        const int64_t at = int64_t{t} * a.num_topk + lane;
        const int64_t id = a.cached ? a.topk_idx[at] : expert_of(job, t, a.topk_idx[at]);
        if (a.cached) c.row = a.send_row[at];
        if (c.row < 0) return c;  // of a dispatch that failed
        if (a.topk_weights != nullptr) c.weight = a.topk_weights[at];
        if (a.routed_idx != nullptr && !a.cached) a.routed_idx[at] = id;
        if (static_cast<uint64_t>(id) < static_cast<uint64_t>(job.view.shape.num_experts)) {
            c.dst = __ldg(state.owner + id);
            c.local = __ldg(state.local + id);
            if (gives_selections(a)) c.position = __ldg(state.position + id);
        }
        return c;
    }

    // Gives the token its rows, in order: once for each token.
    __device__ Route route(int t, const Choice& c) const {
        const DispatchArgs& a = args();
        const bool chosen = c.dst >= 0;
        const uint32_t before = ptx::lanemask_lt();
        const uint32_t same = __match_any_sync(~0u, c.dst);
        Route r;
        r.first = chosen && (same & before) == 0;
        if (!counts_tokens(a)) {
            if (chosen) r.row = r.record = c.row;
            return r;
        }
        if (spread.votes_tokens) {
            const Tables tables(spread);
            const int turn = t - block_begin, vote = (turn >> 5) * job.view.shape.num_ranks + c.dst;
            const uint32_t earlier = (1u << (turn & 31)) - 1;
            if (chosen) {
                r.row = r.record =
                    tables.base[c.dst] + tables.before[vote] + __popc(tables.votes[vote] & earlier);
            }
            return r;
        }
        const int given = chosen ? next[c.dst] : 0;
        if (chosen) r.record = tables().base[c.dst] + given;
        r.row = a.cached && chosen ? c.row : r.record;
        __syncwarp();
        if (r.first) next[c.dst] = given + 1;
        if (gives_selections(a)) give_selection(c, before, r);
        __syncwarp();
        return r;
    }

    // What a caller reads of it.
    __device__ void keep(int t, const Route& r) const {
        const DispatchArgs& a = args();
        if (static_cast<int>(ptx::lane_id()) >= a.num_topk || a.cached) return;
        a.send_row[int64_t{t} * a.num_topk + ptx::lane_id()] = r.row;
    }

    // A handle's rows are a tensor that anybody may have changed.
    __device__ bool in_bounds(const Choice& c, const Route& r) const {
        if (!args().cached) return true;
        bool bad = false;
        if (c.dst >= 0) {
            const Target& target = tables().targets[c.dst];
            bad = r.row < target.min_row || r.row >= target.max_rows;
            if (bad) {
                device::give_up(job.view.watch, {OpKind::kDispatch, in.seq}, kMiscount,
                                {Site::kNone, c.dst, uint64_t(target.max_rows)}, uint64_t(r.row),
                                0);
            }
        }
        return !__any_sync(~0u, bad);
    }

    // What our tokens leave at the ranks they go to.
    __device__ Describer out() const { return {job, tables(), job.view.peers.rank}; }

private:
    // In the order of slots.
    __device__ void give_selection(const Choice& c, uint32_t before, Route& r) const {
        const bool chosen = c.position >= 0;
        const int key = chosen ? c.position : ~int(ptx::lane_id());
        const uint32_t rivals = __match_any_sync(~0u, key);
        int32_t* turn = next + job.view.shape.num_ranks + c.position;
        const int earlier = chosen ? *turn : 0;
        if (chosen) r.row = tables().first_row[c.position] + earlier + __popc(rivals & before);
        __syncwarp();
        if (chosen && (rivals & before) == 0) *turn = earlier + __popc(rivals);
    }
};

// One token, its row in as many pieces as the stage asks for; then `next` is loaded. False: leave.
__device__ __forceinline__ bool move_verbatim(Mover& m, int t, int next, const Choice& c,
                                              const Route& r, const uint4& scales) {
    const DispatchArgs& a = m.args();
    const int64_t row_bytes = a.row_bytes();
#pragma unroll 1
    for (int64_t offset = 0; offset < row_bytes; offset += m.spread.stage_bytes) {
        const int bytes = static_cast<int>(min(int64_t{m.spread.stage_bytes}, row_bytes - offset));
        if (!m.await()) return false;
        if (r.first) device::store_stage(m.out().row_of(c, r) + offset, m.stage.data, bytes);
        if (offset == 0) {  // while the stage is read
            m.out().describe(t, c, r);
            m.put_scales(t, c, r, scales);
        }
        const bool more = offset + bytes < row_bytes;
        m.refill(more ? t : next, more ? offset + bytes : 0);
    }
    return true;
}

// The row in the stage, in place; its scales stand behind it.
template <DType kSource>
__device__ __forceinline__ std::byte* quantize_stage(const Mover& m) {
    const DispatchArgs& a = m.args();
    std::byte* scales = m.stage.data + m.source_bytes();
    device::quantize_row<kSource>(m.stage.data, scales, static_cast<int>(a.hidden), a.scale_block,
                                  a.quantize == Quantize::kFp8Ue8m0);
    ptx::fence_proxy_async_shared();  // what we wrote, before the stores that read it
    __syncwarp();
    return scales;
}

// One token, quantized on the way. False: leave.
template <DType kSource>
__device__ __forceinline__ bool move_quantized(Mover& m, int t, const Choice& c, const Route& r) {
    const DispatchArgs& a = m.args();
    if (!m.await()) return false;
    std::byte* scales = quantize_stage<kSource>(m);
    const bool units = in_units(scales, a.scale_bytes);
    if (r.first) {
        device::store_stage(m.out().row_of(c, r), m.stage.data, static_cast<int>(a.hidden));
        if (units)
            device::store_stage(m.out().scales_of(c, r), scales, static_cast<int>(a.scale_bytes));
    }
    m.out().describe(t, c, r);
    if (!units) {
        m.out().copy_scales(c, r, scales);
        ptx::fence_proxy_async_shared();  // our reads, before the load that follows
    }
    m.refill(t + m.tokens.step, 0);
    return true;
}

// From `ahead`, the choice of the first token, on. False: leave; nothing of ours is under way then.
template <class Config>
__device__ __forceinline__ bool move_rows(Mover& m, Choice ahead) {
    bool ok = true;
    uint4 scales_ahead = make_uint4(0, 0, 0, 0);
    if constexpr (!Config::kQuantizes) scales_ahead = m.look_at_scales(m.tokens.begin);
#pragma unroll 1
    for (int t = m.tokens.begin; ok && t < m.tokens.end; t += m.tokens.step) {
        const Choice c = ahead;
        const Route r = m.route(t, c);
        ok = m.in_bounds(c, r);
        if (!ok) break;
        ahead = m.choose(t + m.tokens.step);
        if constexpr (Config::kQuantizes) {
            ok = move_quantized<Config::kSource>(m, t, c, r);
        } else {
            const uint4 scales = scales_ahead;
            scales_ahead = m.look_at_scales(t + m.tokens.step);
            ok = move_verbatim(m, t, t + m.tokens.step, c, r, scales);
        }
        if (!ok) break;
        m.keep(t, r);
        if (r.first) atomicAdd(&m.tables().pushed[c.dst], 1);
    }
    device::drain_stores();
    m.abandon();
    return ok;
}

}  // namespace ep::kernels
