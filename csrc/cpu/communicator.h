// A rank with its communication thread: operations run in the order they were begun, here or there.
//
// A begun operation costs its caller nothing until it is waited for. Waiting never runs anything,
// so begun operations may be waited for in any order without deadlock.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/rank.h"

namespace ep::cpu {

// A begun operation. Exactly one of the results is filled, by its kind.
class Pending {
public:
    bool done() const;
    // True once finished; false when the hooks interrupted the wait.
    bool wait(const WaitHooks& hooks);

    Dispatched dispatched;
    Outcome combined;

private:
    friend class Communicator;
    void finish();

    mutable std::mutex mutex_;
    std::condition_variable changed_;
    bool done_ = false;
};

class Communicator {
public:
    explicit Communicator(std::unique_ptr<Rank> rank);
    ~Communicator() { close(); }

    Dispatched dispatch(const DispatchArgs& args, const WaitHooks& hooks);
    Outcome combine(const CombineArgs& args, const WaitHooks& hooks);
    // In its turn behind what was begun before; the caller need not wait for that.
    void refuse(OpKind kind, const Outcome& why);
    std::shared_ptr<Pending> begin_dispatch(const DispatchArgs& args);
    std::shared_ptr<Pending> begin_combine(const CombineArgs& args);
    // Waits for all that was begun, refusals too; false when the hooks interrupted it.
    bool drain(const WaitHooks& hooks);

    // Local and bounded: what is begun is cut short, peers learn that we left. Never throws, may be
    // called twice, from any thread: a call that waits in another one ends with kClosed, and so
    // does every later one.
    void close();

    Rank& rank() { return *rank_; }

private:
    class Visit;

    std::shared_ptr<Pending> submit(std::function<void(Pending&)> work);
    void work();
    Outcome told(Outcome outcome) const;

    std::unique_ptr<Rank> rank_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::function<void()>> queue_;
    std::shared_ptr<Pending> last_;
    std::thread thread_;
    std::vector<std::thread::id> visitors_;  // threads inside dispatch or combine
    std::atomic<bool> stopping_{false};
    int64_t pid_;  // a fork has our memory but not our thread, and is not the rank
};

}  // namespace ep::cpu
