// One GPU rank: its state on the device, the page its kernels report to, and the order of its
// operations.
//
// An operation is launched in two halves. The first decides sizes on the device and moves the rows;
// a caller that wants exact sizes waits for its report while they travel. The second unpacks what
// arrived into tensors of the right size.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "contract/gpu.h"
#include "host/device_arena.h"
#include "transport/device_memory.h"

namespace ep {

struct DeviceClocks {
    double arrival_s = 600.0;  // < 0: never
    double progress_s = 30.0;
};

// Memory of every rank as this process has it mapped.
struct DevicePeer {
    std::shared_ptr<DeviceMemory> control, arena;
};

// A dispatch between its two halves.
struct Flight {
    explicit Flight(const DispatchJob& j) : job(j) {}

    DispatchJob job;
    std::shared_ptr<StreamHold> x, meta;
    int32_t num_blocks = 1;
    HostPage::Report report{};  // once waited for
};

class DeviceRank {
public:
    // Collective in effect: every rank constructs one before the first operation. `max_blocks`
    // bounds what any kernel may occupy.
    DeviceRank(const Shape& shape, int rank, uint64_t generation,
               const std::vector<int32_t>& expert_owner, std::vector<DevicePeer> peers,
               std::shared_ptr<DeviceArena> arena, const DeviceClocks& clocks, int max_blocks);
    ~DeviceRank();
    DeviceRank(const DeviceRank&) = delete;
    DeviceRank& operator=(const DeviceRank&) = delete;

    // First half. `status` and `num_recv` are device words of a static call; `waits` asks for a
    // report.
    std::shared_ptr<Flight> begin_dispatch(const DispatchArgs& args, bool waits, int32_t* status,
                                           int32_t* num_recv, int num_sms, Stream stream);
    // The report of a begun call; false when it is not there within `limit`. Then nothing is lost:
    // ask again.
    bool await_report(Flight& flight, Stream stream, std::chrono::milliseconds limit);
    // Second half: extents shrink to what arrived, records become tensors.
    void finish_dispatch(Flight& flight, const UnpackArgs& out, Stream stream);

    void combine(const CombineArgs& args, int num_sms, Stream stream);
    // Makes every peer fail this operation instead of waiting for us.
    void refuse(OpKind kind, const Outcome& why, Stream stream);

    // What the last static call or combine could not raise; at most once each.
    std::optional<Outcome> take_deferred();
    Outcome verdict() const;  // of the failure that ended this communicator
    void interrupt();         // every wait of ours ends soon
    void leave();  // peers that wait for us raise E111 from now on; waits for our kernels

    uint64_t seq() const { return begun_; }
    int default_sms(OpKind kind) const;
    const std::shared_ptr<DeviceArena>& arena() const { return arena_; }

private:
    void fill_state(const std::vector<int32_t>& expert_owner);
    void enter(Stream stream);
    Begin begin(OpKind kind);
    int blocks(OpKind kind, int num_sms) const;
    std::optional<Outcome> incident() const;

    RankView view_;
    std::vector<DevicePeer> peers_;
    std::shared_ptr<DeviceArena> arena_;
    std::byte* state_ = nullptr;  // device
    HostPage* page_ = nullptr;    // pinned
    Stream last_stream_ = nullptr;
    bool has_stream_ = false;
    void* order_ = nullptr;  // cudaEvent_t
    uint64_t begun_ = 0;     // operations begun by this host
    uint64_t deferred_seen_ = 0;
    int num_local_ = 0;
    int smem_bytes_ = 0, max_blocks_ = 1;
    bool left_ = false;
    Outcome last_words_{};  // the verdict, once the page is gone
};

}  // namespace ep
