// A rail over NVSHMEM: IBGDA on a cluster, NVLink or shared memory where PEs share a host.
//
// Public device API of 3.4.5, and nothing newer, so that one plugin runs beside every host library
// from 3.3.20 on (ep_comm/backends/nvshmem_versions.py). A signal goes with its data in one call:
// nothing orders two, as newer versions rotate their queues. Waits are ours, bounded.
#pragma once

#include <nvshmem.h>
#include <nvshmemx.h>

#include <cstddef>
#include <cstdint>

#include "device/rail.cuh"

namespace ep::device {

struct NvshmemRail {
    std::byte* segment;  // symmetric memory of the library
    const int32_t* pe;   // [num_ranks] PE of each rank: ranks need not be numbered alike
    bool has_network;    // some PE is reached through a NIC

    __device__ std::byte* own(int64_t at) const { return segment + at; }

    __device__ std::byte* peer_ptr(int64_t at, int peer) const {
        return static_cast<std::byte*>(nvshmem_ptr(segment + at, pe[peer]));
    }

    __device__ void put(int peer, int64_t dst, int64_t src, int64_t bytes) const {
        nvshmemx_putmem_nbi_warp(segment + dst, segment + src, static_cast<size_t>(bytes),
                                 pe[peer]);
    }

    __device__ void put_signal(int peer, int64_t dst, int64_t src, int64_t bytes,
                               RailWord word) const {
        nvshmemx_putmem_signal_nbi_warp(segment + dst, segment + src, static_cast<size_t>(bytes),
                                        address(word), word.amount, NVSHMEM_SIGNAL_ADD, pe[peer]);
    }

    // To mapped memory by our own red: the library would choose the NIC for it as soon as one PE of
    // the job is not mapped. Whether a peer is mapped never changes, so a word has one transport.
    __device__ void signal_add(int peer, RailWord word) const {
        if (std::byte* mapped = peer_ptr(word.at, peer)) {
            return ptx::red_release_sys_add(reinterpret_cast<uint64_t*>(mapped), word.amount);
        }
        ptx::fence_acq_rel_sys();
        nvshmemx_signal_op(address(word), word.amount, NVSHMEM_SIGNAL_ADD, pe[peer]);
    }

    // Where a host thread drives the NIC, data may trail its signal; the library's wait, over at once
    // as the word is there, makes up for it, and is a fence where IBGDA does.
    __device__ void acquired(RailWord word) const {
        if (has_network) nvshmem_signal_wait_until(address(word), NVSHMEM_CMP_GE, word.amount);
    }

    __device__ void flush() const {}

    __device__ void quiet() const { nvshmem_quiet(); }

private:
    __device__ uint64_t* address(RailWord word) const {
        return reinterpret_cast<uint64_t*>(segment + word.at);
    }
};
static_assert(Rail<NvshmemRail>);

}  // namespace ep::device
