// Direct mode: ranks of other nodes in the kernels of small batches (kernels/stage.cuh).
//
// Lines for them are composed in our outbox, and a put brings the record into the inbox of its rank, with a
// signal: a network orders nothing else. The notice tells every rank how much we have ever put there, so
// who has heard it knows what to wait for, whatever became of earlier calls.
//
// A rank that is masked is told to other nodes by a word of theirs for us, in which each bit is added once;
// the word of a later age, after all have been unmasked, is another (docs/protocol.md, "Masks").
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
#include "kernels/notices.cuh"
#include "kernels/rail_notice.cuh"
#include "kernels/stage.cuh"
#include "kernels/stage_masks.cuh"

namespace ep::kernels {

// A parameter of kernels.
template <device::Rail R>
struct Far {
    static constexpr bool kAny = true;
    static constexpr bool kIsUsual = false;
    static constexpr int kWarps = 12;  // which have registers for what is more than inside a node
    static constexpr int kCombineWarps = 12;

    RailView rails;
    R rail;
    Watch watch;

    // For waits.
    __device__ operator const Watch&() const { return watch; }

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
        return acquire_far(rail, view, rails, *this, op, in);
    }
    // One warp.
    __device__ __forceinline__ bool leave(const RankView& view, Operation op,
                                          const Entering& in) const {
        return leave_far(rail, view, rails, *this, op, in);
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
            const bool is_near = p >= view.peers.near_begin && p < view.peers.near_end;
            if (!is_near && !without(in, p)) {
                ever += puts(p);
                atomicAdd(crossed, static_cast<unsigned long long>(tokens(p)));
            }
            in.outbox[notice.puts_word(p)] = device::pack(static_cast<uint32_t>(ever), in.seq);
        }
        __syncthreads();
        put_notices(rail, view, rails, in, threadIdx.x / 32, blockDim.x / 32);
    }

    // Notices of other nodes, by the first `num_warps` warps of all blocks; the last of them looks after those that
    // other blocks ought to hear. False, or a notice that never comes to await_notices: leave.
    __device__ __noinline__ bool hear(const RankView& view, Operation op, const Entering& in,
                                      int num_warps) const {
        const int warp = threadIdx.x / 32, step = num_warps * static_cast<int>(gridDim.x);
        int i = warp < num_warps ? warp * gridDim.x + blockIdx.x : shape().num_correspondents();
        if (watch.can_mask) await_entered(op, in, i, step);
        bool ok = true;
#pragma unroll 1
        for (; ok && i < shape().num_correspondents(); i += step) {
            const int p = shape().correspondent(view.peers.rank, i);
            if (without(in, p)) continue;
            ok = hear_notice(rail, view, rails, *this, op, in.slot, p) ||
                 __all_sync(~0u, device::goes_on(watch));
        }
        return ok && (warp != num_warps - 1 || hear_rest(view, op, in));
    }
    // One thread.
    __device__ __noinline__ bool await(const RankView& view, Operation op, int slot, int p) const {
        return await_puts(rail, view, rails, *this, op, slot, p);
    }

    // ---- masks ----

    // One thread, which has masked `rank` on our node.
    __device__ __noinline__ void tell_far(int rank) const {
        const uint64_t bit = uint64_t{1} << rank;
        if ((ptx::atom_relaxed_gpu_or(mask_word(MaskWord::kTold), bit) & bit) != 0) return;
        const int me = watch.rank;
        const device::RailWord word{rails.layout.masks_word(age(), me), bit};
#pragma unroll 1
        for (int i = 0; i < shape().num_correspondents(); ++i) {
            rail.signal_add(shape().correspondent(me, i), word);  // read in far_masks
        }
    }
    // One thread.
    __device__ __noinline__ void hear_far() const {
        if (!watch.can_mask) return;
        uint64_t masked = 0;
#pragma unroll 4
        for (int p = 0; p < shape().direct.num_ranks; ++p) masked |= far_masks(p);
        take_masks(masked);
    }
    // The same, by a warp.
    __device__ __forceinline__ void hear_masks() const {
        if (!watch.can_mask) return;
        uint64_t masked = 0;
#pragma unroll 1
        for (int p = ptx::lane_id(); p < shape().direct.num_ranks; p += 32) masked |= far_masks(p);
        const uint32_t high = __reduce_or_sync(~0u, static_cast<uint32_t>(masked >> 32));
        const uint32_t low = __reduce_or_sync(~0u, static_cast<uint32_t>(masked));
        if (ptx::lane_id() == 0) take_masks(uint64_t{high} << 32 | low);
        __syncwarp();
    }
    // What we put to a rank has to be as much as we tell it, so all blocks skip the same ranks: those that the
    // first one finds masked. One warp.
    __device__ __forceinline__ void agree_skipped(Entering& in) const {
        if (!watch.can_mask) return;
        const int lane = ptx::lane_id();
        const uint64_t agreed =
            agree_on(in, in.masked, lane, [this] { return mask_word(MaskWord::kSkipped); });
        if (lane == 0) in.masked = agreed | (in.masked & uint64_t{1} << watch.rank);
        __syncwarp();
    }
    // Those again, later in the operation. One thread.
    __device__ __forceinline__ uint64_t skipped() const {
        if (!watch.can_mask) return 0;
        const uint64_t* words = mask_word(MaskWord::kSkipped);
        return uint64_t{device::bits_of(ptx::ld_relaxed_gpu(words + 1))} << 32 |
               device::bits_of(ptx::ld_relaxed_gpu(words));
    }

    // ---- sending ----

    // One warp, behind a barrier for what others composed: bytes of our outbox to the inbox of rank p.
    __device__ __forceinline__ void put(const RankView& view, int slot, int p, int64_t from,
                                        int64_t to, int64_t bytes, uint64_t amount) const {
        rail.put_signal(p, rails.layout.direct_inbox(slot) + to,
                        rails.layout.direct_outbox(slot) + from, bytes,
                        {rails.layout.came_word(slot, view.peers.rank), amount});
    }

