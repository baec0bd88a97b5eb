// What dispatch and combine share: an operation is entered, everybody's notice is read and judged, the
// slot is left.
//
// defines: at, at_own, Uninitialized, in_shared, Entering, init_told, init_entering, tell_entered,
// NoFar, watch_of, without, acquire_slot, publish_words, publish_head, NoticeWords, judge_word, first_head, nothing_yet, time_notices,
// hear_heads, await_notices, explain, fail_call, report, count_block, await_blocks, release_slot, leave_slot
//
// One block tells the others' notices; every block reads all of them and comes to the verdict by
// itself, as every rank does: the same words, the same function. Functions are for all threads of a
// block unless they say otherwise; `false` means that this rank has given up: return.
//
// All of this runs once, out of cold caches, and waits for nothing as long as for its code. So loops stay
// loops, and what only failures need is out of line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "contract/gpu.h"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "device/wait.cuh"

namespace ep::kernels {

using device::ends_communicator;
using device::Operation;

// A word of `owner`'s control block.
template <class T>
__device__ __forceinline__ T* at(const RankView& view, int owner, int64_t offset) {
    return reinterpret_cast<T*>(view.peers.control[owner] + offset);
}
// Of ours: its address needs no load.
template <class T>
__device__ __forceinline__ T* at_own(const RankView& view, int64_t offset) {
    return reinterpret_cast<T*>(view.peers.own + offset);
}

// Shared memory of a block for a T, which nothing initializes.
template <class T>
struct Uninitialized {
    alignas(T) std::byte bytes[sizeof(T)];

    __device__ T& get() { return *reinterpret_cast<T*>(bytes); }
};

// The parameter of a kernel in shared memory of the block, for functions that have it by reference: through
// that they would read it from L1, which every acquire of the block empties. All threads.
template <class T>
__device__ __forceinline__ const T& in_shared(const T& given, Uninitialized<T>& copy) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % 4 == 0 && alignof(T) >= 4);
    auto* words = reinterpret_cast<uint32_t*>(copy.bytes);
#pragma unroll 1
    for (int i = threadIdx.x; i < int{sizeof(T) / 4}; i += blockDim.x) {
        words[i] = reinterpret_cast<const uint32_t*>(&given)[i];
    }
    __syncthreads();
    return copy.get();
}

// In shared memory of a block.
struct Entering {
    uint64_t seq;
    int32_t slot;                // seq % num_slots
    uint32_t first_bad;          // the lowest objection to a notice, see judge
    uint32_t size_bad;           // and, should there be none, to what all of them come to
    uint32_t routings;           // of a cached call: 0 when what is sent and what is expected agree
    uint64_t masked;             // ranks that this operation goes without
    unsigned long long unheard;  // and those that a wait of this block has given up meanwhile
    uint64_t* outbox;   // where our notice is written once more, for ranks we do not reach; or null
    bool sends;         // of a small batch: this block has its own turn, and no other
    bool leaves;        // and a warp of it has given up since
    uint32_t readers;   // and so many of its warps have read all they will
    int32_t code;       // of our own refusal
    int64_t detail[4];  // and its numbers
    uint32_t told[NoticeLayout::kRefusal];  // head and descriptor of our notice
    Outcome outcome;                        // what went wrong; only with an objection
};

// In the order in which they count. What is wrong with the numbers of notices that agree comes last.
enum Objection : uint32_t {
    kEpochObjection,
    kKindObjection,
    kPoisonObjection,
    kFieldObjection,
    kNumberObjection,
    kExtentObjection,
    kSizeObjection,
};
constexpr uint32_t kNoObjection = 0xffffffffu;

__device__ __forceinline__ uint32_t objection(Objection kind, int peer) {
    return uint32_t{kind} << 16 | static_cast<uint32_t>(peer);
}

// All threads; a barrier of the block must follow. Parameters that differ between the lanes of a warp are
// read one after the other, so this comes before anything has to be quick.
__device__ __forceinline__ void init_told(const Begin& begin, Entering& in) {
    using L = NoticeLayout;
    const auto* head = reinterpret_cast<const uint32_t*>(&begin.head);
    const auto* descriptor = reinterpret_cast<const uint32_t*>(&begin.descriptor);
#pragma unroll 1
    for (int i = threadIdx.x; i < L::kRefusal; i += blockDim.x) {
        in.told[i] = i < L::kHead ? head[i] : descriptor[i - L::kDescriptor];
    }
}

