// Device memory of the plugin: arrays that die with their owner.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>

#include "transport/beside_captures.h"
#include "transport/nvshmem.h"

namespace ep {

inline void check_cuda(int error, const char* call) {
    if (error != cudaSuccess) throw NvshmemError{call, error};
}

struct FreeDevice {
    void operator()(void* memory) const {
        const BesideCaptures beside;
        cudaFree(memory);
    }
};
template <class T>
using OnDevice = std::unique_ptr<T, FreeDevice>;

// A copy of `from`, or zeros where that is null.
template <class T>
OnDevice<T> on_device(const T* from, size_t count) {
    const BesideCaptures beside;
    void* memory = nullptr;
    check_cuda(cudaMalloc(&memory, count * sizeof(T)), "cudaMalloc");
    OnDevice<T> owned(static_cast<T*>(memory));
    check_cuda(from != nullptr ? cudaMemcpy(memory, from, count * sizeof(T), cudaMemcpyHostToDevice)
                               : cudaMemset(memory, 0, count * sizeof(T)),
               "cudaMemcpy");
    return owned;
}

}  // namespace ep
