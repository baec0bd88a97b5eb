// Bounded waits: every loop of a kernel that waits for somebody else is in here.
//
// A wait ends when the word it watches is there, when its clock runs out, or when this rank has
// given up elsewhere. Who gives up first records the incident where the host reads it and where
// peers look; the kernel then returns like any other, and the context lives on.
#pragma once

#include <concepts>
#include <cstdint>

#include "contract/gpu.h"
#include "device/ptx.cuh"

namespace ep::device {

// The operation a kernel belongs to.
struct Operation {
    OpKind kind;
    uint64_t seq;
};

// What is waited for: a number that grows until it reaches `want`.
struct Awaited {
    Site site;
    int peer;
    uint64_t want;
};

// For a rank of another node the host gives a blank one of ours, which says neither that it left nor
// where it is.
__device__ __forceinline__ ControlHeader* header_of(const Watch& watch, int rank) {
    return reinterpret_cast<ControlHeader*>(watch.control[rank]);
}

// True once this rank has given up; every later kernel returns at entry.
__device__ __forceinline__ bool gave_up(const Watch& watch) {
    return ptx::ld_relaxed_gpu(watch.abort) != 0;
}

// ---- masks: ranks that nobody waits for any more ----

__device__ __forceinline__ bool has_rank(uint64_t ranks, int rank) {
    return (ranks >> rank & 1) != 0;
}

__device__ __forceinline__ uint64_t* masks_of(const Watch& watch, int rank) {
    return reinterpret_cast<uint64_t*>(watch.control[rank] + watch.masks);
}

// A bit for each rank that is masked, as far as we know by now.
__device__ __forceinline__ uint64_t masked_ranks(const Watch& watch) {
    return watch.can_mask ? ptx::ld_relaxed_sys(masks_of(watch, watch.rank)) : 0;
}

// The host may ask which ranks are masked.
__device__ __forceinline__ void tell_masked(const Watch& watch, uint64_t ranks) {
#pragma unroll 1
    for (; ranks != 0; ranks &= ranks - 1) {
        const int rank = __ffsll(static_cast<long long>(ranks)) - 1;
        ptx::st_release_sys(&watch.page->masked[rank], 1);
    }
}

// From now on nobody waits for `rank`, which is told, too. Every rank's waits look at its own word, so all
// go on without it within a poll of each other.
__device__ __noinline__ inline void mask(const Watch& watch, int rank) {
#pragma unroll 1
    for (int p = watch.near_begin; p < watch.near_end; ++p) {
        ptx::red_relaxed_sys_or(masks_of(watch, p), uint64_t{1} << rank);
    }
    tell_masked(watch, uint64_t{1} << rank);
}

// What a wait has whose ranks may stand on other nodes: it converts to the Watch. `watch` of type W below is one
// of these, or that itself.
template <class W>
concept FarWatch = requires(const W& watch, int rank) {
    // Other nodes are told that `rank` is masked. One thread.
    { watch.tell_far(rank) } -> std::same_as<void>;
    // What they have told becomes part of our own word. One thread.
    { watch.hear_far() } -> std::same_as<void>;
};

// After a wait that came to nothing: whether the rank is masked, and the operation goes on without it.
__device__ __forceinline__ bool goes_on(const Watch& watch) {
    return watch.can_mask && !gave_up(watch);
}

// What `peer` last told us of its life.
__device__ __forceinline__ uint64_t life_of(const Watch& watch, int peer) {
    const auto* lives = reinterpret_cast<const uint64_t*>(watch.control[watch.rank] + watch.lives);
    return ptx::ld_acquire_sys(lives + peer);
}

// In our header, for who waits for us; and at every rank we reach, for who must not wait for an answer.
__device__ __forceinline__ void tell_life(const Watch& watch, Life life) {
    ptx::st_release_sys(&header_of(watch, watch.rank)->life, static_cast<uint32_t>(life));
    for (int p = watch.near_begin; p < watch.near_end; ++p) {
        auto* lives = reinterpret_cast<uint64_t*>(watch.control[p] + watch.lives);
        ptx::st_release_sys(lives + watch.rank, static_cast<uint64_t>(life));
    }
}

// Who found out, when it was another rank: 1 + rank, low half of the number of its operation.
struct Informant {
    uint32_t rank = 0, epoch = 0;
};

__device__ __forceinline__ void record(const Watch& watch, Operation op, int code, Awaited awaited,
                                       uint64_t have, uint64_t waited_ns, Informant told) {
    if (ptx::atom_acq_rel_gpu_exch(watch.abort, 1) != 0) return;
    Incident incident;
    incident.code = static_cast<uint16_t>(code);
    incident.site = awaited.site;
    incident.op = static_cast<uint8_t>(op.kind);
    incident.rank = static_cast<int16_t>(watch.rank);
    incident.peer = static_cast<int16_t>(awaited.peer);
    incident.epoch = told.rank != 0 ? told.epoch : static_cast<uint32_t>(op.seq);
    incident.flags = told.rank;
    incident.seq = op.seq;
    if (awaited.peer >= 0) {
        incident.peer_seq = ptx::ld_acquire_sys(&header_of(watch, awaited.peer)->entered_seq);
    }
    incident.waited_ns = waited_ns;
    incident.want = static_cast<int64_t>(awaited.want);
    incident.have = static_cast<int64_t>(have);
    watch.page->incident = incident;
    ControlHeader* own = header_of(watch, watch.rank);
    own->verdict = incident;
    ptx::st_release_sys(&own->verdict_valid, 1);  // pairs with adopt_failure of a peer
    tell_life(watch, Life::kFailed);
    // The host last, which acquires it: its user may then write to what peers still read, see
    // owners_are_healthy.
    ptx::st_release_sys(&watch.page->incident_valid, 1);
}

// Ends the communicator. The first thread that comes here says why; the others were too late.
__device__ __noinline__ inline void give_up(const Watch& watch, Operation op, int code,
                                            Awaited awaited, uint64_t have, uint64_t waited_ns) {
    record(watch, op, code, awaited, have, waited_ns, {});
}

// Codes after which a communicator is dead; all others fail one call.
__device__ __forceinline__ bool ends_communicator(int code) {
    return (code >= 100 && code < 200) || code == kBadCount || code == kBadEpoch ||
           code == kMiscount || code == kOutOfStep;
}

// A peer that failed has told why; one that closed, or cannot say, is simply gone.
__device__ __noinline__ inline void adopt_failure(const Watch& watch, Operation op, Awaited awaited,
                                                  uint64_t have, uint64_t waited_ns) {
    const ControlHeader* theirs = header_of(watch, awaited.peer);
    int code = kPeerLeft;
    Awaited blamed = awaited;
    Informant told;
    if (ptx::ld_acquire_sys(&theirs->verdict_valid) != 0) {
        const Incident& verdict = theirs->verdict;
        const bool by_signal = verdict.code == kInterrupted;  // its user asked for it
        const int culprit = by_signal ? verdict.rank : verdict.peer;
        if (culprit >= 0 && culprit < watch.num_ranks && verdict.rank >= 0 &&
            verdict.rank < watch.num_ranks && (by_signal || ends_communicator(verdict.code))) {
            code = by_signal ? static_cast<int>(kPeerLeft) : verdict.code;
            blamed.peer = culprit;
            blamed.want = static_cast<uint64_t>(verdict.want);
            have = static_cast<uint64_t>(verdict.have);
            told = {verdict.rank + 1u, static_cast<uint32_t>(verdict.seq)};
        }
    }
    record(watch, op, code, blamed, have, waited_ns, told);
}

constexpr int kLooks = 64;             // for what is on its way, before it is waited for properly
constexpr int kLookEvery = 64;         // turns between looks at the clock
constexpr int kLookFurther = 64 * 64;  // turns between looks at the host and at the peer's life

// Before a peer's entry the arrival clock runs, afterwards the one that progress sets back.
__device__ __forceinline__ bool arriving(Site site) {
    return site == Site::kEntry || site == Site::kSlot || site == Site::kRailNotice;
}

// How long the network is given. Who waits for what a rank of its own node does, itself included, gives it
// twice as long where nodes are several: that rank may wait for a rail, then gives up first, and says whose.
__device__ __forceinline__ int64_t limit_of(const Watch& watch, const Awaited& awaited) {
    if (arriving(awaited.site)) return watch.arrival_ns;
    const bool is_near = awaited.peer >= watch.near_begin && awaited.peer < watch.near_end;
    const bool has_rails = watch.near_end - watch.near_begin < watch.num_ranks;
    return has_rails && is_near ? 2 * watch.progress_ns : watch.progress_ns;
}

__device__ __forceinline__ bool is_gone(uint32_t life) {
    return life == static_cast<uint32_t>(Life::kLeft) ||
           life == static_cast<uint32_t>(Life::kFailed);
}

// We are masked by the others, and must not go on as if we were not.
__device__ __noinline__ inline void leave_masked(const Watch& watch, Operation op) {
    give_up(watch, op, kMasked, {Site::kNone, watch.rank, 0}, 0, 0);
}

// Whether nobody waits for this peer any more, or for us.
__device__ __forceinline__ bool is_masked(const Watch& watch, Operation op, int peer) {
    const uint64_t masked = masked_ranks(watch);
    if (has_rank(masked, watch.rank)) leave_masked(watch, op);
    return has_rank(masked, peer) || has_rank(masked, watch.rank);
}

// Instead of giving up: masks the peer, where that may be. False: give up.
template <class W>
__device__ __forceinline__ bool goes_without(const W& watch, int peer) {
    const Watch& own = watch;
    if (!own.can_mask || peer == own.rank) return false;
    mask(own, peer);
    if constexpr (FarWatch<W>) watch.tell_far(peer);
    return true;
}

// Tells the host of a wait that takes long, or that it is over. True, as its caller returns.
__device__ __noinline__ inline bool post(const Watch& watch, Operation op, Awaited awaited,
                                         uint64_t start, bool waits) {
    if (ptx::globaltimer() - start > static_cast<uint64_t>(watch.post_ns)) {
        ptx::st_release_sys(&watch.page->waiting[awaited.peer],
                            waits ? waiting_word(op.seq, op.kind, awaited.site) : 0);
    }
    return true;
}

// The host, or the peer itself, ends the wait for it.
__device__ __noinline__ inline bool is_over(const Watch& watch, Operation op, Awaited awaited,
                                            uint64_t start) {
    post(watch, op, awaited, start, true);
    if (ptx::ld_acquire_sys(&watch.page->abort) != 0) return true;
    if (ptx::ld_acquire_sys(&watch.page->lost[awaited.peer]) != 0) return true;
    return awaited.peer != watch.rank &&
           is_gone(ptx::ld_acquire_sys(&header_of(watch, awaited.peer)->life));
}

// Why it is over. What is there by now counts all the same, unless our user wants to leave.
template <class W>
__device__ __noinline__ bool still_counts(const W& watch, Operation op, Awaited awaited,
                                          uint64_t now, uint64_t waited_ns) {
    const Watch& own = watch;
    const uint64_t abort = ptx::ld_acquire_sys(&own.page->abort);
    if (abort_code(abort) != kInterrupted && now >= awaited.want) return true;
    if (abort == 0) {
        const auto lost = static_cast<int>(ptx::ld_acquire_sys(&own.page->lost[awaited.peer]));
        if (goes_without(watch, awaited.peer)) return false;
        if (lost != 0) {
            give_up(watch, op, lost, awaited, now, waited_ns);
        } else {
            adopt_failure(watch, op, awaited, now, waited_ns);
        }
        return false;
    }
    Awaited blamed = awaited;
    if (abort_peer(abort) >= 0) blamed.peer = abort_peer(abort);
    give_up(watch, op, abort_code(abort), blamed, now, waited_ns);
    return false;
}

// How the number waited for stands in a word: by itself, or in the upper half of a packed one.
enum class Word { kNumber, kPacked };

// The number of the operation a packed word belongs to, which is near `seq`.
__device__ __forceinline__ uint64_t number_of(uint64_t word, uint64_t seq) {
    const auto ahead = static_cast<int32_t>(static_cast<uint32_t>(word >> 32) - uint32_t(seq));
    return seq + static_cast<uint64_t>(int64_t{ahead});
}

// A wait that takes long, looked at in turns from 1 to kLookFurther, again and again.
template <class W>
struct LongWait {
    enum State { kWaits, kThere, kOver };
    const W& watch;
    Operation op;
    Awaited awaited;
    const uint64_t* addr;
    Word word;
    uint64_t start, seen, progress;