// One thread; a barrier of the block must follow.
__device__ __forceinline__ void init_entering(const RankView& view, const Begin& begin,
                                              Entering& in) {
    in.seq = view.state.seq[0] + 1;  // the block that ends an operation puts it there
    in.slot = static_cast<int>(view.state.seq[1]);
    in.first_bad = in.size_bad = kNoObjection;
    in.routings = 0;
    in.masked = device::masked_ranks(view.watch);
    in.unheard = 0;
    in.outbox = nullptr;
    in.leaves = false;
    in.readers = 0;
    in.code = code_of(begin.head.what);
    if (in.code == kOk) return;
#pragma unroll 1
    for (int i = 0; i < 4; ++i) in.detail[i] = begin.refusal.detail[i];
}

// For sentences only, orders nothing. One thread.
__device__ __forceinline__ void tell_entered(const RankView& view, Operation op) {
    ControlHeader* own = at_own<ControlHeader>(view, 0);
    own->entered_kind = static_cast<uint32_t>(op.kind);
    own->entered_seq = op.seq;
}

// Ranks of other nodes, in operations that go on without ranks that are masked. Here nobody is far, or waits do
// not go on; elsewhere Far of kernels/direct.cuh.
struct NoFar {
    static constexpr bool kAny = false;
    static constexpr int kWarps = 16;  // of a block of a small dispatch
    static constexpr int kCombineWarps = 16;
};
// What waits of an operation have.
template <class F>
__device__ __forceinline__ decltype(auto) watch_of(const RankView& view, const F& far) {
    if constexpr (F::kAny) {
        return (far);
    } else {
        return (view.watch);
    }
}

// Whether this operation goes without a rank.
__device__ __forceinline__ bool without(const Entering& in, int rank) {
    return in.masked != 0 && device::has_rank(in.masked, rank);
}

// The slot is ours once every peer has left what it did there num_slots operations ago. One warp of the
// block that publishes; the others wait for what it publishes to ourselves. kMasks: `masked` are not
// waited for, nor who is masked meanwhile.
template <bool kMasks = false, class F>
__device__ inline bool acquire_slot(const RankView& view, const F& far, Operation op, int slot,
                                    uint64_t masked = 0) {
    const uint64_t num_slots = view.shape.num_slots;
    bool ok = true;
    if (kMasks && device::has_rank(masked, view.peers.rank)) {
        device::leave_masked(view.watch, op);
        return false;
    }
#pragma unroll 1
    for (int p = view.peers.near_begin + ptx::lane_id();
         op.seq > num_slots && p < view.peers.near_end; p += 32) {
        if (kMasks && device::has_rank(masked, p)) continue;
        // pairs with the store in leave_slot
        const auto* word = at_own<uint64_t>(view, view.layout.released_word(slot, p));
        // Of a small operation only ordinary stores follow, which do not overtake what they depend on.
        if (kMasks && ptx::ld_relaxed_sys(word) >= op.seq - num_slots) continue;
        ok = ok && (device::wait_word(watch_of(view, far), op, {Site::kSlot, p, op.seq - num_slots},
                                      word) ||
                    (kMasks && device::goes_on(view.watch)));
    }
    if (ptx::lane_id() == 0) tell_entered(view, op);
    return ok;
}

// Words [begin, end) of our notice, to everybody, by half of the block: the warps that wait for notices
// have no stores of their own to wait for at a fence. kAll: by all of it, where there is no such fence. What
// the words give away has been done by kernels before this one, so they need no release. `control`: blocks of
// all ranks.
template <bool kAll = false, class Bits>
__device__ __forceinline__ void publish_words(const RankView& view, std::byte* const* control,
                                              const Entering& in, int begin, int end, Bits bits) {
    const int64_t offset = view.layout.notice(in.slot, view.peers.rank);
    const int half = kAll ? 0 : blockDim.x / 64 * 32, first = static_cast<int>(threadIdx.x) - half;
#pragma unroll 1
    for (int i = begin + first; first >= 0 && i < end; i += blockDim.x - half) {
        const uint64_t word = device::pack(bits(i), in.seq);
#pragma unroll 1
        for (int p = view.peers.near_begin; p < view.peers.near_end; ++p) {
            if (in.masked != 0 && device::has_rank(in.masked, p)) continue;
            ptx::st_relaxed_sys(reinterpret_cast<uint64_t*>(control[p] + offset) + i, word);
        }
        if (in.outbox != nullptr) in.outbox[i] = word;
    }
}

// Word i of a notice in front of its counts: head, descriptor and, should we refuse, why.
__device__ __forceinline__ uint32_t head_word(const Begin& begin, const Entering& in, int i) {
    using L = NoticeLayout;
    const auto* reason = reinterpret_cast<const uint32_t*>(&begin.refusal);
    const auto* detail = reinterpret_cast<const uint32_t*>(in.detail);
    constexpr int kDetail = sizeof(in.detail) / 4;
    if (i == L::kWhat) return (in.told[i] & 0xffff0000u) | static_cast<uint32_t>(in.code);
    if (i < L::kRefusal) return in.told[i];
    if (in.code == kOk) return 0;
    const int at = i - L::kRefusal;
    return at < kDetail ? detail[at] : reason[at];
}

