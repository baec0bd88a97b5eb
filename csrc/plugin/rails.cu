#include "plugin/rails.h"

#include <cuda_runtime_api.h>

#include "device/rail_nvshmem.cuh"
#include "kernels/rail_kernels.cuh"
#include "plugin/on_device.h"

namespace ep {
namespace {

class Rails : public NvshmemRails {
public:
    Rails(const NvshmemSegment& segment, const std::vector<int>& pe, bool has_network)
        : pe_(on_device(pe.data(), pe.size())),
          rail_{segment.data, pe_.get(), has_network},
          table_(kernels::rail_kernels(&rail_)) {}

    const kernels::RailKernels& table() const override { return table_; }

private:
    OnDevice<int> pe_;
    device::NvshmemRail rail_;
    kernels::RailKernels table_;
};

}  // namespace

std::shared_ptr<NvshmemRails> make_nvshmem_rails(const NvshmemSegment& segment,
                                                 const std::vector<int>& pe, bool has_network) {
    return std::make_shared<Rails>(segment, pe, has_network);
}

}  // namespace ep
