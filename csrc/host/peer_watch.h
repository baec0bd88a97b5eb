// The thread that watches over a GPU rank: its kernels cannot see processes, so it ends their waits
// when a peer died, and tells who is late.
//
// It knows peers by their pidfd and the bootstrap connection. Whoever leaves in order, or breaks its
// CUDA context, says so there first; an end without a word is a death. No CUDA here: the kernels read
// HostPage::abort and write HostPage::waiting.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "contract/gpu.h"
#include "host/peer_process.h"

namespace ep {

struct PeerClocks {
    double arrival_warn_s = 5.0;
    double arrival_s = 600.0;  // < 0: never
    double progress_s = 30.0;
};

// Called from the watching thread.
struct PeerHooks {
    // A peer is late: one call per wait.
    std::function<void(OpKind kind, int peer, double waited_s)> late;
    // An error number once our own CUDA context is broken, else 0.
    std::function<int()> broken;
};

class PeerWatch {
public:
    // `page` outlives the watch. Waits are reported to us once they took `post_s`.
    // With `can_mask` kernels are told of a peer that is lost, and decide what becomes of it.
    PeerWatch(int rank, HostPage* page, std::vector<PeerProcess> peers, const PeerClocks& clocks,
              double post_s, PeerHooks hooks, bool can_mask = false);
    ~PeerWatch() { stop(); }
    PeerWatch(const PeerWatch&) = delete;
    PeerWatch& operator=(const PeerWatch&) = delete;

    // Says goodbye to every peer and ends the thread. Once; not from a hook.
    void stop();
    // While paused the connections are left alone. Returns when that is so.
    void pause(bool paused);
    // Whether a peer has left, or its process has ended, as far as we know by now.
    bool is_over(int peer) const;
    // The error number of our own broken context, or 0.
    int fault() const;

private:
    enum class Word : uint32_t { kLeft = 1, kFault = 2 };
    struct Message {  // over the bootstrap connection
        uint32_t magic = kMagic;
        Word word = Word::kLeft;
        int64_t number = 0;                             // a CUDA error
        static constexpr uint32_t kMagic = 0x57504545;  // "EEPW"
    };
    struct Peer {
        PeerProcess process;
        bool over = false;     // left in order, or blamed already
        uint64_t waiting = 0;  // the wait for it that we know of
        double since_s = 0;    // when it began
        uint64_t warned_seq =
            0;  // the last operation that was told to be late: its warps take turns
    };

    void run();
    void look();
    void listen(int p);
    void time_waits(int p, double now);
    void look_at_context();
    void end_waits(int code, int peer);  // all, or with masks those for this peer
    void tell_all(const Message& message);

    const int rank_;
    HostPage* const page_;
    std::vector<Peer> peers_;
    const PeerClocks clocks_;
    const double post_s_;
    const PeerHooks hooks_;
    const bool can_mask_;
    int wake_ = -1;  // eventfd: the end
    int64_t fault_ = 0;
    bool paused_ = false;
    mutable std::mutex mutex_;    // of fault_
    mutable std::mutex looking_;  // of paused_, and held while we look
    std::thread thread_;
    const int64_t pid_;  // a fork has our memory but not our thread
};

}  // namespace ep
