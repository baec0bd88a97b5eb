#include "cpu/watch.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

namespace ep::cpu {
namespace {

constexpr long kSliceNs =
    20'000'000;             // how long a waiter sleeps before it looks at its peers again
constexpr int kSpins = 64;  // a few microseconds: a peer on another core often answers at once
constexpr uint32_t kAnyone = UINT32_MAX;  // in waiting_for
constexpr auto kLookEvery = std::chrono::milliseconds(20);

void futex_sleep(uint32_t& word, uint32_t seen) {
    const timespec slice{0, kSliceNs};
    syscall(SYS_futex, &word, FUTEX_WAIT, seen, &slice, nullptr, 0);
}

void futex_wake_all(uint32_t& word) {
    syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

Life life_of(ControlHeader& header) {
    return static_cast<Life>(std::atomic_ref(header.life).load(std::memory_order_acquire));
}

}  // namespace

void ring(ControlHeader& receiver, int from) {
    std::atomic_ref(receiver.doorbell).fetch_add(1, std::memory_order_seq_cst);
    const uint32_t awaited = std::atomic_ref(receiver.waiting_for).load(std::memory_order_seq_cst);
    const bool wake = from == kAnyRank
                          ? awaited != 0
                          : awaited == kAnyone || awaited == static_cast<uint32_t>(from) + 1;
    if (wake) futex_wake_all(receiver.doorbell);
}

void Masks::mask(int rank) const {
    for (uint64_t* word : words_) {
        std::atomic_ref(*word).fetch_or(uint64_t{1} << rank, std::memory_order_release);
    }
    for (ControlHeader* header : headers_) ring(*header, kAnyRank);
}

Watch::Watch(int rank, std::vector<ControlHeader*> headers,
             const std::vector<PeerProcess>& processes, const Clocks& clocks,
             const WaitHooks& hooks, OpKind op, uint64_t seq, const Masks* masks)
    : rank_(rank),
      headers_(std::move(headers)),
      processes_(processes),
      clocks_(clocks),
      hooks_(hooks),
      op_(op),
      seq_(seq),
      masks_(masks) {}

bool Watch::until(Site site, int peer, const std::function<bool()>& ready,
                  const std::function<int64_t()>& progress, int64_t want, WokenBy woken_by) {
    if (!outcome_.ok()) return false;
    for (int i = 0; i < kSpins; ++i) {
        if (ready()) return true;
        pause_briefly();
    }
    ControlHeader& own = *headers_[rank_];
    const uint32_t awaited =
        woken_by == WokenBy::kAnyone ? kAnyone : static_cast<uint32_t>(peer) + 1;
    Wait wait{site, peer, Clock::now(), Clock::now(), want, 0, progress == nullptr, false};
    auto next_look = wait.start;
    while (true) {
        // The bell is read before the condition: a publication in between changes it and futex
        // refuses to sleep.
        const uint32_t bell = std::atomic_ref(own.doorbell).load(std::memory_order_seq_cst);
        if (ready()) return true;
        const auto now = Clock::now();
        if (now >= next_look) {
            next_look = now + kLookEvery;
            if (progress != nullptr) {
                const int64_t have = progress();
                if (have != wait.have) wait.last_progress = now;
                wait.have = have;
            }
            if (give_up(wait)) return came_after_all(ready);
        }
        std::atomic_ref waiting_for(own.waiting_for);
        waiting_for.store(awaited, std::memory_order_seq_cst);
        futex_sleep(own.doorbell, bell);
        waiting_for.store(0, std::memory_order_relaxed);
    }
}

// A peer may publish its last word and leave between our two looks: what it published counts.
bool Watch::came_after_all(const std::function<bool()>& ready) {
    const int code = outcome_.incident.code;
    if (code == kInterrupted || code == kMasked || !ready()) return false;
    outcome_ = Outcome{};
    return true;
}

// Precedence: interrupt, death, a peer's own verdict, a peer that left, the clocks.
bool Watch::give_up(Wait& wait) {
    if (hooks_.interrupted && hooks_.interrupted()) {
        blame(kInterrupted, wait, wait.peer);
        return true;
    }
    if (masks_ != nullptr) return goes_without(wait);
    const int gone = first_gone();
    if (gone >= 0) {
        blame(kPeerDied, wait, gone);
        return true;
    }
    if (adopt_failure(wait)) return true;
    if (wait.peer != rank_ && life_of(*headers_[wait.peer]) == Life::kLeft) {
        blame(kPeerLeft, wait, wait.peer);
        return true;
    }
    return expired(wait, Clock::now());
}

// Whom we wait for is masked, by others or now by us. Of all that died or failed everybody is told.
bool Watch::goes_without(Wait& wait) {
    if (!is_wanted()) return true;
    for (int p = 0; p < static_cast<int>(headers_.size()); ++p) {
        const Life life = life_of(*headers_[p]);
        const bool lost = life == Life::kFailed || (p == wait.peer && life == Life::kLeft);
        if (p != rank_ && !masks_->has(p) && (lost || is_dead(p))) masks_->mask(p);
    }
    if (masks_->has(wait.peer)) return true;
    if (wait.peer == rank_ || !expired(wait, Clock::now())) return false;
    outcome_ = Outcome{};
    masks_->mask(wait.peer);
    return true;
}

bool Watch::is_wanted() {
    if (masks_ == nullptr || !masks_->has(rank_)) return true;
    const auto now = Clock::now();
    blame(kMasked, {Site::kNone, rank_, now, now, 0, 0, false, false}, rank_);
    return false;
}

bool Watch::adopt_failure(const Wait& wait) {
    for (size_t p = 0; p < headers_.size(); ++p) {
        if (static_cast<int>(p) != rank_ && life_of(*headers_[p]) == Life::kFailed) {
            adopt(*headers_[p], wait);
            return true;
        }
    }
    return false;
}

bool Watch::healthy(Site site) {
    // What we read until now was read before we look whether its owner had given up.
    std::atomic_thread_fence(std::memory_order_acquire);
    if (masks_ != nullptr) return outcome_.ok() && is_wanted();
    const Wait wait{site, rank_, Clock::now(), Clock::now(), 0, 0, false, false};
    return outcome_.ok() && !adopt_failure(wait);
}

bool Watch::expired(Wait& wait, Clock::time_point now) {
    const auto seconds = [now](Clock::time_point since) {
        return std::chrono::duration<double>(now - since).count();
    };
    const double waited = seconds(wait.start);
    if (waited >= clocks_.arrival_warn_s && !wait.warned) {
        wait.warned = true;
        if (hooks_.late) hooks_.late(wait.site, wait.peer, waited);
    }
    if (!wait.arriving) {
        if (seconds(wait.last_progress) < clocks_.progress_s) return false;
        blame(kStalled, wait, wait.peer);
        return true;
    }
    const bool late = clocks_.arrival_s >= 0 && waited >= clocks_.arrival_s;
    const bool silent = waited >= clocks_.progress_s && is_stopped(processes_[wait.peer]);
    if (!late && !silent) return false;
    blame(kPeerAbsent, wait, wait.peer);
    return true;
}

// A process that ended after it closed its buffer has left, not died.
bool Watch::is_dead(int peer) const {
    return is_gone(processes_[peer]) && life_of(*headers_[peer]) == Life::kAlive;
}

int Watch::first_gone() const {
    for (int p = 0; p < static_cast<int>(headers_.size()); ++p) {
        if (p != rank_ && is_dead(p)) return p;
    }
    return -1;
}

void Watch::blame(int code, const Wait& wait, int peer) {
    Incident& incident = outcome_.incident;
    incident.code = static_cast<uint16_t>(code);
    incident.site = wait.site;
    incident.op = static_cast<uint8_t>(op_);
    incident.rank = static_cast<int16_t>(rank_);
    incident.peer = static_cast<int16_t>(peer);
    incident.epoch = static_cast<uint32_t>(seq_);
    incident.seq = seq_;
    incident.peer_seq =
        std::atomic_ref(headers_[peer]->entered_seq).load(std::memory_order_acquire);
    incident.waited_ns = static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - wait.start).count());
    incident.want = wait.want;
    incident.have = wait.have;
}

// One fault, one verdict: a peer that already failed told us why, and who.
void Watch::adopt(const ControlHeader& failed, const Wait& wait) {
    ControlHeader& header = const_cast<ControlHeader&>(failed);
    if (load_acquire(header.verdict_valid) == 0) {
        blame(kPeerLeft, wait, wait.peer);
        return;
    }
    const Incident verdict = header.verdict;
    const auto is_rank = [this](int r) { return r >= 0 && r < static_cast<int>(headers_.size()); };
    if (!is_rank(verdict.rank) || !is_rank(verdict.peer) || !ends_communicator(verdict.code)) {
        blame(kPeerLeft, wait, wait.peer);  // it failed, and cannot even say why
        return;
    }
    const bool by_signal = verdict.code == kInterrupted;  // it left because its user asked for it
    const int culprit = by_signal ? verdict.rank : verdict.peer;
    blame(by_signal ? static_cast<int>(kPeerLeft) : verdict.code, wait, culprit);
    outcome_.detail[0] = verdict.rank + 1;  // who found out, counted from 1; 0 = we did
    outcome_.detail[1] = static_cast<int64_t>(verdict.seq);
    outcome_.incident.want = verdict.want;
    outcome_.incident.have = verdict.have;
}

}  // namespace ep::cpu
