// Does a rail work? A block for each peer puts patterns into the peer's ring and gets as many: data
// must be there when its signal is, and a place must be free when its credit is.
//
// defines: RailProbeJob, rail_probe_kernel, launch_rail_probe
//
// A template over the rail, so that each library that brings a rail compiles its own.
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "contract/rail.h"
#include "device/rail.cuh"
#include "kernels/launch.cuh"

namespace ep::kernels {

template <device::Rail R>
struct RailProbeJob {
    R rail;
    RailShape shape;  // ring of channel 0
    Watch watch;
    unsigned long long* wrong = nullptr;  // [1] 16-byte units that were not what they had to be
    uint64_t first = 0;                   // chunks that went before this probe, on every ring
    int32_t rank = 0, num_chunks = 1;
};

// Unit `i` of a chunk: nobody else sends it.
__device__ __forceinline__ uint4 probe_pattern(int src, uint64_t chunk, int64_t i) {
    return {static_cast<uint32_t>(src), static_cast<uint32_t>(chunk), static_cast<uint32_t>(i),
            0x5eed5eedu};
}

// One warp and one peer. Each turn sends a chunk and takes one, so neither side can run ahead.
template <device::Rail R>
struct RailProbe {
    const RailProbeJob<R>& job;
    RailLayout layout;
    int peer, my_node, peer_node;
    device::Operation op{OpKind::kNone, 0};

    __device__ bool wait(device::RailWord word) const {
        return device::rail_wait(job.rail, job.watch, op, Site::kRows, peer, word);
    }
    __device__ int64_t units() const { return job.shape.chunk_bytes / 16; }
    __device__ int lane() const { return static_cast<int>(ptx::lane_id()); }

    __device__ bool send(uint64_t n) const {
        const uint64_t until = credits_until(job.shape, n);
        if (!wait({layout.head_word(peer_node, 0, n), until})) return false;
        const int64_t there = layout.recv_chunk(peer_node, my_node, 0, n);
        const int64_t here = layout.send_chunk(my_node, peer_node, 0, n);
        std::byte* mapped = job.rail.peer_ptr(0, peer);
        auto* stage = reinterpret_cast<uint4*>(device::rail_stage(job.rail, mapped, there, here));
        for (int64_t i = lane(); i < units(); i += 32) stage[i] = probe_pattern(job.rank, n, i);
        device::rail_hand_over(job.rail, mapped, peer, there, here, job.shape.chunk_bytes,
                               {layout.tail_word(my_node, 0, n), 1});
        return true;
    }

    __device__ bool take(uint64_t n) const {
        const uint64_t until = chunks_until(job.shape, n);
        if (!wait({layout.tail_word(peer_node, 0, n), until})) return false;
        const auto* chunk = reinterpret_cast<const uint4*>(
            job.rail.own(layout.recv_chunk(my_node, peer_node, 0, n)));
        unsigned long long wrong = 0;
        for (int64_t i = lane(); i < units(); i += 32) {
            const uint4 have = chunk[i], want = probe_pattern(peer, n, i);
            wrong += have.x != want.x || have.y != want.y || have.z != want.z || have.w != want.w;
        }
        if (wrong != 0) atomicAdd(job.wrong, wrong);
        __syncwarp();
        if (lane() == 0) job.rail.signal_add(peer, {layout.head_word(my_node, 0, n), 1});
        return true;
    }
};

template <device::Rail R>
__global__ void __launch_bounds__(32, 1)
    rail_probe_kernel(const __grid_constant__ RailProbeJob<R> job) {
    const NodeShape& nodes = job.shape.nodes;
    const int my_node = nodes.node(job.rank);
    // Each rank begins with another node.
    const int node = (my_node + 1 + static_cast<int>(blockIdx.x)) % nodes.num_nodes;
    const RailProbe<R> probe{job, RailLayout(job.shape), nodes.rank(node, nodes.local(job.rank)),
                             my_node, node};
    const uint64_t end = job.first + static_cast<uint64_t>(job.num_chunks);
    for (uint64_t n = job.first; n < end; ++n) {
        if (!probe.send(n) || !probe.take(n)) return;
    }
    job.rail.flush();
    // Until all of ours has been taken, so that the next probe finds the ring free.
    for (int i = 0; i < job.shape.ring_chunks(); ++i) {
        const uint64_t until = credits_until(job.shape, end + i);
        if (!probe.wait({probe.layout.head_word(node, 0, end + i), until})) return;
    }
}

// A cudaError_t as an int. All ranks of all rails run it at the same time.
template <device::Rail R>
int launch_rail_probe(const RailProbeJob<R>& job, Stream stream) {
    rail_probe_kernel<R><<<job.shape.num_peers(), 32, 0, stream>>>(job);
    return cudaGetLastError();
}

}  // namespace ep::kernels
