// A usual combine at an owner that adds up its rows of a token (kernels/usual.cuh): the first piece of a warp, which in
// most calls is its only one. All rows are on their way together, from registers to registers.
//
// defines: UsualOwner, NoOwner, send_runs, send_usual
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "contract/stage.h"
#include "device/lines.cuh"
#include "device/ptx.cuh"
#include "kernels/stage.cuh"
#include "kernels/stage_owner.cuh"
#include "kernels/stage_sums.cuh"

namespace ep::kernels {

// kUnits: see PartSender, of which a warp has one, too.
template <DType kDtype, class F, int kUnits>
struct UsualOwner {
    using Sender = PartSender<kDtype, F, kUnits>;
    static constexpr int kRows = 10 / kUnits;  // that are on their way together

    using Token = typename Sender::Token;

    __device__ __forceinline__ explicit UsualOwner(const Sender& s) : sender(s) {}

    const Sender& sender;
    bool asks = false;  // has a piece
    // What is told of the token, and of the lane's slot.
    const int32_t *at_src = nullptr, *at_row = nullptr;
    const std::byte* first = nullptr;  // where this lane's first unit of the piece is in row 0
    int left = 0;                      // units of a row from there on
    // Once the token is known:
    Token token = {};
    uint32_t here = 0;     // lanes of slots with rows here
    uint32_t ahead = 0;    // those whose rows have not been asked for
    int came = INT32_MAX;  // see PartSender::past
    float weight = 1.0f;   // of the lane's row
    Words rows[kRows][kUnits];

    // Before anything has come.
    __device__ __forceinline__ void announce(const Pieces& at) {
        const CombineArgs& a = sender.job.args;
        const CombineSpread& spread = sender.spread;
        asks = spread.sent.pieces == 1 && at.item < a.num_recv;
        if (!asks) return;
        const int64_t i = Sender::row_of(spread, at.item);
        at_src = a.recv_src + 2 * i;
        at_row = a.recv_row + i * a.num_topk + ptx::lane_id();
        first = a.x + at.piece * Sender::kPieceBytes + LineLane{}.index(0) * kUnitBytes;
        left = units_from_lane(spread.row_units - at.piece * Sender::kPieceUnits);
        ptx::pin(at_src), ptx::pin(at_row);
    }
    // Where it asks. Rows come meanwhile; not of a token that needs to be looked at more closely.
    __device__ __forceinline__ void look() {
        const CombineArgs& a = sender.job.args;
        const Shape& shape = sender.job.view.shape;
        if (!asks) return;
        const auto lane = static_cast<int>(ptx::lane_id());
        const bool is_rank = lane < shape.num_ranks;
        const int64_t of_rank = is_rank ? a.rank_counts[shape.num_ranks + lane] : 0;
        const int2 from = *reinterpret_cast<const int2*>(at_src);
        token.src = from.x, token.t = from.y, token.row = -1;
        if (lane < a.num_topk) token.row = *at_row;
        here = __ballot_sync(~0u, token.row >= 0);
        const bool is_token = static_cast<uint32_t>(token.src) < uint32_t(shape.num_ranks) &&
                              static_cast<uint32_t>(token.t) < uint32_t(shape.max_tokens);
        asks = is_token && !__any_sync(~0u, token.row >= a.num_rows);
        came = static_cast<int>(__reduce_add_sync(~0u, static_cast<uint32_t>(of_rank)));
        if (!asks) return;
        ahead = here;
#pragma unroll
        for (int r = 0; r < kRows; ++r) load_next(r);
        if (a.weighted && token.row >= 0) weight = a.row_weights[token.row];
    }
    // Their sum goes to the token's source. `piece`: as announced.
    __device__ __forceinline__ void send(int piece, uint64_t seq, int slot) {
        const RankView& view = sender.job.view;
        const int64_t place = int64_t{view.peers.rank} * view.shape.max_tokens + token.t;
        std::byte* to = sender.stage.control[token.src] + view.layout.stage(slot) +
                        place * sender.stage.record.bytes() + piece * Sender::kPieceLines +
                        LineLane{}.offset(0);
        LineSums<kDtype, kUnits> sums;
        sums.clear();
#pragma unroll 1
        for (uint32_t more = here; more != 0;) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                if (more == 0) break;
                // By one where there are no weights, which changes nothing.
                sums.add(rows[r], __shfl_sync(~0u, weight, __ffs(more) - 1));
                more &= more - 1;
                load_next(r);
            }
        }
        const int lines = units_from_line(sender.spread.row_units - piece * Sender::kPieceUnits);
#pragma unroll
        for (int v = 0; v < kUnits; ++v) {
            Words words = device::words_of(sums.unit[v].rounded());
            if (LineLane{}.is_last()) words.b = seq;
            if (lines > v * kUnitsApart) device::put_line(to + v * kLinesApart, words);
        }
    }

private:
    // The next row that is ahead, should there be one, has place r.
    __device__ __forceinline__ void load_next(int r) {
        if (ahead == 0) return;
        const int64_t row = __shfl_sync(~0u, token.row, __ffs(ahead) - 1);
        ahead &= ahead - 1;
#pragma unroll
        for (Words& w : rows[r]) w = {};
        load_units(first + row * sender.spread.row_bytes, left, rows[r]);
    }
};

// Of kernels that have none.
struct NoOwner {
    template <class Sender>
    __device__ __forceinline__ explicit NoOwner(const Sender&) {}
};

// From this run on, each `step`-th. One warp. False: leave.
template <DType kDtype, class F, int kUnits>
__device__ __noinline__ bool send_runs(const CombineJob& job, const CombineSpread& spread,
                                       std::byte* const* control, const F& far, const Entering& in,
                                       int2* list, int run, int step) {
    const Operation op{OpKind::kCombine, in.seq};
    const PartSender<kDtype, F, kUnits> sender{
        job, spread, {job.view, spread.record, control, op, in.slot, far}, list};
    const Pieces at(spread.sent, run);
    const auto token = sender.look(at.item);
    typename PartSender<kDtype, F, kUnits>::Ahead ahead;
    sender.look(token, at.piece, ahead);
    return sender.run(at, step, token, ahead);
}

// What a warp sends: its first piece, if that is one for UsualOwner, then the others. False: leave.
template <DType kDtype, class F, int kUnits>
__device__ __forceinline__ bool send_usual(UsualOwner<kDtype, F, kUnits>& owner, int run, int step,
                                           const Entering& in) {
    const auto& sender = owner.sender;
    if (owner.asks) {
        owner.send(Pieces(sender.spread.sent, run).piece, in.seq, in.slot);
        run += step;
    }
    run = PartSender<kDtype, F, kUnits>::past(sender.job, sender.spread, run, step, owner.came);
    if (sender.spread.sent.row_of(run) >= sender.job.args.num_recv) return true;
    const auto& stage = sender.stage;
    return send_runs<kDtype, F, kUnits>(sender.job, sender.spread, stage.control, stage.far, in,
                                        sender.list, run, step);
}

}  // namespace ep::kernels
