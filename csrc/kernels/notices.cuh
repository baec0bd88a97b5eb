// Everybody's notice is heard and judged.
//
// defines: NoticeWords, set_outcome, lies_in_arena, clear_outcome, explain, Head, judge, judge_word, first_head,
// nothing_yet, time_notices, hear_heads, await_notices
//
// One block tells the others' notices; every block reads all of them and comes to the verdict by
// itself, as every rank does: the same words, the same function. As in kernels/enter.cuh functions are for all
// threads of a block, and `false` means: return.
#pragma once

#include <cstddef>
#include <cstdint>

#include "contract/gpu.h"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"

namespace ep::kernels {

// The notice of one rank, as it stands in our control block.
struct NoticeWords {
    const uint64_t* words;

    __device__ NoticeWords(const RankView& view, int slot, int src)
        : words(at_own<uint64_t>(view, view.layout.notice(slot, src))) {}

    // Of a word we have waited for.
    __device__ uint32_t get(int i) const { return device::bits_of(words[i]); }
    __device__ int64_t get64(int i) const {
        return static_cast<int64_t>(uint64_t{get(i + 1)} << 32 | get(i));
    }
};

__device__ inline void set_outcome(Outcome& outcome, int code, int peer, int64_t want,
                                   int64_t have) {
    outcome.incident.code = static_cast<uint16_t>(code);
    outcome.incident.peer = static_cast<int16_t>(peer);
    outcome.incident.want = want;
    outcome.incident.have = have;
}

// What a peer published becomes an address only after it was found to lie in that peer's arena:
// `count` items of `bytes` from `offset` on.
__device__ __forceinline__ bool lies_in_arena(const RankView& view, int peer, int64_t offset,
                                              int64_t count, int64_t bytes) {
    return offset >= 0 && count >= 0 && offset + count * bytes <= view.peers.arena_bytes[peer];
}

// One thread: an empty outcome of this operation.
__device__ inline void clear_outcome(const RankView& view, const Begin& begin, Entering& in) {
#pragma unroll 1
    for (int i = 0; i < int{sizeof(Outcome) / 8}; ++i) {
        reinterpret_cast<uint64_t*>(&in.outcome)[i] = 0;
    }
    Incident& incident = in.outcome.incident;
    incident.magic = Incident::kMagic;
    incident.op = static_cast<uint8_t>(kind_of(begin.head.what));
    incident.rank = static_cast<int16_t>(view.peers.rank);
    incident.epoch = static_cast<uint32_t>(in.seq);
    incident.seq = in.seq;
}

// One thread turns an objection to a notice itself into an outcome.
__device__ __noinline__ inline void explain(const RankView& view, const Begin& begin,
                                            Entering& in) {
    using L = NoticeLayout;
    const auto p = static_cast<int>(in.first_bad & 0xffff);
    const NoticeWords theirs(view, in.slot, p);
    const OpKind kind = kind_of(begin.head.what);
    const Operation op{kind, in.seq};
    clear_outcome(view, begin, in);
    Outcome& outcome = in.outcome;
    // Words that only we look at; they were stored together with those we have waited for.
    const auto get = [&](int i) {
        uint64_t word;
        return device::wait_packed(view.watch, op, p, theirs.words + i, word)
                   ? device::bits_of(word)
                   : 0;
    };
    switch (in.first_bad >> 16) {
        case kEpochObjection:
            return set_outcome(outcome, kBadEpoch, p, int64_t(in.seq),
                               int64_t(device::number_of(theirs.words[0], in.seq)));
        case kKindObjection:
            return set_outcome(outcome, kOutOfStep, p, int64_t(kind),
                               int64_t(kind_of(theirs.get(L::kWhat))));
        case kPoisonObjection: {
            const int code = code_of(theirs.get(L::kWhat));
            if (!may_poison_entry(code)) return set_outcome(outcome, kBadCount, p, 0, code);
            set_outcome(outcome, code, p, 0, 0);
            auto* refusal = reinterpret_cast<uint32_t*>(outcome.detail);
            static_assert(offsetof(Outcome, reason) - offsetof(Outcome, detail) ==
                          offsetof(Refusal, reason));
#pragma unroll 1
            for (int i = 0; i < L::kRefusalWords; ++i) refusal[i] = get(L::kRefusal + i);
            outcome.reason[kReasonBytes - 1] = '\0';
            return;
        }
        default:
#pragma unroll 1
            for (int f = 0; f < kNumFields; ++f) {
                const int64_t mine = begin.descriptor.value[f];
                const uint64_t low = get(L::kDescriptor + 2 * f);
                const auto other =
                    static_cast<int64_t>(uint64_t{get(L::kDescriptor + 2 * f + 1)} << 32 | low);
                if (mine == other) continue;
                set_outcome(outcome, kCallDiffers, p, mine, other);
                outcome.detail[0] = f;
                return;
            }
            set_outcome(outcome, kBadCount, p, 0, 0);  // a signature of nothing
    }
}

// A warp's view of the head of a notice: each lane holds its word.
struct Head {
    uint32_t own;

