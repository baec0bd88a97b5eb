// What dispatch and combine of small batches share: how they begin and end, and where rows stand meanwhile.
//
// Rows go to their receivers as lines (device/lines.cuh) before anybody is heard; the receiver hears all
// ranks' notices as always, comes to the same verdict as everybody, and only then makes anything of the
// lines. Both halves are one kernel, or two with nothing of ours on the GPU in between.
//
// Ranks of other nodes are `F`: NoFar, or Far of kernels/direct.cuh.
//
// What a rank sends is divided into turns, one for each block. Other kernels may hold some SMs, and wait for
// a kernel that waits for this one: then some blocks start only when others have ended. So no block waits for
// a turn that nobody has begun: blocks claim theirs, and before they wait for rows, those that are left.
//
// defines: kStageWarps, uniform_warp, turn_of_block, publishes_stage, StageView, Claim, Unclaimed, take_turn,
// claim_own, Releases, Beginning, begin_half, resume_half, last_block, Readers, end_half
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "contract/stage.h"
#include "device/lines.cuh"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"
#include "kernels/leave.cuh"

namespace ep::kernels {

constexpr int kStageWarps = NoFar::kWarps;  // of a block of a dispatch, at most

// The warp of a thread. Compilers see that it is the same for all lanes, and need not provide for others.
__device__ __forceinline__ int uniform_warp() {
    return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
}

// Blocks have their turns from the last to the first: the one that publishes starts first.
__device__ __forceinline__ int turn_of_block() {
    return static_cast<int>(gridDim.x - 1 - blockIdx.x);
}
__device__ __forceinline__ bool publishes_stage() { return blockIdx.x == 0; }

// The places of one operation.
template <class F>
struct StageView {
    const RankView& view;
    const Record& record;
    std::byte* const* control;  // [num_ranks] control blocks
    Operation op;
    int slot;
    const F& far;

    __device__ __forceinline__ bool is_far(int p) const {
        return F::kAny && (p < view.peers.near_begin || p >= view.peers.near_end);
    }
    // Place `index` in what rank p has for this slot.
    __device__ __forceinline__ std::byte* place(int p, int64_t index) const {
        return control[p] + view.layout.stage(slot) + index * record.bytes();
    }
    // Where the record of rank p with this index has come, or will; or what stands `bytes` behind the first one.
    __device__ __forceinline__ const std::byte* arrival(int p, int64_t index) const {
        return arrival_at(p, index * record.bytes());
    }
    __device__ __forceinline__ const std::byte* arrival_at(int p, int64_t bytes) const {
        if constexpr (F::kAny) {
            if (is_far(p)) return far.came(slot, bytes);
        }
        return view.peers.own + view.layout.stage(slot) + bytes;
    }
    // Lanes name ranks, or -1: what those of other nodes have put is there. One warp. Not 0: lanes whose ranks'
    // is not; leave, or go on without them.
    __device__ __forceinline__ uint32_t await_far(int p) const {
        if constexpr (F::kAny) {
            const bool ok = p < 0 || !is_far(p) || far.await(view, op, slot, p);
            return __ballot_sync(~0u, !ok);
        }
        return 0;
    }
    // Where a piece begins in a record.
    __device__ __forceinline__ int64_t piece_at(int piece) const {
        return int64_t{kLineBytes} * (record.meta_lines + piece * record.piece_lines);
    }
};

// One thread. Whether a turn of this operation is ours to send: nobody has it. In two steps, so that the answer is on
// its way while other things are done.
struct Claim {
    uint64_t bit = 0, before = 0;  // who does not ask has it

    __device__ __forceinline__ void ask(const RankView& view, int turn) {
        bit = uint64_t{1} << turn % 64;
        before = ptx::atom_relaxed_gpu_or(view.state.claimed + turn / 64, bit);
    }
    __device__ __forceinline__ bool is_ours() const { return (before & bit) == 0; }
};
// Turns of the word that nobody has.
__device__ __forceinline__ uint64_t unclaimed(const RankView& view, int word) {
    const int turns = static_cast<int>(gridDim.x) - 64 * word;
    const uint64_t all = turns >= 64 ? ~uint64_t{0} : (uint64_t{1} << turns) - 1;
    return all & ~ptx::ld_relaxed_gpu(view.state.claimed + word);
}
// Whether there are any, in two steps, too. One warp, of which each lane looks at a word.
struct Unclaimed {
    static_assert(kMostBlocks <= 32 * 64);
    uint64_t turns = 0;

