// GPU memory of one rank that other ranks can map: the driver's virtual memory shared as POSIX file
// descriptors, or, where those are refused, the runtime's IPC handles.
//
// Either way what travels is one descriptor: an IPC handle lies in a sealed memfd. The driver is
// reached through the runtime at the first use, so a machine without one still imports the module.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace ep {

// Thrown when the CUDA runtime or driver refuses something; `code` is its number for it.
struct DeviceError {
    std::string call, what;
    int code = 0;
};

class DeviceMemory {
public:
    enum class Kind { kVmm, kIpc };

    // Zeroed memory on `device`, rounded up to the driver's granularity. kVmm falls back to kIpc.
    static std::shared_ptr<DeviceMemory> create(int device, int64_t bytes, Kind kind = Kind::kVmm);
    // A peer's memory, mapped for `device`. The descriptor stays the caller's.
    static std::shared_ptr<DeviceMemory> map(int device, int fd, int64_t bytes);

    ~DeviceMemory();
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;

    // Gives the memory back but keeps its addresses, on every rank that has it mapped: it is free
    // once all have. kVmm only; nobody uses the addresses until it is restored.
    void drop();
    void restore();             // our own memory, zeroed; `fd` is there again
    void restore_from(int fd);  // a peer's

    std::byte* data() const { return data_; }
    int64_t bytes() const { return bytes_; }
    int device() const { return device_; }
    Kind kind() const { return kind_; }
    int fd() const { return fd_; }  // -1 for a mapped one
    void close_fd();                // after every peer has mapped it

private:
    DeviceMemory(int device, int64_t bytes, Kind kind)
        : bytes_(bytes), device_(device), kind_(kind) {}
    void make();
    void make_ipc();
    void import(int fd);
    void map_handle();
    void zero();

    std::byte* data_ = nullptr;
    int64_t bytes_;
    unsigned long long handle_ = 0;
    int device_;
    Kind kind_;
    int fd_ = -1;
    bool mapped_ = false;
    bool is_own_ = false;
};

}  // namespace ep
