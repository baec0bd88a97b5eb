#include "transport/device_memory.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <unistd.h>

namespace ep {
namespace {

void check(cudaError_t error, const char* call) {
    if (error != cudaSuccess) throw DeviceError{call, cudaGetErrorString(error)};
}

// Functions of the driver by name, as of CUDA 12.0.
template <class Function>
Function driver(const char* name) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found), name);
    if (found != cudaDriverEntryPointSuccess) throw DeviceError{name, "the driver is too old"};
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
        throw DeviceError{call, text != nullptr ? text : "unknown error"};
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

// The runtime makes the device's primary context current for this thread.
void use_device(int device) {
    check(cudaSetDevice(device), "cudaSetDevice");
    check(cudaFree(nullptr), "cudaFree");
}

}  // namespace

void DeviceMemory::map_handle() {
    const Driver& cu = the_driver();
    CUdeviceptr address = 0;
    cu.check(cu.reserve(&address, bytes_, 0, 0, 0), "cuMemAddressReserve");
    data_ = reinterpret_cast<std::byte*>(address);
    cu.check(cu.map(address, bytes_, 0, handle_, 0), "cuMemMap");
    mapped_ = true;
    CUmemAccessDesc access{};
    access.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device_}};
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    cu.check(cu.set_access(address, bytes_, &access, 1), "cuMemSetAccess");
}

std::shared_ptr<DeviceMemory> DeviceMemory::create(int device, int64_t bytes) {
    use_device(device);
    const Driver& cu = the_driver();
    std::shared_ptr<DeviceMemory> memory(
        new DeviceMemory(device, round_to_granularity(device, bytes)));
    const CUmemAllocationProp prop = properties(device);
    cu.check(cu.create(&memory->handle_, memory->bytes_, &prop, 0), "cuMemCreate");
    memory->map_handle();
    cu.check(cu.export_handle(&memory->fd_, memory->handle_,
                              CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
             "cuMemExportToShareableHandle");
    check(cudaMemset(memory->data_, 0, memory->bytes_), "cudaMemset");
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    return memory;
}

std::shared_ptr<DeviceMemory> DeviceMemory::map(int device, int fd, int64_t bytes) {
    use_device(device);
    const Driver& cu = the_driver();
    std::shared_ptr<DeviceMemory> memory(
        new DeviceMemory(device, round_to_granularity(device, bytes)));
    cu.check(cu.import_handle(&memory->handle_, reinterpret_cast<void*>(static_cast<intptr_t>(fd)),
                              CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
             "cuMemImportFromShareableHandle");
    memory->map_handle();
    return memory;
}

// Memory is freed when the last rank has let go of it; nothing here may throw.
DeviceMemory::~DeviceMemory() {
    close_fd();
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
