// EP_CUDA(call): a refused call of the CUDA runtime becomes a DeviceError that quotes it.
#pragma once

#include "transport/device_memory.h"

#ifdef EP_HAS_CUDA
#include <cuda_runtime_api.h>

#define EP_CUDA(call)                                                               \
    do {                                                                            \
        const auto ep_error = static_cast<cudaError_t>(call);                       \
        if (ep_error != cudaSuccess)                                                \
            throw ::ep::DeviceError{#call, cudaGetErrorString(ep_error), ep_error}; \
    } while (false)

namespace ep {

// The answer of a query. It must not be found by whoever asks for the last error later, as torch does.
inline bool is_ready(cudaError_t answer) {
    if (answer == cudaErrorNotReady) {
        (void)cudaGetLastError();
        return false;
    }
    EP_CUDA(answer);
    return true;
}

}  // namespace ep
#endif
