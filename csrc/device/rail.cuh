// A rail: what a kernel can do with the ranks on its rail, whichever transport is below.
//
// defines: Rail, RailWord, fence_stage, rail_stage, rail_hand_over, rail_ready, rail_wait
//
// Addresses are byte offsets into one symmetric segment (contract/rail.h). A transport orders nothing
// but the data of a put_signal before its signal: words count, and never depend on two puts arriving
// in turn. Each word is added to by one rank only, and so by one transport.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "device/ptx.cuh"
#include "device/wait.cuh"

namespace ep::device {

// A word of the segment, and what is added to it.
struct RailWord {
    int64_t at;
    uint64_t amount;
};

// A parameter of kernels. `peer` is a rank of the buffer; sources lie in our own segment and may be
// read until the peer's credit says that the data has been taken.
template <class R>
concept Rail = std::is_trivially_copyable_v<R> &&
               requires(const R& rail, int peer, int64_t at, int64_t bytes, RailWord word) {
                   // Our own segment.
                   { rail.own(at) } -> std::same_as<std::byte*>;
                   // The peer's, where our stores and loads reach it; else null.
                   { rail.peer_ptr(at, peer) } -> std::same_as<std::byte*>;
                   // One warp: peer, destination, source, bytes.
                   { rail.put(peer, at, at, bytes) } -> std::same_as<void>;
                   // One warp: the same, then adds to the word there; whoever acquires it has the data.
                   { rail.put_signal(peer, at, at, bytes, word) } -> std::same_as<void>;
                   // One thread: adds to a word of the peer. Releases what the thread did before.
                   { rail.signal_add(peer, word) } -> std::same_as<void>;
                   // One thread that has acquired a word: what else makes the data behind it readable.
                   { rail.acquired(word) } -> std::same_as<void>;
                   // One warp: hands out what was put but held back; before it waits, and at its end.
                   { rail.flush() } -> std::same_as<void>;
                   // One thread: sources of all puts may be written again. Unbounded; only at close.
                   { rail.quiet() } -> std::same_as<void>;
               };

// One warp, each lane with its bulk stores into the segment complete (drain_stores): a NIC may read
// what the warp staged.
__device__ __forceinline__ void fence_stage() {
    ptx::fence_acq_rel_sys();
    __syncwarp();
}

// Where a warp writes what it then hands over to `dst`: right there where our stores reach it, else at `src`
// in our own segment. `mapped`: the segment of the peer, as peer_ptr(0, peer) has it.
template <Rail R>
__device__ std::byte* rail_stage(const R& rail, std::byte* mapped, int64_t dst, int64_t src) {
    return mapped != nullptr ? mapped + dst : rail.own(src);
}

// One warp: what was written there is at the peer once the word says so. Each lane's bulk stores are complete
// (drain_stores); what other warps wrote, some lane has acquired.
template <Rail R>
__device__ void rail_hand_over(const R& rail, std::byte* mapped, int peer, int64_t dst, int64_t src,
                               int64_t bytes, RailWord word) {
    __syncwarp();
    if (mapped == nullptr) {
        fence_stage();
        return rail.put_signal(peer, dst, src, bytes, word);
    }
    if (ptx::lane_id() == 0) rail.signal_add(peer, word);  // releases all of it
    __syncwarp();
}

// One warp: whether a word of our segment has reached word.amount; what it announces is readable then.
// For roles that serve several rings: they look at all and wait for none.
template <Rail R>
__device__ bool rail_ready(const R& rail, RailWord word) {
    bool ready = false;
    if (ptx::lane_id() == 0) {
        ready = ptx::ld_acquire_sys(reinterpret_cast<const uint64_t*>(rail.own(word.at))) >=
                word.amount;
        if (ready) rail.acquired(word);
    }
    ready = __shfl_sync(~0u, ready, 0);
    __syncwarp();  // lane 0 acquired for all
    return ready;
}

// One warp: waits for it. False when time ran out, here or elsewhere on this rank.
template <Rail R, class W>
[[nodiscard]] __device__ bool rail_wait(const R& rail, const W& watch, const Operation& op,
                                        Site site, int peer, RailWord word) {
    if (rail_ready(rail, word)) return true;
    rail.flush();
    bool ok = true;
    if (ptx::lane_id() == 0) {
        const auto* own = reinterpret_cast<const uint64_t*>(rail.own(word.at));
        ok = wait_word(watch, op, {site, peer, word.amount}, own);
        if (ok) rail.acquired(word);
    }
    ok = __shfl_sync(~0u, ok, 0);
    __syncwarp();
    return ok;
}

}  // namespace ep::device
