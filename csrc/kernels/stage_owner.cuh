// A small combine at an owner: rows of outputs, or what its rows of a token come to, go to the token's source.
//
// defines: PartSender
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "contract/stage.h"
#include "device/lines.cuh"
#include "device/ptx.cuh"
#include "device/rail.cuh"
#include "device/wait.cuh"
#include "kernels/stage.cuh"
#include "kernels/stage_sums.cuh"

namespace ep::kernels {

template <DType kDtype, class F>
struct PartSender {
    const CombineJob& job;
    StageView<F> stage;
    uint64_t masked = 0;  // ranks that nothing is sent to

    // A token that came here: its rows are held by the lanes of their slots.
    struct Token {
        int src = -1, t = -1, row = -1;
    };
    __device__ __forceinline__ Token look(int64_t i) const {
        const CombineArgs& a = args();
        const int lane = ptx::lane_id();
        Token token;
        if (i >= a.num_recv) return token;
        const int2 from = *reinterpret_cast<const int2*>(a.recv_src + 2 * i);
        token.src = from.x, token.t = from.y;
        if (a.layout == RecvLayout::kCompact) {
            token.row = lane == 0 ? static_cast<int>(i) : -1;
        } else if (lane < a.num_topk) {
            token.row = a.recv_row[i * a.num_topk + lane];
        }
        return token;
    }

    // First rows of a piece, on their way.
    struct Ahead {
        Words rows[kRowsAtOnce][kAtOnce];
    };
    __device__ __forceinline__ void look(const Token& token, int p, Ahead& ahead) const {
        const bool is_there = token.row >= 0 && token.row < args().num_rows;
        load_rows(token, p, __ballot_sync(~0u, is_there), ahead);
    }

    // From `token` on, the first of this warp, at which it has looked. False: leave.
    __device__ __forceinline__ bool run(Pieces at, int step, Token token, Ahead& ahead) const {
        bool ok = true;
#pragma unroll 1
        while (ok && at.item() < job.args.num_recv) {
            const int piece = at.piece();
            at.next(step);
            const Token next = look(at.item());
            ok = send(token, piece, ahead, [&] { look(next, at.piece(), ahead); });
            token = next;
        }
        return ok;
    }

private:
    __device__ const CombineArgs& args() const { return job.args; }

    // `then`, once all that `ahead` holds is used.
    template <class Then>
    __device__ __forceinline__ bool send(const Token& token, int p, Ahead& ahead, Then then) const {
        const CombineArgs& a = args();
        const RankView& view = job.view;
        const bool compact = a.layout == RecvLayout::kCompact;
        const int src = token.src, t = token.t, row = token.row;
        // Tensors of a handle, which anybody may have changed.
        const bool bad = src >= view.shape.num_ranks ||
                         (src >= 0 && (t < 0 || t >= view.shape.max_tokens || row >= a.num_rows));
        if (__any_sync(~0u, bad)) {
            device::give_up(view.watch, stage.op, kMiscount,
                            {Site::kPulled, view.peers.rank, uint64_t(a.num_rows)}, uint64_t(row),
                            0);
            return false;
        }
        if (src < 0 || (masked != 0 && device::has_rank(masked, src))) {  // nobody's
            then();
        } else if (compact || !a.per_rank) {
            send_each(token, p, ahead, then);
        } else {
            send_sum(token, p, ahead, then);
        }
        return true;
    }

    __device__ const std::byte* piece_of(int row, int p) const {
        return args().x + row * args().row_bytes() + int64_t{p} * stage.record.piece_bytes;
    }
    __device__ __forceinline__ int units_of(int p) const {
        return stage.piece_bytes(p, args().row_bytes()) / kUnitBytes;
    }

    // The next rows of `left`, held by the lanes of their slots.
    __device__ __forceinline__ void load_rows(const Token& token, int p, uint32_t left,
                                              Ahead& ahead) const {
        const int units = units_of(p), first = first_unit(units);
#pragma unroll
        for (int r = 0; r < kRowsAtOnce && left != 0; ++r, left &= left - 1) {
            const int row = __shfl_sync(~0u, token.row, __ffs(left) - 1);
            load_units(piece_of(row, p), first, units, ahead.rows[r]);
        }
    }

    // use(slot, units) for every row of a token.
    template <class Use>
    __device__ __forceinline__ void each_row(const Token& token, int p, uint32_t left, Ahead& ahead,
                                             Use use) const {
#pragma unroll 1
        while (left != 0) {
#pragma unroll
            for (int r = 0; r < kRowsAtOnce && left != 0; ++r, left &= left - 1) {
                use(__ffs(left) - 1, ahead.rows[r]);
            }
            if (left != 0) load_rows(token, p, left, ahead);
        }
    }

