// Rows in flight: one piece of shared memory per warp or more, filled and emptied by bulk copies.
//
// defines: Stage, announce_load, load_announced, load_stage, await_stage, drain_stage, store_stage,
// drain_reads, drain_older, drain_stores
//
// A stage may be refilled once its stores have been read (drain_reads). Its rows are there for the
// receiver only once they are complete (drain_stores), and only a release after that may say so.
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "device/ptx.cuh"
#include "device/wait.cuh"

namespace ep::device {

// Shared memory for one row, or a part of one, and the barrier its load completes on.
struct Stage {
    std::byte* data;
    uint64_t* loaded;
    uint32_t parity = 0;  // of the load that is under way
};

// One thread prepares a stage's barrier; a barrier of the block must follow.
__device__ __forceinline__ void init_stage(const Stage& stage) {
    ptx::mbarrier_init(stage.loaded, 1);
    ptx::fence_mbarrier_init_release_cluster();
}

// One thread; what ordinary accesses did to the stage must be behind a fence_proxy_async_shared. In two steps: the
// first one tells the barrier how much will come, and touches nothing else.
__device__ __forceinline__ void announce_load(const Stage& stage, int bytes) {
    ptx::mbarrier_arrive_expect_tx(stage.loaded, bytes);
}
__device__ __forceinline__ void load_announced(const Stage& stage, const std::byte* src,
                                               int bytes) {
    ptx::bulk_load(stage.data, src, bytes, stage.loaded);
}
__device__ __forceinline__ void load_stage(const Stage& stage, const std::byte* src, int bytes) {
    announce_load(stage, bytes);
    load_announced(stage, src, bytes);
}

// Every thread that reads the stage. False: leave.
[[nodiscard]] __device__ __forceinline__ bool await_stage(const Watch& watch, Operation op,
                                                          Stage& stage, int from) {
    const uint32_t parity = stage.parity;
    uint64_t* loaded = stage.loaded;
    if (!ptx::mbarrier_try_wait_parity(loaded, parity) &&
        !wait_own(watch, op, from,
                  [loaded, parity] { return ptx::mbarrier_try_wait_parity(loaded, parity); })) {
        return false;
    }
    stage.parity ^= 1;
    return true;
}

// Before a block leaves without its rows: a load of our own memory that is under way arrives soon,
// whoever has given up.
__device__ __forceinline__ void drain_stage(Stage& stage) {
    constexpr int kTurns = 1 << 20;  // each may sleep a little
    for (int turn = 0; turn < kTurns; ++turn) {
        if (ptx::mbarrier_try_wait_parity(stage.loaded, stage.parity)) break;
    }
    stage.parity ^= 1;
}

// Any thread, after await_stage; each thread drains its own stores.
__device__ __forceinline__ void store_stage(std::byte* dst, const std::byte* src, int bytes) {
    ptx::bulk_store(dst, src, bytes);
}

__device__ __forceinline__ void drain_reads() {
    ptx::bulk_commit_group();
    ptx::bulk_wait_group_read<0>();
}

// Stores before those that the last drain_reads was for are complete.
__device__ __forceinline__ void drain_older() { ptx::bulk_wait_group<1>(); }

__device__ __forceinline__ void drain_stores() {
    ptx::bulk_commit_group();
    ptx::bulk_wait_group<0>();
}

}  // namespace ep::device
