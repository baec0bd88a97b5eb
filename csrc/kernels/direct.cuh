// Direct mode: ranks of other nodes in the kernels of small batches (kernels/stage.cuh).
//
// Lines for them are composed in our outbox, and a put brings the record into the inbox of its rank, with a
// signal: a network orders nothing else. The notice tells every rank how much we have ever put there, so
// who has heard it knows what to wait for, whatever became of earlier calls.
//
// defines: Far
#pragma once

#include <cstdint>

#include "contract/direct.h"
#include "contract/gpu.h"
#include "device/lines.cuh"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "device/rail.cuh"
#include "kernels/enter.cuh"
#include "kernels/rail_notice.cuh"
#include "kernels/stage.cuh"

namespace ep::kernels {

// A parameter of kernels.
template <device::Rail R>
struct Far {
    static constexpr bool kAny = true;
    static constexpr int kWarps = 12;  // which have registers for what is more than inside a node
    static constexpr int kCombineWarps = 12;

    RailView rails;
    R rail;

    __device__ const RailShape& shape() const { return rails.shape; }
    __device__ const NodeShape& nodes() const { return rails.shape.nodes; }

    // ---- where records lie: bytes from the first one of a slot on ----

    __device__ const std::byte* came(int slot, int64_t at) const {
        return rail.own(rails.layout.direct_inbox(slot) + at);
    }
    __device__ std::byte* outgoing(int slot, int64_t at) const {
        return rail.own(rails.layout.direct_outbox(slot) + at);
    }

    // What is told our rail of token t, as its first lines tell it; and what the source on `node` told us.
    __device__ std::byte* own_note(int slot, int t, const Record& record) const {
        return rail.own(rails.layout.own_notes(slot) + t * note_bytes(record));
    }
    __device__ const std::byte* note(int slot, int node, int t, const Record& record) const {
        return rail.own(rails.layout.notes_of(slot, node) + t * note_bytes(record));
    }
    __device__ static int64_t note_bytes(const Record& record) {
        return int64_t{kLineBytes} * record.meta_lines;
    }

    // ---- how an operation begins and ends ----

    // One warp; the block's notice is written for other nodes, too.
    __device__ __noinline__ bool acquire(const RankView& view, Operation op, Entering& in) const {
        if (ptx::lane_id() == 0) open_outbox(rail, rails, in);
        __syncwarp();
        return acquire_far(rail, view, rails, op, in.slot);
    }
    // One warp.
    __device__ __forceinline__ bool leave(const RankView& view, Operation op,
                                          const Entering& in) const {
        return leave_far(rail, view, rails, op, in);
    }

    // Behind the notice: what we put to each rank in this operation, which is the records of tokens(rank)
    // and amounts to puts(rank). All threads of the block that publishes; then the notice goes out.
    template <class Tokens, class Puts>
    __device__ __forceinline__ void publish(const RankView& view, const Entering& in, Tokens tokens,
                                            Puts puts) const {
        auto* crossed = reinterpret_cast<unsigned long long*>(
            rails.state.ever + static_cast<int>(RailCounter::kDirectOut));
        const RailNoticeLayout notice(view.shape, nodes().num_nodes, shape().num_channels);
#pragma unroll 1
        for (int p = threadIdx.x; p < view.shape.num_ranks; p += blockDim.x) {
            uint64_t& ever = rails.state.puts[in.slot * shape().direct.num_ranks + p];
            if (p < view.peers.near_begin || p >= view.peers.near_end) {
                ever += puts(p);
                atomicAdd(crossed, static_cast<unsigned long long>(tokens(p)));
            }
            in.outbox[notice.puts_word(p)] = device::pack(static_cast<uint32_t>(ever), in.seq);
        }
        __syncthreads();
        put_notices(rail, view, rails, in.seq, threadIdx.x / 32, blockDim.x / 32);
    }

    // Notices of other nodes, by the first `num_warps` warps of all blocks. False, or a notice that never
    // comes to await_notices: leave.
    __device__ __noinline__ bool hear(const RankView& view, Operation op, int slot,
                                      int num_warps) const {
        const int warp = threadIdx.x / 32;
        int i = warp < num_warps ? warp * gridDim.x + blockIdx.x : shape().num_correspondents();
        bool ok = true;
#pragma unroll 1
        for (; ok && i < shape().num_correspondents(); i += num_warps * gridDim.x) {
            ok =
                hear_notice(rail, view, rails, op, slot, shape().correspondent(view.peers.rank, i));
        }
        return ok;
    }
    // One thread.
    __device__ __noinline__ bool await(const RankView& view, Operation op, int slot, int p) const {
        return await_puts(rail, view, rails, op, slot, p);
    }

    // ---- sending ----

    // One warp, behind a barrier for what others composed: bytes of our outbox to the inbox of rank p.
    __device__ __forceinline__ void put(const RankView& view, int slot, int p, int64_t from,
                                        int64_t to, int64_t bytes, uint64_t amount) const {
        rail.put_signal(p, rails.layout.direct_inbox(slot) + to,
                        rails.layout.direct_outbox(slot) + from, bytes,
                        {rails.layout.came_word(slot, view.peers.rank), amount});
    }
};

}  // namespace ep::kernels
