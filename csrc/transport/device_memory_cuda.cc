#include "transport/device_memory.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "transport/beside_captures.h"

namespace ep {
namespace {

void check(cudaError_t error, const char* call) {
    if (error != cudaSuccess) throw DeviceError{call, cudaGetErrorString(error), error};
}

// Functions of the driver by name, as of CUDA 12.0.
template <class Function>
Function driver(const char* name) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found), name);
    if (found != cudaDriverEntryPointSuccess)
        throw DeviceError{name, "the driver is too old", cudaErrorInsufficientDriver};
    return reinterpret_cast<Function>(entry);
}

struct Driver {
    decltype(&cuGetErrorString) error_string =
        driver<decltype(&cuGetErrorString)>("cuGetErrorString");
    decltype(&cuDeviceGetAttribute) attribute =
        driver<decltype(&cuDeviceGetAttribute)>("cuDeviceGetAttribute");
    decltype(&cuMemGetAllocationGranularity) granularity =
        driver<decltype(&cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity");
    decltype(&cuMemCreate) create = driver<decltype(&cuMemCreate)>("cuMemCreate");
    decltype(&cuMemRelease) release = driver<decltype(&cuMemRelease)>("cuMemRelease");
    decltype(&cuMemAddressReserve) reserve =
        driver<decltype(&cuMemAddressReserve)>("cuMemAddressReserve");
    decltype(&cuMemAddressFree) free_address =
        driver<decltype(&cuMemAddressFree)>("cuMemAddressFree");
    decltype(&cuMemMap) map = driver<decltype(&cuMemMap)>("cuMemMap");
    decltype(&cuMemUnmap) unmap = driver<decltype(&cuMemUnmap)>("cuMemUnmap");
    decltype(&cuMemSetAccess) set_access = driver<decltype(&cuMemSetAccess)>("cuMemSetAccess");
    decltype(&cuMemExportToShareableHandle) export_handle =
        driver<decltype(&cuMemExportToShareableHandle)>("cuMemExportToShareableHandle");
    decltype(&cuMemImportFromShareableHandle) import_handle =
        driver<decltype(&cuMemImportFromShareableHandle)>("cuMemImportFromShareableHandle");

    void check(CUresult result, const char* call) const {
        if (result == CUDA_SUCCESS) return;
        const char* text = nullptr;
        error_string(result, &text);
        throw DeviceError{call, text != nullptr ? text : "unknown error", result};
    }
};

const Driver& the_driver() {
    static const Driver driver;
    return driver;
}

CUmemAllocationProp properties(int device) {
    CUmemAllocationProp prop{};
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    prop.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
    int rdma = 0;
    the_driver().attribute(&rdma, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED,
                           device);
    prop.allocFlags.gpuDirectRDMACapable = rdma != 0;
    return prop;
}

int64_t round_to_granularity(int device, int64_t bytes) {
    const CUmemAllocationProp prop = properties(device);
    size_t unit = 0;
    the_driver().check(the_driver().granularity(&unit, &prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
                       "cuMemGetAllocationGranularity");
    const auto step = static_cast<int64_t>(unit);
    return (bytes + step - 1) / step * step;
}

// What lies in the memfd of memory that is shared by an IPC handle.
struct IpcRecord {
    uint64_t magic = kMagic;
    cudaIpcMemHandle_t handle;
    static constexpr uint64_t kMagic = 0x4350495f50455f43;  // "C_EP_IPC"
};

// Refusals after which IPC may still work: descriptors are not supported, or a sandbox forbids them.
bool may_try_ipc(const DeviceError& error) {
    return error.code == CUDA_ERROR_NOT_SUPPORTED || error.code == CUDA_ERROR_NOT_PERMITTED ||
           error.code == CUDA_ERROR_OPERATING_SYSTEM || error.code == CUDA_ERROR_INVALID_VALUE;
}

// A descriptor of the driver's cannot be read.
bool is_ipc(int fd, IpcRecord& record) {
    return pread(fd, &record, sizeof(record), 0) == sizeof(record) &&
           record.magic == IpcRecord::kMagic;
}

// The runtime makes the device's primary context current for this thread.
void use_device(int device) {
    check(cudaSetDevice(device), "cudaSetDevice");
    check(cudaFree(nullptr), "cudaFree");
}

}  // namespace

void DeviceMemory::map_handle() {
    const Driver& cu = the_driver();
    auto address = reinterpret_cast<CUdeviceptr>(data_);
    if (data_ == nullptr) cu.check(cu.reserve(&address, bytes_, 0, 0, 0), "cuMemAddressReserve");
    data_ = reinterpret_cast<std::byte*>(address);
    cu.check(cu.map(address, bytes_, 0, handle_, 0), "cuMemMap");
    mapped_ = true;
    CUmemAccessDesc access{};
    access.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device_}};
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    cu.check(cu.set_access(address, bytes_, &access, 1), "cuMemSetAccess");
}

