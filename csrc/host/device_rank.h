// One GPU rank: its state on the device, the page its kernels report to, and the order of its
// operations.
//
// A dispatch is queued as a whole, before anybody knows its sizes: outputs are granted for the worst case,
// and what is too much comes back once the kernel has reported them, which is while the rows travel.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "contract/gpu.h"
#include "host/copy_push.h"
#include "host/device_arena.h"
#include "host/device_state.h"
#include "host/flight.h"
#include "host/peer_watch.h"
#include "host/rails.h"
#include "transport/device_memory.h"

namespace ep {

// Memory of a rank as this process has it mapped, and its process. Of a rank of another node: no memory, and
// how large its arena is.
struct DevicePeer {
    std::shared_ptr<DeviceMemory> control, arena;
    PeerProcess process;
    int64_t arena_bytes = 0;
};

// A combine that has been queued, or its first half.
struct BegunCombine {
    CombineJob job;
    int32_t num_blocks = 1;
    Half half = Half::kBoth;
};

class DeviceRank {
public:
    // Collective in effect: every rank constructs one before the first operation. `max_blocks`
    // bounds what any kernel may occupy. `late` is called from a thread of ours. `rails`: of a buffer
    // across nodes. `can_mask`: small operations go on without a rank that is lost; across nodes those of
    // direct mode.
    DeviceRank(const Shape& shape, int rank, uint64_t generation,
               const std::vector<int32_t>& expert_owner, std::vector<DevicePeer> peers,
               std::shared_ptr<DeviceArena> arena, const PeerClocks& clocks, int max_blocks,
               std::function<void(OpKind, int peer, double waited_s)> late,
               const RailSetup* rails = nullptr, bool can_mask = false);
    ~DeviceRank();
    DeviceRank(const DeviceRank&) = delete;
    DeviceRank& operator=(const DeviceRank&) = delete;

    // Queues all of it. With `reports` sizes are known once the report is there; then, or at once when
    // shapes are static, call settle. Null: with `grants_all`, and nothing has happened.
    std::shared_ptr<Flight> dispatch(const DispatchArgs& args, const DispatchWants& wants,
                                     Stream stream);
    // Moves the rows of a dispatch by copies, once its report is there and good. Compact, not
    // quantized. By SMs after all when the arena has no room to pack them.
    void push_copies(Flight& flight);
    // Whether the report of a call is there.
    bool has_report(Flight& flight);
    // Waits for it; false when it is not there within `limit`. Then nothing is lost: ask again.
    bool await_report(Flight& flight, std::chrono::milliseconds limit);
    // Extents shrink to what the report says.
    void settle(Flight& flight);

    std::shared_ptr<BegunCombine> combine(const CombineArgs& args, const CombineWants& wants,
                                          Stream stream);
    // The second half of an operation, when only its first one has been queued.
    void finish(Flight& flight, Stream stream);
    void finish(BegunCombine& begun, Stream stream);
    // Makes every peer fail this operation instead of waiting for us.
    void refuse(OpKind kind, const Outcome& why, Stream stream);

    // Nobody waits for a rank any more, as soon as this returns.
    void mask(int rank);
    // A bit for each rank that is masked, as far as this host was told: by the end of an operation.
    uint64_t masked() const;
    // As of now; and a number that no operation of ours exceeds, as this host or, with graphs replayed, the
    // device counts them. Waits for a copy.
    std::pair<uint64_t, uint64_t> masked_and_seq() const;
    // Collective in effect, between operations: these stay masked, and `seq` is the last number.
    void unmask(uint64_t seq, uint64_t masked);
    // Whether a peer has closed or its process has ended, as far as we know by now.
    bool is_gone(int peer) const { return !watch_ || watch_->is_over(peer); }

    // What the first static call or combine could not raise, of those nobody has asked about yet.
    std::optional<Outcome> take_deferred();
    bool failed() const { return incident().has_value(); }  // this communicator ended
    Outcome verdict() const;                                // of the failure that ended it
    int fault() const;                                      // our context broke: a CUDA error
    // Somebody else may use the bootstrap connections meanwhile.
    void pause_watch(bool paused) { watch_->pause(paused); }
    void interrupt();  // every wait of ours ends soon
    void leave();      // peers that wait for us raise E111 from now on; waits for our kernels

    const Shape& shape() const { return shape_; }
    // Whether a call goes as small batches do.
    template <class Args>
    bool stages(const Args& args) const {
        return rails_ ? rails_->is_direct(shape_, args) : is_staged(shape_, args);
    }
    uint64_t seq() const { return begun_; }
    int default_sms(OpKind kind) const;
    int num_local() const { return state_->num_local(); }  // experts of this rank
    const std::shared_ptr<DeviceArena>& arena() const { return arena_; }
    const Rails* rails() const { return rails_.get(); }  // null on one node

private:
    bool enter(Stream stream);  // whether it is being captured
    bool grant(Flight& flight, const DispatchWants& wants);
    bool take_extents(Flight& flight, int64_t rows, int64_t tokens);
    void tell_extents(Flight& flight, int64_t rows, int64_t tokens);
    void refuse_memory(Flight& flight, int64_t needed, int64_t free);
    void launch(Flight& flight, const DispatchWants& wants);
    void expand(Flight& flight);
    // A second half is as large as the first one.
    void launch_staged(Flight& flight, Half half, int num_sms = 0);
    void launch_staged(BegunCombine& begun, Half half, Stream stream, int num_sms = 0);
    int blocks(OpKind kind, int num_sms) const;
    // SMs of a small operation.
    int small_blocks(StageBlocks needed, int num_sms) const;
    RankView small_view() const;  // of operations that go on without masked ranks
    std::optional<Outcome> incident() const;

    Shape shape_;
    int rank_;
    std::vector<DevicePeer> peers_;
    std::shared_ptr<DeviceArena> arena_;
    std::shared_ptr<DeviceState> state_;
    std::shared_ptr<Rails> rails_;
    std::shared_ptr<void> kept_;  // all that a captured graph may touch
    std::unique_ptr<PeerWatch> watch_;
    std::unique_ptr<CopyPush> copies_;
    RankView view_;
    HostPage* page_ = nullptr;
    Stream last_stream_ = nullptr;
    bool has_stream_ = false;
    void* order_ = nullptr;  // cudaEvent_t
    void* probe_ = nullptr;  // cudaStream_t: tells whether our context works
    uint64_t begun_ = 0;     // operations begun by this host
    int smem_bytes_ = 0, max_blocks_ = 1;
    bool left_ = false;
    const bool can_mask_;
    const int64_t pid_;
    Outcome last_words_{};  // the verdict, once the page is gone
};

}  // namespace ep