    template <class Then>
    __device__ __forceinline__ void send_each(const Token& token, int p, Ahead& ahead,
                                              Then then) const {
        const CombineArgs& a = args();
        const RankView& view = job.view;
        const int src = token.src, t = token.t, units = units_of(p);
        const bool per_rank = a.layout == RecvLayout::kCompact;
        const uint32_t rows = __ballot_sync(~0u, token.row >= 0);
        const auto place_of = [&](int slot) {
            return per_rank ? int64_t{view.peers.rank} * view.shape.max_tokens + t
                            : int64_t{t} * a.num_topk + slot;
        };
        const auto own_place_of = [&](int slot) { return place_out(src, t, per_rank ? 0 : slot); };
        each_row(token, p, rows, ahead, [&](int slot, Words(&w)[kAtOnce]) {
            std::byte* to = target(src, place_of(slot), own_place_of(slot));
            put(to + stage.piece_at(p), units, w);
        });
        then();
        if constexpr (F::kAny) {
#pragma unroll 1
            for (uint32_t left = rows; left != 0; left &= left - 1) {
                const int slot = __ffs(left) - 1;
                // A token counts the same at its source, however many rows it has here.
                const bool is_last = (left & (left - 1)) == 0;
                const int others = per_rank ? 0 : a.num_topk - __popc(rows);
                send_off(src, place_of(slot), own_place_of(slot), p, units,
                         is_last ? 1 + others : 1);
            }
        }
    }

    template <class Then>
    __device__ __forceinline__ void send_sum(const Token& token, int p, Ahead& ahead,
                                             Then then) const {
        const CombineArgs& a = args();
        const RankView& view = job.view;
        const int src = token.src, t = token.t, units = units_of(p);
        float weight = 1.0f;
        if (a.weighted && token.row >= 0) weight = a.row_weights[token.row];
        const int64_t place = int64_t{view.peers.rank} * view.shape.max_tokens + t;
        const int64_t own_place = place_out(src, t, 0);
        LineSums<kDtype> sums;
        sums.clear();
        each_row(token, p, __ballot_sync(~0u, token.row >= 0), ahead,
                 [&](int slot, Words(&w)[kAtOnce]) {
                     const float factor = __shfl_sync(~0u, weight, slot);
                     if (a.weighted) {
                         sums.add(w, factor);
                     } else {
                         sums.add(w);
                     }
                 });
        then();
        Words out[kAtOnce];
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) out[v] = device::words_of(sums.unit[v].rounded());
        put(target(src, place, own_place) + stage.piece_at(p), units, out);
        send_off(src, place, own_place, p, units, 1);
    }

    // ---- ranks of other nodes ----

    // Where a row for one of them stands in our outbox.
    __device__ __forceinline__ int64_t place_out(int src, int t, int slot) const {
        const RankView& view = job.view;
        const int ahead =
            src < view.peers.near_begin ? 0 : view.peers.near_end - view.peers.near_begin;
        const int each = args().one_per_rank() ? 1 : args().num_topk;
        return ((src - ahead) * view.shape.max_tokens + t) * each + slot;
    }
    // Where lines of a record go, by its place there and in our outbox.
    __device__ __forceinline__ std::byte* target(int src, int64_t place, int64_t own_place) const {
        if constexpr (F::kAny) {
            if (stage.is_far(src)) {
                return stage.far.outgoing(stage.slot, own_place * stage.record.bytes());
            }
        }
        return stage.place(src, place);
    }
    // A piece that is complete there.
    __device__ __forceinline__ void send_off(int src, int64_t place, int64_t own_place, int p,
                                             int units, int amount) const {
        if constexpr (F::kAny) {
            if (!stage.is_far(src)) return;
            const int64_t bytes = stage.record.bytes(), at = stage.piece_at(p);
            const int64_t lines = (units + kLineUnits - 1) / kLineUnits;
            device::fence_stage();
            stage.far.put(job.view, stage.slot, src, own_place * bytes + at, place * bytes + at,
                          kLineBytes * lines, static_cast<uint64_t>(amount));
        }
    }

    __device__ __forceinline__ void put(std::byte* to, int units, Words (&w)[kAtOnce]) const {
        const LineLane at;
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
            const int l = v * LineLane::kAtOnce;
            if (at.is_last()) w[v].b = stage.op.seq;
            __syncwarp();
            if ((l + at.line) * kLineUnits < units) device::put_line(to + at.offset(l), w[v]);
        }
    }
};

}  // namespace ep::kernels
