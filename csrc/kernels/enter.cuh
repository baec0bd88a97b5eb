// What dispatch and combine share: one block enters an operation, reads everybody's entry, comes to
// the verdict, leaves the slot.
//
// defines: Entering, acquire_slot, publish_entries, await_entries, fail_call, report, release_slot
//
// Every rank reads the same entries, so every rank comes to the same verdict. All functions are for
// all threads of a block; `false` means that this rank has given up: return.
//
// Loops stay loops: this runs once, out of cold caches, and waits for nothing as long as for its code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "contract/gpu.h"
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

// In shared memory of the block that enters.
struct Entering {
    EntryRecord entry;   // what we publish
    Outcome outcome;     // what went wrong, if it did
    uint32_t first_bad;  // the lowest objection, see judge
    uint64_t seq;
    int32_t slot;  // seq % num_slots; a division is a page of code, so once
};

enum Objection : uint32_t { kEpochObjection, kKindObjection, kPoisonObjection, kFieldObjection };
constexpr uint32_t kNoObjection = 0xffffffffu;

__device__ __forceinline__ uint32_t objection(Objection kind, int peer) {
    return uint32_t{kind} << 16 | static_cast<uint32_t>(peer);
}

// Takes the next sequence number, and the slot once every peer has left what it did there
// num_slots operations ago.
__device__ inline bool acquire_slot(const RankView& view, const Begin& begin, Entering& in) {
    static_assert(sizeof(EntryRecord) % 8 == 0);
    const int tid = threadIdx.x;
#pragma unroll 1
    for (int i = tid; i < int{sizeof(EntryRecord) / 8}; i += blockDim.x) {
        reinterpret_cast<uint64_t*>(&in.entry)[i] =
            reinterpret_cast<const uint64_t*>(&begin.entry)[i];
    }
#pragma unroll 1
    for (int i = tid; i < int{sizeof(Outcome) / 8}; i += blockDim.x) {
        reinterpret_cast<uint64_t*>(&in.outcome)[i] = 0;
    }
    const uint64_t seq = *view.state.seq + 1;
    const uint64_t num_slots = view.shape.num_slots;
    const int slot = static_cast<int>(seq % num_slots);
    const Operation op{static_cast<OpKind>(begin.entry.kind), seq};
    bool ok = true;
    if (seq > num_slots) {
#pragma unroll 1
        for (int p = tid; p < view.shape.num_ranks; p += blockDim.x) {
            // pairs with the release in release_slot
            const auto* word =
                at<uint64_t>(view, view.peers.rank, view.layout.released_word(slot, p));
            ok = ok && device::wait_word(view.watch, op, {Site::kSlot, p, seq - num_slots}, word);
        }
    }
    ok = __syncthreads_and(ok);
    if (tid == 0) {
        in.seq = seq;
        in.slot = slot;
        in.first_bad = kNoObjection;
        *view.state.seq = seq;
        OpState& state = *view.state.op;
        state.seq = seq;
        state.slot = slot;
        state.code = kOutOfStep;  // until the verdict
        ControlHeader* own = at<ControlHeader>(view, view.peers.rank, 0);
        own->entered_kind = begin.entry.kind;
        own->entered_seq = seq;  // for sentences only, orders nothing
    }
    __syncthreads();
    return ok;
}

// What a dispatch brings, in shared memory.
struct Bringing {
    const int32_t* totals = nullptr;  // rows for every rank, then selections by position; or null
    const int32_t* first = nullptr;   // [num_ranks + 1] position of each rank's first expert
    bool counts = false;              // selections are told
};

// One warp for each peer.
__device__ inline void publish_entries(const RankView& view, const Entering& in,
                                       const Bringing& what) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
    const int slot = in.slot;
    const auto* words = reinterpret_cast<const uint64_t*>(&in.entry);
    constexpr int kNumRows = offsetof(EntryRecord, num_rows) / 8;