    __device__ LongWait(const W& w, Operation o, Awaited what, const uint64_t* a, Word kind)
        : watch(w), op(o), awaited(what), addr(a), word(kind), start(ptx::globaltimer()) {
        seen = have(), progress = start;
    }

    __device__ __forceinline__ uint64_t have() const { return have(addr); }
    __device__ __forceinline__ uint64_t have(const uint64_t* at) const {
        const uint64_t value = ptx::ld_acquire_sys(at);
        return word == Word::kNumber ? value : number_of(value, awaited.want);
    }

    __device__ __forceinline__ State look(int turn) {
        const uint64_t now = have();
        if (now > awaited.want && awaited.site == Site::kLine) {
            give_up(watch, op, kBadEpoch, awaited, now, 0);
            return kOver;
        }
        if (now >= awaited.want) return post(watch, op, awaited, start, false) ? kThere : kOver;
        if (turn % kLookEvery != 0) return kWaits;
        if (gave_up(watch) || is_masked(watch, op, awaited.peer)) return kOver;
        const uint64_t time = ptx::globaltimer();
        if (now != seen && !arriving(awaited.site)) progress = time;
        seen = now;
        const int64_t limit = limit_of(watch, awaited);
        if (limit >= 0 && time - progress > static_cast<uint64_t>(limit)) {
            const int code = arriving(awaited.site) ? kPeerAbsent : kStalled;
            if (!goes_without(watch, awaited.peer)) {
                give_up(watch, op, code, awaited, now, time - start);
            }
            return kOver;
        }
        if (turn != kLookFurther) return kWaits;
        if constexpr (FarWatch<W>) watch.hear_far();
        // Its last words came before it left: look once more.
        const bool over = is_over(watch, op, awaited, start) &&
                          !still_counts(watch, op, awaited, have(), time - start);
        return over ? kOver : kWaits;
    }
};

template <class W>
__device__ __noinline__ bool wait_long(const W& watch, Operation op, Awaited awaited,
                                       const uint64_t* addr, Word word) {
    using Wait = LongWait<W>;
    Wait wait(watch, op, awaited, addr, word);
    for (int turn = 1;; turn = turn % kLookFurther + 1) {
        const typename Wait::State state = wait.look(turn);
        if (state != Wait::kWaits) return state == Wait::kThere;
    }
}

// Waits for a word of each lane and adds how long that took; what is there at once costs nothing. It ends
// when all are there or one wait has to end: the waits proper, which follow, say which. `relay`: such a
// word of the rank through which ours comes, or null; the time until it is there is not ours. One warp;
// no stats: a lane that waits for nothing.
template <class W>
__device__ __noinline__ void time_waits(const W& watch, Operation op, Awaited awaited,
                                        const uint64_t* addr, const uint64_t* relay, Word word,
                                        int64_t* stats) {
    using Wait = LongWait<W>;
    Wait wait(watch, op, awaited, addr, word);
    uint64_t from = wait.start;
    auto state = Wait::kThere;
    if (stats != nullptr && wait.seen < awaited.want) state = Wait::kWaits;
    for (int turn = 1;; turn = turn % kLookFurther + 1) {
        if (state == Wait::kWaits) {
            if (relay != nullptr && wait.have(relay) < awaited.want) from = ptx::globaltimer();
            state = wait.look(turn);
            if (state == Wait::kThere) {
                *stats += static_cast<int64_t>(ptx::globaltimer() - from);
            }
            if (state == Wait::kOver && goes_on(watch)) state = Wait::kThere;
        }
        if (__any_sync(~0u, state == Wait::kOver)) return;
        if (__all_sync(~0u, state == Wait::kThere)) return;
    }
}

// True when the word has reached what is awaited. False when time ran out, here or elsewhere on this
// rank: leave, touch nothing; unless goes_on() says that only this peer is lost.
template <class W>
[[nodiscard]] __device__ __forceinline__ bool wait_word(const W& watch, Operation op,
                                                        Awaited awaited, const uint64_t* word) {
    return ptx::ld_acquire_sys(word) >= awaited.want ||
           wait_long(watch, op, awaited, word, Word::kNumber);
}

// Bounds a loop that looks at several words and can go on with any: who finds nothing asks whether to look
// again. One thread.
class Patience {
public:
    // `awaited` is one of the words, at `have`; its peer is blamed should time run out. False: leave.
    __device__ __noinline__ bool look_again(const Watch& watch, Operation op, Awaited awaited,
                                            uint64_t have) {
        if (turn_ == 0) start_ = progress_ = ptx::globaltimer(), seen_ = have;
        turn_ = turn_ % kLookFurther + 1;
        if (turn_ % kLookEvery != 0) return true;
        if (gave_up(watch)) return false;
        const uint64_t time = ptx::globaltimer();
        if (have != seen_) progress_ = time;
        seen_ = have;
        if (watch.progress_ns >= 0 && time - progress_ > static_cast<uint64_t>(watch.progress_ns)) {
            give_up(watch, op, kStalled, awaited, have, time - start_);
            return false;
        }
        if (turn_ != kLookFurther) return true;
        if (peer_ != awaited.peer) withdraw(watch);
        peer_ = awaited.peer;
        return !is_over(watch, op, awaited, start_) ||
               still_counts(watch, op, awaited, have, time - start_);
    }
    // Something was there.
    __device__ void found(const Watch& watch) {
        if (peer_ >= 0) withdraw(watch);
        turn_ = 0;
    }

private:
    // The host was told that we wait for this peer.
    __device__ void withdraw(const Watch& watch) {
        if (peer_ >= 0) ptx::st_release_sys(&watch.page->waiting[peer_], 0);
        peer_ = -1;
    }

