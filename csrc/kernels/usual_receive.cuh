// The second half of a usual dispatch (kernels/usual.cuh): a warp takes a piece of a token to rows of x, or to some of
// them where warps are more than pieces.
//
// defines: UsualRun, UsualTurns, UsualReceiver, receive_usual
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "contract/stage.h"
#include "device/lines.cuh"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"
#include "kernels/stage.cuh"
#include "kernels/stage_fill.cuh"
#include "kernels/stage_receive.cuh"
#include "kernels/stage_second_half.cuh"
#include "kernels/stage_tables.cuh"
#include "kernels/usual.cuh"
#include "kernels/usual_hear.cuh"
#include "kernels/usual_send.cuh"

namespace ep::kernels {

// Piece p of token t of a source, for some of its rows here: each `1 << shares_log`-th from `share` on.
struct UsualRun {
    int src, t, piece, share;

    // The n-th. Tokens come one of each source at a time: those that all have come first.
    __device__ __forceinline__ UsualRun(const StageSpread& s, int n) {
        const int index = n >> s.shares_log, token = s.pieces_of_row.quotient(index);
        t = s.sources.quotient(token);
        src = token - t * s.sources.value;
        piece = index - token * s.record.num_pieces;
        share = n - (index << s.shares_log);
    }
};

// Where a warp takes its runs, and where a lane finds what is told of its slot: what is known before anything has come.
struct UsualTurns {
    int from, step;
    UsualRun run;
    int next_t;  // of the run behind that
    int places;  // of the lane's slot, see word_of() and pair_of(): held in one register

    __device__ __forceinline__ UsualTurns(const StageSpread& spread, const DispatchArgs& a,
                                          int warp, int num_warps)
        : from(warp * static_cast<int>(gridDim.x) + turn()),
          // The warp that tells has the very last turn, and takes nothing.
          step(num_warps * static_cast<int>(gridDim.x) - 1),
          run(spread, from),
          next_t(UsualRun(spread, from + step).t) {
        const int slot = min(static_cast<int>(ptx::lane_id()), a.num_topk - 1);
        places = place_of(1 + slot) | place_of(1 + a.num_topk + slot / 2) << 8;
        ptx::pin(run.src), ptx::pin(run.t), ptx::pin(run.piece), ptx::pin(run.share);
        ptx::pin(next_t), ptx::pin(places);
    }
    // What is told of the lane's slot, and the weights of it and another. All lanes.
    __device__ __forceinline__ uint64_t word_of(const device::Words& meta) const {
        return at(meta, places & 0xff);
    }
    __device__ __forceinline__ uint64_t pair_of(const device::Words& meta) const {
        return at(meta, places >> 8);
    }

private:
    __device__ __forceinline__ static uint64_t at(const device::Words& meta, int place) {
        const uint64_t a = __shfl_sync(~0u, meta.a, place & 31);
        const uint64_t b = __shfl_sync(~0u, meta.b, place & 31);
        return place < 32 ? a : b;
    }
    // The block that publishes comes last; those behind it have least to send.
    __device__ __forceinline__ static int turn() {
        return static_cast<int>(blockIdx.x == 0 ? gridDim.x : blockIdx.x) - 1;
    }
    // The lane that has word i of what is told, and behind that which half.
    __device__ __forceinline__ static int place_of(int i) {
        const int line = i / kLineWords, of_line = i - line * kLineWords;
        return 8 * line + of_line / 2 + of_line % 2 * 32;
    }
};

// Of a warp. kAtOnce: steps of a piece.
template <class F, int kAtOnce>
struct UsualReceiver {
    static constexpr int kApart = device::LineLane::kAtOnce * kLineUnits;       // units of a row
    static constexpr int kLinesApart = device::LineLane::kAtOnce * kLineBytes;  // bytes of lines

