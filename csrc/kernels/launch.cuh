// How launchers start and load kernels.
//
// defines: Grid, launch, launch_dependent, load_kernel
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "kernels/launch.h"

namespace ep::kernels {

struct Grid {
    int blocks, threads, smem_bytes;
};

// Starts a kernel; `early`: before the kernel in front of it in the stream has ended, once all its
// blocks have allowed it. Such a kernel calls griddepcontrol_wait. Works in a captured graph, too.
template <class... Params, class... Args>
int launch_dependent(void (*kernel)(Params...), const Grid& grid, bool early, Stream stream,
                     const Args&... args) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid.blocks;
    config.blockDim = grid.threads;
    config.dynamicSmemBytes = grid.smem_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

template <class... Params, class... Args>
int launch(void (*kernel)(Params...), const Grid& grid, Stream stream, const Args&... args) {
    return launch_dependent(kernel, grid, false, stream, args...);
}

// Loads a kernel and lets it have all the shared memory of a block. `least`: becomes what is left for
// dynamic memory, when that is less: only the loaded kernel tells, as its linker may have added to it.
inline int load_kernel(const void* kernel, int smem_bytes, int* least = nullptr) {
    cudaFuncAttributes attributes;
    if (const int error = cudaFuncGetAttributes(&attributes, kernel)) return error;
    const int dynamic = smem_bytes - static_cast<int>(attributes.sharedSizeBytes);
    if (least != nullptr) *least = std::min(*least, dynamic);
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic);
}

}  // namespace ep::kernels