private:
    // What no block has brought: those that ought to may not have started, and wait for SMs that we hold. One
    // warp. False: leave.
    __device__ __forceinline__ bool hear_rest(const RankView& view, Operation op,
                                              const Entering& in) const {
        bool ok = true;
#pragma unroll 1
        for (int i = 0; ok && i < shape().num_correspondents(); ++i) {
            const int p = shape().correspondent(view.peers.rank, i);
            bool is_brought = without(in, p);
            const uint64_t* word = NoticeWords(view, in.slot, p).words;
#pragma unroll 1
            for (int turn = 0; turn < device::kLooks && !is_brought; ++turn) {
                is_brought = __all_sync(~0u, device::is_of(ptx::ld_relaxed_sys(word), op.seq));
            }
            ok = is_brought || hear_notice(rail, view, rails, *this, op, in.slot, p) ||
                 __all_sync(~0u, device::goes_on(watch));
        }
        return ok;
    }
    __device__ __forceinline__ uint64_t* mask_word(MaskWord word) const {
        return rails.state.masks + static_cast<int>(word);
    }
    __device__ __forceinline__ uint64_t age() const {
        return ptx::ld_relaxed_gpu(mask_word(MaskWord::kAge));
    }
    __device__ __forceinline__ uint64_t far_masks(int p) const {
        const std::byte* word = rail.own(rails.layout.masks_word(age(), p));
        return ptx::ld_relaxed_sys(reinterpret_cast<const uint64_t*>(word));
    }
    __device__ __forceinline__ void take_masks(uint64_t masked) const {
        if ((masked & ~device::masked_ranks(watch)) == 0) return;
        ptx::red_relaxed_sys_or(device::masks_of(watch, watch.rank), masked);
    }

    // Those that this warp will hear, waited for side by side, so that clocks of several that are lost run out
    // together.
    __device__ __forceinline__ void await_entered(Operation op, const Entering& in, int first,
                                                  int step) const {
        const uint64_t want = notices_until(shape(), op.seq);
        rail.flush();
#pragma unroll 1
        for (; first < shape().num_correspondents(); first += 32 * step) {
            const int i = first + static_cast<int>(ptx::lane_id()) * step;
            if (i >= shape().num_correspondents()) continue;
            const int p = shape().correspondent(watch.rank, i);
            if (without(in, p)) continue;
            const std::byte* word = rail.own(rails.layout.entered_word(op.seq, p));
            // Whether it came is seen by who hears it.
            (void)device::wait_word(*this, op, {Site::kRailNotice, p, want},
                                    reinterpret_cast<const uint64_t*>(word));
        }
        __syncwarp();
    }
};

}  // namespace ep::kernels
