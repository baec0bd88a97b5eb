// DeviceMemory over host memory: what csrc/transport/device_memory_cuda.cc is on a machine with a GPU.
// Pages around it are nobody's: who reaches there ends the program.
#include "transport/device_memory.h"

#include <sys/mman.h>

#include <new>

namespace ep {
namespace {

constexpr int64_t kGuard = int64_t{1} << 32;  // of addresses, on either side
constexpr int64_t kPage = 4096;

int64_t in_pages(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

}  // namespace

std::shared_ptr<DeviceMemory> DeviceMemory::create(int device, int64_t bytes, Kind kind) {
    std::shared_ptr<DeviceMemory> memory(new DeviceMemory(device, bytes, kind));
    void* room = mmap(nullptr, in_pages(bytes) + 2 * kGuard, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) throw std::bad_alloc();
    memory->data_ = static_cast<std::byte*>(room) + kGuard;
    mprotect(memory->data_, in_pages(bytes), PROT_READ | PROT_WRITE);
    return memory;
}

DeviceMemory::~DeviceMemory() {
    if (data_ != nullptr) munmap(data_ - kGuard, in_pages(bytes_) + 2 * kGuard);
}

}  // namespace ep
