// A rail between ranks that pretend to stand on different nodes: all segments are memory of one GPU,
// or of GPUs that map each other, and a warp copies.
//
// It does on purpose what a network may do: puts are held back, so their sources are read late; they
// are handed out in another order; a rail is slow, or stalls; a rank falls silent. It knows nothing of
// what only a network has: completion queues, their depth, registered memory, the NIC's own ordering.
#pragma once

#include <cstddef>
#include <cstdint>

#include "contract/loopback.h"
#include "contract/rail.h"
#include "device/rail.cuh"

namespace ep::device {

// A put that has not been carried out.
struct HeldPut {
    int64_t dst, src, bytes;
    RailWord word;  // amount 0: no signal
    int32_t peer;
};

// What a warp holds back; in global memory, zeroed.
struct HeldPuts {
    HeldPut put[kMaxHeld];
    int32_t count;
    uint32_t draws;  // random numbers used so far
};

struct LoopbackRail {
    std::byte* const* segments;  // [num_ranks]
    HeldPuts* held;              // [warps of the grid], or null
    NodeShape nodes;
    int32_t rank;
    Trouble trouble;

    __device__ std::byte* own(int64_t at) const { return segments[rank] + at; }

    // Unless asked to, kernels may not store into a pretended node, as they could not into a real one.
    __device__ std::byte* peer_ptr(int64_t at, int peer) const {
        const bool is_near = nodes.node(peer) == nodes.node(rank);
        return is_near || trouble.is_mapped ? segments[peer] + at : nullptr;
    }

    __device__ void put(int peer, int64_t dst, int64_t src, int64_t bytes) const {
        send({dst, src, bytes, {0, 0}, peer});
    }

    __device__ void put_signal(int peer, int64_t dst, int64_t src, int64_t bytes,
                               RailWord word) const {
        send({dst, src, bytes, word, peer});
    }

    __device__ void signal_add(int peer, RailWord word) const {
        if (is_lost(peer, word)) return;
        pause_up_to(trouble.max_delay_ns, trouble.seed ^ static_cast<uint32_t>(word.at));
        ptx::red_release_sys_add(reinterpret_cast<uint64_t*>(segments[peer] + word.at),
                                 word.amount);
    }

    // Whoever finds something there is slow, too.
    __device__ void acquired(RailWord word) const {
        pause_up_to(trouble.max_delay_ns, ~trouble.seed ^ static_cast<uint32_t>(word.at));
    }

    // A warp hands out all it holds, in an order drawn anew each time.
    __device__ void flush() const {
        if (held != nullptr) carry_all();
    }

    __device__ void quiet() const {}

private:
    __device__ static int warp_of_grid() {
        return static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / 32);
    }

    __device__ bool is_lost(int peer, const RailWord& word) const {
        const bool stalls = trouble.is_silent || peer == trouble.stalled_peer;
        return stalls && word.at >= trouble.lost_from;
    }

    // A small mixer; enough to vary orders and delays (Murmur3's finalizer).
    __device__ static uint32_t mix(uint32_t x) {
        x = (x ^ x >> 16) * 0x85ebca6bu;
        x = (x ^ x >> 13) * 0xc2b2ae35u;
        return x ^ x >> 16;
    }

    // Out of line, as a NIC's work is.
    __device__ __noinline__ void carry_all() const {
        HeldPuts& mine = held[warp_of_grid()];
        while (mine.count > 0) carry_one(mine);
    }

    __device__ __noinline__ void send(const HeldPut put) const {
        if (is_lost(put.peer, put.word)) return;
        if (held == nullptr || trouble.max_held == 0) return carry(put, trouble.seed);
        HeldPuts& mine = held[warp_of_grid()];
        if (mine.count == min(trouble.max_held, kMaxHeld)) carry_one(mine);
        __syncwarp();
        if (ptx::lane_id() == 0) mine.put[mine.count++] = put;
        __syncwarp();
    }

    // One of those held back, whichever is drawn; the last takes its place.
    __device__ void carry_one(HeldPuts& mine) const {
        const int32_t count = mine.count;
        const uint32_t draw =
            mix(trouble.seed ^ static_cast<uint32_t>(warp_of_grid()) << 20 ^ mine.draws);
        const int which = static_cast<int>(draw % static_cast<uint32_t>(count));
        const HeldPut put = mine.put[which];
        __syncwarp();
        if (ptx::lane_id() == 0) {
            mine.put[which] = mine.put[count - 1];
            mine.count = count - 1;
            ++mine.draws;
        }
        __syncwarp();
        carry(put, draw);
    }

    // A warp copies 16 bytes a lane, then signals.
    __device__ void carry(const HeldPut& put, uint32_t draw) const {
        if (ptx::lane_id() == 0) pause_up_to(trouble.max_delay_ns, draw);
        __syncwarp();
        const auto* src = reinterpret_cast<const uint4*>(segments[rank] + put.src);
        auto* dst = reinterpret_cast<uint4*>(segments[put.peer] + put.dst);
        for (int64_t i = ptx::lane_id(); i < put.bytes / 16; i += 32) dst[i] = src[i];
        __syncwarp();
        if (put.word.amount == 0 || ptx::lane_id() != 0) return;
        ptx::fence_acq_rel_sys();  // the stores of all lanes, which met us at the barrier
        ptx::red_release_sys_add(reinterpret_cast<uint64_t*>(segments[put.peer] + put.word.at),
                                 put.word.amount);
    }

    __device__ static void pause_up_to(int64_t max_ns, uint32_t draw) {
        if (max_ns > 0) pause_ns(mix(draw) % static_cast<uint64_t>(max_ns + 1));
    }
};
static_assert(Rail<LoopbackRail>);

}  // namespace ep::device