__device__ inline void publish_head(const RankView& view, std::byte* const* control,
                                    const Begin& begin, const Entering& in) {
    using L = NoticeLayout;
    publish_words(view, control, in, 0, in.code == kOk ? L::kRefusal : L::kRows,
                  [&](int i) { return head_word(begin, in, i); });
}

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

// The first rank whose head a warp hears. Of a small operation the first warps have rows to look for.
template <bool kSmall>
__device__ __forceinline__ int first_head() {
    const int num_warps = blockDim.x / 32, warp = threadIdx.x / 32;
    return kSmall ? (warp + num_warps / 2) % num_warps : warp;
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

// A block has read all it will of the notices; a barrier of the block came before. One thread.
__device__ __forceinline__ void count_block(const RankView& view) {
    ptx::red_release_gpu_add(view.state.finished, 1);  // pairs with await_blocks
}

// Until all blocks have, each `times` over. One warp of the block that ends the operation. False: leave.
__device__ __forceinline__ bool await_blocks(const RankView& view, Operation op, int times = 1) {
    const uint32_t* finished = view.state.finished;
    const auto all = [=] { return ptx::ld_acquire_gpu(finished) == gridDim.x * times; };
    if (!all() && !device::wait_own(view.watch, op, view.peers.rank, all)) return false;
    __syncwarp();
    if (ptx::lane_id() == 0) *view.state.finished = 0;
    return true;
}

// All blocks have read all there is in this slot. One warp. Nobody needs more than the value: a rank that
// hears our next notice knows as much.
__device__ __forceinline__ void release_slot(const RankView& view, std::byte* const* control,
                                             uint64_t seq, int slot) {
#pragma unroll 1
    for (int p = view.peers.near_begin + ptx::lane_id(); p < view.peers.near_end; p += 32) {
        // pairs with the acquire in acquire_slot; what we have read there has come long ago
        std::byte* word = control[p] + view.layout.released_word(slot, view.peers.rank);
        ptx::st_relaxed_sys(reinterpret_cast<uint64_t*>(word), seq);
    }
    // for sentences only
    if (ptx::lane_id() == 0) at_own<ControlHeader>(view, 0)->finished_seq = seq;
}

// The next operation has the next number and slot. One thread, once all blocks have read theirs.
__device__ __forceinline__ void advance(const RankView& view, uint64_t seq, int slot) {
    view.state.seq[0] = seq;
    view.state.seq[1] = slot + 1 == view.shape.num_slots ? 0 : slot + 1;
}

// The operation is over here. One warp.
__device__ __forceinline__ void leave_slot(const RankView& view, uint64_t seq, int slot) {
    release_slot(view, view.peers.control, seq, slot);
    if (ptx::lane_id() == 0) advance(view, seq, slot);
}

// One thread. Tells our host what came of the call.
__device__ inline void report(const RankView& view, const Begin& begin, uint64_t seq,
                              const Outcome* failure, const OpState& state) {
    const bool later = begin.call == 0 && begin.report_later && failure != nullptr;
    if (begin.call == 0 && !later) return;
    HostPage& page = *view.watch.page;
    HostPage::Report& out = later ? page.deferred : page.sync[begin.call % kMaxReports];
    if (later && ptx::ld_acquire_sys(&page.deferred_seen) != out.call)
        return;  // the first one stays
    out.seq = seq;
    out.outcome.incident.code = kOk;
    if (failure != nullptr) out.outcome = *failure;
    out.num_recv = state.num_recv;
    out.num_rows = state.num_rows;
    out.index_rows = state.index_rows;
    out.num_logged = state.num_logged;
    ptx::st_release_sys(&out.call, later ? seq : begin.call);  // the host acquires it
}

// The call fails here as it does everywhere; the next one works, unless the ranks are out of step. One
// warp, once all blocks have read.
__device__ __noinline__ inline void fail_call(const RankView& view, const Begin& begin,
                                              Entering& in, bool advances = true) {
    const Incident& incident = in.outcome.incident;
    if (!ends_communicator(incident.code)) {
        // Lines that nobody will load (contract/stage.h), before anybody's next ones to the same places.
        __syncwarp();
        ptx::fence_acq_rel_sys();
        release_slot(view, view.peers.control, in.seq, in.slot);
    }
    if (ptx::lane_id() != 0) return;
    if (!ends_communicator(incident.code) && advances) advance(view, in.seq, in.slot);
    if (ends_communicator(incident.code)) {
        device::give_up(view.watch, {kind_of(begin.head.what), in.seq}, incident.code,
                        {incident.site, incident.peer, uint64_t(incident.want)},
                        uint64_t(incident.have), 0);
        return;
    }
    report(view, begin, in.seq, &in.outcome, {});
}

}  // namespace ep::kernels
