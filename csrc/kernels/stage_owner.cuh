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
#include "kernels/usual.cuh"

namespace ep::kernels {

// kUnits: of every lane in a piece of a row. Larger pieces cost less, and are fewer: some warps may have none.
template <DType kDtype, class F, int kUnits>
struct PartSender {
    static constexpr int kPieceUnits = kUnits * kUnitsApart;
    static constexpr int kPieceBytes = kPieceUnits * kUnitBytes;  // of a row
    static constexpr int kPieceLines = kUnits * kLinesApart;      // bytes there
    static constexpr int kRows = 8 / kUnits;           // of a token that are on their way together
    static_assert(!F::kAny || kUnits == kUnitsAdded);  // rails take pieces of records

    const CombineJob& job;
    const CombineSpread& spread;
    StageView<F> stage;
    int2* list;           // [32] shared memory of this warp, see look
    uint64_t masked = 0;  // ranks that nothing is sent to

    // The place of the item-th token that is sent, among those that came here.
    __device__ __forceinline__ static int row_of(const CombineSpread& spread, int item) {
        if (item >= spread.rotated) return item;
        const int ahead = item + spread.first_sent;
        return ahead < spread.rotated ? ahead : ahead - spread.rotated;
    }
    // The first of these runs, each `step`-th, that is not of a place where no token has come to: shapes that are fixed
    // have such places behind all others, of which `came` are none.
    __device__ __forceinline__ static int past(const CombineJob& job, const CombineSpread& spread,
                                               int run, int step, int came) {
        int item = spread.sent.row_of(run);
#pragma unroll 1
        while (item < job.args.num_recv && row_of(spread, item) >= came) {
            run += step;
            item = spread.sent.row_of(run);
        }
        return run;
    }

    // A token that came here: the lanes of its slots hold their rows.
    struct Token {
        int src = -1, t = -1, row = -1;
    };
    // The item-th that is sent.
    __device__ __forceinline__ Token look(int item) const {
        const CombineArgs& a = args();
        const int lane = ptx::lane_id();
        Token token;
        if (item >= a.num_recv) return token;
        const int64_t i = row_of(spread, item);
        const int2 from = *reinterpret_cast<const int2*>(a.recv_src + 2 * i);
        token.src = from.x, token.t = from.y;
        if (is_compact<F>(a.layout)) {
            token.row = lane == 0 ? static_cast<int>(i) : -1;
        } else if (lane < a.num_topk) {
            token.row = a.recv_row[i * a.num_topk + lane];
        }
        return token;
    }

    // A token whose pieces are on their way: the first rows of one of them. Lane n knows of its n-th row.
    struct Ahead {
        int count = 0;                     // rows it has here; -1: it has some that do not exist
        int slot = 0, row = 0;             // that the row is of, and its place
        float weight = 1.0f;               // of the row
        const std::byte* first = nullptr;  // where this lane's first unit of the piece is in row 0
        Words rows[kRows][kUnits] = {};
    };
    // Piece p is loaded, and what rows weigh.
    __device__ __forceinline__ void look(const Token& token, int p, Ahead& ahead) const {
        const CombineArgs& a = args();
        const int lane = ptx::lane_id();
        const uint32_t here = __ballot_sync(~0u, token.row >= 0);
        const int count = __popc(here);
        __syncwarp();  // those of the token before have been read
        if (token.row >= 0) list[__popc(here & ptx::lanemask_lt())] = {lane, token.row};
        __syncwarp();
        const int2 own = lane < count ? list[lane] : int2{0, 0};
        ahead.slot = own.x, ahead.row = own.y;
        ahead.count = __any_sync(~0u, token.row >= a.num_rows) ? -1 : count;
        ahead.first = a.x + p * kPieceBytes + LineLane{}.index(0) * kUnitBytes;
        const int left_here = units_from_lane(units_from(p));
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (r >= ahead.count) break;
            load_row(ahead, r, left_here, false, ahead.rows[r]);
        }
        ahead.weight = 1.0f;
        if (sums_rows() && a.weighted && lane < ahead.count)
            ahead.weight = a.row_weights[ahead.row];
    }

