// One CPU rank: its own and its peers' shared memory, and the two operations on it.
//
// The protocol is docs/protocol.md, "Steps on a CPU": counts first, the receiver places, rows go
// straight to their final place, combine pulls. Operations of one rank run one after the other, in
// the order they were begun.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "contract/args.h"
#include "contract/layout.h"
#include "contract/records.h"
#include "contract/shape.h"
#include "contract/status.h"
#include "cpu/watch.h"
#include "host/arena.h"
#include "transport/segment.h"

namespace ep::cpu {

// A rank's shared memory as this process sees it.
struct Peer {
    std::shared_ptr<Segment> control, arena;
    PeerProcess process;
};

// Which rank owns an expert, and where it stands there.
class ExpertMap {
public:
    ExpertMap(std::vector<int32_t> owner, int num_ranks);

    int num_experts() const { return static_cast<int>(owner_.size()); }
    int owner(int64_t expert) const { return owner_[expert]; }
    int local(int64_t expert) const { return local_[expert]; }
    int num_local(int rank) const { return first_[rank + 1] - first_[rank]; }
    // Experts counted owner by owner: position(e) = first(owner) + local.
    int first(int rank) const { return first_[rank]; }
    int position(int64_t expert) const { return first_[owner_[expert]] + local_[expert]; }

private:
    std::vector<int32_t> owner_, local_, first_;
};

// Where dispatched rows lie, until the tensors that use them die.
struct Dispatched {
    Outcome outcome;
    uint64_t seq = 0;
    int64_t num_recv = 0;              // unique tokens received
    int64_t num_rows = 0;              // rows of x; slab: rows per expert
    int64_t x_offset = -1;             // of x in our arena
    std::vector<int32_t> group_start;  // [num_local_experts + 1] grouped: first row of each group
    std::vector<int64_t> lost_rows;  // slab: counted, but their source was masked before they came
    std::shared_ptr<ExtentHold> x, meta;
};

class Rank {
public:
    Rank(const Shape& shape, int rank, uint64_t generation, std::vector<int32_t> expert_owner,
         std::vector<Peer> peers, std::shared_ptr<Arena> arena, const Clocks& clocks,
         bool can_mask = false);

    // The next operation's sequence number, in the order operations are begun.
    uint64_t take_seq() { return ++last_seq_; }

    Dispatched dispatch(uint64_t seq, const DispatchArgs& args, const WaitHooks& hooks);
    // Turns what lies beside the rows into the tensors a user sees, and duplicates rows where a
    // layout wants it. False when metadata names an expert or a row that does not exist; that entry
    // is skipped, and a peer's ends the communicator.
    bool unpack(const Dispatched& result, const DispatchArgs& args, const UnpackArgs& out);
    Outcome combine(uint64_t seq, const CombineArgs& args, const WaitHooks& hooks);
    // Tells every peer that this rank refused its call, so that they raise instead of waiting.
    // Waits only for the slot.
    Outcome refuse(uint64_t seq, OpKind kind, const Outcome& why, const WaitHooks& hooks);

    // Nobody waits for a rank any more.
    void mask(int rank) const { masks_.mask(rank); }
    uint64_t masked() const { return masks_.now(); }  // a bit for each rank
    // Collective in effect, between operations: these stay masked, and `seq` is the last number.
    void unmask(uint64_t seq, uint64_t masked);
    // Whether a peer has closed or failed, or its process has ended.
    bool is_gone(int peer) const;

    void leave();  // peers that wait for us raise E111 from now on
    Outcome verdict() const { return verdict_; }
    uint64_t seq() const { return last_seq_; }
    void seed_seq(
        uint64_t seq);  // tests: start near a wrap; all ranks alike, before the first operation

    int rank() const { return rank_; }
    const Shape& shape() const { return shape_; }
    const ExpertMap& experts() const { return experts_; }
    const std::shared_ptr<Arena>& arena() const { return arena_; }
    std::byte* arena_data() const { return peers_[rank_].arena->data(); }
    int64_t peers_arena_bytes(int rank) const { return peers_[rank].arena->bytes(); }
    ControlHeader& header(int rank) const;

private:
    friend class Operation;

    // Rows that ever went through rings: staged by us for a source, taken by us from an owner.
    struct Flow {
        uint64_t staged = 0, taken = 0;
    };

    void give_up(const Outcome& why);  // the communicator has failed; tells every peer
    void wake_all() const;
    std::vector<ControlHeader*> all_headers() const;
    std::vector<uint64_t*> mask_words() const;

    Shape shape_;
    ControlLayout layout_;
    int rank_;
    ExpertMap experts_;
    std::vector<Peer> peers_;
    std::vector<PeerProcess> processes_;
    std::shared_ptr<Arena> arena_;
    Clocks clocks_;
    const bool can_mask_;
    Masks masks_;
    uint64_t last_seq_ = 0;
    std::vector<uint64_t> expected_;                 // [slots][ranks] rows ever announced to us
    std::vector<Flow> flows_;                        // [ranks]
    Outcome verdict_;                                // of the failure that ended this communicator
    std::vector<std::shared_ptr<ExtentHold>> lost_;  // extents a peer may still write to
    std::mutex running_;                             // one operation at a time
};

}  // namespace ep::cpu
