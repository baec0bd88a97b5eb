// The watching thread of a GPU rank, without a GPU: real processes die, leave, stop and speak; the
// page is written as kernels would.
#include "host/peer_watch.h"

#include <signal.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "check.h"

namespace {

using Clock = std::chrono::steady_clock;

uint64_t abort_of(ep::HostPage& page) {
    return std::atomic_ref(page.abort).load(std::memory_order_acquire);
}

// Whether `ready` comes true, also on a machine that pauses.
template <class Ready>
bool soon(Ready ready) {
    const auto end = Clock::now() + std::chrono::seconds(30);
    while (!ready() && Clock::now() < end) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return ready();
}

// Rank 1 is a child that runs `body` with its end of the connection; we are rank 0.
struct Pair {
    template <class Body>
    explicit Pair(Body body) : page(std::make_unique<ep::HostPage>()) {
        int ends[2];
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0) std::abort();
        child = fork();
        if (child == 0) {
            close(ends[0]);
            body(ends[1]);
            _exit(0);
        }
        close(ends[1]);
        socket = ends[0];
        peers.resize(2);
        const auto pidfd = static_cast<int>(syscall(SYS_pidfd_open, child, 0));
        peers[1] = {pidfd, socket, child};
    }
    ~Pair() {
        kill(child, SIGKILL);
        waitpid(child, nullptr, 0);
        close(socket);
        if (peers[1].pidfd >= 0) close(peers[1].pidfd);
    }

    std::unique_ptr<ep::HostPage> page;
    std::vector<ep::PeerProcess> peers;
    int socket = -1;
    pid_t child = -1;
};

void sleep_long(int) { sleep(60); }

// As another rank's own watch would.
void watch_and_stop(int socket, int error, bool at_once = false) {
    auto page = std::make_unique<ep::HostPage>();
    std::vector<ep::PeerProcess> peers(2);
    peers[0].socket = socket;
    ep::PeerHooks hooks;
    hooks.broken = [error] { return error; };
    ep::PeerWatch watch(1, page.get(), peers, {}, 1.0, hooks);
    if (error != 0 && !at_once) soon([&] { return watch.fault() == error; });
    watch.stop();
}

}  // namespace

int main() {
    ep::test("a killed peer ends all waits and is blamed", [] {
        Pair pair(sleep_long);
        ep::PeerWatch watch(0, pair.page.get(), pair.peers, {}, 1.0, {});
        std::this_thread::sleep_for(std::chrono::milliseconds(250));
        ep::expect_eq(abort_of(*pair.page), 0u);
        kill(pair.child, SIGKILL);
        ep::expect(soon([&] { return abort_of(*pair.page) != 0; }), "no word of the death");
        ep::expect_eq(ep::abort_code(abort_of(*pair.page)), int{ep::kPeerDied});
        ep::expect_eq(ep::abort_peer(abort_of(*pair.page)), 1);
    });

    ep::test("a peer that says goodbye has left, and its end is no death", [] {
        Pair pair([](int socket) { watch_and_stop(socket, 0); });
        ep::PeerWatch watch(0, pair.page.get(), pair.peers, {}, 1.0, {});
        waitpid(pair.child, nullptr, 0);
        std::this_thread::sleep_for(std::chrono::milliseconds(300));
        ep::expect_eq(abort_of(*pair.page), 0u);
    });

    ep::test("a peer whose context broke says so, also when it closes at once", [] {
        for (const bool at_once : {false, true}) {
            Pair pair([=](int socket) { watch_and_stop(socket, 700, at_once); });
            ep::PeerWatch watch(0, pair.page.get(), pair.peers, {}, 1.0, {});
            ep::expect(soon([&] { return abort_of(*pair.page) != 0; }), "no word of the fault");
            ep::expect_eq(ep::abort_code(abort_of(*pair.page)), int{ep::kPeerFault});
        }
    });

    ep::test("an interrupt is not overwritten by a death", [] {
        Pair pair(sleep_long);
        pair.page->abort = ep::abort_word(ep::kInterrupted, -1);
        ep::PeerWatch watch(0, pair.page.get(), pair.peers, {}, 1.0, {});
        kill(pair.child, SIGKILL);
        std::this_thread::sleep_for(std::chrono::milliseconds(300));
        ep::expect_eq(ep::abort_code(abort_of(*pair.page)), int{ep::kInterrupted});
        ep::expect_eq(ep::abort_peer(abort_of(*pair.page)), -1);
    });

    ep::test("each late wait is told once, and a stopped peer is given up", [] {
        Pair pair(sleep_long);
        std::atomic<int> told{0};
        ep::PeerHooks hooks;
        hooks.late = [&](ep::OpKind kind, int peer, double waited) {
            ep::expect(kind == ep::OpKind::kCombine && peer == 1 && waited >= 0.3, "who is late");
            ++told;
        };
        const ep::PeerClocks clocks{0.3, -1.0, 0.6};
        ep::PeerWatch watch(0, pair.page.get(), pair.peers, clocks, 0.1, hooks);
        const auto set = [&](uint64_t word) { std::atomic_ref(pair.page->waiting[1]).store(word); };
        const auto wait_in = [&](uint64_t seq, ep::Site site = ep::Site::kEntry) {
            set(ep::waiting_word(seq, ep::OpKind::kCombine, site));
        };
        wait_in(7);
        ep::expect(soon([&] { return told == 1; }), "the first warning");
        std::this_thread::sleep_for(std::chrono::milliseconds(300));
        ep::expect_eq(told.load(), 1);
        for (int turn = 0; turn < 2; ++turn) {  // several warps wait, and some wait is over
            wait_in(7, ep::Site::kRows);
            std::this_thread::sleep_for(std::chrono::milliseconds(500));
            set(0);
            std::this_thread::sleep_for(std::chrono::milliseconds(200));
            wait_in(7);
            std::this_thread::sleep_for(std::chrono::milliseconds(500));
        }
        ep::expect_eq(told.load(), 1);
        wait_in(8);
        ep::expect(soon([&] { return told == 2; }), "the second warning");
        ep::expect_eq(abort_of(*pair.page), 0u);  // late, but it runs
        kill(pair.child, SIGSTOP);
        ep::expect(soon([&] { return abort_of(*pair.page) != 0; }), "no word of the stop");
        ep::expect_eq(ep::abort_code(abort_of(*pair.page)), int{ep::kPeerAbsent});
    });

    ep::test("a paused watch leaves the connection alone", [] {
        Pair pair([](int socket) {
            char byte = 0;
            (void)!read(socket, &byte, 1);  // until the watch is paused
            (void)!write(socket, &byte, 1);
            sleep(60);
        });
        ep::PeerWatch watch(0, pair.page.get(), pair.peers, {}, 1.0, {});
        watch.pause(true);
        (void)!write(pair.socket, "x", 1);
        char byte = 0;
        ep::expect(soon([&] { return recv(pair.socket, &byte, 1, MSG_DONTWAIT) == 1; }) || byte,
                   "somebody else read it");
        kill(pair.child, SIGKILL);
        std::this_thread::sleep_for(std::chrono::milliseconds(300));
        ep::expect_eq(abort_of(*pair.page), 0u);
        watch.pause(false);
        ep::expect(soon([&] { return abort_of(*pair.page) != 0; }), "no word of the death");
    });
    return ep::finish();
}
