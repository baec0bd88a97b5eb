// The second half of a small dispatch: lines become rows of x and what belongs to them.
//
// defines: scales_of_piece, Receiver
#pragma once

#include <cstdint>

#include "contract/direct.h"
#include "contract/gpu.h"
#include "device/lines.cuh"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"
#include "kernels/stage.cuh"
#include "kernels/stage_masks.cuh"
#include "kernels/stage_tables.cuh"
#include "kernels/usual.cuh"

namespace ep::kernels {

// The scales behind a piece, of which few lanes have some, in shared memory of the warp. All lanes.
template <int kAtOnce>
__device__ __forceinline__ const uint32_t* scales_of_piece(const StageTables& tables, int row_units,
                                                           const device::Words (&w)[kAtOnce]) {
    const device::LineLane at;
    auto* units = reinterpret_cast<uint4*>(tables.warp_memory());
    __syncwarp();  // those of the piece before have been read
#pragma unroll
    for (int v = 0; v < kAtOnce; ++v) {
        const int unit = at.index(0) + v * device::LineLane::kAtOnce * kLineUnits - row_units;
        if (at.is_last() || unit < 0 || unit >= tables.spread.scale_units) continue;
        units[unit] = device::unit_of(w[v]);
    }
    __syncwarp();
    return reinterpret_cast<const uint32_t*>(units);
}

// Of a warp, which takes pieces of tokens of any source. kAtOnce: steps of a piece, or more.
template <class F, int kAtOnce>
struct Receiver {
    // Between those of one lane: units in a row, bytes of lines in a record.
    static constexpr int kApart = device::LineLane::kAtOnce * kLineUnits;
    static constexpr int kLinesApart = device::LineLane::kAtOnce * kLineBytes;

    const DispatchJob& job;
    StageTables tables;
    StageView<F> stage;
    Entering& in;  // whom this block goes without

    // A run of pieces of what a source may have sent.
    struct Run {
        int src, t;  // of its token t; from another node of the t-th that comes here
        int index;   // among those of the token

        __device__ __forceinline__ int first(const Runs& runs) const { return index * runs.pieces; }
    };
    // What its source told of a token; of a slot here its lane knows which expert it is for.
    struct Told {
        int index = -1;             // its number among those that come here
        int local = -1, turn = -1;  // of the slot, if it comes here
        float weight = 0.0f;
    };
    // What a warp has of its first run before all have been heard.
    struct Ahead {
        device::Words meta, lines[kAtOnce];
        Told told;
        bool is_told = false;
    };

    // The first run of a warp, of which nothing is known.
    __device__ __forceinline__ void start(int first, Run& at, Ahead& ahead) const {
        const Runs& runs = tables.spread.taken;
        const Divisor& places = tables.spread.places_of_source;
        const int place = runs.row_of(first);
        at.src = places.quotient(place), at.t = place - at.src * places.value;
        at.index = first - place * runs.per_row.value;
        ahead.told = {}, ahead.is_told = false;
    }

    // A look at a piece that may have come, in two steps: loads, then what they brought.
    struct Peek {
        const Receiver& receiver;
        const Run& at;
        Ahead& ahead;

        __device__ __forceinline__ void load() {
            if (!F::kAny && at.src < receiver.job.view.shape.num_ranks && !ahead.is_told) {
                receiver.load(receiver.record_of(at), at, ahead);
            }
        }
        __device__ __forceinline__ void look() {
            if (!F::kAny && at.src < receiver.job.view.shape.num_ranks && !ahead.is_told) {
                ahead.is_told = receiver.is_told(ahead);
            }
        }
    };
    // After looks: what has come is made something of, as far as that goes before the verdict.
    __device__ __forceinline__ void understand(Ahead& ahead) const {
        if (ahead.is_told) ahead.told = told_by(ahead.meta);
    }

    // This run, and each `step`-th after it, of all tokens that all ranks may have. read(), once or twice: all lines
    // have been loaded. False: leave.
    template <class Read>
    __device__ __forceinline__ bool run(int step, Run at, Ahead& ahead, Read read) const {
        const Divisor& per_row = tables.spread.taken.per_row;
        const auto num_ranks = static_cast<int>(job.view.shape.num_ranks);
        const auto most = static_cast<int>(job.view.shape.max_tokens);
        const auto is_last = [&] {
            const int left = (num_ranks - at.src) * most - at.t;
            return left * per_row.value - at.index <= step;
        };
        bool ok = true;
#pragma unroll 1
        while (ok && at.src < num_ranks) {
            if (at.t < places_of(at.src) && !is_gone(at.src)) {
                ok = take(at, ahead, [&] {
                    if (is_last()) read();
                });
            }
            if (is_last()) break;
            ahead.is_told = false;
            const int next = at.index + step, tokens = per_row.quotient(next);
            at.index = next - tokens * per_row.value;
            for (at.t += tokens; at.t >= most; at.t -= most) ++at.src;
        }
        if (ok) read();
        return ok;
    }

private:
    // What becomes of a token here; a slot's row is held by its lane.
    struct Arrival {
        int token, index;  // of its source; among those that come here
        int row = -1, local;
        float weight;
        uint32_t scales = 0;  // where its scales begin, in words
    };
    // Of the rows that a token has here the one with the number of the lane.
    struct Targets {
        int count, row;
        uint32_t scales;
    };