#pragma unroll 1
    for (int p = warp; p < view.shape.num_ranks; p += num_warps) {
        auto* theirs = at<uint64_t>(view, p, view.layout.entry(slot, view.peers.rank));
#pragma unroll 1
        for (int i = lane + 1; i < int{sizeof(EntryRecord) / 8}; i += 32) {
            theirs[i] =
                i == kNumRows && what.totals != nullptr ? uint64_t(what.totals[p]) : words[i];
        }
        if (what.counts) {
            const int first = what.first[p], num_local = what.first[p + 1] - first;
            auto* counts = at<int32_t>(view, p, view.layout.count_row(slot, view.peers.rank));
            const int32_t* selections = what.totals + view.shape.num_ranks + first;
#pragma unroll 1
            for (int e = lane; e < num_local; e += 32) counts[e] = selections[e];
        }
        __syncwarp();
        if (lane == 0) ptx::st_release_sys(theirs, in.seq);  // pairs with await_entries
    }
}

__device__ __forceinline__ const EntryRecord& entry_of(const RankView& view, int slot, int src) {
    return *at<const EntryRecord>(view, view.peers.rank, view.layout.entry(slot, src));
}

// A warp looks at one peer's entry; returns its objection.
__device__ inline uint32_t judge(const RankView& view, const Entering& in, int p) {
    const EntryRecord& entry = entry_of(view, in.slot, p);
    const int lane = threadIdx.x % 32;
    static_assert(kNumFields <= 32);
    const bool same =
        lane >= kNumFields || entry.descriptor.value[lane] == in.entry.descriptor.value[lane];
    const bool agree = __all_sync(~0u, same);
    if (entry.seq != in.seq) return objection(kEpochObjection, p);
    if (entry.kind != in.entry.kind) return objection(kKindObjection, p);
    if (entry.code != kOk) return objection(kPoisonObjection, p);
    return agree ? kNoObjection : objection(kFieldObjection, p);
}

__device__ inline void set_outcome(Outcome& outcome, int code, int peer, int64_t want,
                                   int64_t have) {
    outcome.incident.code = static_cast<uint16_t>(code);
    outcome.incident.peer = static_cast<int16_t>(peer);
    outcome.incident.want = want;
    outcome.incident.have = have;
}

// What a peer published becomes an address only after it was found to lie in that peer's arena:
// `count` items of `bytes` from `offset` on.
__device__ inline bool lies_in_arena(const RankView& view, int peer, int64_t offset, int64_t count,
                                     int64_t bytes) {
    const int64_t limit = view.peers.arena_bytes[peer];
    return offset >= 0 && offset <= limit && offset % kRowAlign == 0 && count >= 0 &&
           (bytes == 0 || count <= (limit - offset) / bytes);
}

// One thread turns the lowest objection into an outcome.
__device__ __noinline__ inline void explain(const RankView& view, Entering& in) {
    const int p = static_cast<int>(in.first_bad & 0xffff);
    const EntryRecord& entry = entry_of(view, in.slot, p);
    Outcome& outcome = in.outcome;
    switch (in.first_bad >> 16) {
        case kEpochObjection:
            return set_outcome(outcome, kBadEpoch, p, int64_t(in.seq), int64_t(entry.seq));
        case kKindObjection:
            return set_outcome(outcome, kOutOfStep, p, in.entry.kind, entry.kind);
        case kPoisonObjection:
            if (!may_poison_entry(entry.code))
                return set_outcome(outcome, kBadCount, p, 0, entry.code);
            set_outcome(outcome, entry.code, p, 0, 0);
#pragma unroll 1
            for (int i = 0; i < 4; ++i) outcome.detail[i] = entry.detail[i];
#pragma unroll 1
            for (int i = 0; i < kReasonBytes; ++i) outcome.reason[i] = entry.reason[i];
            outcome.reason[kReasonBytes - 1] = '\0';
            return;
        default:
#pragma unroll 1
            for (int f = 0; f < kNumFields; ++f) {
                const int64_t mine = in.entry.descriptor.value[f];
                const int64_t theirs = entry.descriptor.value[f];
                if (mine == theirs) continue;
                set_outcome(outcome, kCallDiffers, p, mine, theirs);
                outcome.detail[0] = f;
                return;
            }
    }
}

