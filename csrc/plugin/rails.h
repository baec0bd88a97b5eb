// The kernels across nodes, compiled for NVSHMEM, of one rank: the table host code calls through, and what
// it points to.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "contract/rail.h"
#include "kernels/rail_kernels.h"
#include "transport/nvshmem.h"

namespace ep {

class NvshmemRails {
public:
    virtual ~NvshmemRails() = default;
    virtual const kernels::RailKernels& table() const = 0;
};

// On the current device. `pe`: of each rank. `has_network`: some PE is reached through a NIC.
std::shared_ptr<NvshmemRails> make_nvshmem_rails(const NvshmemSegment& segment,
                                                 const std::vector<int>& pe, bool has_network);

}  // namespace ep
