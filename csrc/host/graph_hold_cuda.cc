#include "host/graph_hold.h"

#include <cuda_runtime_api.h>
#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <csignal>
#include <iterator>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "host/cuda_check.h"
#include "transport/beside_captures.h"

namespace ep {
namespace {

struct Kept {
    std::shared_ptr<void> object;
    const void* arena;
    int device;
};

// What graphs that are gone have kept, until somebody lets go of it.
class Dropped {
public:
    void add(Kept kept) {
        {
            std::lock_guard lock(mutex_);
            kept_.push_back(std::move(kept));
        }
        changed_.notify_all();
    }

    // Extents: they return to an arena that lives.
    void release(const void* arena) {
        std::vector<Kept> gone;
        std::unique_lock lock(mutex_);
        const auto other = [arena](const Kept& k) { return k.arena != arena; };
        const auto ours = std::stable_partition(kept_.begin(), kept_.end(), other);
        std::move(ours, kept_.end(), std::back_inserter(gone));
        kept_.erase(ours, kept_.end());
        changed_.wait(lock, [&] {  // an extent that the thread has in hand
            return std::find(in_hand_.begin(), in_hand_.end(), arena) == in_hand_.end();
        });
    }

    void release_all() {
        std::unique_lock lock(mutex_);
        if (kept_.empty() && in_hand_.empty()) return;
        int before = 0;
        EP_CUDA(cudaGetDevice(&before));
        while (!kept_.empty()) release_one(lock);
        changed_.wait(lock, [this] { return in_hand_.empty(); });
        EP_CUDA(cudaSetDevice(before));
    }

    // Where there can be none, things stay until somebody calls release.
    void start_thread() {
        std::lock_guard lock(mutex_);
        if (has_thread_) return;
        has_thread_ = true;
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for threads of the user
        try {
            std::thread([this] { run(); }).detach();
        } catch (const std::system_error&) {
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

private:
    [[noreturn]] void run() {
        std::unique_lock lock(mutex_);
        while (true) {
            changed_.wait(lock, [this] { return !kept_.empty(); });
            release_one(lock);
        }
    }

    void release_one(std::unique_lock<std::mutex>& lock) {
        Kept kept = std::move(kept_.back());
        kept_.pop_back();
        in_hand_.push_back(kept.arena);
        lock.unlock();
        {
            const BesideCaptures beside;
            cudaSetDevice(kept.device);
            kept.object.reset();
        }
        lock.lock();
        in_hand_.erase(std::find(in_hand_.begin(), in_hand_.end(), kept.arena));
        changed_.notify_all();
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<Kept> kept_;
    std::vector<const void*> in_hand_;  // arenas of what is being let go, or null
    bool has_thread_ = false;
};

Dropped& dropped() {
    static auto* const all = new Dropped;  // graphs may end after our statics
    return *all;
}

// The graph a capture builds, or null.
cudaGraph_t graph_of(cudaStream_t stream) {
    cudaStreamCaptureStatus status;
    cudaGraph_t graph = nullptr;
    EP_CUDA(cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph, nullptr, nullptr, nullptr));
    return status == cudaStreamCaptureStatusActive ? graph : nullptr;
}

void drop(void* held) {
    const std::unique_ptr<Kept> kept(static_cast<Kept*>(held));
    dropped().add(std::move(*kept));
}

}  // namespace

bool is_capturing(cudaStream_t stream) { return graph_of(stream) != nullptr; }

bool in_same_graph(cudaStream_t one, cudaStream_t other) {
    return graph_of(one) == graph_of(other);
}

void keep_in_graph(cudaStream_t stream, std::shared_ptr<void> kept, const void* arena) {
    cudaGraph_t graph = graph_of(stream);
    if (graph == nullptr) return;
    dropped().start_thread();
    auto held = std::make_unique<Kept>(Kept{std::move(kept), arena, 0});
    EP_CUDA(cudaGetDevice(&held->device));
    cudaUserObject_t object;
    EP_CUDA(cudaUserObjectCreate(&object, held.get(), drop, 1, cudaUserObjectNoDestructorSync));
    (void)held.release();
    EP_CUDA(cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove));
}

void release_dropped(const void* arena) { dropped().release(arena); }

void release_dropped() { dropped().release_all(); }

}  // namespace ep
