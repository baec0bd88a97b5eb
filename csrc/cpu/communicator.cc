#include "cpu/communicator.h"

#include <unistd.h>

#include <chrono>

namespace ep::cpu {
namespace {

constexpr auto kSlice = std::chrono::milliseconds(20);

Outcome interrupted() {
    Outcome outcome;
    outcome.incident.code = kInterrupted;
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

Communicator::Communicator(std::unique_ptr<Rank> rank) : rank_(std::move(rank)), pid_(getpid()) {}

Dispatched Communicator::dispatch(const DispatchArgs& args, const WaitHooks& hooks) {
    if (!drain(hooks)) {
        Dispatched cut;
        cut.outcome = interrupted();
        return cut;
    }
    return rank_->dispatch(rank_->take_seq(), args, hooks);
}

Outcome Communicator::combine(const CombineArgs& args, const WaitHooks& hooks) {
    if (!drain(hooks)) return interrupted();
    return rank_->combine(rank_->take_seq(), args, hooks);
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
    });
}

std::shared_ptr<Pending> Communicator::begin_combine(const CombineArgs& args) {
    return submit([this, args, seq = rank_->take_seq()](Pending& pending) {
        pending.combined =
            rank_->combine(seq, args, {[this] { return stopping_.load(); }, nullptr});
    });
}

std::shared_ptr<Pending> Communicator::submit(std::function<void(Pending&)> work) {
    auto pending = std::make_shared<Pending>();
    std::lock_guard lock(mutex_);
    queue_.push_back([pending, work = std::move(work)] {
        work(*pending);
        pending->finish();
    });
    last_ = pending;
    if (!thread_.joinable()) thread_ = std::thread([this] { this->work(); });
    changed_.notify_one();
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
    rank_->leave();
}

}  // namespace ep::cpu