    // From `token` on, the first of this warp, at which it has looked. False: leave.
    __device__ __forceinline__ bool run(Pieces at, int step, Token token, Ahead& ahead) const {
        bool ok = true;
#pragma unroll 1
        while (ok && at.item < args().num_recv) {
            Pieces next = at;
            next.next(spread.sent, step);
            if (token.src < 0) next = {spread.sent, past_empty(job, spread, next.run, step)};
            const Token following = look(next.item);
            ok = send(token, at, ahead, [&] {
                if (next.item < args().num_recv) look(following, next.piece, ahead);
            });
            at = next, token = following;
        }
        return ok;
    }

private:
    __device__ const CombineArgs& args() const { return job.args; }
    __device__ bool sums_rows() const { return kernels::sums_rows<F>(args()); }

    // The same, of one warp that is at such a place.
    __device__ __noinline__ static int past_empty(const CombineJob& job,
                                                  const CombineSpread& spread, int run, int step) {
        const int num_ranks = job.view.shape.num_ranks;
        int came = 0;
#pragma unroll 1
        for (int p = ptx::lane_id(); p < num_ranks; p += 32) {
            came += static_cast<int>(job.args.rank_counts[num_ranks + p]);
        }
        return past(job, spread, run, step, __reduce_add_sync(~0u, came));
    }

    // `then`, once all that `ahead` holds is used.
    template <class Then>
    __device__ __forceinline__ bool send(const Token& token, const Pieces& at, Ahead& ahead,
                                         Then then) const {
        const CombineArgs& a = args();
        const RankView& view = job.view;
        const int src = token.src, t = token.t;
        // Tensors of a handle, which anybody may have changed.
        const bool bad = ahead.count < 0 || src >= view.shape.num_ranks ||
                         (src >= 0 && (t < 0 || t >= view.shape.max_tokens));
        if (__any_sync(~0u, bad)) {
            device::give_up(view.watch, stage.op, kMiscount,
                            {Site::kPulled, view.peers.rank, uint64_t(a.num_rows)},
                            uint64_t(token.row), 0);
            return false;
        }
        const bool is_masked = !F::kIsUsual && masked != 0 && device::has_rank(masked, src);
        if (src < 0 || is_masked) {  // nobody's
            then();
        } else if (sums_rows()) {
            send_sum(token, at, ahead, then);
        } else {
            send_each(token, at, ahead, then);
        }
        return true;
    }

    // Units of a row from a piece on.
    __device__ __forceinline__ int units_from(int p) const {
        return spread.row_units - p * kPieceUnits;
    }
    // The piece of the n-th row, or the next one. `left`: units from this lane's first one of the piece on.
    __device__ __forceinline__ void load_row(const Ahead& ahead, int n, int left, bool of_next,
                                             Words (&w)[kUnits]) const {
        const int64_t row = __shfl_sync(~0u, ahead.row, n);
        const std::byte* from = ahead.first + row * spread.row_bytes;
        load_units(from + (of_next ? kPieceBytes : 0), left - (of_next ? kPieceUnits : 0), w);
    }

