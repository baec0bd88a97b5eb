// GPU memory of one rank that other ranks can map: the driver's virtual memory, shared as POSIX file
// descriptors.
//
// The driver is reached through the runtime at the first use, so a machine without one still imports
// the module.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace ep {

// Thrown when the CUDA runtime or driver refuses something.
struct DeviceError {
    std::string call, what;
};

class DeviceMemory {
public:
    // Zeroed memory on `device`, rounded up to the driver's granularity.
    static std::shared_ptr<DeviceMemory> create(int device, int64_t bytes);
    // A peer's memory, mapped for `device`. The descriptor stays the caller's.
    static std::shared_ptr<DeviceMemory> map(int device, int fd, int64_t bytes);

    ~DeviceMemory();
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;

    std::byte* data() const { return data_; }
    int64_t bytes() const { return bytes_; }
    int device() const { return device_; }
    int fd() const { return fd_; }  // -1 for a mapped one
    void close_fd();                // after every peer has mapped it

private:
    DeviceMemory(int device, int64_t bytes) : bytes_(bytes), device_(device) {}
    void map_handle();

    std::byte* data_ = nullptr;
    int64_t bytes_;
    unsigned long long handle_ = 0;
    int device_;
    int fd_ = -1;
    bool mapped_ = false;
};

}  // namespace ep