    __device__ const DispatchArgs& args() const { return job.args; }
    __device__ bool compact() const { return is_compact<F>(args().layout); }

    __device__ std::byte* x() const {
        return tables.arena() + int64_t{job.begin.head.grant.page[Grant::kX]} * kExtentAlign;
    }

    // Places of a source that may have a record for us: one for each token, of which not all come here. From
    // another node one for each that does.
    __device__ __forceinline__ int places_of(int src) const {
        const int me = job.view.peers.rank;
        if (stage.is_far(src)) return tables.rows(src + 1, me) - tables.rows(src, me);
        return tables.heard()[src].num_tokens;
    }

    // Of piece p: units of the row, and with the scales behind them.
    __device__ __forceinline__ int row_units_of(int p) const {
        return tables.spread.row_units_of(p);
    }
    __device__ __forceinline__ int units_of(int p) const {
        return row_units_of(p) + tables.spread.scale_units;
    }
    __device__ __forceinline__ const std::byte* record_of(const Run& at) const {
        return stage.arrival(at.src, int64_t{at.src} * job.view.shape.max_tokens + at.t);
    }
    __device__ __forceinline__ bool tells() const {
        return device::LineLane().line < stage.record.meta_lines;
    }

    // Whether what it says of the token is there. All lanes.
    __device__ __forceinline__ bool is_told(const Ahead& ahead) const {
        return __all_sync(~0u, !tells() || !device::LineLane().is_last() || is_ours(ahead.meta));
    }
    // Lanes of a line come here together, or get halves of two.
    __device__ __forceinline__ void load(const std::byte* record, const Run& at,
                                         Ahead& ahead) const {
        __syncwarp();
        if (tells()) ahead.meta = device::get_line(record + device::LineLane().offset(0));
        const int p = at.first(tables.spread.taken);
        get(record + stage.piece_at(p), units_of(p), ahead.lines);
    }

    // read(): all its lines have been loaded.
    template <class Read>
    __device__ __forceinline__ bool take(const Run& at, Ahead& ahead, Read read) const {
        const int src = at.src;
        if constexpr (F::kAny) {
            if (stage.await_far(ptx::lane_id() == 0 ? src : -1) != 0) {
                return lose(job.view, in, src);
            }
        }
        const std::byte* record = record_of(at);
        if (!ahead.is_told) {
            load(record, at, ahead);
#pragma unroll 1
            for (int turn = 0; !is_told(ahead); ++turn) {
                if (turn >= device::kLooks && !await(src, record, stage.record.meta_lines)) {
                    return lose(job.view, in, src);
                }
                load(record, at, ahead);
            }
            ahead.told = told_by(ahead.meta);
        }
        if (ahead.told.index < 0) {  // it does not come here
            read();
            return true;
        }
        const Arrival to = place(at, ahead.told);
        if (!in_bounds(src, to)) return false;
        if (at.index == 0) describe(src, to);
        const Targets rows = targets_of(to);
        device::Words(&w)[kAtOnce] = ahead.lines;
        const Runs& runs = tables.spread.taken;
        int p = at.first(runs);
        const auto is_end = [&](int piece) {  // no number that is held: registers are full
            return piece >= min(at.first(runs) + runs.pieces, stage.record.num_pieces);
        };
        const std::byte* lines = record + stage.piece_at(p);
        // Where a lane's first unit goes in the first row.
        std::byte* out =
            x() + int64_t{p} * stage.record.piece_bytes + kUnitBytes * device::LineLane().index(0);
#pragma unroll 1
        while (true) {
            const int row_units = row_units_of(p), units = row_units + tables.spread.scale_units;
#pragma unroll 1
            for (int turn = 0; !there(units, w); ++turn) {
                if (turn >= device::kLooks && !await(src, lines, lines_of(units))) {
                    return lose(job.view, in, src);
                }
                get(lines, units, w);
            }
            if (is_end(p + 1)) read();
            put_rows(row_units, rows, out, w);
            if (units > row_units) put_scales(p, row_units, rows, w);
            if (is_end(++p)) return true;
            lines += int64_t{stage.record.piece_lines} * kLineBytes;
            out += stage.record.piece_bytes;
            get(lines, units_of(p), w);
        }
    }

