// What owners and sources of a small combine share: pieces of rows, and sums of lines in registers.
//
// defines: kAtOnce, kRowsAtOnce, Pieces, LineSums, load_units, first_unit
#pragma once

#include <cstddef>

#include "contract/config.h"
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

// Of a warp: pieces of rows, one of `step` of the grid after the other; a piece of `item` after the other.
struct Pieces {
    int index, num_pieces;

    __device__ __forceinline__ int item() const { return index / num_pieces; }
    __device__ __forceinline__ int piece() const { return index - item() * num_pieces; }
    __device__ __forceinline__ void next(int step) { index += step; }
};

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
