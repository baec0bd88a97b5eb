#include "transport/nvshmem.h"

#include <cuda_runtime_api.h>
#include <nvshmem_host.h>

#include <cstdlib>
#include <cstring>

#include "transport/beside_captures.h"

namespace ep {
namespace {

// Variables that are there for the time of a call.
class ScopedSettings {
public:
    explicit ScopedSettings(const std::vector<std::pair<std::string, std::string>>& settings) {
        for (const auto& [name, value] : settings) {
            if (std::getenv(name.c_str()) != nullptr) continue;  // the user knows better
            setenv(name.c_str(), value.c_str(), 1);
            set_.push_back(name);
        }
    }
    ~ScopedSettings() {
        for (const std::string& name : set_) unsetenv(name.c_str());
    }
    ScopedSettings(const ScopedSettings&) = delete;
    ScopedSettings& operator=(const ScopedSettings&) = delete;

private:
    std::vector<std::string> set_;
};

void check(int status, const char* call) {
    if (status != 0) throw NvshmemError{call, status};
}

}  // namespace

namespace nvshmem {

NvshmemVersion compiled_version() {
    return {NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION,
            NVSHMEM_VENDOR_PATCH_VERSION};
}

NvshmemVersion host_version() {
    NvshmemVersion v{};
    nvshmemx_vendor_get_version_info(&v[0], &v[1], &v[2]);
    return v;
}

bool is_initialized() { return nvshmemx_init_status() >= NVSHMEM_STATUS_IS_INITIALIZED; }

NvshmemId new_id() {
    nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
    static_assert(sizeof(id) == sizeof(NvshmemId));
    check(nvshmemx_get_uniqueid(&id), "nvshmemx_get_uniqueid");
    NvshmemId bytes;
    std::memcpy(bytes.data(), &id, sizeof(id));
    return bytes;
}

}  // namespace nvshmem

std::shared_ptr<NvshmemWorld> NvshmemWorld::join(
    const NvshmemId& id, int pe, int num_pes,
    const std::vector<std::pair<std::string, std::string>>& settings) {
    nvshmemx_uniqueid_t unique = NVSHMEMX_UNIQUEID_INITIALIZER;
    std::memcpy(&unique, id.data(), sizeof(unique));
    nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
    check(nvshmemx_set_attr_uniqueid_args(pe, num_pes, &unique, &attributes),
          "nvshmemx_set_attr_uniqueid_args");
    const ScopedSettings scope(settings);
    // As nvshmemx_init_attr does, which would end the process where this fails.
    const NvshmemVersion ours = nvshmem::compiled_version();
    const nvshmemi_version_t version{ours[0], ours[1], ours[2]};
    int provided = 0;
    check(nvshmemi_init_thread(NVSHMEM_THREAD_SERIALIZED, &provided, NVSHMEMX_INIT_WITH_UNIQUEID,
                               &attributes, version),
          "nvshmemx_init_attr");
    return std::shared_ptr<NvshmemWorld>(new NvshmemWorld);
}

NvshmemWorld::~NvshmemWorld() = default;

int NvshmemWorld::my_pe() const { return nvshmem_my_pe(); }

int NvshmemWorld::num_pes() const { return nvshmem_n_pes(); }

bool NvshmemWorld::is_mapped(const NvshmemSegment& segment, int pe) const {
    return nvshmem_ptr(segment.data, pe) != nullptr;
}

NvshmemSegment NvshmemWorld::allocate(int64_t bytes) {
    constexpr size_t kAlign = 4096;
    auto* data = static_cast<std::byte*>(nvshmem_align(kAlign, static_cast<size_t>(bytes)));
    if (data == nullptr) return {};
    const NvshmemSegment segment{data, bytes};
    clear(segment);
    return segment;
}

void NvshmemWorld::clear(const NvshmemSegment& segment) {
    const BesideCaptures beside;
    check(cudaMemset(segment.data, 0, static_cast<size_t>(segment.bytes)), "cudaMemset");
    check(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
}

void NvshmemWorld::leave() {
    if (std::exchange(left_, true)) return;
    nvshmem_finalize();
}

}  // namespace ep