    __device__ __forceinline__ bool is_gone(int src) const {
        const uint64_t gone = in.masked | in.unheard;
        return __any_sync(~0u, gone != 0 && device::has_rank(gone, src));
    }

    __device__ __forceinline__ bool is_ours(const device::Words& w) const {
        return w.b == stage.op.seq;
    }
    __device__ __forceinline__ bool there(int units, const device::Words (&w)[kAtOnce]) const {
        const device::LineLane at;
        const int left = units - kLineUnits * at.line;
        bool late = false;
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) late |= (left > v * kApart) & !is_ours(w[v]);
        return !__any_sync(~0u, at.is_last() & late);
    }
    __device__ __forceinline__ static int lines_of(int units) {
        return (units + kLineUnits - 1) / kLineUnits;
    }
    __device__ __forceinline__ bool await(int src, const std::byte* from, int lines) const {
        return device::await_lines(watch_of(job.view, stage.far), stage.op, src, from, 0, lines);
    }
    __device__ __forceinline__ void get(const std::byte* piece, int units,
                                        device::Words (&w)[kAtOnce]) const {
        const device::LineLane at;
        const int left = units - kLineUnits * at.line;
        piece += at.offset(0);
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
            if (left > v * kApart) w[v] = device::get_line(piece + v * kLinesApart);
        }
    }

    // See Sender::describe.
    __device__ __forceinline__ Told told_by(const device::Words& meta) const {
        const DispatchArgs& a = args();
        const int slot = min(static_cast<int>(ptx::lane_id()), a.num_topk - 1);
        Told r;
        r.index = static_cast<int>(__shfl_sync(~0u, static_cast<uint32_t>(meta.a), 0));
        const uint64_t told = word(meta, 1 + slot);
        uint64_t pair = 0;
        if (a.with_weights) pair = word(meta, 1 + a.num_topk + slot / 2);
        const auto code = static_cast<uint32_t>(told);
        if (static_cast<int>(ptx::lane_id()) >= a.num_topk || code == kNoStagedExpert ||
            staged_rank(code) != job.view.peers.rank) {
            return r;
        }
        r.turn =
            F::kAny ? turn_of(static_cast<uint32_t>(told >> 32)) : static_cast<int>(told >> 32);
        r.local = staged_local(code);
        r.weight = __uint_as_float(static_cast<uint32_t>(slot % 2 != 0 ? pair >> 32 : pair));
        return r;
    }
    // From that, what all bring, and the place.
    __device__ __forceinline__ Arrival place(const Run& at, const Told& told) const {
        const DispatchArgs& a = args();
        const int me = job.view.peers.rank, src = at.src;
        Arrival r{at.t, told.index, -1, told.local, told.weight};
        if (stage.is_far(src)) r.token = told.index, r.index = at.t;
        if (told.local < 0) return r;
        const auto words = static_cast<uint32_t>(a.scale_bytes / 4);
        const int position = tables.first()[me] + told.local;
        if (compact()) {
            r.row = tables.rows(src, me) + r.index;
            r.scales = static_cast<uint32_t>(r.row) * words;
        } else if (position < tables.first()[me + 1]) {
            const bool is_turn =
                static_cast<uint32_t>(told.turn) < static_cast<uint32_t>(a.capacity);
            const int row = tables.selections(src, position) + (is_turn ? told.turn : 0);
            const bool fits = is_turn && row < a.capacity;
            r.row = fits ? static_cast<int>(told.local * a.capacity) + row : -2;
            r.scales = told.local * words * static_cast<uint32_t>(scales_apart()) + row;
        } else {
            r.row = -2;
        }
        return r;
    }

    // Word i, which may differ between lanes.
    __device__ __forceinline__ static uint64_t word(const device::Words& w, int i) {
        const int line = i / kLineWords, of_line = i - line * kLineWords;
        const int from = 8 * line + of_line / 2;
        const uint64_t a = __shfl_sync(~0u, w.a, from), b = __shfl_sync(~0u, w.b, from);
        return of_line % 2 != 0 ? b : a;
    }

    // What a peer told is looked at before it becomes an address.
    __device__ __forceinline__ bool in_bounds(int src, const Arrival& to) const {
        const int64_t at = int64_t{tables.rows(src, job.view.peers.rank)} + to.index;
        const bool bad = to.row == -2 || at >= job.out.max_recv || to.row >= job.out.max_rows ||
                         to.local >= job.view.shape.max_local_experts;
        if (!__any_sync(~0u, bad)) return true;
        if (bad) {
            device::give_up(job.view.watch, stage.op, kBadCount,
                            {Site::kLine, src, uint64_t(job.out.max_rows)}, uint64_t(to.row), 0);
        }
        return false;
    }

    __device__ __forceinline__ void describe(int src, const Arrival& to) const {
        const DispatchArgs& a = args();
        const int t = to.token;
        const UnpackArgs& out = job.out;
        const int lane = ptx::lane_id();
        const int64_t i = int64_t{tables.rows(src, job.view.peers.rank)} + to.index;
        if (lane < 2) out.recv_src[2 * i + lane] = lane == 0 ? src : t;
        if (compact()) {
            if (lane < a.num_topk) {
                put_id(i * a.num_topk + lane, to.local);
                if (a.with_weights) out.topk_weights[i * a.num_topk + lane] = to.weight;
            }
            if (out.row_token != nullptr && lane == 0) out.row_token[i] = t;
            return;
        }
        if (lane < a.num_topk) out.recv_row[i * a.num_topk + lane] = to.row;
        if (to.row < 0) return;
        if (a.with_weights) out.topk_weights[to.row] = to.weight;
        if (out.row_token != nullptr) out.row_token[to.row] = t;
    }

    __device__ __forceinline__ void put_id(int64_t at, int local) const {
        if (job.out.idx_is_int64) {
            static_cast<int64_t*>(job.out.topk_idx)[at] = local;
        } else {
            static_cast<int32_t*>(job.out.topk_idx)[at] = local;
        }
    }

    // Compact: all slots of a token have one row.
    __device__ __forceinline__ Targets targets_of(const Arrival& to) const {
        uint32_t left = __ballot_sync(~0u, to.row >= 0);
        if (compact()) left &= 0u - left;
        Targets r{__popc(left), 0, 0};
        auto* list = reinterpret_cast<uint2*>(tables.warp_memory());
        const auto lane = static_cast<int>(ptx::lane_id());
        __syncwarp();  // scales of the token before have been read
        if (left >> lane & 1) {
            list[__popc(left & ptx::lanemask_lt())] = {static_cast<uint32_t>(to.row), to.scales};
        }
        __syncwarp();
        if (lane < r.count) r.row = static_cast<int>(list[lane].x), r.scales = list[lane].y;
        return r;
    }

    // A piece to every row; `out`: where a lane's first unit goes in row 0.
    __device__ __forceinline__ void put_rows(int row_units, const Targets& to, std::byte* out,
                                             const device::Words (&w)[kAtOnce]) const {
        const device::LineLane at;
        const int left = at.is_last() ? 0 : row_units - at.index(0);
        const auto put = [&](int row) {
            std::byte* units = out + int64_t{row} * tables.spread.row_bytes;
#pragma unroll
            for (int v = 0; v < kAtOnce; ++v) {
                if (left <= v * kApart) continue;
                ptx::st_global_v2(units + v * kApart * kUnitBytes, w[v].a, w[v].b);
            }
        };
#pragma unroll 1
        for (int n = 0; n < to.count; n += 2) {
            const int one = __shfl_sync(~0u, to.row, n), other = __shfl_sync(~0u, to.row, n + 1);
            put(one);
            if (n + 1 < to.count) put(other);
        }
    }

    // Of slabs scales are column-major, columns 16 bytes aligned.
    __device__ __forceinline__ int64_t scales_apart() const {
        return compact() ? 1 : (args().capacity + 3) / 4 * 4;
    }

    // Scales of a piece to every row. Few lanes have some, so they come to all through shared memory of the warp: a
    // lane stores a word of a row.
    __device__ __forceinline__ void put_scales(int p, int row_units, const Targets& to,
                                               const device::Words (&w)[kAtOnce]) const {
        const Divisor& words = tables.spread.scale_words;
        const int before = p * words.value;
        const int end = min(words.value, static_cast<int>(args().scale_bytes / 4) - before);
        const uint32_t* scales = scales_of_piece(tables, row_units, w);
        const int64_t apart = scales_apart();
        auto* out = reinterpret_cast<uint32_t*>(job.out.scales) + before * apart;
#pragma unroll 1
        for (int first = 0; first < to.count * words.value; first += 32) {
            const int k = first + static_cast<int>(ptx::lane_id());
            const int row = words.quotient(k), i = k - row * words.value;
            const uint32_t at_row = __shfl_sync(~0u, to.scales, row);
            if (row >= to.count || i >= end) continue;
            ptx::st_global(out + at_row + i * apart, scales[i]);
        }
    }
};

}  // namespace ep::kernels
