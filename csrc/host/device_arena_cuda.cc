#include <cuda_runtime_api.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "host/cuda_check.h"
#include "host/device_arena.h"
#include "host/graph_hold.h"
#include "transport/beside_captures.h"

namespace ep {

DeviceArena::DeviceArena(std::shared_ptr<DeviceMemory> memory)
    : memory_(std::move(memory)), extents_(memory_->bytes()) {}

DeviceArena::~DeviceArena() = default;

// What a grant asks streams, each once.
class DeviceArena::Marks {
public:
    // `capturing`: streams that are not being captured, only.
    Marks(int device, bool capturing) : device_(device), capturing_(capturing) {}

    // Whether it is known that a stream has done all that was queued there when the extent was first
    // looked at. During a capture nobody looks for the first time.
    bool are_reached(User& user) {
        go_beside();
        if (!user.mark) {
            if (capturing_ || is_capturing(user.stream)) return false;
            Found& stream = found(user.stream);
            if (stream.is_done) return true;
            if (!stream.mark) stream.mark = mark_of(user.stream);
            user.mark = stream.mark;
            return false;
        }
        auto* event = static_cast<cudaEvent_t>(user.mark.get());
        for (const auto& [seen, is_reached] : seen_) {
            if (seen == event) return is_reached;
        }
        seen_.emplace_back(event, is_ready(cudaEventQuery(event)));
        return seen_.back().second;
    }

    // The stream runs behind what this one, which has been asked, has not reached.
    void let_wait(Stream stream, const User& user) {
        go_beside();
        void* mark = user.mark.get();
        if (std::find(waited_.begin(), waited_.end(), mark) != waited_.end()) return;
        EP_CUDA(cudaStreamWaitEvent(stream, static_cast<cudaEvent_t>(mark), 0));
        waited_.push_back(mark);
    }

private:
    // Before anything is asked; most grants ask nothing.
    void go_beside() {
        if (!beside_) beside_.emplace();
    }
    struct Found {
        Stream stream;
        bool is_done;
        std::shared_ptr<void> mark;  // for all extents that have none yet
    };
    Found& found(Stream stream) {
        for (Found& f : found_) {
            if (f.stream == stream) return f;
        }
        found_.push_back({stream, is_ready(cudaStreamQuery(stream)), nullptr});
        return found_.back();
    }
    std::shared_ptr<void> mark_of(Stream stream) const {
        EP_CUDA(cudaSetDevice(device_));
        cudaEvent_t event;
        EP_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        std::shared_ptr<void> mark(event, [](void* e) {
            const BesideCaptures beside;
            cudaEventDestroy(static_cast<cudaEvent_t>(e));
        });
        EP_CUDA(cudaEventRecord(event, stream));
        return mark;
    }

