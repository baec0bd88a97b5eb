// Lines: seven units of 16 bytes and the number of their operation, of which a reader who finds the number
// has all units.
//
// Eight lanes store or load a line with one instruction, 16 bytes each. The hardware moves its 128 bytes
// as a whole, over NVLink, too; the PTX memory model does not promise it, but NCCL's LL128 protocol lives
// on it, and tests/stress_nvlink.py looks for torn lines. Nothing has to be ordered behind such a store: it
// costs one trip over the link, where rows and a flag behind them cost two and a fence.
//
// defines: Words, unit_of, words_of, LineLane, put_line, get_line, await_lines
#pragma once

#include <cstdint>

#include "contract/stage.h"
#include "device/ptx.cuh"
#include "device/wait.cuh"

namespace ep::device {

// What one lane has of a line: a unit. In the last lane `b` is the number of the operation.
struct Words {
    uint64_t a, b;
};

__device__ __forceinline__ uint4 unit_of(const Words& w) {
    return make_uint4(static_cast<uint32_t>(w.a), static_cast<uint32_t>(w.a >> 32),
                      static_cast<uint32_t>(w.b), static_cast<uint32_t>(w.b >> 32));
}
__device__ __forceinline__ Words words_of(const uint4& u) {
    return {uint64_t{u.y} << 32 | u.x, uint64_t{u.w} << 32 | u.z};
}

// Of a lane: which of four lines it works at, and where.
struct LineLane {
    static constexpr int kAtOnce = 4;  // lines a warp stores or loads with one instruction

    int line, unit;

    __device__ __forceinline__ LineLane()
        : line(static_cast<int>(ptx::lane_id() / 8)), unit(static_cast<int>(ptx::lane_id() % 8)) {}
    __device__ __forceinline__ bool is_last() const { return unit == 7; }
    // The number of its unit among those of all lines, should it have one.
    __device__ __forceinline__ int index(int first_line) const {
        return kLineUnits * (first_line + line) + unit;
    }
    __device__ __forceinline__ int64_t offset(int first_line) const {
        return int64_t{kLineBytes} * (first_line + line) + 16 * unit;
    }
};

// Lanes of a line come here together.
__device__ __forceinline__ void put_line(std::byte* to, const Words& words) {
    ptx::st_relaxed_sys_v2(reinterpret_cast<uint64_t*>(to), words.a, words.b);
}

__device__ __forceinline__ Words get_line(const std::byte* from) {
    Words words;
    ptx::ld_relaxed_sys_v2(reinterpret_cast<const uint64_t*>(from), words.a, words.b);
    return words;
}

// Until lines [begin, end) of `peer` are there; then they can be loaded. All lanes of a warp. False: leave.
// One of a later operation is none of ours, and will not become one: E241.
template <class W>
[[nodiscard]] __device__ __noinline__ bool await_lines(const W& watch, Operation op, int peer,
                                                       const std::byte* from, int begin, int end) {
    const LineLane at;
    bool ok = true;
#pragma unroll 1
    for (int turn = 0, line = begin; turn < kLooks; ++turn) {
        const auto* number = reinterpret_cast<const uint64_t*>(from + at.offset(line)) + 1;
        const bool looks = at.is_last() && line + at.line < end;
        if (!__all_sync(~0u, !looks || ptx::ld_relaxed_sys(number) == op.seq)) continue;
        line += LineLane::kAtOnce;
        if (line >= end) return true;
    }
#pragma unroll 1
    for (int line = begin; ok && line < end; line += LineLane::kAtOnce) {
        if (at.is_last() && line + at.line < end) {
            const auto* number = reinterpret_cast<const uint64_t*>(from + at.offset(line)) + 1;
            ok = ptx::ld_acquire_sys(number) == op.seq ||
                 wait_long(watch, op, {Site::kLine, peer, op.seq}, number, Word::kNumber);
        }
        ok = __all_sync(~0u, ok);
    }
    return ok;
}

}  // namespace ep::device
