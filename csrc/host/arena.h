// The arena's allocator: extents of one rank's symmetric memory, granted to operations and returned
// by dying tensors.
//
// First fit from the lowest address, so memory that was touched once is used again. Any thread may
// return an extent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

namespace ep {

struct Extent {
    int64_t offset = 0, bytes = 0;
};

struct ArenaStats {
    int64_t capacity, in_use, peak, largest_free, num_extents;
};

class Arena {
public:
    // Of an extent that holds so many.
    static int64_t bytes_of_extent(int64_t bytes);

    // `memory` is what the extents lie in; it lives as long as the arena and every extent held.
    explicit Arena(int64_t capacity, std::shared_ptr<void> memory = nullptr);

    // The lowest extent of at least `bytes`, or nothing when no free range is long enough. Nothing of `but`,
    // which is in ascending order.
    std::optional<Extent> grant(int64_t bytes, const std::vector<Extent>& but = {});
    // What that was; empty: nobody had it.
    Extent give_back(int64_t offset);
    // Shortens a granted extent to what it turned out to need.
    void trim(int64_t offset, int64_t bytes);
    // The granted extent that holds [offset, offset + bytes), if there is one.
    std::optional<Extent> find(int64_t offset, int64_t bytes) const;
    // Calls `use` with each range nobody holds, and grants nothing meanwhile; for giving pages back to
    // the system. `use` must not call the arena.
    void visit_free(const std::function<void(const Extent&)>& use) const;
    ArenaStats stats() const;
    int64_t in_use() const;

private:
    void put_free(int64_t offset, int64_t bytes);

    mutable std::mutex mutex_;
    std::map<int64_t, int64_t> free_;  // offset -> bytes, never adjacent
    std::map<int64_t, int64_t> used_;
    int64_t capacity_, in_use_ = 0, peak_ = 0;
    std::shared_ptr<void> memory_;
};

// An extent held by tensors: the last one to die returns it. Keeps the arena (and what it stands
// on) alive.
class ExtentHold {
public:
    ExtentHold(std::shared_ptr<Arena> arena, Extent extent)
        : arena_(std::move(arena)), extent_(extent) {}
    ~ExtentHold() { arena_->give_back(extent_.offset); }
    ExtentHold(const ExtentHold&) = delete;
    ExtentHold& operator=(const ExtentHold&) = delete;

    const Extent& extent() const { return extent_; }

private:
    std::shared_ptr<Arena> arena_;
    Extent extent_;
};

}  // namespace ep
