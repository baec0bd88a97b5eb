// What graphs keep, how long, and that nothing of ours ends a capture: the emulator ends the program where
// CUDA would end one.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "host/graph_hold.h"
#include "world.h"

namespace {

using namespace world;
using Clock = std::chrono::steady_clock;

Case alone() {
    Case c;
    c.ranks = 1;
    c.is_static = true;
    return c;
}

void begin_capture(World& w) {
    cudaStreamBeginCapture(w.ranks[0].stream, cudaStreamCaptureModeGlobal);
}

cudaGraph_t end_capture(World& w) {
    cudaGraph_t graph = nullptr;
    cudaStreamEndCapture(w.ranks[0].stream, &graph);
    return graph;
}

void dispatch(World& w) { w.queue(0, w.args_of(0), false); }

cudaGraph_t captured(World& w) {
    begin_capture(w);
    dispatch(w);
    w.ranks[0].flight.reset();
    return end_capture(w);
}

// Within a minute.
template <class Is>
bool becomes(Is is) {
    const auto end = Clock::now() + std::chrono::seconds(60);
    while (!is()) {
        if (Clock::now() > end) return false;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return true;
}

// The last graph of a closed buffer ends, and the next capture begins at once.
void run_graph_of_closed_buffer() {
    World next(alone());
    std::weak_ptr<DeviceMemory> memory;
    cudaGraph_t graph = nullptr;
    {
        World closed(alone());
        memory = closed.peers[0].arena;
        graph = captured(closed);
    }
    expect(!memory.expired(), "a graph keeps the memory its replays touch");
    begin_capture(next);
    cudaGraphDestroy(graph);
    const bool gone = becomes([&] {
        dispatch(next);
        next.ranks[0].flight.reset();
        return memory.expired();
    });
    expect(gone, "memory of a graph that is gone");
    cudaGraphDestroy(end_capture(next));
}

void run_extents_come_back() {
    World w(alone());
    const DeviceArena& arena = *w.ranks[0].arena;
    cudaGraph_t graph = captured(w);
    expect(arena.in_use() > 0, "a graph keeps its extents");
    cudaGraphDestroy(graph);
    const bool back = becomes([&] {
        w.ranks[0].arena->reclaim(w.ranks[0].stream);
        return arena.in_use() == 0;
    });
    expect(back, "extents of a graph that is gone");
}

// Ranks come and go while another stream is captured.
void run_ranks_beside_a_capture() {
    World w(alone()), other(alone());
    begin_capture(other);
    Rank& r = w.ranks[0];
    r.device.reset();
    r.arena = std::make_shared<DeviceArena>(w.peers[0].arena);
    r.device = std::make_unique<DeviceRank>(w.shape, 0, 2, w.owner, w.peers, r.arena,
                                            PeerClocks{5, 20, 20}, 16, [](OpKind, int, double) {});
    w.peers.clear();
    w.queue(0, w.args_of(0), true);
    while (!r.device->await_report(*r.flight, std::chrono::milliseconds(0))) {
    }
    expect_eq(code_of(r), int{kOk});
    cudaGraphDestroy(end_capture(other));
}

// A buffer is closed whose last call is being captured.
void run_close_in_its_capture() {
    World w(alone());
    begin_capture(w);
    dispatch(w);
    w.ranks[0].flight.reset();
    w.ranks[0].device.reset();
    cudaGraphDestroy(end_capture(w));
}

// Memory that died while another stream has work: no stream waits for that while there is other memory, what
// was used by the stream alone comes back at once, and the rest once it is needed, or no longer used.
void run_memory_of_another_stream() {
    World w(alone());
    DeviceArena& arena = *w.ranks[0].arena;
    cudaStream_t busy = nullptr, ours = w.ranks[0].stream;
    cudaStreamCreateWithFlags(&busy, 0);
    std::atomic<bool> goes_on = false;
    constexpr int64_t kBytes = 1 << 20;
    auto theirs = arena.grant(kBytes, busy), own = arena.grant(kBytes, ours);
    const int64_t at = theirs->extent().offset, beside = own->extent().offset;
    emulator::queue(busy, [&] { goes_on.wait(false); });
    theirs.reset(), own.reset();
    own = arena.grant(kBytes, ours);
    expect_eq(own->extent().offset, beside);
    cudaStreamSynchronize(ours);  // while the other one stands still
    expect_eq(int(cudaGetLastError()), int(cudaSuccess));
    // What is queued there later is not waited for.
    std::atomic<bool> ends = false;
    emulator::queue(busy, [&] { ends.wait(false); });
    auto large = arena.grant(arena.capacity() - 2 * kBytes, ours);
    expect(large != nullptr, "the memory besides");
    cudaStreamSynchronize(ours);
    auto needed = arena.grant(kBytes, ours);
    expect_eq(needed->extent().offset, at);
    expect(cudaStreamQuery(ours) == cudaErrorNotReady, "waits for who has used it");
    expect_eq(int(cudaGetLastError()), int(cudaErrorNotReady));
    goes_on = true;
    goes_on.notify_all();
    cudaStreamSynchronize(ours);
    needed.reset();
    expect(cudaStreamQuery(busy) == cudaErrorNotReady, "has more to do");
    (void)cudaGetLastError();
    ends = true;
    ends.notify_all();
    cudaStreamSynchronize(busy);
    expect_eq(arena.grant(kBytes, ours)->extent().offset, at);
    own.reset(), large.reset();
    (void)arena.reclaim(ours);
    expect_eq(arena.in_use(), int64_t{0});
    cudaStreamDestroy(busy);
}

// Of two streams that have used memory one is done with it. What is queued there later is not waited for.
void run_memory_of_two_streams() {
    World w(alone());
    DeviceArena& arena = *w.ranks[0].arena;
    cudaStream_t busy = nullptr, done = nullptr, ours = w.ranks[0].stream;
    cudaStreamCreateWithFlags(&busy, 0);
    cudaStreamCreateWithFlags(&done, 0);
    for (const cudaStream_t early : {done, ours}) {  // which is not there for the last grant
        const cudaStream_t last = early == ours ? done : ours;
        std::atomic<bool> goes_on = false, ends = false;
        auto hold = arena.grant(1 << 20, early);
        const int64_t at = hold->extent().offset;
        hold->use_on(busy);
        emulator::queue(busy, [&] { goes_on.wait(false); });
        hold.reset();
        expect(arena.grant(1 << 20, ours)->extent().offset != at, "memory that is in use");
        emulator::queue(early, [&] { ends.wait(false); });
        goes_on = true;
        goes_on.notify_all();
        cudaStreamSynchronize(busy);
        expect_eq(arena.grant(1 << 20, last)->extent().offset, at);
        expect(cudaStreamQuery(early) == cudaErrorNotReady, "has more to do");
        (void)cudaGetLastError();
        cudaStreamSynchronize(last);  // it waits for nothing
        ends = true;
        ends.notify_all();
        cudaStreamSynchronize(early);
        (void)arena.reclaim(ours);
    }
    cudaStreamDestroy(busy);
    cudaStreamDestroy(done);
}

// What a stream takes back while it has work is for that stream alone, also what its grant leaves of it.
void run_memory_that_comes_back_early() {
    World w(alone());
    DeviceArena& arena = *w.ranks[0].arena;
    cudaStream_t busy = nullptr, ours = w.ranks[0].stream;
    cudaStreamCreateWithFlags(&busy, 0);
    constexpr int64_t kBytes = 1 << 20;
    const auto overlap = [](const StreamHold& hold, const Extent& b) {
        const Extent& a = hold.extent();
        return a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes;
    };
    for (const int64_t bytes : {int64_t{0}, kBytes / 2}) {  // that the stream asks for itself
        std::atomic<bool> goes_on = false;
        auto theirs = arena.grant(kBytes, busy);
        const Extent range = theirs->extent();
        emulator::queue(busy, [&] { goes_on.wait(false); });
        theirs.reset();
        theirs = arena.grant(bytes, busy);
        expect_eq(theirs->extent().offset, range.offset);
        auto other = arena.grant(kBytes / 4, ours);
        expect(!overlap(*other, range), "memory that another stream may still use");
        auto again = arena.grant(kBytes / 4, busy);
        expect(overlap(*again, range), "what is left is for that stream");
        cudaStreamSynchronize(ours);  // it waits for nothing
        const int64_t longest = arena.stats().largest_free;
        auto rest = arena.grant(longest - kBytes / 2, ours);
        expect(!overlap(*rest, range), "memory that another stream may still use");
        auto needed = arena.grant(kBytes / 8, ours);
        if (!overlap(*needed, range)) needed = arena.grant(arena.stats().largest_free, ours);
        other.reset(), rest.reset();
        goes_on = true;
        goes_on.notify_all();
        cudaStreamSynchronize(ours);
        cudaStreamSynchronize(busy);
        theirs.reset(), again.reset(), needed.reset();
        (void)arena.reclaim(ours);
        expect_eq(arena.in_use(), int64_t{0});
        expect_eq(arena.grant(kBytes, ours)->extent().offset, int64_t{0});
    }
    // Where there is no other, who gets it waits.
    std::atomic<bool> goes_on = false;
    auto all = arena.grant(arena.capacity(), busy);
    emulator::queue(busy, [&] { goes_on.wait(false); });
    all.reset();
    all = arena.grant(0, busy);
    auto needed = arena.grant(kBytes, ours);
    expect(needed != nullptr, "memory behind the other stream");
    expect(cudaStreamQuery(ours) == cudaErrorNotReady, "waits for who may use it");
    (void)cudaGetLastError();
    goes_on = true;
    goes_on.notify_all();
    cudaStreamSynchronize(ours);
    cudaStreamSynchronize(busy);
    cudaStreamDestroy(busy);
}

// A call in a loop is granted what the last one had, as it is; what has died besides is not kept for it.
void run_memory_of_a_loop() {
    World w(alone());
    DeviceArena& arena = *w.ranks[0].arena;
    cudaStream_t busy = nullptr, ours = w.ranks[0].stream;
    cudaStreamCreateWithFlags(&busy, 0);
    constexpr int64_t kBytes = 1 << 20, kPage = 4096;
    std::atomic<bool> goes_on = false;
    emulator::queue(ours, [&] { goes_on.wait(false); });
    auto first = arena.grant(kBytes, ours), second = arena.grant(kPage, ours);
    const Extent a = first->extent(), b = second->extent();
    auto large = arena.grant(4 * kBytes, ours), above = arena.grant(kPage, ours);
    for (int turn = 0; turn < 3; ++turn) {
        first.reset(), second.reset();
        first = arena.grant(kBytes - 1, ours), second = arena.grant(1, ours);
        expect_eq(first->extent().offset, a.offset);
        expect_eq(first->extent().bytes, a.bytes);
        expect_eq(second->extent().offset, b.offset);
        if (turn == 1) large.reset();  // comes before them
    }
    expect_eq(arena.in_use(), kBytes + 2 * kPage);
    // Who dies behind it is looked at by the next grant that asks for something else.
    large = arena.grant(4 * kBytes, ours);
    first.reset(), large.reset();
    first = arena.grant(kBytes, ours);
    expect_eq(arena.in_use(), 5 * kBytes + 2 * kPage);
    auto other = arena.grant(2 * kPage, ours);
    expect_eq(arena.in_use(), kBytes + 4 * kPage);
    // Another stream gets none of it while this one has work.
    first.reset();
    auto theirs = arena.grant(kBytes, busy);
    expect(theirs->extent().offset != a.offset, "memory that another stream may still use");
    cudaStreamSynchronize(busy);  // it waits for nothing
    theirs.reset();
    // However many of one size have died: few of them are kept, and none once memory is short.
    std::vector<std::shared_ptr<StreamHold>> many;
    for (int i = 0; i < 5; ++i) many.push_back(arena.grant(kBytes, ours));
    many.clear();
    first = arena.grant(kBytes, ours);
    expect_eq(arena.in_use(), kBytes + 4 * kPage);
    for (int i = 0; i < 5; ++i) many.push_back(arena.grant(kBytes, ours));
    many.resize(1);
    expect(arena.is_crowded(), "they count until they are looked at");
    many.push_back(arena.grant(kBytes, ours));
    expect_eq(arena.in_use(), 3 * kBytes + 4 * kPage);
    many.clear();
    (void)arena.grant(1, ours);
    // Nor does it hide what another stream has used.
    auto used = arena.grant(kBytes, ours), beside = arena.grant(kBytes, ours);
    beside->use_on(busy);
    used.reset(), beside.reset();
    used = arena.grant(kBytes, ours);
    expect_eq(arena.in_use(), 2 * kBytes + 4 * kPage);
    used.reset();
    // What was given back of an extent is no part of it.
    first.reset(), other.reset(), second.reset(), above.reset();
    goes_on = true;
    goes_on.notify_all();
    cudaStreamSynchronize(ours);
    (void)arena.reclaim(ours);
    expect_eq(arena.in_use(), int64_t{0});
    auto short_one = arena.grant(4 * kPage, ours);
    arena.trim(*short_one, kPage);
    expect_eq(short_one->extent().bytes, kPage);
    auto rest = arena.grant(3 * kPage, ours);
    expect_eq(rest->extent().offset, short_one->extent().offset + kPage);
    short_one.reset();
    auto whole = arena.grant(4 * kPage, ours);
    expect(whole->extent().offset >= rest->extent().offset + 3 * kPage, "granted twice");
    cudaStreamDestroy(busy);
}

// A graph may run on any stream, before that is over which its own stream was given before the capture.
void run_memory_used_before_a_capture() {
    World w(alone());
    DeviceArena& arena = *w.ranks[0].arena;
    cudaStream_t ours = w.ranks[0].stream;
    constexpr int64_t kBytes = 1 << 20;
    std::atomic<bool> goes_on = false;
    auto before = arena.grant(kBytes, ours), early = arena.grant(2 * kBytes, ours);
    const int64_t at = before->extent().offset, from = early->extent().offset,
                  end = from + 2 * kBytes;
    emulator::queue(ours, [&] { goes_on.wait(false); });
    early.reset();
    early = arena.grant(kBytes, ours);  // and leaves a range that came back early
    expect_eq(early->extent().offset, from);
    before.reset();
    begin_capture(w);
    auto inside = arena.grant(kBytes, ours);
    expect(inside->extent().offset >= end, "memory that is in use");
    // Rather than fail it takes that, too.
    auto besides = arena.grant(arena.capacity() - 4 * kBytes, ours);
    expect(besides->extent().offset >= end, "the memory besides");
    const int64_t first = arena.grant(kBytes, ours)->extent().offset;
    const int64_t last = arena.grant(kBytes, ours)->extent().offset;
    expect_eq(std::min(first, last), at);
    expect_eq(std::max(first, last), from + kBytes);
    expect(!arena.grant(kBytes, ours), "granted twice");
    inside.reset(), besides.reset();
    cudaGraphDestroy(end_capture(w));
    goes_on = true;
    goes_on.notify_all();
    cudaStreamSynchronize(ours);
    early.reset();
    const bool back = becomes([&] { return arena.reclaim(ours) == arena.capacity(); });
    expect(back, "extents of a graph that is gone");
}

// What is known to be over before a capture is free in it.
void run_memory_free_before_a_capture() {
    World w(alone());
    DeviceArena& arena = *w.ranks[0].arena;
    cudaStream_t other = nullptr, ours = w.ranks[0].stream;
    cudaStreamCreateWithFlags(&other, 0);
    constexpr int64_t kBytes = 1 << 20;
    std::atomic<bool> goes_on = false;
    auto before = arena.grant(kBytes, ours);
    const int64_t at = before->extent().offset;
    emulator::queue(ours, [&] { goes_on.wait(false); });
    before.reset();
    auto elsewhere = arena.grant(kBytes, other);  // looks at what died
    expect(elsewhere->extent().offset != at, "memory that is in use");
    goes_on = true;
    goes_on.notify_all();
    cudaStreamSynchronize(ours);
    begin_capture(w);
    auto inside = arena.grant(kBytes, ours);
    expect_eq(inside->extent().offset, at);
    inside.reset();
    cudaGraphDestroy(end_capture(w));
    cudaStreamDestroy(other);
}

}  // namespace

int main() {
    test("a graph of a closed buffer ends in a capture", run_graph_of_closed_buffer);
    test("extents of a graph come back", run_extents_come_back);
    test("ranks come and go beside a capture", run_ranks_beside_a_capture);
    test("a buffer is closed in its own capture", run_close_in_its_capture);
    test("memory that another stream has used", run_memory_of_another_stream);
    test("memory of a loop", run_memory_of_a_loop);
    test("memory that comes back early", run_memory_that_comes_back_early);
    test("memory that two streams have used", run_memory_of_two_streams);
    test("memory used before a capture", run_memory_used_before_a_capture);
    test("memory free before a capture", run_memory_free_before_a_capture);
    release_dropped();
    return finish();
}
