// How an operation is entered: what a block knows of it, the slot, and what it tells others.
//
// defines: NoFar, at, at_own, Uninitialized, in_shared, Entering, Objection, objection, init_told,
// starts_early, fetch_parameter, init_entering, tell_entered, watch_of, without, acquire_slot, publish_words,
// publish_head
//
// What dispatch and combine share is here, in kernels/notices.cuh (what others tell is heard and judged) and in
// kernels/leave.cuh (the slot is left). Functions are for all threads of a block unless they say otherwise;
// `false` means that this rank has given up: return.
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

using device::Operation;

// Ranks of other nodes, in operations that go on without ranks that are masked. Here nobody is far, or waits do
// not go on; elsewhere Far of kernels/direct.cuh.
struct NoFar {
    static constexpr bool kAny = false;
    static constexpr bool kIsUsual = false;  // see kernels/usual.cuh
    static constexpr int kWarps = 16;        // of a block of a small dispatch
    static constexpr int kCombineWarps = 16;
};

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
    uint32_t sinks[2];  // see fetch_parameter
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

// All threads; a barrier of the block must follow.
__device__ __forceinline__ void init_told(const Begin& begin, Entering& in) {
    using L = NoticeLayout;
    const auto* head = reinterpret_cast<const uint32_t*>(&begin.head);
    const auto* descriptor = reinterpret_cast<const uint32_t*>(&begin.descriptor);
    // Lanes of a warp read parameters one after the other, so each warp has some of them.
    const auto warps = static_cast<int>(blockDim.x) / 32;
    const int first = static_cast<int>(ptx::lane_id()) * warps + static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
    for (int i = first; i < L::kRefusal; i += 32 * warps) {
        in.told[i] = i < L::kHead ? head[i] : descriptor[i - L::kDescriptor];
    }
}

// Whether a kernel has time before the one in front of it has ended: there were SMs for it. Else nothing that it does is
// hidden.
__device__ __forceinline__ bool starts_early(const RankView& view) {
    return view.overlaps && static_cast<int>(gridDim.x) <= view.early_blocks;
}

// Fetches a parameter of a kernel into the cache of instructions that name parameters. Else the first one that names
// one of a line would wait for it, 40 to 125 cycles each time. Uniform, since what lanes load by an address of their
// own goes through another cache. One warp, of a kernel that starts early: it takes 3000 cycles. `sink`: a word for what
// has no meaning.
template <class Param>
__device__ __forceinline__ void fetch_parameter(const Param& given, volatile uint32_t& sink) {
    constexpr int kLine = 64;
    const auto* bytes = reinterpret_cast<const std::byte*>(&given);
    uint32_t word = 0;
#pragma unroll
    for (int at = 0; at < int{sizeof(Param)}; at += kLine) {
        word ^= *reinterpret_cast<const uint32_t*>(bytes + at);
    }
    if (ptx::lane_id() == 0) sink = word;
}

// One thread; a barrier of the block must follow.
template <class F = NoFar>
__device__ __forceinline__ void init_entering(const RankView& view, const Begin& begin,
                                              uint64_t seq, int slot, Entering& in) {
    in.seq = seq, in.slot = slot;
    in.first_bad = in.size_bad = kNoObjection;
    in.routings = 0;
    in.masked = F::kIsUsual ? 0 : device::masked_ranks(view.watch);
    in.unheard = 0;
    in.outbox = nullptr;
    in.leaves = false;
    in.readers = 0;
    in.code = code_of(begin.head.what);
    if (in.code == kOk) return;
#pragma unroll 1
    for (int i = 0; i < 4; ++i) in.detail[i] = begin.refusal.detail[i];
}
// The same of the next operation, whose number and slot the block has left that ended the last one.
template <class F = NoFar>
__device__ __forceinline__ void init_entering(const RankView& view, const Begin& begin,
                                              Entering& in) {
    init_entering<F>(view, begin, view.state.seq[0] + 1, static_cast<int>(view.state.seq[1]), in);
}

// For sentences only, orders nothing. One thread.
__device__ __forceinline__ void tell_entered(const RankView& view, Operation op) {
    ControlHeader* own = at_own<ControlHeader>(view, 0);
    own->entered_kind = static_cast<uint32_t>(op.kind);
    own->entered_seq = op.seq;
}

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
template <class F = NoFar>
__device__ __forceinline__ bool without(const Entering& in, int rank) {
    return !F::kIsUsual && in.masked != 0 && device::has_rank(in.masked, rank);
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
template <bool kAll = false, class F = NoFar, class Bits>
__device__ __forceinline__ void publish_words(const RankView& view, std::byte* const* control,
                                              const Entering& in, int begin, int end, Bits bits) {
    const int64_t offset = view.layout.notice(in.slot, view.peers.rank);
    const int half = kAll ? 0 : blockDim.x / 64 * 32, first = static_cast<int>(threadIdx.x) - half;
#pragma unroll 1
    for (int i = begin + first; first >= 0 && i < end; i += blockDim.x - half) {
        const uint64_t word = device::pack(bits(i), in.seq);
#pragma unroll 1
        for (int p = view.peers.near_begin; p < view.peers.near_end; ++p) {
            if (without<F>(in, p)) continue;
            ptx::st_relaxed_sys(reinterpret_cast<uint64_t*>(control[p] + offset) + i, word);
        }
        if (!F::kIsUsual && in.outbox != nullptr) in.outbox[i] = word;
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

template <class F = NoFar>
__device__ inline void publish_head(const RankView& view, std::byte* const* control,
                                    const Begin& begin, const Entering& in) {
    using L = NoticeLayout;
    publish_words<false, F>(view, control, in, 0, in.code == kOk ? L::kRefusal : L::kRows,
                            [&](int i) { return head_word(begin, in, i); });
}

}  // namespace ep::kernels
