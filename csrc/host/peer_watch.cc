#include "host/peer_watch.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>

namespace ep {
namespace {

constexpr int kLookEveryMs = 100;  // at the waits, and at our own context; a death wakes us

double seconds_now() {
    using Clock = std::chrono::steady_clock;
    return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

}  // namespace

PeerWatch::PeerWatch(int rank, HostPage* page, std::vector<PeerProcess> peers,
                     const PeerClocks& clocks, double post_s, PeerHooks hooks, bool can_mask)
    : rank_(rank),
      page_(page),
      clocks_(clocks),
      post_s_(post_s),
      hooks_(std::move(hooks)),
      can_mask_(can_mask),
      wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      pid_(getpid()) {
    for (const PeerProcess& process : peers) {
        Peer peer;
        peer.process = process;
        peers_.push_back(peer);
    }
    thread_ = std::thread([this] { run(); });
}

void PeerWatch::stop() {
    if (!thread_.joinable()) return;
    if (getpid() != pid_) return thread_.detach();
    const uint64_t one = 1;
    (void)!write(wake_, &one, sizeof(one));
    thread_.join();
    look_at_context();  // without one no kernel has said that we leave
    if (fault() == 0) tell_all({.word = Word::kLeft});
    close(wake_);
}

int PeerWatch::fault() const {
    std::lock_guard lock(mutex_);
    return static_cast<int>(fault_);
}

bool PeerWatch::is_over(int peer) const {
    std::lock_guard lock(looking_);
    return peers_[peer].over;
}

void PeerWatch::pause(bool paused) {
    std::lock_guard lock(looking_);
    paused_ = paused;
}

void PeerWatch::run() {
    std::vector<pollfd> fds;
    while (true) {
        fds.assign(1, {wake_, POLLIN, 0});
        std::unique_lock lock(looking_);
        for (const Peer& peer : peers_) {
            if (peer.over || paused_) continue;
            if (peer.process.pidfd >= 0) fds.push_back({peer.process.pidfd, POLLIN, 0});
            if (peer.process.socket >= 0) {
                fds.push_back({peer.process.socket, POLLIN | POLLRDHUP, 0});
            }
        }
        lock.unlock();
        poll(fds.data(), fds.size(), kLookEveryMs);
        if (fds[0].revents != 0) return;
        lock.lock();
        if (!paused_) look();
    }
}

void PeerWatch::look() {
    const double now = seconds_now();
    for (int p = 0; p < static_cast<int>(peers_.size()); ++p) {
        if (p == rank_) continue;
        listen(p);
        time_waits(p, now);
    }
    look_at_context();
}

void PeerWatch::look_at_context() {
    if (!hooks_.broken || fault() != 0) return;
    const int error = hooks_.broken();
    if (error == 0) return;
    {
        std::lock_guard lock(mutex_);
        fault_ = error;
    }
    tell_all({.word = Word::kFault, .number = error});
}

// What a peer says comes before its end.
void PeerWatch::listen(int p) {
    Peer& peer = peers_[p];
    if (peer.over) return;
    // Asked before we read: its last word may be under way.
    const bool gone = is_gone(peer.process) || is_ending(peer.process);
    Message message;
    const ssize_t got = peer.process.socket < 0
                            ? -1
                            : recv(peer.process.socket, &message, sizeof(message), MSG_DONTWAIT);
    const bool spoke = got == sizeof(message) && message.magic == Message::kMagic;
    if (!spoke && !gone) return;
    peer.over = true;
    if (spoke && message.word == Word::kLeft) return;  // kernels see it in its `life`
    end_waits(spoke ? kPeerFault : kPeerDied, p);
}

// The first reason stays.
void PeerWatch::end_waits(int code, int peer) {
    if (can_mask_) {
        uint32_t not_yet = 0;
        std::atomic_ref(page_->lost[peer])
            .compare_exchange_strong(not_yet, static_cast<uint32_t>(code),
                                     std::memory_order_release);
        return;
    }
    uint64_t none = 0;
    std::atomic_ref(page_->abort)
        .compare_exchange_strong(none, abort_word(code, peer), std::memory_order_release);
}

void PeerWatch::time_waits(int p, double now) {
    Peer& peer = peers_[p];
    const uint64_t word = std::atomic_ref(page_->waiting[p]).load(std::memory_order_acquire);
    if (word != peer.waiting) {
        peer.waiting = word;
        peer.since_s = now - post_s_;
    }
    if (word == 0) return;
    const double waited = now - peer.since_s;
    if (waited >= clocks_.arrival_warn_s && waiting_seq(word) > peer.warned_seq) {
        peer.warned_seq = waiting_seq(word);
        if (hooks_.late) hooks_.late(waiting_kind(word), p, waited);
    }
    const Site site = waiting_site(word);
    const bool arriving = site == Site::kEntry || site == Site::kSlot;
    if (arriving && waited >= clocks_.progress_s && is_stopped(peer.process)) {
        end_waits(kPeerAbsent, p);
    }
}

void PeerWatch::tell_all(const Message& message) {
    for (const Peer& peer : peers_) {
        if (peer.process.socket < 0) continue;
        (void)!send(peer.process.socket, &message, sizeof(message), MSG_DONTWAIT | MSG_NOSIGNAL);
    }
}

}  // namespace ep
