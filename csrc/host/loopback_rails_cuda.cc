#include <cuda_runtime_api.h>

#include "host/cuda_check.h"
#include "host/loopback_rails.h"
#include "transport/beside_captures.h"

namespace ep {
namespace {

constexpr int kMaxWarps = 32;  // of a block

}  // namespace

std::shared_ptr<LoopbackRails> LoopbackRails::create(
    const RailShape& shape, int rank, std::vector<std::shared_ptr<DeviceMemory>> segments,
    int max_blocks) {
    const BesideCaptures beside;
    EP_CUDA(cudaSetDevice(segments[rank]->device()));
    std::shared_ptr<LoopbackRails> rails(new LoopbackRails);
    rails->shape_ = shape;
    rails->segments_ = std::move(segments);
    std::vector<std::byte*> addresses;
    for (const auto& segment : rails->segments_) {
        addresses.push_back(segment ? segment->data() : nullptr);
    }
    const auto bytes = static_cast<int64_t>(8 * addresses.size());
    const int64_t held_at = (bytes + 127) / 128 * 128;
    const int64_t held_bytes = kernels::held_bytes(max_blocks * kMaxWarps);
    EP_CUDA(cudaMalloc(reinterpret_cast<void**>(&rails->data_), held_at + held_bytes));
    EP_CUDA(cudaMemset(rails->data_, 0, held_at + held_bytes));
    EP_CUDA(cudaMemcpy(rails->data_, addresses.data(), bytes, cudaMemcpyHostToDevice));
    rails->kernels_ = kernels::make_loopback({reinterpret_cast<std::byte* const*>(rails->data_),
                                              rails->data_ + held_at, shape.nodes, rank});
    return rails;
}

LoopbackRails::~LoopbackRails() {
    const BesideCaptures beside;
    cudaFree(data_);
}

RailSetup LoopbackRails::setup() { return {shape_, &kernels_->table(), shared_from_this()}; }

}  // namespace ep
