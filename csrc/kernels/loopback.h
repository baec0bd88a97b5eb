// The kernels across nodes for nodes that are pretended, of one rank.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "contract/loopback.h"
#include "contract/rail.h"
#include "kernels/rail_kernels.h"

namespace ep::kernels {

struct LoopbackParts {
    std::byte* const* segments;  // [num_ranks] as mapped here, in device memory
    std::byte* held;             // held_bytes(warps of the widest grid), zeroed
    NodeShape nodes;
    int32_t rank;
};

class LoopbackKernels {
public:
    virtual ~LoopbackKernels() = default;
    virtual const RailKernels& table() const = 0;
    virtual void set_trouble(const Trouble& trouble) = 0;  // of launches from now on
};

std::unique_ptr<LoopbackKernels> make_loopback(const LoopbackParts& parts);
int64_t held_bytes(int num_warps);

}  // namespace ep::kernels
