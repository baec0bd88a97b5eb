#include <cuda_runtime_api.h>

#include <algorithm>

#include "host/cuda_check.h"
#include "host/device_arena.h"
#include "host/graph_hold.h"
#include "transport/beside_captures.h"

namespace ep {

DeviceArena::DeviceArena(std::shared_ptr<DeviceMemory> memory)
    : memory_(std::move(memory)), extents_(memory_->bytes()) {
    const BesideCaptures beside;
    EP_CUDA(cudaSetDevice(memory_->device()));
    EP_CUDA(
        cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(&event_), cudaEventDisableTiming));
}

DeviceArena::~DeviceArena() {
    const BesideCaptures beside;
    cudaEventDestroy(static_cast<cudaEvent_t>(event_));
}

std::shared_ptr<StreamHold> DeviceArena::grant(int64_t bytes, Stream stream) {
    return grant(bytes, stream, is_capturing(stream));
}

std::shared_ptr<StreamHold> DeviceArena::grant(int64_t bytes, Stream stream, bool capturing) {
    release_dropped(this);
    collect(stream, capturing);
    const auto extent = extents_.grant(bytes);
    if (!extent) return nullptr;
    auto hold = std::make_shared<StreamHold>(shared_from_this(), *extent, stream);
    if (capturing) keep_in_graph(stream, hold, this);
    return hold;
}

int64_t DeviceArena::reclaim(Stream stream) {
    release_dropped(this);
    collect(stream, is_capturing(stream));
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

void DeviceArena::retire(Retired extent) {
    std::lock_guard lock(mutex_);
    retired_.push_back(std::move(extent));
}

// A capture takes nothing back that another stream still uses: its graph cannot wait for work that
// was queued outside of it.
void DeviceArena::collect(Stream stream, bool capturing) {
    std::vector<Retired> found, kept;
    {
        std::lock_guard lock(mutex_);
        found.swap(retired_);
    }
    if (found.empty()) return;
    std::vector<Stream> waited{stream};
    for (Retired& extent : found) {
        bool ready = true;
        for (Stream other : extent.streams) {
            if (std::find(waited.begin(), waited.end(), other) != waited.end()) continue;
            ready = !capturing && !is_capturing(other);
            if (!ready) break;
            EP_CUDA(cudaEventRecord(static_cast<cudaEvent_t>(event_), other));
            EP_CUDA(cudaStreamWaitEvent(stream, static_cast<cudaEvent_t>(event_), 0));
            waited.push_back(other);
        }
        if (ready) {
            extents_.give_back(extent.offset);
        } else {
            kept.push_back(std::move(extent));
        }
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
