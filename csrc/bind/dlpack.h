// The part of the DLPack ABI that hands arena memory to an array library, and sees its tensors
// (https://dmlc.github.io/dlpack: capsules of version 0, the exchange table of version 1).
#pragma once

#include <cstdint>

namespace ep::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };

struct Device {
    int32_t type, id;
};
struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};
struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // null: dense, row-major
    uint64_t byte_offset;
};
struct ManagedTensor {
    Tensor tensor;
    void* context;
    void (*deleter)(ManagedTensor*);
};

struct Version {
    uint32_t major, minor;
};
struct VersionedTensor {
    Version version;
    void* context;
    void (*deleter)(VersionedTensor*);
    uint64_t flags;
    Tensor tensor;
};

// What a type of tensors offers in C. Functions return 0, or -1 with a Python exception set.
struct Exchange {
    Version version;
    Exchange* older;
    int (*allocate)(Tensor*, VersionedTensor**, void*, void (*)(void*, const char*, const char*));
    int (*from_object)(void*, VersionedTensor**);
    int (*to_object)(VersionedTensor*, void**);  // takes it over
    int (*view)(void*, Tensor*);                 // valid as long as the object is
    int (*current_stream)(int32_t device_type, int32_t device, void**);
};

}  // namespace ep::dlpack