    const DispatchJob& job;
    const StageTables& tables;
    const UsualTurns& turns;
    Operation op{};
    const std::byte* records = nullptr;  // of all sources in this slot
    int first = 0, num_local = 0;        // the position of our first expert, and how many we have

    using Run = UsualRun;
    // What has come of it, perhaps.
    struct Lines {
        device::Words meta = {}, words[kAtOnce] = {};
    };

    // Once the operation is known.
    __device__ __forceinline__ void enter(const Entering& in) {
        const int me = job.view.peers.rank;
        op = {OpKind::kDispatch, in.seq};
        records = job.view.peers.own + job.view.layout.stage(in.slot);
        first = tables.first()[me];
        num_local = tables.first()[me + 1] - first;
    }

    __device__ __forceinline__ const std::byte* record_of(const Run& at) const {
        const int64_t place = int64_t{at.src} * tables.shape.max_tokens + at.t;
        return records + place * tables.spread.record.bytes();
    }
    // Lanes of a line come here together.
    __device__ __forceinline__ void load(const Run& at, Lines& lines) const {
        const device::LineLane lane;
        const Record& r = tables.spread.record;
        const std::byte* record = record_of(at) + lane.offset(0);
        const int left = units_of(at) - kLineUnits * lane.line;
        const std::byte* piece = record + kLineBytes * (r.meta_lines + at.piece * r.piece_lines);
        if (lane.line < r.meta_lines) lines.meta = device::get_line(record);
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
            if (left > v * kApart) lines.words[v] = device::get_line(piece + v * kLinesApart);
        }
    }

    // read(): all lines that count have come. False: leave.
    template <class Read>
    __device__ __forceinline__ bool take(const Run& at, Lines& lines, Read read) const {
        const std::byte* record = record_of(at);
        const Record& r = tables.spread.record;
#pragma unroll 1
        for (int turn = 0; !is_told(lines.meta); ++turn) {
            if (turn >= device::kLooks && !await(at, record, r.meta_lines)) return false;
            load(at, lines);
        }
        const int index =
            static_cast<int>(__shfl_sync(~0u, static_cast<uint32_t>(lines.meta.a), 0));
        if (index < 0) {  // it does not come here
            read();
            return true;
        }
        // Votes are on their way together.
        const int units = units_of(at);
        bool late = is_late(units, lines.words);
        const Arrival to = place(at, index, lines.meta);
        const bool bad = __any_sync(~0u, is_bad(at.src, index, to));
        const uint32_t targets = targets_of(at, to);
        if (bad) return object(at.src, index, to);
        if (at.piece == 0 && at.share == 0) describe(at, index, to);
#pragma unroll 1
        for (int turn = 0; late; ++turn) {
            const std::byte* piece =
                record + kLineBytes * (r.meta_lines + at.piece * r.piece_lines);
            const int count = (units + kLineUnits - 1) / kLineUnits;
            if (turn >= device::kLooks && !await(at, piece, count)) return false;
            load(at, lines);
            late = is_late(units, lines.words);
        }
        read();
        put(at, to, targets, lines.words);
        return true;
    }

private:
    // What becomes of a slot of a token here; of its lane.
    struct Arrival {
        int row = -1, local = -1;
        float weight = 0.0f;
        uint32_t scales = 0;  // where its scales begin, in words
    };

    __device__ __forceinline__ const DispatchArgs& args() const { return job.args; }
    __device__ __forceinline__ bool compact() const { return is_compact<F>(args().layout); }
    __device__ __forceinline__ int units_of(const Run& at) const {
        return tables.spread.row_units_of(at.piece) + tables.spread.scale_units;
    }
    // Of slabs scales are column-major, columns 16 bytes aligned.
    __device__ __forceinline__ int scales_apart() const {
        return compact() ? 1 : (static_cast<int>(args().capacity) + 3) / 4 * 4;
    }

