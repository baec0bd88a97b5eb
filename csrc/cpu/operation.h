// What dispatch and combine share: entering an operation, reading everybody's entry, failing it,
// leaving its slot.
#pragma once

#include <vector>

#include "cpu/rank.h"
#include "cpu/wait_times.h"

namespace ep::cpu {

class Operation {
public:
    // `can_lack`: it goes on without masked ranks, where there are masks.
    Operation(Rank& rank, OpKind kind, uint64_t seq, const WaitHooks& hooks, bool can_lack);

    // 0. The slot is ours again at every peer: it has finished what it did there num_slots
    // operations ago.
    bool acquire_slot();
    // Whether it goes without a rank: nothing is sent there or awaited from there.
    bool without(int peer) const { return gone_ != 0 && (gone_ >> peer & 1) != 0; }
    // After a wait for it that came to nothing: whether it is only masked. From here on without it.
    bool goes_without(int peer);
    // 1. Publishes `entry` (and our selections of the peer's experts) to one peer.
    void enter(int peer, EntryRecord entry, const int32_t* expert_counts);
    // 2. Waits for everybody's entry; false when one of them poisons the call or disagrees with
    // `mine`. wait_stats: [num_ranks] or null, see WaitTimes.
    bool await_entries(const Descriptor& mine, int64_t* wait_stats);
    // 8. We have read all there is in this slot.
    void release_slot();

    // Marks the call failed here; `fail` also ends the communicator when the code says so.
    Outcome fail(const Outcome& outcome);
    // An extent that a late peer may still write to after the communicator failed: never granted
    // again.
    void abandon(std::shared_ptr<ExtentHold> extent) { rank.lost_.push_back(std::move(extent)); }
    static Outcome outcome_of(int code, int peer, int64_t a = 0, int64_t b = 0);

    template <class T>
    T& at(int owner, int64_t offset) const {
        return *reinterpret_cast<T*>(rank.peers_[owner].control->data() + offset);
    }
    // What peers said, copied when they published it: what was checked cannot change afterwards.
    const EntryRecord& entry_of(int src) const { return entries_[src]; }
    const BaseRecord& base_of(int dst) const { return bases_[dst]; }
    void read_base(int dst) { bases_[dst] = at<BaseRecord>(me, layout.base(slot, dst)); }
    uint64_t& expected(int src) const { return rank.expected_[size_t(slot) * num_ranks + src]; }
    auto& flow(int peer) const { return rank.flows_[peer]; }
    std::byte* arena_of(int peer) const { return rank.peers_[peer].arena->data(); }
    void ring_all() const;

    Rank& rank;
    const ControlLayout& layout;
    const ExpertMap& experts;
    const OpKind kind;
    const uint64_t seq;
    const int me, num_ranks, slot;
    Watch watch;
    Outcome outcome;

private:
    bool judge_entries(const Descriptor& mine);

    uint64_t gone_;                     // a bit for each rank
    std::vector<EntryRecord> entries_;  // [num_ranks]
    std::vector<BaseRecord> bases_;     // [num_ranks]
};

}  // namespace ep::cpu