    __device__ __forceinline__ void look(const RankView& view) {
        const auto word = static_cast<int>(ptx::lane_id());
        if (gridDim.x > 1 && 64 * word < static_cast<int>(gridDim.x)) turns = unclaimed(view, word);
    }
    __device__ __forceinline__ bool none() const { return __all_sync(~0u, turns == 0); }
};
// A turn that nobody had, now ours; -1: there is none. One warp.
__device__ __noinline__ inline int take_turn(const RankView& view) {
    int turn = -1;
#pragma unroll 1
    for (int word = 0; turn < 0 && 64 * word < static_cast<int>(gridDim.x); ++word) {
        if (ptx::lane_id() != 0) break;
#pragma unroll 1
        for (uint64_t left = unclaimed(view, word); turn < 0 && left != 0; left &= left - 1) {
            const int one = 64 * word + __ffsll(static_cast<long long>(left)) - 1;
            Claim claim;
            claim.ask(view, one);
            if (claim.is_ours()) turn = one;
        }
    }
    return __shfl_sync(~0u, turn, 0);
}

// Whether this block sends its turn, in two steps, too. One warp; a barrier of the block must follow.
template <Half kHalf>
__device__ __forceinline__ Claim claim_own(const RankView& view) {
    Claim claim;
    const bool asks = kHalf == Half::kBoth && gridDim.x > 1 && ptx::lane_id() == 0;
    if (asks) claim.ask(view, turn_of_block());
    return claim;
}

// Who has left which slot when, looked at before we know which slot is ours: these words only grow. First before the
// kernels ahead have ended, which may be several operations ago; then while we are told our number. Of each lane a
// word; where they are too many, none.
struct Releases {
    const uint64_t* word = nullptr;
    int slot = -1;  // that it is of
    uint64_t early = 0, late = 0;

    // `begins`: of the warp that will.
    __device__ __forceinline__ Releases(const RankView& view, bool begins) {
        if (!begins) return;
        const int near = view.peers.near_end - view.peers.near_begin;
        const auto lane = static_cast<int>(ptx::lane_id());
        slot = lane / near;
        const int p = view.peers.near_begin + lane - slot * near;
        if (near > 32 || slot >= view.shape.num_slots) return;
        word = at_own<uint64_t>(view, view.layout.released_word(slot, p));
        early = ptx::ld_relaxed_sys(word);
    }
    __device__ __forceinline__ void look() {
        if (word != nullptr) late = ptx::ld_relaxed_sys(word);
    }
    // Whether all had left a slot after operation `last`, which is not 0.
    __device__ __forceinline__ bool all(const RankView& view, int of, uint64_t last) const {
        const int near = view.peers.near_end - view.peers.near_begin;
        if ((of + 1) * near > 32) return false;
        return __all_sync(~0u, slot != of || early >= last) ||
               __all_sync(~0u, slot != of || late >= last);
    }
};

// The number and the slot of the next operation. In two steps, so that loads are on their way while other things are
// done. One warp, which also waits until the slot is ours; nobody writes before that.
struct Beginning {
    Releases releases;
    // In all lanes, so that nothing of them comes through shared memory.
    uint64_t seq = 0;
    int slot = 0;

