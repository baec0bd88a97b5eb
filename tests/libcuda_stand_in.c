// A libcuda of two GPUs in host memory, for `ep-comm doctor` on machines without a GPU.
//
// The prototypes are those of the CUDA driver API, so that ctypes passes what the real one takes. It
// refuses what the real one refuses (a copy between GPUs without peer access, memory of another size,
// a wrong struct), says on stderr what its process left behind, and fails as FAKE_CUDA tells it to.
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef int Result;
typedef unsigned long long Pointer;
typedef unsigned long long Handle;

enum {
    kOk = 0,
    kInvalidValue = 1,
    kNotInitialized = 3,
    kInvalidContext = 201,
    kInvalidHandle = 400,
    kPeerNotEnabled = 705,
    kNotPermitted = 800
};
enum { kNumGpus = 2, kMost = 16, kGranularity = 2 << 20, kPosixFd = 1, kFabric = 8 };

typedef struct {
    int type, id;
} Location;
typedef struct {
    int type, handle_types;
    Location location;
    void* win32;
    struct {
        unsigned char compression, rdma;
        unsigned short usage;
        unsigned char reserved[4];
    } flags;
} AllocationProp;
typedef struct {
    Location location;
    int flags;
} AccessDesc;

static int initialized, depth, contexts[kMost], retained[kNumGpus], peers[kNumGpus][kNumGpus];
static int handles, mappings, reservations;
static struct {
    Pointer address;
    size_t size;
    int gpu;
} memory[kMost];
static struct Context {
    int gpu;
} primary[kNumGpus] = {{0}, {1}};

static int told(const char* fault) {
    const char* all = getenv("FAKE_CUDA");
    return all != NULL && strstr(all, fault) != NULL;
}

__attribute__((destructor)) static void say_what_is_left(void) {
    int blocks = 0;
    for (int i = 0; i < kMost; ++i) blocks += memory[i].size > 0;
    const int left = blocks + depth + retained[0] + retained[1] + handles + mappings + reservations;
    if (left > 0) fprintf(stderr, "libcuda stand-in: %d things were left behind\n", left);
}

static int find(Pointer address, size_t size) {
    for (int i = 0; i < kMost; ++i) {
        if (memory[i].size > 0 && address >= memory[i].address &&
            address + size <= memory[i].address + memory[i].size) {
            return i;
        }
    }
    return -1;
}

static int add(Pointer address, size_t size, int gpu) {
    for (int i = 0; i < kMost; ++i) {
        if (memory[i].size > 0) continue;
        memory[i].address = address;
        memory[i].size = size;
        memory[i].gpu = gpu;
        return 1;
    }
    return 0;
}

static int current(void) { return depth > 0 ? contexts[depth - 1] : -1; }

Result cuGetErrorName(Result code, const char** name) {
    *name = code == kPeerNotEnabled ? "CUDA_ERROR_PEER_ACCESS_NOT_ENABLED"
            : code == kNotPermitted ? "CUDA_ERROR_NOT_PERMITTED"
                                    : "CUDA_ERROR_INVALID_VALUE";
    return kOk;
}

Result cuInit(unsigned flags) {
    initialized = 1;
    return flags == 0 ? kOk : kInvalidValue;
}
Result cuDriverGetVersion(int* version) {
    *version = 13000;
    return kOk;
}
Result cuDeviceGetCount(int* count) {
    *count = kNumGpus;
    return initialized ? kOk : kNotInitialized;
}
Result cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal < kNumGpus ? kOk : kInvalidValue;
}
Result cuDeviceGetUuid_v2(unsigned char uuid[16], int device) {
    memset(uuid, 0x10 + device, 16);
    return kOk;
}
Result cuDeviceGetAttribute(int* value, int which, int device) {
    (void)device;
    *value = which == 75 ? 9 : 0;  // compute capability 9.0
    return which == 75 || which == 76 ? kOk : kInvalidValue;
}
Result cuDeviceGetP2PAttribute(int* value, int which, int from, int to) {
    *value = !(which == 2 && told("no_access")) && !(which == 3 && told("no_atomics"));
    return from != to && (which == 2 || which == 3) ? kOk : kInvalidValue;
}

Result cuDevicePrimaryCtxRetain(struct Context** context, int device) {
    *context = &primary[device];
    ++retained[device];
    return kOk;
}
Result cuDevicePrimaryCtxRelease_v2(int device) {
    --retained[device];
    return kOk;
}
Result cuCtxPushCurrent_v2(struct Context* context) {
    if (context != &primary[0] && context != &primary[1]) return kInvalidContext;
    contexts[depth++] = context->gpu;
    return kOk;
}
Result cuCtxPopCurrent_v2(struct Context** context) {
    if (depth == 0) return kInvalidContext;
    *context = &primary[contexts[--depth]];
    return kOk;
}
Result cuCtxSynchronize(void) { return depth > 0 ? kOk : kInvalidContext; }
Result cuCtxEnablePeerAccess(struct Context* peer, unsigned flags) {
    if (peer->gpu == current() || flags != 0) return kInvalidValue;
    if (told("no_access")) return kNotPermitted;
    peers[current()][peer->gpu] = 1;
    return kOk;
}
Result cuCtxDisablePeerAccess(struct Context* peer) {
    peers[current()][peer->gpu] = 0;
    return kOk;
}