    // use(n, units) for every row of a piece. A row that is used makes place for one behind it; has_more: of the next
    // piece, too.
    template <class Use>
    __device__ __forceinline__ void each_row(int units, bool has_more, Ahead& ahead,
                                             Use use) const {
        const int left = units_from_lane(units);
#pragma unroll 1
        for (int first = 0; first < ahead.count; first += kRows) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                if (first + r >= ahead.count) break;
                use(first + r, ahead.rows[r]);
                const int n = first + r + kRows;
                const bool of_next = n >= ahead.count;
                if (of_next && !has_more) continue;
                load_row(ahead, of_next ? r : n, left, of_next, ahead.rows[r]);
            }
        }
    }

    template <class Then>
    __device__ __forceinline__ void send_each(const Token& token, const Pieces& at, Ahead& ahead,
                                              Then then) const {
        const CombineArgs& a = args();
        const RankView& view = job.view;
        const int src = token.src, t = token.t;
        const bool per_rank = is_compact<F>(a.layout);
        const int count = ahead.count, slot = ahead.slot;
        const int64_t place = per_rank ? int64_t{view.peers.rank} * view.shape.max_tokens + t
                                       : int64_t{t} * a.num_topk;
        const int64_t own_place = place_out(src, t, 0);
        const int64_t apart = per_rank ? 0 : spread.record.bytes();
        std::byte* to = target(src, place, own_place) + at.piece * kPieceLines;
        int p = at.piece;
#pragma unroll 1
        for (int left = at.left; left > 0; --left, ++p) {
            const int units = units_from(p);
            each_row(units, left > 1, ahead, [&](int n, Words(&w)[kUnits]) {
                put(to + __shfl_sync(~0u, slot, n) * apart, units, w);
            });
            if (left > 1) {
                ahead.first += kPieceBytes;
            } else {
                then();
            }
            to += kPieceLines;
            if constexpr (F::kAny) {
#pragma unroll 1
                for (int n = 0; n < count; ++n) {
                    const int of = per_rank ? 0 : __shfl_sync(~0u, slot, n);
                    // A token counts the same at its source, however many rows it has here.
                    const int others = per_rank ? 0 : a.num_topk - count;
                    send_off(src, place + of, own_place + of, p, units,
                             n + 1 == count ? 1 + others : 1);
                }
            }
        }
    }

    template <class Then>
    __device__ __forceinline__ void send_sum(const Token& token, const Pieces& at, Ahead& ahead,
                                             Then then) const {
        const CombineArgs& a = args();
        const RankView& view = job.view;
        const int src = token.src, t = token.t;
        const int64_t place = int64_t{view.peers.rank} * view.shape.max_tokens + t;
        const int64_t own_place = place_out(src, t, 0);
        std::byte* to = target(src, place, own_place) + at.piece * kPieceLines;
        int p = at.piece;
#pragma unroll 1
        for (int left = at.left; left > 0; --left, ++p) {
            const int units = units_from(p);
            LineSums<kDtype, kUnits> sums;
            sums.clear();
            each_row(units, left > 1, ahead, [&](int n, Words(&w)[kUnits]) {
                if (a.weighted) {
                    sums.add(w, __shfl_sync(~0u, ahead.weight, n));
                } else {
                    sums.add(w);
                }
            });
            if (left > 1) {
                ahead.first += kPieceBytes;
            } else {
                then();
            }
            Words out[kUnits];
#pragma unroll
            for (int v = 0; v < kUnits; ++v) out[v] = device::words_of(sums.unit[v].rounded());
            put(to, units, out);
            send_off(src, place, own_place, p, units, 1);
            to += kPieceLines;
        }
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
            const int64_t lines = (min(units, kPieceUnits) + kLineUnits - 1) / kLineUnits;
            device::fence_stage();
            stage.far.put(job.view, stage.slot, src, own_place * bytes + at, place * bytes + at,
                          kLineBytes * lines, static_cast<uint64_t>(amount));
        }
    }

    // `units`: of the row from the piece on.
    __device__ __forceinline__ void put(std::byte* to, int units, Words (&w)[kUnits]) const {
        const LineLane at;
        const int left = units_from_line(units);
        to += at.offset(0);
        __syncwarp();
#pragma unroll
        for (int v = 0; v < kUnits; ++v) {
            if (at.is_last()) w[v].b = stage.op.seq;
            if (left > v * kUnitsApart) device::put_line(to + v * kLinesApart, w[v]);
        }
    }
};

}  // namespace ep::kernels
