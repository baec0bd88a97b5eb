// A dispatch whose rows travel by copy engine: what its kernels and its host tell each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "contract/gpu.h"

namespace ep {

// Where our rows go at one rank. Pinned memory, for the host that queues the copies.
struct Place {
    int64_t x_offset, meta_offset;  // extents in its arena
    int64_t row, num_rows;          // of ours there
    int32_t until[kMaxChunks];      // rows of all chunks up to this one
};

// Rows are packed by destination, in the order of their tokens, and copied from there.
struct PackJob {
    DispatchJob dispatch;
    Place* places = nullptr;       // [num_ranks], mapped
    int32_t* start = nullptr;      // [num_ranks] first packed row of each destination
    std::byte* rows = nullptr;     // [packed rows][row_bytes]
    std::byte* records = nullptr;  // [packed rows][record bytes]
    int32_t first_chunk = 0, end_chunk = 0;
};
static_assert(std::is_trivially_copyable_v<PackJob> && sizeof(PackJob) <= 2048);

}  // namespace ep
