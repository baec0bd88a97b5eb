#include "host/arena.h"

#include <algorithm>

#include "contract/config.h"

namespace ep {

int64_t Arena::bytes_of_extent(int64_t bytes) {
    return (std::max<int64_t>(bytes, 1) + kExtentAlign - 1) / kExtentAlign * kExtentAlign;
}

Arena::Arena(int64_t capacity, std::shared_ptr<void> memory)
    : capacity_(capacity), memory_(std::move(memory)) {
    if (capacity > 0) free_[0] = capacity;
}

std::optional<Extent> Arena::grant(int64_t bytes, const std::vector<Extent>& but) {
    const int64_t rounded = bytes_of_extent(bytes);
    std::lock_guard lock(mutex_);
    auto left_out = but.begin();
    for (const auto& [offset, size] : free_) {
        const int64_t begin = offset, end = offset + size;
        int64_t at = begin;
        for (; left_out != but.end() && left_out->offset < end; ++left_out) {
            if (left_out->offset - at >= rounded) break;
            at = std::max(at, left_out->offset + left_out->bytes);
        }
        if (end - at < rounded) continue;
        free_.erase(begin);
        if (at > begin) free_[begin] = at - begin;
        if (at + rounded < end) free_[at + rounded] = end - at - rounded;
        used_[at] = rounded;
        in_use_ += rounded;
        peak_ = std::max(peak_, in_use_);
        return Extent{at, rounded};
    }
    return std::nullopt;
}

Extent Arena::give_back(int64_t offset) {
    std::lock_guard lock(mutex_);
    const auto used = used_.find(offset);
    if (used == used_.end()) return {};
    const int64_t bytes = used->second;
    in_use_ -= bytes;
    used_.erase(used);
    put_free(offset, bytes);
    return {offset, bytes};
}

void Arena::trim(int64_t offset, int64_t bytes) {
    const int64_t kept = bytes_of_extent(bytes);
    std::lock_guard lock(mutex_);
    const auto used = used_.find(offset);
    if (used == used_.end() || kept >= used->second) return;
    const int64_t rest = used->second - kept;
    in_use_ -= rest;
    used->second = kept;
    put_free(offset + kept, rest);
}

// Free ranges that touch become one. The caller holds the lock.
void Arena::put_free(int64_t offset, int64_t bytes) {
    auto next = free_.lower_bound(offset);
    if (next != free_.end() && next->first == offset + bytes) {
        bytes += next->second;
        next = free_.erase(next);
    }
    if (next != free_.begin()) {
        const auto before = std::prev(next);
        if (before->first + before->second == offset) {
            before->second += bytes;
            return;
        }
    }
    free_[offset] = bytes;
}

std::optional<Extent> Arena::find(int64_t offset, int64_t bytes) const {
    std::lock_guard lock(mutex_);
    auto it = used_.upper_bound(offset);
    if (it == used_.begin()) return std::nullopt;
    --it;
    if (offset + bytes > it->first + it->second) return std::nullopt;
    return Extent{it->first, it->second};
}

void Arena::visit_free(const std::function<void(const Extent&)>& use) const {
    std::lock_guard lock(mutex_);
    for (const auto& [offset, bytes] : free_) use({offset, bytes});
}

ArenaStats Arena::stats() const {
    std::lock_guard lock(mutex_);
    int64_t largest = 0;
    for (const auto& [offset, bytes] : free_) largest = std::max(largest, bytes);
    return {capacity_, in_use_, peak_, largest, static_cast<int64_t>(used_.size())};
}

int64_t Arena::in_use() const {
    std::lock_guard lock(mutex_);
    return in_use_;
}

}  // namespace ep