    __device__ __forceinline__ bool is_told(const device::Words& meta) const {
        const device::LineLane at;
        const bool tells = at.is_last() && at.line < tables.spread.record.meta_lines;
        return __all_sync(~0u, !tells || meta.b == op.seq);
    }
    __device__ __forceinline__ bool is_late(int units,
                                            const device::Words (&words)[kAtOnce]) const {
        const device::LineLane at;
        const int left = at.is_last() ? units - kLineUnits * at.line : 0;
        bool late = false;
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) late |= left > v * kApart && words[v].b != op.seq;
        return __any_sync(~0u, late);
    }
    __device__ __noinline__ bool await(Run at, const std::byte* from, int count) const {
        return device::await_lines(job.view.watch, op, at.src, from, 0, count);
    }

    // See send_usual. What a peer told is looked at before it becomes an address.
    __device__ __forceinline__ Arrival place(const Run& at, int index,
                                             const device::Words& meta) const {
        const DispatchArgs& a = args();
        const auto lane = static_cast<int>(ptx::lane_id());
        const int me = job.view.peers.rank;
        const uint64_t told = turns.word_of(meta);
        const uint64_t pair = turns.pair_of(meta);  // of what has no weights: anything
        const auto code = static_cast<uint32_t>(told);
        Arrival to;
        if (lane >= a.num_topk || code == kNoStagedExpert || staged_rank(code) != me) return to;
        const int turn = static_cast<int>(told >> 32);
        to.local = staged_local(code);
        to.weight = __uint_as_float(static_cast<uint32_t>(lane % 2 != 0 ? pair >> 32 : pair));
        const auto words = static_cast<uint32_t>(a.scale_bytes / 4);
        if (compact()) {
            to.row = tables.rows(at.src, me) + index;
            to.scales = static_cast<uint32_t>(to.row) * words;
        } else if (to.local < num_local) {
            const bool is_turn = static_cast<uint32_t>(turn) < static_cast<uint32_t>(a.capacity);
            const int row = tables.selections(at.src, first + to.local) + (is_turn ? turn : 0);
            const bool fits = is_turn && row < a.capacity;
            to.row = fits ? to.local * static_cast<int>(a.capacity) + row : -2;
            to.scales = to.local * words * static_cast<uint32_t>(scales_apart()) + row;
        } else {
            to.row = -2;
        }
        return to;
    }
    __device__ __forceinline__ bool is_bad(int src, int index, const Arrival& to) const {
        const int64_t at = int64_t{tables.rows(src, job.view.peers.rank)} + index;
        return to.row == -2 || at >= job.out.max_recv || to.row >= job.out.max_rows ||
               to.local >= tables.shape.max_local_experts;
    }
    __device__ __noinline__ bool object(int src, int index, Arrival to) const {
        if (is_bad(src, index, to)) {
            device::give_up(job.view.watch, op, kBadCount,
                            {Site::kLine, src, uint64_t(job.out.max_rows)}, uint64_t(to.row), 0);
        }
        return false;
    }

    __device__ __forceinline__ void describe(const Run& at, int index, const Arrival& to) const {
        const DispatchArgs& a = args();
        const UnpackArgs& out = job.out;
        const auto lane = static_cast<int>(ptx::lane_id());
        const int64_t i = int64_t{tables.rows(at.src, job.view.peers.rank)} + index;
        if (lane < 2) out.recv_src[2 * i + lane] = lane == 0 ? at.src : at.t;
        if (lane >= a.num_topk) return;
        const int64_t of_slot = i * a.num_topk + lane;
        if (!compact()) {
            out.recv_row[of_slot] = to.row;
            if (a.with_weights && to.row >= 0) out.topk_weights[to.row] = to.weight;
            return;
        }
        if (a.with_weights) out.topk_weights[of_slot] = to.weight;
        if (out.idx_is_int64) {
            static_cast<int64_t*>(out.topk_idx)[of_slot] = to.local;
        } else {
            static_cast<int32_t*>(out.topk_idx)[of_slot] = to.local;
        }
    }

    // Lanes whose rows are ours to store. Compact: all slots of a token have one row.
    __device__ __forceinline__ uint32_t targets_of(const Run& at, const Arrival& to) const {
        const uint32_t here = __ballot_sync(~0u, to.row >= 0);
        if (compact()) return here & (0u - here);
        const int turn = __popc(here & ptx::lanemask_lt());
        const int mask = (1 << tables.spread.shares_log) - 1;
        return __ballot_sync(~0u, to.row >= 0 && (turn & mask) == at.share);
    }

    __device__ __forceinline__ void put(const Run& at, const Arrival& to, uint32_t targets,
                                        const device::Words (&words)[kAtOnce]) const {
        const device::LineLane line;
        const StageSpread& s = tables.spread;
        const auto lane = static_cast<int>(ptx::lane_id());
        const int row_units = s.row_units_of(at.piece), before = at.piece * s.scale_words.value;
        const int left = line.is_last() ? 0 : row_units - line.index(0);
        const int num_scales =
            min(s.scale_words.value, static_cast<int>(args().scale_bytes / 4) - before);
        const bool has_scale = s.scale_units > 0 && lane < num_scales;
        const uint32_t scale =
            s.scale_units > 0 ? scales_of_piece(tables, row_units, words)[lane] : 0;
        std::byte* x = tables.arena() +
                       int64_t{job.begin.head.grant.page[Grant::kX]} * kExtentAlign +
                       int64_t{at.piece} * s.record.piece_bytes + kUnitBytes * line.index(0);
        auto* scales =
            reinterpret_cast<uint32_t*>(job.out.scales) + int64_t{before + lane} * scales_apart();
        const auto store = [&](int row, uint32_t its_scales) {
            std::byte* units = x + int64_t{row} * s.row_bytes;
#pragma unroll
            for (int v = 0; v < kAtOnce; ++v) {
                if (left <= v * kApart) continue;
                ptx::st_global_v2(units + v * kApart * kUnitBytes, words[v].a, words[v].b);
            }
            if (has_scale) ptx::st_global(scales + its_scales, scale);
        };
#pragma unroll 1
        while (targets != 0) {
            const int one = __ffs(targets) - 1;
            targets &= targets - 1;
            const int other = targets != 0 ? __ffs(targets) - 1 : one;
            targets &= targets - 1;
            const int row = __shfl_sync(~0u, to.row, one), row2 = __shfl_sync(~0u, to.row, other);
            const uint32_t at_scales = __shfl_sync(~0u, to.scales, one);
            const uint32_t at_scales2 = __shfl_sync(~0u, to.scales, other);
            store(row, at_scales);
            if (other != one) store(row2, at_scales2);
        }
    }
};

