// Bounded waiting between ranks that share host memory: futex doorbells, deadlines, and who is to
// blame.
//
// A waiter sleeps on its own doorbell and says for whom; whoever publishes something for it rings,
// which wakes it only when it is the one waited for: where ranks share cores, waking a rank that
// cannot go on yet costs another one its turn. Every few milliseconds a waiter looks whether a peer
// died, failed or left. Nothing here spins for longer than a few microseconds.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <vector>

#include "contract/records.h"
#include "contract/status.h"
#include "host/peer_process.h"

namespace ep::cpu {

struct Clocks {
    double arrival_warn_s = 5.0;
    double arrival_s = 600.0;  // < 0: never
    double progress_s = 30.0;
};

// Called now and then from a waiting thread. `interrupted` is asked often and ends the wait when
// true.
struct WaitHooks {
    std::function<bool()> interrupted;
    std::function<void(Site, int peer, double waited_s)> late;
};

// Publishing and seeing flag words: the only places that order memory between ranks.
inline uint64_t load_acquire(uint64_t& word) {
    return std::atomic_ref(word).load(std::memory_order_acquire);
}
inline void store_release(uint64_t& word, uint64_t value) {
    std::atomic_ref(word).store(value, std::memory_order_release);
}
inline void add_release(uint64_t& word, uint64_t value) {
    std::atomic_ref(word).fetch_add(value, std::memory_order_release);
}

inline constexpr int kAnyRank = -1;
enum class WokenBy { kPeer, kAnyone };

// Tells `receiver` that `from` has published something for it; kAnyRank: whoever it waits for.
void ring(ControlHeader& receiver, int from);

// Ranks that nobody waits for: a bit for each in a word of every rank, which any rank may set. Whoever
// masks a rank tells all at once, so nobody runs out of patience with a rank that still waits for it.
class Masks {
public:
    Masks(int rank, std::vector<ControlHeader*> headers, std::vector<uint64_t*> words)
        : rank_(rank), headers_(std::move(headers)), words_(std::move(words)) {}

    uint64_t now() const { return load_acquire(*words_[rank_]); }
    bool has(int rank) const { return (now() >> rank & 1) != 0; }
    void mask(int rank) const;
    // Of all ranks that stay, each for itself, while nobody is in an operation.
    void reset(uint64_t masked) const { store_release(*words_[rank_], masked); }

private:
    int rank_;
    std::vector<ControlHeader*> headers_;
    std::vector<uint64_t*> words_;
};

// Codes after which the communicator is dead; all others fail one call.
bool ends_communicator(int code);

// One operation's view of time and of its peers.
class Watch {
public:
    Watch(int rank, std::vector<ControlHeader*> headers, const std::vector<PeerProcess>& processes,
          const Clocks& clocks, const WaitHooks& hooks, OpKind op, uint64_t seq,
          const Masks* masks = nullptr);

    // True once ready() holds. False when the wait is over without it: `outcome()` says why, and
    // blames `peer`. Only what that peer publishes wakes us, unless `woken_by` says otherwise.
    // `progress()` is a number that changes while the peer advances; null = the peer has not
    // entered yet (arrival clock). With masks nobody is blamed: false with an outcome that is ok means
    // that the peer is masked.
    [[nodiscard]] bool until(Site site, int peer, const std::function<bool()>& ready,
                             const std::function<int64_t()>& progress = nullptr, int64_t want = 0,
                             WokenBy woken_by = WokenBy::kPeer);

    // False when the others have masked us.
    [[nodiscard]] bool is_wanted();
    // False when a peer's communicator has failed, whatever we were waiting for. With masks, when we are
    // masked: nobody reads what a peer that fails may change, but we may have read what is in use again.
    [[nodiscard]] bool healthy(Site site);

    bool has_masks() const { return masks_ != nullptr; }
    const Outcome& outcome() const { return outcome_; }

private:
    using Clock = std::chrono::steady_clock;
    struct Wait {
        Site site;
        int peer;
        Clock::time_point start, last_progress;
        int64_t want, have;
        bool arriving;  // the peer has not entered this operation
        bool warned;
    };

    bool give_up(Wait& wait);
    bool came_after_all(const std::function<bool()>& ready);
    bool adopt_failure(const Wait& wait);
    bool goes_without(Wait& wait);
    bool expired(Wait& wait, Clock::time_point now);
    bool is_dead(int peer) const;
    int first_gone() const;
    void blame(int code, const Wait& wait, int peer);
    void adopt(const ControlHeader& failed, const Wait& wait);

    int rank_;
    std::vector<ControlHeader*> headers_;
    const std::vector<PeerProcess>& processes_;
    Clocks clocks_;
    const WaitHooks& hooks_;
    OpKind op_;
    uint64_t seq_;
    const Masks* masks_;  // of an operation that goes on without masked ranks; or null
    Outcome outcome_;
};

}  // namespace ep::cpu
