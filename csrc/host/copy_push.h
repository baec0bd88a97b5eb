// Moves the rows of a dispatch by copy engine: a short step on all SMs packs them by destination, piece
// by piece; copies bring them to their final rows, which overlaps the packing of what follows.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "contract/pack.h"
#include "host/device_arena.h"
#include "host/flight.h"
#include "transport/device_memory.h"

namespace ep {

class CopyPush {
public:
    // `arenas`: of every rank, as mapped here.
    CopyPush(int rank, std::vector<std::byte*> arenas, int smem_bytes);
    ~CopyPush();
    CopyPush(const CopyPush&) = delete;
    CopyPush& operator=(const CopyPush&) = delete;

    // Decides the call: the report that its host waits for comes with the places. Behind that, rows are
    // packed, if the arena has room for as many as there may be. A chunk is an SM that waits for the other
    // ranks; where they share the GPU, `most_blocks` of each fit on it.
    void begin(Flight& flight, DeviceArena& arena, int most_blocks);
    // Once that report is there and good: the flight's stream continues when the rows of all ranks are there.
    // When the arena has no room to pack our rows, `few_blocks` SMs move them.
    void run(Flight& flight, DeviceArena& arena, int num_blocks, int few_blocks);

private:
    // Of at most `num_rows`; false: there is no room.
    bool pack(Flight& flight, DeviceArena& arena, int num_blocks, int64_t num_rows);
    void copy_piece(const Flight& flight, int piece, const std::vector<int64_t>& start);
    std::array<void**, kPieces + 1> every_event();

    int rank_;
    std::vector<std::byte*> arenas_;
    Place *places_ = nullptr, *mapped_places_ = nullptr;  // [num_ranks] pinned
    int smem_bytes_;
    Stream copies_ = nullptr;
    std::array<void*, kPieces> packed_{};  // cudaEvent_t: behind the packing of each piece,
    void* over_ = nullptr;                 // and behind all copies
};

}  // namespace ep