// Nobody may wait for a whole device while some stream of it is captured.
void DeviceMemory::zero() {
    check(cudaMemset(data_, 0, bytes_), "cudaMemset");
    check(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
}

void DeviceMemory::make() {
    const Driver& cu = the_driver();
    const CUmemAllocationProp prop = properties(device_);
    cu.check(cu.create(&handle_, bytes_, &prop, 0), "cuMemCreate");
    map_handle();
    cu.check(cu.export_handle(&fd_, handle_, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
             "cuMemExportToShareableHandle");
    zero();
}

void DeviceMemory::make_ipc() {
    void* address = nullptr;
    check(cudaMalloc(&address, bytes_), "cudaMalloc");
    data_ = static_cast<std::byte*>(address);
    IpcRecord record;
    check(cudaIpcGetMemHandle(&record.handle, data_), "cudaIpcGetMemHandle");
    fd_ = memfd_create("ep_comm_ipc", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd_ < 0 || write(fd_, &record, sizeof(record)) != sizeof(record) ||
        fcntl(fd_, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) != 0) {
        throw DeviceError{"memfd_create", std::strerror(errno), cudaErrorOperatingSystem};
    }
    zero();
}

std::shared_ptr<DeviceMemory> DeviceMemory::create(int device, int64_t bytes, Kind kind) {
    const BesideCaptures beside;
    use_device(device);
    const int64_t rounded = round_to_granularity(device, bytes);
    const auto start = [&](Kind with) {
        std::shared_ptr<DeviceMemory> memory(new DeviceMemory(device, rounded, with));
        memory->is_own_ = true;
        with == Kind::kVmm ? memory->make() : memory->make_ipc();
        return memory;
    };
    if (kind == Kind::kIpc) return start(kind);
    try {
        return start(kind);
    } catch (const DeviceError& refused) {
        if (!may_try_ipc(refused)) throw;
        try {
            return start(Kind::kIpc);
        } catch (const DeviceError&) {
            throw refused;
        }
    }
}

void DeviceMemory::import(int fd) {
    const Driver& cu = the_driver();
    cu.check(cu.import_handle(&handle_, reinterpret_cast<void*>(static_cast<intptr_t>(fd)),
                              CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
             "cuMemImportFromShareableHandle");
    map_handle();
}

std::shared_ptr<DeviceMemory> DeviceMemory::map(int device, int fd, int64_t bytes) {
    const BesideCaptures beside;
    use_device(device);
    IpcRecord record;
    const Kind kind = is_ipc(fd, record) ? Kind::kIpc : Kind::kVmm;
    std::shared_ptr<DeviceMemory> memory(
        new DeviceMemory(device, round_to_granularity(device, bytes), kind));
    if (kind == Kind::kVmm) {
        memory->import(fd);
        return memory;
    }
    void* address = nullptr;
    check(cudaIpcOpenMemHandle(&address, record.handle, cudaIpcMemLazyEnablePeerAccess),
          "cudaIpcOpenMemHandle");
    memory->data_ = static_cast<std::byte*>(address);
    return memory;
}

void DeviceMemory::drop() {
    if (kind_ != Kind::kVmm) return;
    const BesideCaptures beside;
    const Driver& cu = the_driver();
    close_fd();
    if (mapped_) cu.check(cu.unmap(reinterpret_cast<CUdeviceptr>(data_), bytes_), "cuMemUnmap");
    mapped_ = false;
    if (handle_ != 0) cu.check(cu.release(handle_), "cuMemRelease");
    handle_ = 0;
}

void DeviceMemory::restore() {
    if (kind_ != Kind::kVmm || mapped_) return;
    const BesideCaptures beside;
    use_device(device_);
    make();
}

void DeviceMemory::restore_from(int fd) {
    if (kind_ != Kind::kVmm || mapped_) return;
    const BesideCaptures beside;
    use_device(device_);
    import(fd);
}

// Memory is freed when the last rank has let go of it; nothing here may throw.
DeviceMemory::~DeviceMemory() {
    const BesideCaptures beside;
    close_fd();
    if (kind_ == Kind::kIpc) {
        if (data_ != nullptr) is_own_ ? cudaFree(data_) : cudaIpcCloseMemHandle(data_);
        return;
    }
    const Driver& cu = the_driver();
    const auto address = reinterpret_cast<CUdeviceptr>(data_);
    if (mapped_) cu.unmap(address, bytes_);
    if (data_ != nullptr) cu.free_address(address, bytes_);
    if (handle_ != 0) cu.release(handle_);
}

void DeviceMemory::close_fd() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
}

}  // namespace ep
