// What owners and sources of a small combine share: pieces of rows, and sums of lines in registers.
//
// defines: kUnitsApart, kLinesApart, kUnitsAdded, Pieces, CombineSpread, LineSums, units_from_lane,
// units_from_line, load_units
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "contract/config.h"
#include "contract/gpu.h"
#include "contract/stage.h"
#include "device/lines.cuh"
#include "device/reduce.cuh"

namespace ep::kernels {

using device::LineLane;
using device::Words;

constexpr int kUnitsApart = LineLane::kAtOnce * kLineUnits;  // of one lane, in a row
constexpr int kLinesApart = LineLane::kAtOnce * kLineBytes;  // the same, in a record
// Of every lane in what a source adds up at once: a piece.
constexpr int kUnitsAdded = 2;
static_assert(kUnitsAdded * LineLane::kAtOnce == kSumLines);

// What a warp of a combine goes through: a run of pieces, then each `step`-th run after it.
struct Pieces {
    int run;
    int item, piece, left;  // of a row this piece, and so many that are left of the run

    __device__ __forceinline__ Pieces(const Runs& runs, int first) { start(runs, first); }
    __device__ __forceinline__ void next(const Runs& runs, int step) { start(runs, run + step); }

private:
    __device__ __forceinline__ void start(const Runs& runs, int which) {
        run = which;
        item = runs.row_of(run);
        piece = runs.first_piece(run);
        left = min(runs.pieces, runs.num_pieces - piece);
    }
};

// What a combine spreads over its warps.
struct CombineSpread {
    Record record;
    int32_t row_bytes, row_units;
    // Of every lane in a piece of an owner's: larger ones where they are many.
    int32_t units_sent;
    Runs sent, added;
    // The row that is sent first: those of other ranks before our own. Of so many, which are all that come if others
    // have as many tokens as we; what comes beside them, or is empty, is behind them.
    int32_t first_sent, rotated;
    int32_t first_adder;  // the first warp that adds up; where there are so many, none that sends
    bool has_bias;

    // `wide`: owners may take larger pieces.
    CombineSpread(const RankView& view, const CombineArgs& a, int warps, bool wide)
        : record(record_of(a)),
          row_bytes(static_cast<int32_t>(a.row_bytes())),
          row_units(row_bytes / kUnitBytes),
          added(record.num_pieces, a.num_tokens, warps),
          has_bias(a.bias0 != nullptr || a.bias1 != nullptr) {
        const int64_t rows = rows_here(view.shape, a);
        const bool many = rows * record.num_pieces > warps;  // else they take one each
        units_sent = wide && many ? 2 * kUnitsAdded : kUnitsAdded;
        sent = Runs(static_cast<int>(divide_up(record.num_pieces, units_sent / kUnitsAdded)), rows,
                    warps);
        // Rows lie in ascending order of sources. Others may have other numbers of tokens: then the order is
        // not the best one.
        const int64_t ours = rows / view.shape.num_ranks;
        const int64_t behind = ours * (view.peers.rank + 1);
        const int64_t most = std::min(a.num_tokens * view.shape.num_ranks, a.num_recv);
        rotated = static_cast<int32_t>(most);
        first_sent = static_cast<int32_t>(behind < most ? behind : 0);
        const int64_t idle = warps - int64_t{a.num_tokens} * added.per_row.value;
        first_adder = static_cast<int32_t>(std::clamp<int64_t>(idle, 0, most * sent.per_row.value));
    }

private:
    // Tokens that come here, should every rank have as many as we, and choose experts evenly.
    static int64_t rows_here(const Shape& s, const CombineArgs& a) {
        const double misses = std::pow(1.0 - 1.0 / s.num_ranks, a.num_topk);
        const auto come = static_cast<int64_t>(a.num_tokens * s.num_ranks * (1.0 - misses));
        return std::min(come, int64_t{a.num_recv});
    }
};
static_assert(std::is_trivially_copyable_v<CombineSpread>);

// Sums of a warp: what its lanes have of some lines.
template <DType kDtype, int kUnits>
struct LineSums {
    device::Unit<kDtype> unit[kUnits];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (auto& u : unit) u.clear();
    }
    __device__ __forceinline__ void add(const Words (&w)[kUnits]) {
#pragma unroll
        for (int v = 0; v < kUnits; ++v) unit[v].add(device::unit_of(w[v]));
    }
    __device__ __forceinline__ void add(const Words (&w)[kUnits], float weight) {
#pragma unroll
        for (int v = 0; v < kUnits; ++v) unit[v].add(device::unit_of(w[v]), weight);
    }
};

// Of `units` of a row from a piece on: so many from the first one of this lane on, none where that is none. The v-th
// one after it is there if these are more than v * kUnitsApart.
__device__ __forceinline__ int units_from_lane(int units) {
    const LineLane at;
    return at.is_last() ? 0 : units - at.index(0);
}
// The same of lines: the v-th one that this lane takes part in is there.
__device__ __forceinline__ int units_from_line(int units) {
    return units - kLineUnits * LineLane{}.line;
}

// Units of a row in memory, of which this lane's first one is at `from`. What is not there stays as it was.
template <int kUnits>
__device__ __forceinline__ void load_units(const std::byte* from, int left, Words (&w)[kUnits]) {
#pragma unroll
    for (int v = 0; v < kUnits; ++v) {
        if (left <= v * kUnitsApart) continue;
        const auto* unit = reinterpret_cast<const uint4*>(from + v * kUnitsApart * kUnitBytes);
        w[v] = device::words_of(*unit);
    }
}

}  // namespace ep::kernels
