// Moves the rows of a dispatch by copy engine: a short step on all SMs packs them by destination, piece
// by piece; copies bring them to their final rows, which overlaps the packing of what follows.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "contract/pack.h"
#include "host/device_arena.h"
#include "transport/device_memory.h"

namespace ep {

class CopyPush {
public:
    // `arenas`: of every rank, as mapped here.
    CopyPush(int rank, std::vector<std::byte*> arenas, int smem_bytes);
    ~CopyPush();
    CopyPush(const CopyPush&) = delete;
    CopyPush& operator=(const CopyPush&) = delete;

    // Decides the call: the report that its host waits for comes with the places. A chunk is an SM that
    // waits for the other ranks; where they share the GPU, `most_blocks` of each fit on it.
    void begin(DispatchJob& job, int most_blocks, Stream stream);
    // Once that report is there and good: `stream` continues when the rows of all ranks are there. When
    // the arena has no room to pack our rows, `few_blocks` SMs move them.
    void run(const DispatchJob& job, DeviceArena& arena, int num_blocks, int few_blocks,
             Stream stream);

private:
    void copy_piece(const PackJob& pack, int piece, const std::vector<int64_t>& start);

    int rank_;
    std::vector<std::byte*> arenas_;
    Place *places_ = nullptr, *mapped_places_ = nullptr;  // [num_ranks] pinned
    int smem_bytes_;
    Stream copies_ = nullptr;
    void* event_ = nullptr;  // cudaEvent_t
};

}  // namespace ep