    const int device_;
    const bool capturing_;
    std::optional<BesideCaptures> beside_;
    std::vector<Found> found_;
    std::vector<std::pair<cudaEvent_t, bool>> seen_;
    std::vector<void*> waited_;
};

std::shared_ptr<StreamHold> DeviceArena::grant(int64_t bytes, Stream stream) {
    return grant(bytes, stream, is_capturing(stream));
}

std::shared_ptr<StreamHold> DeviceArena::grant(int64_t bytes, Stream stream, bool capturing) {
    release_dropped(this);
    std::unique_lock lock(granting_);
    Marks marks(device(), capturing);
    auto extent = capturing ? std::nullopt : take_back(bytes, stream);
    if (!extent) {
        collect(stream, capturing, false, marks);
        extent = grant_now(bytes, stream, !capturing, marks);
    }
    if (!extent) {
        collect(stream, capturing, true, marks);
        take_over(stream, capturing, marks);
        extent = grant_now(bytes, stream, true, marks);
    }
    lock.unlock();
    if (!extent) return nullptr;
    auto hold = std::make_shared<StreamHold>(shared_from_this(), *extent, stream);
    if (capturing) keep_in_graph(stream, hold, this);
    return hold;
}

int64_t DeviceArena::reclaim(Stream stream) {
    release_dropped(this);
    const std::lock_guard lock(granting_);
    const bool capturing = is_capturing(stream);
    Marks marks(device(), capturing);
    collect(stream, capturing, true, marks);
    take_over(stream, capturing, marks);
    return extents_.stats().largest_free;
}

void DeviceArena::trim(StreamHold& hold, int64_t bytes) {
    Extent& extent = hold.extent_;
    extents_.trim(extent.offset, bytes);
    extent.bytes = std::min(extent.bytes, Arena::bytes_of_extent(bytes));
}

int64_t DeviceArena::offset_of(uintptr_t address, int64_t bytes) const {
    const auto base = reinterpret_cast<uintptr_t>(memory_->data());
    if (address < base || address + bytes > base + memory_->bytes()) return -1;
    const auto offset = static_cast<int64_t>(address - base);
    return extents_.find(offset, bytes) ? offset : -1;
}

void DeviceArena::retire(const Extent& extent, const std::vector<Stream>& streams) {
    Retired retired{extent, {}};
    for (Stream stream : streams) retired.users.push_back({stream, nullptr});
    std::lock_guard lock(mutex_);
    retired_.push_back(std::move(retired));
}

// What a call in a loop asks for: as much as has died first. Only while few have died, which this stream alone has
// used, and memory is not short: they count as in use until they are looked at.
std::optional<Extent> DeviceArena::take_back(int64_t bytes, Stream stream) {
    constexpr size_t kFew = 4;  // two results of a static call
    if (is_crowded()) return std::nullopt;
    std::lock_guard lock(mutex_);
    const auto is_own = [stream](const Retired& r) {
        return r.users.size() == 1 && r.users[0].stream == stream;
    };
    if (retired_.empty() || retired_.size() > kFew ||
        retired_.front().extent.bytes != Arena::bytes_of_extent(bytes) ||
        !std::all_of(retired_.begin(), retired_.end(), is_own)) {
        return std::nullopt;
    }
    const Retired taken = std::move(retired_.front());
    retired_.erase(retired_.begin());
    return taken.extent;
}

// Free memory that work on `stream` may use. `takes_own`: also behind what is queued there.
std::optional<Extent> DeviceArena::grant_now(int64_t bytes, Stream stream, bool takes_own,
                                             Marks& marks) {
    std::vector<Extent> others;
    std::erase_if(early_, [&](Early& early) {
        if (takes_own && early.user.stream == stream) return false;
        if (marks.are_reached(early.user)) return true;
        others.push_back(early.range);
        return false;
    });
    std::sort(others.begin(), others.end(),
              [](const Extent& a, const Extent& b) { return a.offset < b.offset; });
    const auto extent = extents_.grant(bytes, others);
    if (!extent) return extent;
    // It is nobody's any more; what is left of a range, on either side, stays as it is.
    const int64_t begin = extent->offset, end = begin + extent->bytes;
    std::vector<Early> left;
    std::erase_if(early_, [&](const Early& early) {
        const int64_t first = early.range.offset, last = first + early.range.bytes;
        if (last <= begin || first >= end) return false;
        if (first < begin) left.push_back({{first, begin - first}, early.user});
        if (last > end) left.push_back({{end, last - end}, early.user});
        return true;
    });
    std::move(left.begin(), left.end(), std::back_inserter(early_));
    return extent;
}

// Ranges that touch become one as long as nobody has asked for them.
void DeviceArena::give_back_early(const Extent& range, const User& user) {
    Early now{range, user};
    std::erase_if(early_, [&](const Early& other) {
        const Extent& a = other.range;
        Extent& b = now.range;
        const bool touches = a.offset + a.bytes == b.offset || b.offset + b.bytes == a.offset;
        if (!touches || other.user.stream != user.stream || other.user.mark != user.mark) {
            return false;
        }
        b = {std::min(a.offset, b.offset), a.bytes + b.bytes};
        return true;
    });
    early_.push_back(std::move(now));
}

// `waits`: the stream waits for the others. A capture takes nothing back that another stream has used: its
// graph cannot wait for work that was queued outside of it. What the stream itself has used outside it takes
// only when `waits`, that is, rather than fail: the graph may be launched on another stream, before that is
// over, unless it was waited for before the capture, as torch.cuda.graph does.
void DeviceArena::collect(Stream stream, bool capturing, bool waits, Marks& marks) {
    std::vector<Retired> found, kept;
    {
        std::lock_guard lock(mutex_);
        found.swap(retired_);
    }
    if (found.empty()) return;
    for (Retired& retired : found) {
        bool ready = true;
        // Who has got there is not asked again: it may have other work by then.
        std::erase_if(retired.users, [&](User& user) {
            const bool is_own = user.stream == stream;
            if (is_own && (!capturing || waits)) return false;
            if (marks.are_reached(user)) return true;
            ready = ready && waits && !capturing && !is_capturing(user.stream);
            return false;
        });
        if (!ready) {
            // The same for our own work, should a grant on another stream find the extent.
            std::erase_if(retired.users, [&](User& user) {
                return user.stream == stream && marks.are_reached(user);
            });
            kept.push_back(std::move(retired));
            continue;
        }
        const Extent range = extents_.give_back(retired.extent.offset);
        if (retired.users.empty()) continue;
        User own{stream, nullptr};
        for (const User& user : retired.users) {
            if (user.stream != stream) marks.let_wait(stream, user);
        }
        if (retired.users.size() == 1 && retired.users[0].stream == stream) own = retired.users[0];
        give_back_early(range, own);
    }
    if (kept.empty()) return;
    std::lock_guard lock(mutex_);
    std::move(kept.begin(), kept.end(), std::back_inserter(retired_));
}

// What is free for other streams becomes free for this one, which waits for them.
void DeviceArena::take_over(Stream stream, bool capturing, Marks& marks) {
    std::vector<Extent> ranges;
    std::erase_if(early_, [&](Early& early) {
        if (early.user.stream == stream) return false;
        if (capturing || is_capturing(early.user.stream)) return false;
        if (marks.are_reached(early.user)) return true;
        marks.let_wait(stream, early.user);
        ranges.push_back(early.range);
        return true;
    });
    for (const Extent& range : ranges) give_back_early(range, {stream, nullptr});
}

void StreamHold::use_on(Stream stream) {
    std::lock_guard lock(mutex_);
    if (std::find(streams_.begin(), streams_.end(), stream) == streams_.end()) {
        streams_.push_back(stream);
    }
}

}  // namespace ep
