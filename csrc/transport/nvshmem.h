// The NVSHMEM world of this process, its symmetric memory, and who of it is a rank of ours.
//
// A process has one world, made by us or by the application; a second init joins the first. The
// library's barriers are in join, allocate and leave, and nowhere else.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace ep {

// Thrown when the library refuses something.
struct NvshmemError {
    std::string call;
    int status;
};

using NvshmemVersion = std::array<int, 3>;
using NvshmemId = std::array<std::byte, 128>;  // as it travels between ranks

namespace nvshmem {

NvshmemVersion compiled_version();  // of the headers, and so of the device library in this plugin
NvshmemVersion host_version();      // of the library that is loaded
bool is_initialized();
NvshmemId new_id();  // one PE makes it, before any of them joins

}  // namespace nvshmem

// Symmetric memory; kept by the process until the world ends, since freeing it is a barrier.
struct NvshmemSegment {
    std::byte* data = nullptr;
    int64_t bytes = 0;
};

class NvshmemWorld {
public:
    // Collective over all PEs. `settings` are variables of the library that stand in the environment
    // while it initializes, where the user has not set them: it can be told in no other way.
    static std::shared_ptr<NvshmemWorld> join(
        const NvshmemId& id, int pe, int num_pes,
        const std::vector<std::pair<std::string, std::string>>& settings);

    ~NvshmemWorld();  // takes nothing down: see leave
    NvshmemWorld(const NvshmemWorld&) = delete;
    NvshmemWorld& operator=(const NvshmemWorld&) = delete;

    int my_pe() const;
    int num_pes() const;
    bool is_mapped(const NvshmemSegment& segment, int pe) const;

    // Collective; zeroed, and known to be so everywhere only after a further exchange. Null data: no
    // memory on some PE.
    NvshmemSegment allocate(int64_t bytes);
    void clear(const NvshmemSegment& segment);  // our part of it, to zero

    // Collective and unbounded: ends our share of the world, and the world itself if nobody else of
    // this process joined it. A process that does not call it leaves all to the system.
    void leave();

private:
    NvshmemWorld() = default;
    bool left_ = false;
};

}  // namespace ep
