// The arena of a GPU rank: extents that return together with the work still queued on them.
//
// A dying tensor only puts its extent on a list, from any thread, also during a capture or a garbage
// collection. The next grant marks how far other streams have come that were declared for it, and takes it
// back once they have got there. Work on its own stream runs behind what is queued there, so that one gets
// the memory at once; another stream gets it only when that is over. No stream waits for another as long as
// there is memory besides: what is queued on that one may wait for what is queued on this one, here or at a
// peer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "host/arena.h"
#include "transport/device_memory.h"

struct CUstream_st;

namespace ep {

using Stream = CUstream_st*;

class StreamHold;

class DeviceArena : public std::enable_shared_from_this<DeviceArena> {
public:
    explicit DeviceArena(std::shared_ptr<DeviceMemory> memory);
    ~DeviceArena();

    // An extent for work on `stream`, or nothing. What a capture is granted belongs to its graph.
    std::shared_ptr<StreamHold> grant(int64_t bytes, Stream stream);
    // The same for who knows whether `stream` is being captured.
    std::shared_ptr<StreamHold> grant(int64_t bytes, Stream stream, bool capturing);
    // Takes back all that has died, for work on `stream`, which waits for it; the longest piece there is then.
    int64_t reclaim(Stream stream);
    // Gives the end of an extent back, before anybody was told of it.
    void trim(StreamHold& hold, int64_t bytes);
    // Where memory lies in a granted extent, or -1.
    int64_t offset_of(uintptr_t address, int64_t bytes) const;
    std::byte* data() const { return memory_->data(); }
    int device() const { return memory_->device(); }
    ArenaStats stats() const { return extents_.stats(); }
    int64_t in_use() const { return extents_.in_use(); }
    int64_t capacity() const { return memory_->bytes(); }
    // Whether so much is in use that results should not stay.
    bool is_crowded() const { return in_use() > capacity() / 4 * 3; }

private:
    friend class StreamHold;
    // A stream that has used an extent, and a cudaEvent_t behind that; null: not recorded yet.
    struct User {
        Stream stream;
        std::shared_ptr<void> mark;
    };
    struct Retired {
        Extent extent;
        std::vector<User> users;  // that may not have got there
    };
    // Free memory for work on one stream; for other streams once that has got there.
    struct Early {
        Extent range;
        User user;
    };
    class Marks;
    void retire(const Extent& extent, const std::vector<Stream>& streams);
    std::optional<Extent> take_back(int64_t bytes, Stream stream);
    void collect(Stream stream, bool capturing, bool waits, Marks& marks);
    void take_over(Stream stream, bool capturing, Marks& marks);
    std::optional<Extent> grant_now(int64_t bytes, Stream stream, bool takes_own, Marks& marks);
    void give_back_early(const Extent& range, const User& user);

    std::shared_ptr<DeviceMemory> memory_;
    Arena extents_;
    std::mutex mutex_;
    std::vector<Retired> retired_;  // as they died; behind them what is not ready yet
    std::mutex granting_;
    std::vector<Early> early_;  // ranges do not overlap
};

// An extent held by tensors; the last one to die retires it.
class StreamHold {
public:
    StreamHold(std::shared_ptr<DeviceArena> arena, Extent extent, Stream stream)
        : arena_(std::move(arena)), extent_(extent), streams_{stream} {}
    ~StreamHold() { arena_->retire(extent_, streams_); }
    StreamHold(const StreamHold&) = delete;
    StreamHold& operator=(const StreamHold&) = delete;

    void use_on(Stream stream);
    const Extent& extent() const { return extent_; }
    std::byte* data() const { return arena_->data() + extent_.offset; }
    int device() const { return arena_->device(); }

private:
    friend class DeviceArena;

    std::shared_ptr<DeviceArena> arena_;
    Extent extent_;
    std::mutex mutex_;
    std::vector<Stream> streams_;
};

}  // namespace ep
