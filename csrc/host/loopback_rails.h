// Rails of a rank whose other nodes are pretended: every segment is memory of this process's GPUs.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "contract/loopback.h"
#include "host/rails.h"
#include "kernels/loopback.h"
#include "transport/device_memory.h"

namespace ep {

class LoopbackRails : public std::enable_shared_from_this<LoopbackRails> {
public:
    // On the device of `segments[rank]`. `segments`: of every rank, as mapped here; of
    // RailLayout(shape).end bytes, zeroed. `max_blocks`: of any kernel.
    static std::shared_ptr<LoopbackRails> create(
        const RailShape& shape, int rank, std::vector<std::shared_ptr<DeviceMemory>> segments,
        int max_blocks);
    ~LoopbackRails();
    LoopbackRails(const LoopbackRails&) = delete;
    LoopbackRails& operator=(const LoopbackRails&) = delete;

    RailSetup setup();
    // From the next operation on.
    void set_trouble(const Trouble& trouble) { kernels_->set_trouble(trouble); }

private:
    LoopbackRails() = default;

    RailShape shape_;
    std::vector<std::shared_ptr<DeviceMemory>> segments_;
    std::byte* data_ = nullptr;  // device: addresses of the segments, puts held back
    std::unique_ptr<kernels::LoopbackKernels> kernels_;
};

}  // namespace ep