// Waits for everybody's entry; afterwards in.outcome holds the verdict on them. A warp calls read(p)
// once it has p's.
template <class Read>
__device__ bool await_entries(const RankView& view, Entering& in, Read read) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
    const int slot = in.slot;
    const Operation op{static_cast<OpKind>(in.entry.kind), in.seq};
    bool ok = true;
#pragma unroll 1
    for (int p = warp; p < view.shape.num_ranks; p += num_warps) {
        const auto* word = at<uint64_t>(view, view.peers.rank, view.layout.entry(slot, p));
        // pairs with the release in publish_entries
        if (lane == 0)
            ok = ok && device::wait_word(view.watch, op, {Site::kEntry, p, in.seq}, word);
        ok = __shfl_sync(~0u, ok, 0);
        if (!ok) break;
        read(p);
        const uint32_t objected = judge(view, in, p);
        if (lane == 0 && objected != kNoObjection) atomicMin(&in.first_bad, objected);
    }
    ok = __syncthreads_and(ok);
    if (ok && threadIdx.x == 0 && in.first_bad != kNoObjection) explain(view, in);
    __syncthreads();
    return ok;
}

// One thread. We have read all there is in this slot.
__device__ inline void release_slot(const RankView& view, uint64_t seq, int slot) {
#pragma unroll 1
    for (int p = 0; p < view.shape.num_ranks; ++p) {
        // pairs with the acquire in acquire_slot
        ptx::st_release_sys(at<uint64_t>(view, p, view.layout.released_word(slot, view.peers.rank)),
                            seq);
    }
    ptx::st_release_sys(&at<ControlHeader>(view, view.peers.rank, 0)->finished_seq, seq);
}

// One thread. Tells our host what came of the call.
__device__ inline void report(const RankView& view, const Begin& begin, uint64_t seq,
                              const Outcome* failure, const OpState& state) {
    const bool later = begin.call == 0 && begin.report_later && failure != nullptr;
    if (begin.call == 0 && !later) return;
    HostPage& page = *view.watch.page;
    HostPage::Report& out = later ? page.deferred : page.sync[begin.lane];
    if (later && ptx::ld_acquire_sys(&page.deferred_seen) != out.call)
        return;  // the first one stays
    out.seq = seq;
    out.outcome.incident.code = kOk;
    if (failure != nullptr) out.outcome = *failure;
    out.num_recv = state.num_recv;
    out.num_rows = state.num_rows;
    out.index_rows = state.index_rows;
    ptx::st_release_sys(&out.call, later ? seq : begin.call);  // the host acquires it
}

// One thread. The call fails here as it does everywhere; the next one works, unless the ranks are
// out of step.
__device__ __noinline__ inline void fail_call(const RankView& view, const Begin& begin,
                                              Entering& in) {
    Incident& incident = in.outcome.incident;
    incident.magic = Incident::kMagic;
    incident.op = static_cast<uint8_t>(in.entry.kind);
    incident.rank = static_cast<int16_t>(view.peers.rank);
    incident.epoch = static_cast<uint32_t>(in.seq);
    incident.seq = in.seq;
    OpState& state = *view.state.op;
    state.code = incident.code;
    state.num_recv = state.num_rows = state.index_rows = 0;
    if (ends_communicator(incident.code)) {
        const Operation op{static_cast<OpKind>(in.entry.kind), in.seq};
        device::give_up(view.watch, op, incident.code,
                        {incident.site, incident.peer, uint64_t(incident.want)},
                        uint64_t(incident.have), 0);
        return;
    }
    release_slot(view, in.seq, in.slot);
    report(view, begin, in.seq, &in.outcome, state);
}

}  // namespace ep::kernels
