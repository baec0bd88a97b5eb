// Packed words: 32 bits and the number of their operation in one store of 64. Who sees the number sees
// the bits, so nothing has to be ordered behind them: one trip over the link, where a payload and a flag
// take two and a fence (bench/ceilings.cu: 0.8 against 1.9 us).
//
// defines: pack, bits_of, is_of, wait_packed_word, wait_packed, wait_packed_own
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "device/ptx.cuh"
#include "device/wait.cuh"

namespace ep::device {

__device__ __forceinline__ uint64_t pack(uint32_t bits, uint64_t seq) { return seq << 32 | bits; }
__device__ __forceinline__ uint32_t bits_of(uint64_t word) { return static_cast<uint32_t>(word); }
__device__ __forceinline__ bool is_of(uint64_t word, uint64_t seq) {
    return static_cast<uint32_t>(word >> 32) == static_cast<uint32_t>(seq);
}

// A word that rank `peer` stores with st_relaxed_sys, of which nothing but itself is read. False: leave.
template <class W>
[[nodiscard]] __device__ __forceinline__ bool wait_packed_word(const W& watch, Operation op,
                                                               int peer, const uint64_t* addr,
                                                               uint64_t& word) {
#pragma unroll 1
    for (int turn = 0; turn < kLooks; ++turn) {
        word = ptx::ld_relaxed_sys(addr);
        if (is_of(word, op.seq)) return true;
    }
    const bool ok = wait_long(watch, op, {Site::kEntry, peer, op.seq}, addr, Word::kPacked);
    word = ptx::ld_relaxed_sys(addr);
    return ok;
}

// A word that rank `peer` stores with st_relaxed_sys. It gives away what has been done by kernels before
// that store; we may use it after this. False: leave.
[[nodiscard]] __device__ __forceinline__ bool wait_packed(const Watch& watch, Operation op,
                                                          int peer, const uint64_t* addr,
                                                          uint64_t& word) {
    word = ptx::ld_acquire_sys(addr);
    if (is_of(word, op.seq)) return true;
    const bool ok = wait_long(watch, op, {Site::kEntry, peer, op.seq}, addr, Word::kPacked);
    word = ptx::ld_acquire_sys(addr);
    return ok;
}

// A word that another block of ours stores with st_relaxed_gpu.
[[nodiscard]] __device__ __noinline__ inline bool wait_packed_own(const Watch& watch, Operation op,
                                                                  const uint64_t* addr) {
    return wait_own(watch, op, watch.rank,
                    [addr, op] { return is_of(ptx::ld_relaxed_gpu(addr), op.seq); });
}

}  // namespace ep::device