    // Word i, which may differ between lanes.
    __device__ uint32_t word(int i) const { return __shfl_sync(~0u, own, i); }
    __device__ int64_t word64(int i) const {
        const uint64_t lower = word(i);
        return static_cast<int64_t>(uint64_t{word(i + 1)} << 32 | lower);
    }
};

// A warp's objection to a head.
__device__ __forceinline__ uint32_t judge(const Entering& in, int p, const Head& head, bool newer) {
    using L = NoticeLayout;
    const int lane = ptx::lane_id();
    const uint32_t mine = in.told[lane];
    const bool matters = lane == L::kWhat || lane == L::kSignature || lane == L::kSignature + 1;
    // A refusal of our own is told as `what`, like that of a peer.
    const bool fine =
        !newer && (!matters || head.own == mine) && code_of(head.own) * (lane == 0) == kOk;
    if (__all_sync(~0u, fine)) return kNoObjection;
    if (__any_sync(~0u, newer)) return objection(kEpochObjection, p);
    const uint32_t what = head.word(L::kWhat);
    if (kind_of(what) != kind_of(in.told[L::kWhat])) return objection(kKindObjection, p);
    if (code_of(what) != kOk) return objection(kPoisonObjection, p);
    const bool signs = lane == L::kSignature || lane == L::kSignature + 1;
    return __all_sync(~0u, !signs || head.own == mine) ? kNoObjection
                                                       : objection(kFieldObjection, p);
}

// A thread's objection to word i of the head of rank p, of those that judge looks at; the lowest of them is that
// of judge.
__device__ __forceinline__ uint32_t judge_word(const Entering& in, int p, int i, uint64_t word) {
    using L = NoticeLayout;
    const uint32_t theirs = device::bits_of(word), ours = in.told[i];
    if (!device::is_of(word, in.seq)) return objection(kEpochObjection, p);
    if (i != L::kWhat) return theirs == ours ? kNoObjection : objection(kFieldObjection, p);
    if (kind_of(theirs) != kind_of(ours)) return objection(kKindObjection, p);
    return code_of(theirs) == kOk ? kNoObjection : objection(kPoisonObjection, p);
}

// The first rank whose head a warp hears. Of a small operation the first warps have rows to look for, and the last
// ones counts: from the middle downwards, then the others.
template <bool kSmall>
__device__ __forceinline__ int first_head() {
    const int warp = threadIdx.x / 32, middle = static_cast<int>(blockDim.x) / 64 - 2;
    return kSmall && warp <= middle ? middle - warp : warp;
}
// A packed word that is not of operation `seq`.
__device__ __forceinline__ uint64_t nothing_yet(uint64_t seq) { return device::pack(0, seq - 1); }

// One warp.
template <class W>
__device__ __forceinline__ void time_each(const RankView& view, const W& watch, const Entering& in,
                                          Operation op, int64_t* stats) {
    const int num_ranks = view.shape.num_ranks;
    const auto& near = view.peers;
#pragma unroll 1
    for (int first = 0; first < num_ranks; first += 32) {
        const int lane = ptx::lane_id(), p = min(first + lane, num_ranks - 1);
        const NoticeWords notice(view, in.slot, p);
        const NoticeWords relay(view, in.slot,
                                near.near_begin + p % (near.near_end - near.near_begin));
        const bool is_near = !near.relays || (p >= near.near_begin && p < near.near_end);
        const bool is_masked = in.masked != 0 && device::has_rank(in.masked, p);
        device::time_waits(watch, op, {Site::kEntry, p, op.seq}, notice.words,
                           is_near ? nullptr : relay.words, device::Word::kPacked,
                           first + lane < num_ranks && !is_masked ? stats + p : nullptr);
    }
}
// Out of line, and without an object for NoFar: its address would cost the kernel registers that it has no
// others for.
__device__ __noinline__ inline void time_near(const RankView& view, const Entering& in,
                                              Operation op, int64_t* stats) {
    time_each(view, view.watch, in, op, stats);
}
template <class F>
__device__ __noinline__ void time_all(const RankView& view, const F& far, const Entering& in,
                                      Operation op, int64_t* stats) {
    time_each(view, far, in, op, stats);
}
// Before await_notices: adds how long each rank takes to enter; of another node's, how long after the rank
// of ours that relays its notice. One warp.
template <class F>
__device__ __forceinline__ void time_notices(const RankView& view, const F& far, const Entering& in,
                                             Operation op, int64_t* stats) {
    if constexpr (F::kAny) {
        time_all(view, far, in, op, stats);
    } else {
        time_near(view, in, op, stats);
    }
}

// Waits for everybody's notice, each warp for those of some ranks; once all have, in.first_bad is the verdict.
// A warp calls read(p, words, head) for one it has found nothing wrong with; `false` from there: leave.
// kMasks: of a small operation, which goes on without who is masked, adds whom that happens to meanwhile to
// in.unheard, and reads nothing but what notices say; `looked`: a lane's word of the first head of this warp,
// should that have come by now.
template <bool kMasks = false, class F, class Read>
__device__ __forceinline__ bool hear_heads(const RankView& view, const F& far, const Begin& begin,
                                           Entering& in, Read read, uint64_t looked) {
    const int num_warps = blockDim.x / 32;
    const Operation op{kind_of(begin.head.what), in.seq};
    bool ok = true;
#pragma unroll 1
    for (int p = first_head<kMasks>(); ok && p < view.shape.num_ranks; p += num_warps) {
        uint64_t word = looked;
        looked = nothing_yet(in.seq);
        if (kMasks && device::has_rank(in.masked, p)) continue;
        const NoticeWords words(view, in.slot, p);
        const uint64_t* own = words.words + ptx::lane_id();
        if constexpr (kMasks) {
            ok = device::is_of(word, op.seq) ||
                 device::wait_packed_word(watch_of(view, far), op, p, own, word);
        } else {
            ok = device::wait_packed(view.watch, op, p, own, word);
        }
        ok = __all_sync(~0u, ok);
        if (!ok) {
            if (!kMasks) break;
            ok = __all_sync(~0u, device::goes_on(view.watch));
            if (ok && ptx::lane_id() == 0) atomicOr(&in.unheard, 1ull << p);
            continue;
        }
        const Head head{device::bits_of(word)};
        const uint32_t objected = judge(in, p, head, !device::is_of(word, in.seq));
        if (objected == kNoObjection) {
            ok = read(p, words, head);
        } else if (ptx::lane_id() == 0) {
            atomicMin(&in.first_bad, objected);
        }
        if constexpr (!kMasks) ptx::fence_proxy_async_global();  // what we have heard, before them
    }
    return ok;
}

// The same, until all warps have.
template <bool kMasks = false, class F, class Read>
__device__ __forceinline__ bool await_notices(const RankView& view, const F& far,
                                              const Begin& begin, Entering& in, Read read) {
    return __syncthreads_and(hear_heads<kMasks>(view, far, begin, in, read, nothing_yet(in.seq)));
}

}  // namespace ep::kernels