// Of our own tokens, which know by now only their turn among ours: their rows at their owners.
template <class F>
__device__ __forceinline__ void settle_own(const DispatchJob& job, const StageTables& tables,
                                           const OwnSlot& own) {
    const DispatchArgs& a = job.args;
    const auto lane = static_cast<int>(ptx::lane_id());
    const int me = job.view.peers.rank;
    if (lane >= a.num_topk || !own.chosen()) return;
    int row = own.number;
    if (is_compact<F>(a.layout)) {
        row += tables.rows(me, own.dst());
    } else {
        row += staged_local(own.expert.code) * static_cast<int>(a.capacity);
        row += tables.selections(me, own.expert.position);
    }
    a.send_row[int64_t{turn_of_block()} * a.num_topk + lane] = row;
}

enum class Caught { kAll, kFailed, kLeaves };

// Something has not come, or is wrong, or some block has not started. All threads; `has_all`: this warp has heard all.
template <class Config, class F>
__device__ __noinline__ Caught receive_slowly(const DispatchJob& job, const StageSpread& spread,
                                              const F& far, Entering& in, bool has_all,
                                              bool all_sent) {
    const StageTables tables{spread, job.view.shape};
    has_all = __syncthreads_and(has_all);
    if (!catch_up<Config, Half::kBoth>(job, spread, far, in, has_all, all_sent)) {
        return Caught::kLeaves;
    }
    if (min(in.first_bad, in.size_bad) != kNoObjection) {
        take_nothing<F>(job, spread, in);
        return Caught::kFailed;
    }
    const Span own = tokens_of_turn(job, spread, turn_of_block());
    if (in.sends) settle_rows<F>(job, tables, own.begin, own.end, in, true);
    return Caught::kAll;
}

