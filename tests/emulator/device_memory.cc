// DeviceMemory over host memory: what csrc/transport/device_memory_cuda.cc is on a machine with a GPU.
// Pages around it are nobody's: who reaches there ends the program.
#include "transport/device_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace ep {
namespace {

constexpr int64_t kGuard = int64_t{1} << 32;  // of addresses, on either side
constexpr int64_t kPage = 4096;

int64_t in_pages(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

[[noreturn]] void refuse(const char* call) { throw DeviceError{call, std::strerror(errno), errno}; }

std::byte* reserve(int64_t bytes) {
    void* room = mmap(nullptr, in_pages(bytes) + 2 * kGuard, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) refuse("mmap");
    return static_cast<std::byte*>(room) + kGuard;
}

}  // namespace

void DeviceMemory::import(int fd) {
    if (mmap(data_, in_pages(bytes_), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) ==
        MAP_FAILED) {
        refuse("mmap");
    }
    mapped_ = true;
}

void DeviceMemory::make() {
    fd_ = memfd_create("emulated_gpu", MFD_CLOEXEC);
    if (fd_ < 0 || ftruncate(fd_, in_pages(bytes_)) != 0) refuse("memfd_create");
    import(fd_);
}

std::shared_ptr<DeviceMemory> DeviceMemory::create(int device, int64_t bytes, Kind kind) {
    std::shared_ptr<DeviceMemory> memory(new DeviceMemory(device, bytes, kind));
    memory->data_ = reserve(bytes);
    memory->make();
    return memory;
}

std::shared_ptr<DeviceMemory> DeviceMemory::map(int device, int fd, int64_t bytes) {
    std::shared_ptr<DeviceMemory> memory(new DeviceMemory(device, bytes, Kind::kVmm));
    memory->data_ = reserve(bytes);
    memory->import(fd);
    return memory;
}

void DeviceMemory::drop() {
    if (kind_ != Kind::kVmm) return;
    close_fd();
    mmap(data_, in_pages(bytes_), PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    mapped_ = false;
}

void DeviceMemory::restore() {
    if (kind_ == Kind::kVmm && !mapped_) make();
}

void DeviceMemory::restore_from(int fd) {
    if (kind_ == Kind::kVmm && !mapped_) import(fd);
}

DeviceMemory::~DeviceMemory() {
    close_fd();
    if (data_ != nullptr) munmap(data_ - kGuard, in_pages(bytes_) + 2 * kGuard);
}

void DeviceMemory::close_fd() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
}

}  // namespace ep
