// DeviceMemory over host memory: what csrc/transport/device_memory_cuda.cc is on a machine with a GPU.
#include "transport/device_memory.h"

#include <cstdlib>
#include <cstring>

namespace ep {

std::shared_ptr<DeviceMemory> DeviceMemory::create(int device, int64_t bytes, Kind kind) {
    std::shared_ptr<DeviceMemory> memory(new DeviceMemory(device, bytes, kind));
    memory->data_ = static_cast<std::byte*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
    std::memset(memory->data_, 0, bytes);
    return memory;
}

DeviceMemory::~DeviceMemory() { std::free(data_); }

}  // namespace ep