    __device__ __forceinline__ void ask(const RankView& view) {
        seq = view.state.seq[0] + 1;
        slot = static_cast<int>(view.state.seq[1]);
        releases.look();
    }
    // A barrier of the block must follow. False: leave.
    template <class F>
    __device__ __forceinline__ bool enter(const RankView& view, const Begin& begin, const F& far,
                                          Entering& in) const {
        if constexpr (F::kAny) far.hear_masks();
        if (ptx::lane_id() == 0) init_entering<F>(view, begin, seq, slot, in);
        __syncwarp();
        const Operation op{kind_of(in.told[NoticeLayout::kWhat]), seq};
        if constexpr (F::kAny) far.agree_skipped(in);
        const uint64_t num_slots = view.shape.num_slots;
        bool ok = true;
        if ((F::kIsUsual || in.masked == 0) && seq > num_slots &&
            releases.all(view, slot, seq - num_slots)) {
            if (ptx::lane_id() == 0) tell_entered(view, op);
        } else {
            ok = acquire_slot<true>(view, far, op, slot, in.masked);
        }
        if constexpr (F::kAny) return far.acquire(view, op, in) && ok;
        return ok;
    }
};
template <class F>
__device__ __forceinline__ bool begin_half(const RankView& view, const Begin& begin, const F& far,
                                           const Releases& releases, Entering& in) {
    Beginning beginning{releases};
    beginning.ask(view);
    return beginning.enter(view, begin, far, in);
}

// Those that the first half took. The same.
template <class F>
__device__ __forceinline__ bool resume_half(const RankView& view, const Begin& begin, const F& far,
                                            const Begun* begun, Entering& in) {
    if constexpr (F::kAny) far.hear_masks();
    if (ptx::lane_id() == 0) {
        init_entering(view, begin, in);
        in.seq = begun->seq, in.slot = begun->slot;
    }
    __syncwarp();
    return !device::is_masked(view.watch, {kind_of(begin.head.what), in.seq}, view.peers.rank);
}

// What blocks count, for the next kernel. One warp of the last block.
__device__ __forceinline__ void reset_counts(const RankView& view) {
    if (ptx::lane_id() == 0) *view.state.finished = 0;
    if (static_cast<int>(ptx::lane_id()) < kMostBlocks / 64) view.state.claimed[ptx::lane_id()] = 0;
}
// Whether this block is the last of the grid that comes here; all have read what they will, and what they read
// has come. Only where ranks may be masked does the last one look at what others wrote. One warp.
__device__ __forceinline__ bool last_block(const RankView& view) {
    if (gridDim.x == 1) return true;
    uint32_t before = 0;
    if (ptx::lane_id() == 0) {
        before = view.watch.can_mask ? ptx::atom_acq_rel_gpu_add(view.state.finished, 1)
                                     : ptx::atom_relaxed_gpu_add(view.state.finished, 1);
    }
    if (__shfl_sync(~0u, before, 0) + 1 != gridDim.x) return false;
    reset_counts(view);
    return true;
}

// The same, asked warp by warp, each as soon as it has read, while it has still things to store: the answer is
// on its way meanwhile. Inside a node, where nobody can be masked.
struct Readers {
    static constexpr uint32_t kNotYet = ~0u, kOther = kNotYet - 1;
    // In lane 0 of the last warp of this block: that have read before it. Of others kOther, or kNotYet. Nothing is made
    // of it before it is asked for: that would wait for it.
    uint32_t before = kNotYet;

    template <class F>
    __device__ __forceinline__ static bool are_for(const RankView& view) {
        return !F::kAny && (F::kIsUsual || !view.watch.can_mask);
    }
    // All warps; what counts is the first time.
    __device__ __forceinline__ void count(const RankView& view, Entering& in) {
        if (before != kNotYet) return;
        before = kOther;
        if (ptx::lane_id() != 0 || atomicAdd(&in.readers, 1u) + 1 != blockDim.x / 32) return;
        before = gridDim.x == 1 ? 0 : ptx::atom_relaxed_gpu_add(view.state.finished, 1);
    }
    // Whether this was the last warp of the last block.
    __device__ __forceinline__ bool are_all(const RankView& view) const {
        if (__shfl_sync(~0u, before, 0) != gridDim.x - 1) return false;
        reset_counts(view);
        return true;
    }
};

// The end of a half that went well here. One warp of the last block.
template <Half kHalf, class F>
__device__ __forceinline__ void end_half(const RankView& view, std::byte* const* control,
                                         Begun* begun, const F& far, Operation op,
                                         const Entering& in) {
    if constexpr (F::kAny && kHalf != Half::kSend) {
        if (!far.leave(view, op, in)) return;
    }
    if constexpr (kHalf != Half::kSend) release_slot(view, control, in.seq, in.slot);
    if (ptx::lane_id() != 0) return;
    if constexpr (kHalf == Half::kSend) *begun = {in.seq, in.slot, 0};
    if constexpr (kHalf != Half::kReceive) advance(view, in.seq, in.slot);
}

}  // namespace ep::kernels