// As receive() of kernels/stage_second_half.cuh. `own`: of the warp that describes.
template <class Config, class F>
__device__ __forceinline__ bool receive_usual(const DispatchJob& job, const StageSpread& spread,
                                              const StageTables& tables, const F& far, Entering& in,
                                              const UsualTurns& turns, const OwnSlot& own) {
    using R = UsualReceiver<F, kSteps<Config>>;
    const RankView& view = job.view;
    const int warp = uniform_warp();
    R receiver{job, tables, turns};
    receiver.enter(in);
    UsualRun run = turns.run;
    typename R::Lines lines;
    UsualHearing<F> hearing{job, tables, in};
    Unclaimed left;
    if (warp == F::kWarps - 2) left.look(view);  // one warp for all
    const bool all = hearing.wait();
    int tokens =
        static_cast<int>(hearing.limits.num_tokens);  // of the rank with the number of the lane
    const auto most_of = [&] {
        return min(static_cast<int>(__reduce_max_sync(~0u, static_cast<uint32_t>(tokens))),
                   static_cast<int>(view.shape.max_tokens));
    };
    int most = most_of();
    const bool fine = all && hearing.judge();
    if (all && run.t < most) receiver.load(run, lines);
    const bool all_sent = left.none();
    bool settles = warp == kDescriber<F> && in.sends && turn_of_block() < job.args.num_tokens;
    if (!__syncthreads_and(fine && all_sent)) {
        const Caught caught = receive_slowly<Config>(job, spread, far, in, all, all_sent);
        if (caught != Caught::kAll) return caught == Caught::kFailed;
        // Nothing but what is here is known any more: it would be in no register.
        settles = false;
        const auto lane = static_cast<int>(ptx::lane_id());
        tokens = lane < view.shape.num_ranks ? tables.heard()[lane].num_tokens : 0;
        most = most_of();
        receiver.enter(in);
        run = UsualRun(spread, turns.from);
        if (run.t < most) receiver.load(run, lines);
    }
    if (settles) settle_own<F>(job, tables, own);
    const bool tells = publishes_stage() && uniform_warp() == F::kWarps - 1;
    const bool takes = !tells && run.t < most;
    Readers readers;
    if (tells) tell_outputs<F>(job, spread, in, true, 0);
    if (!takes) readers.count(view, in);
    bool ok = true;
#pragma unroll 1
    for (int n = turns.from + turns.step, next_t = turns.next_t; takes && ok; n += turns.step) {
        const bool is_last = next_t >= most;
        const auto read = [&] {
            if (is_last) readers.count(view, in);
        };
        if (run.t < __shfl_sync(~0u, tokens, run.src)) {
            ok = receiver.take(run, lines, read);
        } else {
            read();
        }
        if (is_last) break;
        run = UsualRun(spread, n);
        next_t = UsualRun(spread, n + turns.step).t;
        receiver.load(run, lines);
    }
    if (!ok) {
        in.leaves = true;
        return false;
    }
    fill_rest<F>(job, spread, tables, true);
    if (readers.are_all(view)) {
        const Operation op{OpKind::kDispatch, in.seq};
        end_half<Half::kBoth>(view, tables.control(), job.begun, far, op, in);
    }
    return false;
}

}  // namespace ep::kernels
