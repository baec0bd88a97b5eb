// Private device memory of a rank: tables that never change, and what the kernels of an operation
// leave for each other. And the page its kernels share with their host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "contract/gpu.h"

namespace ep {

class DeviceState {
public:
    // On the current device. `control`, `arenas`, `arena_bytes`: of every rank, as mapped here.
    DeviceState(const Shape& shape, int rank, const std::vector<int32_t>& expert_owner,
                const std::vector<std::byte*>& control, const std::vector<std::byte*>& arenas,
                const std::vector<int64_t>& arena_bytes);
    ~DeviceState();
    DeviceState(const DeviceState&) = delete;
    DeviceState& operator=(const DeviceState&) = delete;

    State view() const;
    Peers peers() const;      // all of which we reach
    uint32_t* abort() const;  // device
    HostPage* page() const { return page_; }
    HostPage* mapped_page() const { return mapped_; }  // the same, as kernels see it
    int num_local() const { return num_local_; }       // experts here

private:
    StateLayout layout_;
    std::byte* data_ = nullptr;
    HostPage *page_ = nullptr, *mapped_ = nullptr;
    std::byte* control_;  // our block
    int num_ranks_, rank_, num_local_ = 0;
};

}  // namespace ep