Result cuMemAlloc_v2(Pointer* address, size_t size) {
    void* block = current() < 0 ? NULL : calloc(1, size);
    *address = (Pointer)block;
    return block != NULL && add(*address, size, current()) ? kOk : kInvalidValue;
}
Result cuMemFree_v2(Pointer address) {
    const int i = find(address, 1);
    if (i < 0 || memory[i].address != address) return kInvalidValue;
    memory[i].size = 0;
    free((void*)address);
    return kOk;
}
Result cuMemcpyHtoD_v2(Pointer to, const void* from, size_t size) {
    const int i = find(to, size);
    if (i < 0 || memory[i].gpu != current()) return kInvalidValue;
    memcpy((void*)to, from, size);
    return kOk;
}
Result cuMemcpyDtoH_v2(void* to, Pointer from, size_t size) {
    const int i = find(from, size);
    if (i < 0 || memory[i].gpu != current()) return kInvalidValue;
    memcpy(to, (const void*)from, size);
    return kOk;
}
Result cuMemcpyDtoD_v2(Pointer to, Pointer from, size_t size) {
    const int theirs = find(to, size), ours = find(from, size);
    if (theirs < 0 || ours < 0 || memory[ours].gpu != current()) return kInvalidValue;
    if (!peers[current()][memory[theirs].gpu]) return kPeerNotEnabled;
    memcpy((void*)to, (const void*)from, size);
    if (told("corrupt") && memory[theirs].gpu == 1) ((char*)to)[size - 1] ^= 1;
    return kOk;
}

static int is_sound(const AllocationProp* prop) {
    const int type = prop->handle_types;
    return prop->type == 1 && prop->location.type == 1 && prop->location.id < kNumGpus &&
           prop->win32 == NULL && (type == kPosixFd || type == kFabric);
}
Result cuMemGetAllocationGranularity(size_t* size, const AllocationProp* prop, int option) {
    *size = kGranularity;
    return is_sound(prop) && option == 0 ? kOk : kInvalidValue;
}
Result cuMemCreate(Handle* handle, size_t size, const AllocationProp* prop, Handle flags) {
    if (!is_sound(prop) || size % kGranularity != 0 || flags != 0) return kInvalidValue;
    if (prop->handle_types == kFabric && told("no_fabric")) return kNotPermitted;
    const int fd = memfd_create("stand-in", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)size) != 0) return kInvalidValue;
    ++handles;
    *handle = 0x100000000ull + (Handle)fd;  // does not fit an int
    return kOk;
}
Result cuMemRelease(Handle handle) {
    --handles;
    return handle >> 32 == 1 && close((int)handle) == 0 ? kOk : kInvalidHandle;
}
Result cuMemAddressReserve(Pointer* address, size_t size, size_t alignment, Pointer hint,
                           Handle flags) {
    if (alignment != 0 || hint != 0 || flags != 0) return kInvalidValue;
    void* place = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *address = (Pointer)place;
    ++reservations;
    return place != MAP_FAILED ? kOk : kInvalidValue;
}
Result cuMemAddressFree(Pointer address, size_t size) {
    --reservations;
    return munmap((void*)address, size) == 0 ? kOk : kInvalidValue;
}
Result cuMemMap(Pointer address, size_t size, size_t offset, Handle handle, Handle flags) {
    if (handle >> 32 != 1 || offset != 0 || flags != 0) return kInvalidHandle;
    ++mappings;
    return mmap((void*)address, size, PROT_NONE, MAP_SHARED | MAP_FIXED, (int)handle, 0) !=
                   MAP_FAILED
               ? kOk
               : kInvalidValue;
}
Result cuMemSetAccess(Pointer address, size_t size, const AccessDesc* access, size_t count) {
    if (count != 1 || access->location.type != 1 || access->flags != 3) return kInvalidValue;
    if (mprotect((void*)address, size, PROT_READ | PROT_WRITE) != 0) return kInvalidValue;
    return add(address, size, access->location.id) ? kOk : kInvalidValue;
}
Result cuMemUnmap(Pointer address, size_t size) {
    const int i = find(address, size);
    if (i < 0) return kInvalidValue;
    memory[i].size = 0;
    --mappings;
    return kOk;
}
Result cuMemExportToShareableHandle(void* shared, Handle handle, int type, Handle flags) {
    if (flags != 0 || handle >> 32 != 1) return kInvalidHandle;
    if (type == kFabric) {
        memset(shared, 0xfa, 64);
        return kOk;
    }
    if (told("no_share")) return kNotPermitted;
    *(int*)shared = dup((int)handle);
    return kOk;
}
Result cuMemImportFromShareableHandle(Handle* handle, void* shared, int type) {
    if (type != kPosixFd) return kInvalidValue;
    ++handles;
    *handle = 0x100000000ull + (Handle)dup((int)(size_t)shared);
    return kOk;
}
