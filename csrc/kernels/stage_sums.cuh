// What owners and sources of a small combine share: pieces of rows, and sums of lines in registers.
//
// defines: kAtOnce, kRowsAtOnce, Pieces, CombineSpread, LineSums, load_units, first_unit
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

constexpr int kAtOnce = 2;  // times four lines that a warp works at: a piece
static_assert(kAtOnce * LineLane::kAtOnce == kSumLines);
constexpr int kRowsAtOnce = 4;  // rows of a token that are on their way together
constexpr int kUnitsApart = LineLane::kAtOnce * kLineUnits;

// What a warp of a combine goes through: a run of pieces, then each `step`-th run after it.
struct Pieces {
    int run;
    int item, piece, left;  // of a row this piece, and so many that are left of the run

    __device__ __forceinline__ Pieces(const Record& record, const Runs& runs, int first) {
        start(record, runs, first);
    }
    __device__ __forceinline__ void next(const Record& record, const Runs& runs, int step) {
        start(record, runs, run + step);
    }

private:
    __device__ __forceinline__ void start(const Record& record, const Runs& runs, int which) {
        run = which;
        item = runs.row_of(run);
        piece = runs.first_piece(run);
        left = min(runs.pieces, record.num_pieces - piece);
    }
};

// What a combine spreads over its warps, of which there are `warps`.
struct CombineSpread {
    Record record;
    int32_t units, last_units;  // of a piece of a row, and of its last one
    Runs sent, added;
    int32_t first_sent;  // the row that is sent first: those of other ranks before our own

    CombineSpread(const RankView& view, const CombineArgs& a, int warps)
        : record(record_of(a)),
          units(record.piece_bytes / kUnitBytes),
          last_units(static_cast<int32_t>(a.row_bytes() / kUnitBytes) -
                     units * (record.num_pieces - 1)),
          sent(record, rows_here(view.shape, a), warps),
          added(record, a.num_tokens, warps) {
        // Rows lie in ascending order of sources. Others may have other numbers of tokens: then the order is
        // not the best one.
        const int64_t ours = rows_here(view.shape, a) / view.shape.num_ranks;
        const int64_t behind = ours * (view.peers.rank + 1);
        first_sent = static_cast<int32_t>(behind < a.num_recv ? behind : 0);
    }

    EP_HD int units_of(int piece) const {
        return piece + 1 == record.num_pieces ? last_units : units;
    }
    EP_HD int64_t piece_stride() const { return int64_t{record.piece_lines} * kLineBytes; }

private:
    // Tokens that come here, should every rank have as many as we, and choose experts evenly.
    static int64_t rows_here(const Shape& s, const CombineArgs& a) {
        const double misses = std::pow(1.0 - 1.0 / s.num_ranks, a.num_topk);
        const auto come = static_cast<int64_t>(a.num_tokens * s.num_ranks * (1.0 - misses));
        return std::min(come, int64_t{a.num_recv});
    }
};
static_assert(std::is_trivially_copyable_v<CombineSpread>);

// Sums of a warp: what its lanes have of eight lines.
template <DType kDtype>
struct LineSums {
    device::Unit<kDtype> unit[kAtOnce];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (auto& u : unit) u.clear();
    }
    __device__ __forceinline__ void add(const Words (&w)[kAtOnce]) {
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) unit[v].add(device::unit_of(w[v]));
    }
    __device__ __forceinline__ void add(const Words (&w)[kAtOnce], float weight) {
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) unit[v].add(device::unit_of(w[v]), weight);
    }
};

// Units of a row in memory, from a lane's first one on.
__device__ __forceinline__ void load_units(const std::byte* row, int first, int units,
                                           Words (&w)[kAtOnce]) {
#pragma unroll
    for (int v = 0; v < kAtOnce; ++v) {
        const int i = first + v * kUnitsApart;
        w[v] = {};
        if (i < units) w[v] = device::words_of(reinterpret_cast<const uint4*>(row)[i]);
    }
}

// A lane's first unit of a piece, or none.
__device__ __forceinline__ int first_unit(int units) {
    const LineLane at;
    return at.is_last() ? units : at.index(0);
}

}  // namespace ep::kernels
