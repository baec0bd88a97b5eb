// How long each rank keeps us waiting, for those who look for stragglers.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

#include "cpu/watch.h"

namespace ep::cpu {

// Others may read sums while we add to them.
template <class Number>
void add_to_stats(Number& sum, Number value) {
    if (value != 0) std::atomic_ref(sum).fetch_add(value, std::memory_order_relaxed);
}

// Of one step in which all ranks are waited for: a rank costs what passes from the first look until it
// is seen to be there; who is there at the first look costs nothing. Ranks are waited for one by one, so
// all of them are looked at while we wait for any.
class WaitTimes {
public:
    // stats: [num_ranks] adds nanoseconds; null = nobody wants to know
    WaitTimes(int64_t* stats, int num_ranks)
        : stats_(stats), awaited_(stats != nullptr ? num_ranks : 0) {
        for (int p = 0; p < static_cast<int>(awaited_.size()); ++p) awaited_[p] = p;
    }

    WokenBy woken_by() const { return stats_ != nullptr ? WokenBy::kAnyone : WokenBy::kPeer; }

    template <class There>
    void look(There there) {
        if (awaited_.empty()) return;
        const auto now = Clock::now();
        if (start_ == Clock::time_point{}) start_ = now;
        std::erase_if(awaited_, [&](int p) {
            if (!there(p)) return false;
            add_to_stats(stats_[p], ns(now - start_));
            return true;
        });
    }

    using Clock = std::chrono::steady_clock;
    static int64_t ns(Clock::duration time) {
        return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
    }

private:
    int64_t* stats_;
    std::vector<int> awaited_;
    Clock::time_point start_{};
};

}  // namespace ep::cpu
