// A dispatch whose rows travel by copy engine: what its kernels and its host tell each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "contract/gpu.h"

namespace ep {

// A copy more costs 2 us, a piece that is not overlapped its packing. That is the first one: it is short, and each
// one after it takes as long to pack as the one before it to copy.
inline constexpr int kPieces = 5;
inline constexpr int kMostPackChunks = 32;

// Where our rows go at one rank. Pinned memory, for the host that queues the copies.
struct Place {
    int64_t x;               // extent in its arena
    int64_t row, num_rows;   // of ours there
    int32_t until[kPieces];  // rows of all pieces up to this one
};

// Rows are packed by destination, in the order of their tokens, and copied from there.
struct PackJob {
    DispatchJob dispatch;
    Place* places = nullptr;    // [num_ranks], mapped
    std::byte* rows = nullptr;  // [packed rows][row_bytes]
    int32_t first_chunk = 0, end_chunk = 0;
};
static_assert(std::is_trivially_copyable_v<PackJob> && sizeof(PackJob) <= 2048);

// The first chunk of a piece.
EP_HD constexpr int piece_begin(int piece, int num_chunks) {
    constexpr int kOfMost[kPieces + 1] = {0, 3, 7, 13, 22, kMostPackChunks};
    return kOfMost[piece] * num_chunks / kMostPackChunks;
}

}  // namespace ep
