// A warp moves its tokens as mover.cuh does, and those that visit other nodes into the rings of its channel
// besides: the row is loaded once for all of them.
//
// defines: move_rows_across
#pragma once

#include <cstdint>

#include "device/copy.cuh"
#include "device/ptx.cuh"
#include "device/quantize.cuh"
#include "device/rail.cuh"
#include "kernels/mover.cuh"
#include "kernels/rail_out.cuh"

namespace ep::kernels {

// A token's slots, of which those on our node go straight to their rows.
struct Divided {
    Choice near;
    Route near_route;
    uint32_t bring;  // lanes that bring it to another node
};

template <device::Rail R>
__device__ __forceinline__ Divided divide(const RailOut<R>& out, const Choice& c, const Route& r,
                                          const Crossing& x) {
    Divided d{c, r, __ballot_sync(~0u, x.node >= 0)};
    if (out.is_far(c.dst)) d.near.dst = -1, d.near_route.first = false;
    return d;
}

// A row that lies whole in the stage, to every ring at once. False: leave; no store of ours is open then.
template <device::Rail R>
__device__ __forceinline__ bool stage_whole(Mover& m, const RailOut<R>& out, int t, const Choice& c,
                                            const Route& r, Crossing& x, uint32_t bring,
                                            const std::byte* scales, Pending& late) {
    const int lane = ptx::lane_id();
    const RailChunks& chunks = out.parcel.chunks;
    if ((bring >> lane & 1) != 0) out.take_place(x);
    return out.when_free(bring, x, 0, late, [&](uint32_t free) {
        if ((free >> lane & 1) != 0) {
            device::store_stage(out.place_of(x, 0) + chunks.head_bytes, m.stage.data,
                                static_cast<int>(chunks.row_bytes));
        }
#pragma unroll 1
        for (uint32_t left = free; left != 0; left &= left - 1) {
            out.write_head(x, __ffs(left) - 1, 0, t, c, r, m.args().num_topk, scales);
        }
    });
}

// Behind the refill that ends the stores of a token: the one before it is complete.
template <device::Rail R>
__device__ __forceinline__ void count_older(const RailOut<R>& out, Pending& late,
                                            const Pending& next) {
    if (__any_sync(~0u, late.node >= 0)) {
        device::drain_older();
        out.hand_over(late, 0);
    }
    late = next;
}

// Bytes of a row from `at` on, into the stage. False: leave; nothing is under way.
__device__ __forceinline__ bool fetch_piece(const DispatchJob& job, Operation op,
                                            device::Stage& stage, int t, int64_t at,
                                            int64_t bytes) {
    const RankView& view = job.view;
    if (ptx::lane_id() == 0) {
        device::load_stage(stage, job.args.x + int64_t{t} * job.args.x_stride + at,
                           static_cast<int>(bytes));
    }
    __syncwarp();
    if (device::await_stage(view.watch, op, stage, view.peers.rank)) {
        return true;
    }
    device::drain_stage(stage);
    return false;
}

// A row that is longer than a stage or a chunk, to one ring after the other: a warp that had a place in two
// rings and filled them by turns would make each wait for the credits of the other. `loads`: the stage does
// not hold all of the row. False: leave.
template <device::Rail R>
__device__ __forceinline__ bool stage_pieces(Mover& m, const RailOut<R>& out, int t,
                                             const Choice& c, const Route& r, Crossing x,
                                             uint32_t bring, const std::byte* scales, bool loads) {
    const RailChunks& chunks = out.parcel.chunks;
    Pending none;
    bool ok = true;
#pragma unroll 1
    for (uint32_t left = bring; ok && left != 0; left &= left - 1) {
        const uint32_t one = left & -left;
        const bool mine = (one >> ptx::lane_id() & 1) != 0;
        if (mine) out.take_place(x);
        __syncwarp();
#pragma unroll 1
        for (int piece = 0; ok && piece < chunks.pieces; ++piece) {
            const int64_t begin = chunks.piece_begin(piece), end = chunks.piece_end(piece);
            ok = out.when_free(one, x, piece, none, [&](uint32_t) {
                out.write_head(x, __ffs(one) - 1, piece, t, c, r, m.args().num_topk, scales);
            });
#pragma unroll 1
            for (int64_t at = begin, bytes; ok && at < end; at += bytes) {
                bytes = loads ? min(end - at, int64_t{m.spread.stage_bytes}) : end - at;
                if (loads) ok = fetch_piece(m.job, out.op, m.stage, t, at, bytes);
                if (ok && mine) {
                    device::store_stage(out.place_of(x, piece) + chunks.head_bytes + at - begin,
                                        m.stage.data + (loads ? 0 : at), static_cast<int>(bytes));
                }
                device::drain_reads();
                __syncwarp();
            }
            device::drain_stores();
            if (ok) out.hand_over({mine ? x.node : -1, x.given}, piece);
        }
    }
    return ok;
}

// Whether a row fits the stage, and its record a chunk.
template <device::Rail R>
__device__ __forceinline__ bool fits(const Mover& m, const RailOut<R>& out) {
    return m.args().row_bytes() <= m.spread.stage_bytes && out.parcel.chunks.pieces == 1;
}

// One token whose row does not: it comes once more for each ring. False: leave.
template <device::Rail R>
__device__ __forceinline__ bool cross_pieces(Mover& m, const RailOut<R>& out, int t,
                                             const Choice& c, const Route& r, const Crossing& x) {
    const Divided d = divide(out, c, r, x);
    const std::byte* scales = m.args().scales + int64_t{t} * m.args().scale_bytes;
    const bool ok = move_verbatim(m, t, m.tokens.end, d.near, d.near_route, m.look_at_scales(t)) &&
                    stage_pieces(m, out, t, c, r, x, d.bring, scales, true);
    if (ok) m.load(t + m.tokens.step, 0);
    return ok;
}

// One token as it is. `late`: the one before it; then this one, where it is to be counted yet. False: leave.
template <device::Rail R>
__device__ __forceinline__ bool cross_verbatim(Mover& m, const RailOut<R>& out, int t,
                                               const Choice& c, const Route& r, Crossing& x,
                                               Pending& late) {
    const DispatchArgs& a = m.args();
    const Divided d = divide(out, c, r, x);
    const std::byte* scales = a.scales + int64_t{t} * a.scale_bytes;
    const uint4 carried = m.look_at_scales(t);
    if (!m.await()) return false;
    if (d.near_route.first) {
        device::store_stage(m.out().row_of(d.near, d.near_route), m.stage.data,
                            static_cast<int>(a.row_bytes()));
    }
    m.out().describe(t, d.near, d.near_route);
    m.put_scales(t, d.near, d.near_route, carried);
    const bool ok = stage_whole(m, out, t, c, r, x, d.bring, scales, late);
    m.refill(t + m.tokens.step, 0);
    if (ok) count_older(out, late, {x.node, x.given});
    return ok;
}

// As quantize_stage; out of line, as its registers and those of everything around it are too many.
template <DType kSource>
__device__ __noinline__ void quantize_whole(std::byte* row, std::byte* scales, int hidden,
                                            int block, bool ue8m0) {
    device::quantize_row<kSource>(row, scales, hidden, block, ue8m0);
    ptx::fence_proxy_async_shared();  // what we wrote, before the stores that read it
    __syncwarp();
}

// One token, quantized on the way. False: leave.
template <DType kSource, device::Rail R>
__device__ __forceinline__ bool cross_quantized(Mover& m, const RailOut<R>& out, int t,
                                                const Choice& c, const Route& r, Crossing& x,
                                                Pending& late) {
    const DispatchArgs& a = m.args();
    const Divided d = divide(out, c, r, x);
    if (!m.await()) return false;
    std::byte* scales = m.stage.data + m.source_bytes();
    quantize_whole<kSource>(m.stage.data, scales, static_cast<int>(a.hidden), a.scale_block,
                            a.quantize == Quantize::kFp8Ue8m0);
    if (d.near_route.first) {
        device::store_stage(m.out().row_of(d.near, d.near_route), m.stage.data,
                            static_cast<int>(a.hidden));
    }
    m.out().describe(t, d.near, d.near_route);
    m.out().copy_scales(d.near, d.near_route, scales);
    const bool whole = out.parcel.chunks.pieces == 1;
    const bool ok = whole ? stage_whole(m, out, t, c, r, x, d.bring, scales, late)
                          : stage_pieces(m, out, t, c, r, x, d.bring, scales, false);
    ptx::fence_proxy_async_shared();  // our reads of scales, before the load that follows
    m.refill(t + m.tokens.step, 0);
    if (ok && whole) count_older(out, late, {x.node, x.given});
    return ok;
}

// From `ahead`, the choice of the first token, on. False: leave; nothing of ours is under way then.
template <class Config, device::Rail R>
__device__ __forceinline__ bool move_rows_across(Mover& m, const RailOut<R>& out, Choice ahead) {
    bool ok = true;
    Pending late;
    Crossing next = out.crossing(m.tokens.begin, ahead.dst);
#pragma unroll 1
    for (int t = m.tokens.begin; ok && t < m.tokens.end; t += m.tokens.step) {
        const Choice c = ahead;
        Crossing x = next;
        const Route r = m.route(t, c);
        ok = m.in_bounds(c, r);
        if (!ok) break;
        m.keep(t, r);
        if (r.first) atomicAdd(&m.tables().pushed[c.dst], 1);
        if constexpr (Config::kQuantizes) {
            ok = cross_quantized<Config::kSource>(m, out, t, c, r, x, late);
            ahead = m.choose(t + m.tokens.step);  // not held while values are
        } else if (fits(m, out)) {
            ahead = m.choose(t + m.tokens.step);
            ok = cross_verbatim(m, out, t, c, r, x, late);
        } else {
            ok = cross_pieces(m, out, t, c, r, x);
            ahead = m.choose(t + m.tokens.step);
        }
        if (ok) next = out.crossing(t + m.tokens.step, ahead.dst);  // while the next row is loaded
    }
    if (ok && __any_sync(~0u, late.node >= 0)) out.settle(late);
    device::drain_stores();
    out.rail.flush();
    m.abandon();
    return ok;
}

}  // namespace ep::kernels
