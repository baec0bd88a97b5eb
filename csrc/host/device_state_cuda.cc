#include <cuda_runtime_api.h>

#include <cstring>

#include "host/cuda_check.h"
#include "host/device_state.h"
#include "transport/beside_captures.h"

namespace ep {

DeviceState::DeviceState(const Shape& shape, int rank, const std::vector<int32_t>& expert_owner,
                         const std::vector<std::byte*>& control,
                         const std::vector<std::byte*>& arenas,
                         const std::vector<int64_t>& arena_bytes)
    : layout_(shape), control_(control[rank]), num_ranks_(shape.num_ranks), rank_(rank) {
    std::vector<std::byte> image(layout_.tables_end);
    const auto table = [&](const Region& region) {
        return reinterpret_cast<int32_t*>(image.data() + region.offset);
    };
    int32_t *local = table(layout_.local), *position = table(layout_.position),
            *first = table(layout_.first);
    std::vector<int32_t> count(shape.num_ranks, 0);
    for (int e = 0; e < shape.num_experts; ++e) {
        table(layout_.owner)[e] = expert_owner[e];
        local[e] = count[expert_owner[e]]++;
    }
    for (int r = 0; r < shape.num_ranks; ++r) first[r + 1] = first[r] + count[r];
    for (int e = 0; e < shape.num_experts; ++e) {
        position[e] = first[expert_owner[e]] + local[e];
    }
    num_local_ = count[rank];
    const auto copy = [&](const Region& region, const void* from) {
        std::memcpy(image.data() + region.offset, from, region.bytes);
    };
    copy(layout_.control, control.data());
    copy(layout_.arena, arenas.data());
    copy(layout_.arena_bytes, arena_bytes.data());

    const BesideCaptures beside;
    EP_CUDA(cudaHostAlloc(reinterpret_cast<void**>(&page_), sizeof(HostPage), cudaHostAllocMapped));
    std::memset(static_cast<void*>(page_), 0, sizeof(HostPage));
    EP_CUDA(cudaHostGetDevicePointer(reinterpret_cast<void**>(&mapped_), page_, 0));
    EP_CUDA(cudaMalloc(reinterpret_cast<void**>(&data_), layout_.end));
    EP_CUDA(cudaMemset(data_, 0, layout_.end));
    const uint64_t slot = 1 % shape.num_slots;  // of operation 1
    std::memcpy(image.data() + layout_.seq.offset + sizeof(uint64_t), &slot, sizeof(slot));
    EP_CUDA(cudaMemcpy(data_, image.data(), image.size(), cudaMemcpyHostToDevice));
}

DeviceState::~DeviceState() {
    const BesideCaptures beside;
    cudaFree(data_);
    cudaFreeHost(page_);
}

State DeviceState::view() const {
    const auto at = [this](const Region& region) { return data_ + region.offset; };
    const auto ints = [&](const Region& region) { return reinterpret_cast<int32_t*>(at(region)); };
    const auto words = [&](const Region& region) {
        return reinterpret_cast<uint64_t*>(at(region));
    };
    return {words(layout_.seq),      reinterpret_cast<OpState*>(at(layout_.op)),
            ints(layout_.owner),     ints(layout_.local),
            ints(layout_.position),  ints(layout_.first),
            words(layout_.expected), words(layout_.chunks),
            ints(layout_.sent),      reinterpret_cast<uint32_t*>(at(layout_.finished)),
            words(layout_.without),  words(layout_.lost),
            words(layout_.claimed)};
}

Peers DeviceState::peers() const {
    return {control_,
            reinterpret_cast<std::byte* const*>(data_ + layout_.control.offset),
            reinterpret_cast<std::byte* const*>(data_ + layout_.arena.offset),
            reinterpret_cast<const int64_t*>(data_ + layout_.arena_bytes.offset),
            rank_,
            0,
            num_ranks_};
}

uint32_t* DeviceState::abort() const {
    return reinterpret_cast<uint32_t*>(data_ + layout_.abort.offset);
}

}  // namespace ep
