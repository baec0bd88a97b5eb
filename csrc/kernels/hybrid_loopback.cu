// The kernels across nodes, compiled for nodes that are pretended (device/rail_loopback.cuh).
#include <cuda_runtime_api.h>

#include "device/rail_loopback.cuh"
#include "kernels/loopback.h"
#include "kernels/rail_kernels.cuh"

namespace ep::kernels {
namespace {

class Loopback : public LoopbackKernels {
public:
    explicit Loopback(const LoopbackParts& parts)
        : rail_{parts.segments, reinterpret_cast<device::HeldPuts*>(parts.held), parts.nodes,
                parts.rank, Trouble{}},
          table_(rail_kernels(&rail_)) {}

    const RailKernels& table() const override { return table_; }
    void set_trouble(const Trouble& trouble) override { rail_.trouble = trouble; }

private:
    device::LoopbackRail rail_;
    RailKernels table_;
};

}  // namespace

std::unique_ptr<LoopbackKernels> make_loopback(const LoopbackParts& parts) {
    return std::make_unique<Loopback>(parts);
}

int64_t held_bytes(int num_warps) { return num_warps * int64_t{sizeof(device::HeldPuts)}; }

}  // namespace ep::kernels
