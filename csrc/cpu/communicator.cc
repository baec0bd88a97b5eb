#include "cpu/communicator.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>

namespace ep::cpu {
namespace {

constexpr auto kSlice = std::chrono::milliseconds(20);
// For a visitor to leave once it was told: longer than any copy it may be in the middle of.
constexpr auto kFarewell = std::chrono::seconds(1);

Outcome interrupted(const Rank& rank) {
    Outcome outcome;
    outcome.incident.code = kInterrupted;
    outcome.incident.rank = static_cast<int16_t>(rank.rank());
    return outcome;
}

}  // namespace

bool Pending::done() const {
    std::lock_guard lock(mutex_);
    return done_;
}

bool Pending::wait(const WaitHooks& hooks) {
    std::unique_lock lock(mutex_);
    while (!changed_.wait_for(lock, kSlice, [this] { return done_; })) {
        lock.unlock();
        if (hooks.interrupted && hooks.interrupted()) return false;
        lock.lock();
    }
    return true;
}

void Pending::finish() {
    std::lock_guard lock(mutex_);
    done_ = true;
    changed_.notify_all();
}

// A thread of the user inside a call; its waits end when the communicator is closed meanwhile.
class Communicator::Visit {
public:
    Visit(Communicator& host, const WaitHooks& asked) : hooks(asked), host_(host) {
        // The stop is looked at last: a signal handler may have closed us just now, and peers must
        // not be looked at any more.
        hooks.interrupted = [&host, &asked] {
            return (asked.interrupted && asked.interrupted()) || host.stopping_;
        };
        std::lock_guard lock(host_.mutex_);
        host_.visitors_.push_back(std::this_thread::get_id());
    }
    ~Visit() {
        std::lock_guard lock(host_.mutex_);
        std::vector<std::thread::id>& visitors = host_.visitors_;
        visitors.erase(std::find(visitors.begin(), visitors.end(), std::this_thread::get_id()));
        host_.changed_.notify_all();
    }

    WaitHooks hooks;

private:
    Communicator& host_;
};

Communicator::Communicator(std::unique_ptr<Rank> rank) : rank_(std::move(rank)), pid_(getpid()) {}

Dispatched Communicator::dispatch(const DispatchArgs& args, const WaitHooks& asked) {
    const Visit visit(*this, asked);
    Dispatched result;
    if (stopping_ || !drain(visit.hooks)) {
        result.outcome = interrupted(*rank_);
    } else {
        result = rank_->dispatch(rank_->take_seq(), args, visit.hooks);
    }
    result.outcome = told(result.outcome);
    return result;
}

Outcome Communicator::combine(const CombineArgs& args, const WaitHooks& asked) {
    const Visit visit(*this, asked);
    if (stopping_ || !drain(visit.hooks)) return told(interrupted(*rank_));
    return told(rank_->combine(rank_->take_seq(), args, visit.hooks));
}

// An operation that we cut short ourselves was closed, whoever waited for whom.
Outcome Communicator::told(Outcome outcome) const {
    if (stopping_ && outcome.incident.code == kInterrupted) outcome.incident.code = kClosed;
    return outcome;
}

void Communicator::refuse(OpKind kind, const Outcome& why) {
    submit([this, kind, why, seq = rank_->take_seq()](Pending& pending) {
        pending.combined =
            rank_->refuse(seq, kind, why, {[this] { return stopping_.load(); }, nullptr});
    });
}

std::shared_ptr<Pending> Communicator::begin_dispatch(const DispatchArgs& args) {
    return submit([this, args, seq = rank_->take_seq()](Pending& pending) {
        pending.dispatched =
            rank_->dispatch(seq, args, {[this] { return stopping_.load(); }, nullptr});
        pending.dispatched.outcome = told(pending.dispatched.outcome);
    });
}

std::shared_ptr<Pending> Communicator::begin_combine(const CombineArgs& args) {
    return submit([this, args, seq = rank_->take_seq()](Pending& pending) {
        pending.combined =
            told(rank_->combine(seq, args, {[this] { return stopping_.load(); }, nullptr}));
    });
}

std::shared_ptr<Pending> Communicator::submit(std::function<void(Pending&)> work) {
    auto pending = std::make_shared<Pending>();
    std::lock_guard lock(mutex_);
    if (stopping_) {
        pending->dispatched.outcome = pending->combined = told(interrupted(*rank_));
        pending->finish();
        return pending;
    }
    queue_.push_back([pending, work = std::move(work)] {
        work(*pending);
        pending->finish();
    });
    last_ = pending;
    if (!thread_.joinable()) thread_ = std::thread([this] { this->work(); });
    changed_.notify_all();
    return pending;
}

// A call without begin waits for everything begun before it: one order for all operations of a
// rank.
bool Communicator::drain(const WaitHooks& hooks) {
    std::shared_ptr<Pending> last;
    {
        std::lock_guard lock(mutex_);
        last = last_;
    }
    if (last && !last->wait(hooks)) return false;
    std::lock_guard lock(mutex_);
    if (last_ == last) last_.reset();
    return true;
}

void Communicator::work() {
    std::unique_lock lock(mutex_);
    while (true) {
        changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
        if (queue_.empty()) return;
        auto next = std::move(queue_.front());
        queue_.pop_front();
        lock.unlock();
        next();  // after a stop each wait inside ends at once
        lock.lock();
    }
}

void Communicator::close() {
    if (getpid() != pid_) {
        if (thread_.joinable()) thread_.detach();
        return;
    }
    {
        std::lock_guard lock(mutex_);
        if (stopping_) return;
        stopping_ = true;
        changed_.notify_all();
    }
    if (thread_.joinable()) thread_.join();
    {
        // We may be called from inside a call of our own thread, by a signal handler: that call
        // ends after we return. One that is kept by its user's code looks at no peer any more.
        std::unique_lock lock(mutex_);
        const auto self = std::this_thread::get_id();
        changed_.wait_for(lock, kFarewell, [this, self] {
            return std::all_of(visitors_.begin(), visitors_.end(),
                               [self](std::thread::id visitor) { return visitor == self; });
        });
    }
    rank_->leave();
}

}  // namespace ep::cpu