    uint64_t start_ = 0, progress_ = 0, seen_ = 0;
    int turn_ = 0, peer_ = -1;
};

// For rails that are slow on purpose.
__device__ __noinline__ inline void pause_ns(uint64_t ns) {
    const uint64_t start = ptx::globaltimer();
    while (ptx::globaltimer() - start < ns) ptx::nanosleep(100);
}

// For a bulk load of our own, from memory of rank `from`, or for what another warp of the block does: what
// stalls it has to end, but no rank has to do anything for it.
template <class Have>
__device__ __noinline__ bool wait_own(const Watch& watch, Operation op, int from, Have have) {
    const Awaited awaited{Site::kRows, from, 1};
    const int64_t limit = limit_of(watch, awaited);
    const uint64_t start = ptx::globaltimer();
    for (int turn = 1; !have(); ++turn) {
        if (turn % kLookEvery != 0) continue;
        if (gave_up(watch)) return false;
        const uint64_t waited = ptx::globaltimer() - start;
        if (limit < 0 || waited <= static_cast<uint64_t>(limit)) continue;
        give_up(watch, op, kStalled, awaited, 0, waited);
        return false;
    }
    return true;
}

// The same by a warp whose registers are full: it calls nothing but what it leaves after.
template <class Have>
__device__ __forceinline__ bool wait_own_together(const Watch& watch, Operation op, int from,
                                                  Have have) {
    if (__all_sync(~0u, have())) return true;
    const Awaited awaited{Site::kRows, from, 1};
    const int64_t limit = limit_of(watch, awaited);
    const uint64_t start = ptx::globaltimer();
#pragma unroll 1
    for (int turn = 1; !__all_sync(~0u, have()); ++turn) {
        if (turn % kLookEvery != 0) continue;
        const uint64_t waited = ptx::globaltimer() - start;
        const bool over = gave_up(watch);
        const bool late = limit >= 0 && waited > static_cast<uint64_t>(limit);
        if (!__any_sync(~0u, over || late)) continue;
        if (late && !over) give_up(watch, op, kStalled, awaited, 0, waited);
        return false;
    }
    return true;
}

}  // namespace ep::device
