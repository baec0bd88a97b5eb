#include <cuda_runtime_api.h>

#include <algorithm>
#include <utility>

#include "host/cuda_check.h"
#include "host/device_arena.h"
#include "host/graph_hold.h"
#include "transport/beside_captures.h"

namespace ep {

DeviceArena::DeviceArena(std::shared_ptr<DeviceMemory> memory)
    : memory_(std::move(memory)), extents_(memory_->bytes()) {}

DeviceArena::~DeviceArena() = default;

std::shared_ptr<StreamHold> DeviceArena::grant(int64_t bytes, Stream stream) {
    return grant(bytes, stream, is_capturing(stream));
}

std::shared_ptr<StreamHold> DeviceArena::grant(int64_t bytes, Stream stream, bool capturing) {
    release_dropped(this);
    collect(stream, capturing, false);
    auto extent = extents_.grant(bytes);
    if (!extent) {
        collect(stream, capturing, true);
        extent = extents_.grant(bytes);
    }
    if (!extent) return nullptr;
    auto hold = std::make_shared<StreamHold>(shared_from_this(), *extent, stream);
    if (capturing) keep_in_graph(stream, hold, this);
    return hold;
}

int64_t DeviceArena::reclaim(Stream stream) {
    release_dropped(this);
    collect(stream, is_capturing(stream), true);
    return extents_.stats().largest_free;
}

void DeviceArena::trim(const StreamHold& hold, int64_t bytes) {
    extents_.trim(hold.extent().offset, bytes);
}

int64_t DeviceArena::offset_of(uintptr_t address, int64_t bytes) const {
    const auto base = reinterpret_cast<uintptr_t>(memory_->data());
    if (address < base || address + bytes > base + memory_->bytes()) return -1;
    const auto offset = static_cast<int64_t>(address - base);
    return extents_.find(offset, bytes) ? offset : -1;
}

void DeviceArena::retire(int64_t offset, const std::vector<Stream>& streams) {
    Retired extent{offset, {}};
    for (Stream stream : streams) extent.users.push_back({stream, nullptr});
    std::lock_guard lock(mutex_);
    retired_.push_back(std::move(extent));
}

// What one call of collect asks streams, each once.
class DeviceArena::Marks {
public:
    explicit Marks(int device) : device_(device) {}

    // Whether the stream has done all that was queued there when the extent was first looked at.
    bool are_reached(User& user) {
        if (!user.mark) {
            Found& stream = found(user.stream);
            if (stream.is_done) return true;
            if (!stream.mark) stream.mark = mark_of(user.stream);
            user.mark = stream.mark;
            return false;
        }
        auto* event = static_cast<cudaEvent_t>(user.mark.get());
        for (const auto& [seen, is_reached] : seen_) {
            if (seen == event) return is_reached;
        }
        seen_.emplace_back(event, is_ready(cudaEventQuery(event)));
        return seen_.back().second;
    }

private:
    struct Found {
        Stream stream;
        bool is_done;
        std::shared_ptr<void> mark;  // for all extents that have none yet
    };
    Found& found(Stream stream) {
        for (Found& f : found_) {
            if (f.stream == stream) return f;
        }
        found_.push_back({stream, is_ready(cudaStreamQuery(stream)), nullptr});
        return found_.back();
    }
    std::shared_ptr<void> mark_of(Stream stream) const {
        EP_CUDA(cudaSetDevice(device_));
        cudaEvent_t event;
        EP_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        std::shared_ptr<void> mark(event, [](void* e) {
            const BesideCaptures beside;
            cudaEventDestroy(static_cast<cudaEvent_t>(e));
        });
        EP_CUDA(cudaEventRecord(event, stream));
        return mark;
    }

    const int device_;
    const BesideCaptures beside_;
    std::vector<Found> found_;
    std::vector<std::pair<cudaEvent_t, bool>> seen_;
};

// `waits`: the stream waits for the others. A capture takes nothing back that another stream has used: its
// graph cannot wait for work that was queued outside of it.
void DeviceArena::collect(Stream stream, bool capturing, bool waits) {
    std::vector<Retired> found, kept;
    {
        std::lock_guard lock(mutex_);
        found.swap(retired_);
    }
    if (found.empty()) return;
    Marks marks(device());
    std::vector<void*> waited;
    for (Retired& extent : found) {
        bool ready = true;
        // Who has got there is not asked again: it may have other work by then.
        std::erase_if(extent.users, [&](User& user) {
            if (user.stream == stream) return false;
            const bool may_ask = !capturing && !is_capturing(user.stream);
            if (may_ask && marks.are_reached(user)) return true;
            ready = ready && may_ask && waits;
            return false;
        });
        if (!ready) {
            // The same for our own work, should a grant on another stream find the extent.
            std::erase_if(extent.users, [&](User& user) {
                return user.stream == stream && !capturing && marks.are_reached(user);
            });
            kept.push_back(std::move(extent));
            continue;
        }
        for (const User& user : extent.users) {
            void* mark = user.stream == stream ? nullptr : user.mark.get();
            if (mark == nullptr || std::find(waited.begin(), waited.end(), mark) != waited.end()) {
                continue;
            }
            EP_CUDA(cudaStreamWaitEvent(stream, static_cast<cudaEvent_t>(mark), 0));
            waited.push_back(mark);
        }
        extents_.give_back(extent.offset);
    }
    if (kept.empty()) return;
    std::lock_guard lock(mutex_);
    std::move(kept.begin(), kept.end(), std::back_inserter(retired_));
}

void StreamHold::use_on(Stream stream) {
    std::lock_guard lock(mutex_);
    if (std::find(streams_.begin(), streams_.end(), stream) == streams_.end()) {
        streams_.push_back(stream);
    }
}

}  // namespace ep
