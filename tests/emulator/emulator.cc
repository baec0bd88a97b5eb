#include "emulator.h"

#include <cuda_runtime_api.h>
#include <sched.h>
#include <sys/mman.h>

#include <deque>
#include <random>
#include <semaphore>

#include "device/ptx.cuh"

#if defined(__x86_64__)
// Saves what a call must keep, leaves one stack for another.
asm(R"(
.text
.globl emulator_switch
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
extern "C" void emulator_switch(void** save, void* load);
#else
#error "the emulator switches stacks of x86_64 only"
#endif

// The address sanitizer is told which stack is in use.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) void()
#endif

namespace emulator {

void die(const char* why) {
    std::fprintf(stderr, "emulator: %s\n", why);
    std::abort();
}

namespace {

constexpr size_t kStackBytes = 96 * 1024;

struct Store {
    std::byte* dst;
    const std::byte* src;
    uint32_t bytes;
    std::vector<std::byte> read;  // what was in shared memory, once it has been read
};
using Group = std::vector<Store>;

struct Fiber {
    Coordinates at;
    void* stack_pointer = nullptr;
    void* fake_stack = nullptr;  // of the address sanitizer
    std::unique_ptr<std::byte[]> stack;
    int warp = 0, lane = 0;
    bool done = false;
    Group open;                // bulk stores that no group holds yet
    std::deque<Group> groups;  // oldest first
};

struct Warp {
    std::array<std::array<uint64_t, 32>, 2> brought{};
    uint32_t arrived = 0;
    int what = 0;
    unsigned turn = 0;
    std::vector<Fiber*> waiting;
};

struct Load {
    std::byte* dst;
    const std::byte* src;
    uint32_t bytes;
    uint64_t* barrier;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::deque<Fiber*> ready;
    void *scheduler = nullptr, *fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_bytes = 0;
    Fiber* running = nullptr;
    const std::function<void()>* body = nullptr;
    std::byte* shared = nullptr;
    int alive = 0;
    int arrived = 0;  // at the barrier of the block
    int64_t sum = 0, last_sum = 0;
    std::vector<Fiber*> at_barrier;
    std::map<int, std::vector<Fiber*>> at_others;  // barriers of some threads
    std::vector<Load> loads;                       // under way
    std::minstd_rand random;
    unsigned polls = 0;
};

thread_local Block* block = nullptr;

void to_scheduler() {
    Fiber& self = *block->running;
    __sanitizer_start_switch_fiber(self.done ? nullptr : &self.fake_stack, block->scheduler_stack,
                                   block->scheduler_stack_bytes);
    emulator_switch(&self.stack_pointer, block->scheduler);
    __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
}

void to_fiber(Fiber& f) {
    block->running = &f;
    __sanitizer_start_switch_fiber(&block->fake_stack, f.stack.get(), kStackBytes);
    emulator_switch(&block->scheduler, f.stack_pointer);
    __sanitizer_finish_switch_fiber(block->fake_stack, nullptr, nullptr);
}

void release_barrier() {
    Block& b = *block;
    b.last_sum = b.sum;
    b.sum = 0;
    b.arrived = 0;
    for (Fiber* f : b.at_barrier) b.ready.push_back(f);
    b.at_barrier.clear();
}

void fiber_main() {
    __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack,
                                    &block->scheduler_stack_bytes);
    (*block->body)();
    Fiber& self = *block->running;
    if (!self.open.empty() || !self.groups.empty()) die("a thread ended before its bulk stores");
    self.done = true;
    --block->alive;
    if (block->alive > 0 && block->arrived == block->alive) release_barrier();
    to_scheduler();
    die("a finished thread runs");
}

// Stacks of fibers that have ended, for those to come: new pages cost more than most of what runs there.
class Stacks {
public:
    std::unique_ptr<std::byte[]> take() {
        const std::lock_guard lock(mutex_);
        if (free_.empty()) return std::make_unique_for_overwrite<std::byte[]>(kStackBytes);
        auto stack = std::move(free_.back());
        free_.pop_back();
        return stack;
    }
    void give(std::unique_ptr<std::byte[]> stack) {
        ASAN_UNPOISON_MEMORY_REGION(stack.get(), kStackBytes);  // frames that were never left
        const std::lock_guard lock(mutex_);
        free_.push_back(std::move(stack));
    }

private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<std::byte[]>> free_;
} stacks;

void prepare(Fiber& f) {
    f.stack = stacks.take();
    auto top = reinterpret_cast<uintptr_t>(f.stack.get() + kStackBytes) & ~uintptr_t{15};
    auto* sp = reinterpret_cast<void**>(top);
    *--sp = nullptr;  // a call leaves the stack like this
    *--sp = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--sp = nullptr;
    f.stack_pointer = sp;
}

// mbarrier: expected arrivals, arrivals that lack, bytes that lack, phase.
struct Barrier {
    uint64_t count : 12, lacks : 12, phase : 1;
    int64_t bytes : 39;
};
static_assert(sizeof(Barrier) == 8);

void complete(Barrier& b) {
    if (b.lacks != 0 || b.bytes != 0) return;
    b.phase ^= 1;
    b.lacks = b.count;
}

void land(size_t i) {
    Block& b = *block;
    const Load load = b.loads[i];
    b.loads[i] = b.loads.back();
    b.loads.pop_back();
    std::memcpy(load.dst, load.src, load.bytes);
    auto& barrier = *reinterpret_cast<Barrier*>(load.barrier);
    barrier.bytes -= load.bytes;
    complete(barrier);
}

void run_block(Block& b) {
    block = &b;
    for (Fiber& f : b.fibers) {
        prepare(f);
        b.ready.push_back(&f);
    }
    while (b.alive > 0) {
        if (!b.loads.empty() && (b.ready.empty() || b.random() % 4 == 0)) {
            land(b.random() % b.loads.size());
        }
        if (b.ready.empty()) {
            if (b.loads.empty()) die("all threads of a block wait for each other");
            continue;
        }
        Fiber* next = b.ready.front();
        b.ready.pop_front();
        to_fiber(*next);
        if (b.running->done) stacks.give(std::move(b.running->stack));
    }
    if (!b.loads.empty()) die("a block ended while a bulk load was under way");
    block = nullptr;
}

}  // namespace

Coordinates& here() { return block->running->at; }
int lane() { return block->running->lane; }
std::byte* dynamic_shared() { return block->shared; }

void yield() {
    Block& b = *block;
    if (++b.polls > b.ready.size()) {  // perhaps all wait for another block
        b.polls = 0;
        sched_yield();
    }
    b.ready.push_back(b.running);
    to_scheduler();
}

int64_t meet_block(int64_t value) {
    Block& b = *block;
    b.sum += value;
    ++b.arrived;
    b.at_barrier.push_back(b.running);
    if (b.arrived == b.alive) release_barrier();
    to_scheduler();
    return b.last_sum;
}

void meet_some(int barrier, int threads) {
    Block& b = *block;
    std::vector<Fiber*>& waiting = b.at_others[barrier];
    waiting.push_back(b.running);
    if (static_cast<int>(waiting.size()) == threads) {
        for (Fiber* f : waiting) b.ready.push_back(f);
        waiting.clear();
    }
    to_scheduler();
}

const std::array<uint64_t, 32>& meet_warp(uint64_t value, int what) {
    Fiber* self = block->running;
    Warp& w = block->warps[self->warp];
    const unsigned turn = w.turn;
    if (w.arrived != 0 && w.what != what) die("lanes of a warp are at different instructions");
    w.what = what;
    w.brought[turn % 2][self->lane] = value;
    w.arrived |= 1u << self->lane;
    w.waiting.push_back(self);
    if (w.arrived == ~0u) {
        w.arrived = 0;
        ++w.turn;
        for (Fiber* f : w.waiting) block->ready.push_back(f);
        w.waiting.clear();
    }
    to_scheduler();
    return w.brought[turn % 2];
}

// ---- bulk copies ----

void barrier_init(uint64_t* barrier, uint32_t count) {
    *reinterpret_cast<Barrier*>(barrier) = {count, count, 0, 0};
}
void barrier_arrive(uint64_t* barrier, uint32_t bytes) {
    auto& b = *reinterpret_cast<Barrier*>(barrier);
    if (b.lacks == 0) die("an mbarrier got one arrival too many");
    b.bytes += bytes;
    --b.lacks;
    complete(b);
}
bool barrier_done(uint64_t* barrier, uint32_t parity) {
    return reinterpret_cast<Barrier*>(barrier)->phase != parity;
}

void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* barrier) {
    const auto address =
        reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src) | bytes;
    if (address % 16 != 0) die("a bulk load is not in units of 16 bytes");
    block->loads.push_back(
        {static_cast<std::byte*>(dst), static_cast<const std::byte*>(src), bytes, barrier});
}

void bulk_store(void* dst, const void* src, uint32_t bytes) {
    const auto address =
        reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src) | bytes;
    if (address % 16 != 0) die("a bulk store is not in units of 16 bytes");
    block->running->open.push_back(
        {static_cast<std::byte*>(dst), static_cast<const std::byte*>(src), bytes, {}});
}

void bulk_commit() {
    Fiber& f = *block->running;
    f.groups.push_back(std::move(f.open));
    f.open.clear();
}

void bulk_wait(int pending, bool reads_only) {
    Fiber& f = *block->running;
    const int until = static_cast<int>(f.groups.size()) - pending;
    for (int g = 0; g < until; ++g) {
        for (Store& s : f.groups[g]) {
            if (s.read.empty()) s.read.assign(s.src, s.src + s.bytes);
        }
    }
    if (reads_only) return;
    for (int g = 0; g < until; ++g) {
        for (const Store& s : f.groups.front()) std::memcpy(s.dst, s.read.data(), s.bytes);
        f.groups.pop_front();
    }
    std::atomic_thread_fence(std::memory_order_seq_cst);
}

// ---- numbers ----

uint32_t bf16(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    if (std::isnan(value)) return 0x7fff;
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
uint32_t f16(float value) { return std::bit_cast<uint16_t>(static_cast<_Float16>(value)); }
float from_f16(uint16_t half) { return static_cast<float>(std::bit_cast<_Float16>(half)); }

static uint32_t e4m3(float value) {
    const uint32_t sign = std::signbit(value) ? 0x80 : 0;
    const float a = std::fabs(value);
    if (std::isnan(value)) return sign | 0x7f;
    if (a == 0.0f) return sign;
    if (a >= 448.0f) return sign | 0x7e;
    if (a == 0.0f) return sign;
    int exponent = 0;
    std::frexp(a, &exponent);
    exponent = std::max(exponent - 1, -6);  // of the leading bit; below it numbers are even steps
    const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(a, 3 - exponent)));
    return sign | static_cast<uint32_t>(((exponent + 6) << 3) + static_cast<int>(steps));
}
uint16_t e4m3x2(float upper, float lower) {
    return static_cast<uint16_t>(e4m3(upper) << 8 | e4m3(lower));
}

// ---- grids ----

std::atomic<int> most_resident = 0;  // blocks of a grid; 0: all

void set_resident(int blocks) { most_resident = blocks; }

// Blocks start in their order, when there is room for one more.
void run_grid(int blocks, int threads, size_t smem_bytes, const std::function<void()>& body) {
    const int most = most_resident > 0 ? most_resident.load() : blocks;
    std::counting_semaphore<> room(most);
    if (threads % 32 != 0 && threads != 1) die("a block is no whole number of warps");
    std::vector<std::thread> running;
    for (int i = 0; i < blocks; ++i) {
        room.acquire();
        running.emplace_back([=, &body, &room] {
            Block b;
            std::vector<std::byte> shared(smem_bytes + 128, std::byte{0xa5});
            const auto base = reinterpret_cast<uintptr_t>(shared.data());
            b.shared = shared.data() + (128 - base % 128) % 128;
            b.body = &body;
            b.alive = threads;
            b.random.seed(static_cast<unsigned>(i * 7919 + threads));
            b.fibers.resize(threads);
            b.warps.resize((threads + 31) / 32);
            for (int t = 0; t < threads; ++t) {
                Fiber& f = b.fibers[t];
                f.at = {unsigned(t), unsigned(i), unsigned(threads), unsigned(blocks)};
                f.warp = t / 32;
                f.lane = t % 32;
            }
            run_block(b);
            room.release();
        });
    }
    for (std::thread& t : running) t.join();
}

}  // namespace emulator

// ---- the runtime ----

struct CUuserObject_st {
    void* data;
    void (*destroy)(void*);
};
struct CUgraph_st {
    std::mutex mutex;
    std::vector<CUuserObject_st*> kept;
};

struct CUstream_st {
    std::atomic<CUgraph_st*> capture = nullptr;
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> work;
    bool busy = false, ends = false;
    std::thread thread{[this] { run(); }};

    ~CUstream_st() {
        {
            std::lock_guard lock(mutex);
            ends = true;
        }
        changed.notify_all();
        thread.join();
    }
    void run() {
        std::unique_lock lock(mutex);
        while (true) {
            changed.wait(lock, [&] { return !work.empty() || ends; });
            if (work.empty()) return;
            auto next = std::move(work.front());
            work.pop_front();
            busy = true;
            lock.unlock();
            next();
            lock.lock();
            busy = false;
            changed.notify_all();
        }
    }
    void push(std::function<void()> next) {
        {
            std::lock_guard lock(mutex);
            work.push_back(std::move(next));
        }
        changed.notify_all();
    }
    bool idle() {
        std::lock_guard lock(mutex);
        return work.empty() && !busy;
    }
    void join() {
        std::unique_lock lock(mutex);
        changed.wait(lock, [&] { return work.empty() && !busy; });
    }
};

struct CUevent_st {
    struct State {
        std::mutex mutex;
        std::condition_variable changed;
        uint64_t recorded = 0, reached = 0;
    };
    std::shared_ptr<State> state = std::make_shared<State>();  // work that is queued outlives it
};

namespace {

std::mutex streams_mutex;
// Who waits for one may be its last owner.
std::map<CUstream_st*, std::shared_ptr<CUstream_st>> streams;

CUstream_st* stream_of(cudaStream_t stream) {
    static CUstream_st* const null_stream = new CUstream_st;
    return stream != nullptr ? stream : null_stream;
}

std::atomic<int> num_captures;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
thread_local bool ends_graph = false;

void may_call() {
    if (ends_graph) emulator::die("a user object calls CUDA at its end");
}
// What is not for captures in global mode, by any thread but those in relaxed mode.
void may_call_unsafe() {
    may_call();
    if (num_captures > 0 && capture_mode != cudaStreamCaptureModeRelaxed) {
        emulator::die("a call ends a capture");
    }
}
void may_ask(cudaStream_t stream) {
    may_call_unsafe();
    if (stream_of(stream)->capture != nullptr) emulator::die("a stream is asked that is captured");
}

std::atomic<int> static_shared = 2048;  // as much as plans reckon with
int early = 0;                          // launches
int widest = 0;                         // grid
std::mutex kernels_mutex;
std::map<const void*, int> dynamic_shared_bytes;  // that kernels may have

}  // namespace

namespace emulator {
void queue(cudaStream_t stream, std::function<void()> work) {
    may_call();
    if (stream_of(stream)->capture == nullptr) stream_of(stream)->push(std::move(work));
}
void set_static_shared(int bytes) { static_shared = bytes; }
int early_launches() {
    std::lock_guard lock(kernels_mutex);
    return std::exchange(early, 0);
}
int widest_launch() {
    std::lock_guard lock(kernels_mutex);
    return std::exchange(widest, 0);
}
bool may_launch(const void* kernel, const cudaLaunchConfig_t& grid) {
    constexpr size_t kDefault = 48 * 1024;
    std::lock_guard lock(kernels_mutex);
    const auto found = dynamic_shared_bytes.find(kernel);
    const size_t most = found == dynamic_shared_bytes.end() ? kDefault : found->second;
    early += grid.numAttrs != 0;
    widest = std::max(widest, static_cast<int>(grid.gridDim));
    return grid.blockDim <= 1024 && grid.dynamicSmemBytes <= most;
}
}  // namespace emulator

const char* cudaGetErrorString(cudaError_t) { return "an error of the emulator"; }
thread_local cudaError_t last_error = cudaSuccess;
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaSetDevice(int) {
    may_call();
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 132 : emulator::kSharedBytes;
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    may_call_unsafe();
    if (num_captures > 0) emulator::die("a device is waited for that has a captured stream");
    std::vector<std::shared_ptr<CUstream_st>> all;
    {
        std::lock_guard lock(streams_mutex);
        for (const auto& [_, stream] : streams) all.push_back(stream);
    }
    for (const auto& stream : all) stream->join();
    stream_of(nullptr)->join();
    return cudaSuccess;
}
cudaError_t cudaMalloc(void** memory, size_t bytes) {
    may_call_unsafe();
    *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
    may_call_unsafe();
    std::free(memory);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
    return cudaMalloc(memory, bytes);
}
cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
    *device = host;
    return cudaSuccess;
}
cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
    may_call_unsafe();
    std::memset(memory, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    may_call_unsafe();
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
    emulator::queue(stream, [=] { std::memcpy(to, from, bytes); });
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    may_call_unsafe();
    auto made = std::make_shared<CUstream_st>();
    *stream = made.get();
    std::lock_guard lock(streams_mutex);
    streams.emplace(made.get(), std::move(made));
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    may_call_unsafe();
    std::unique_lock lock(streams_mutex);
    const auto ended = streams.extract(stream);
    lock.unlock();  // what is queued there runs first, and may call us
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    may_ask(stream);
    stream_of(stream)->join();
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    may_ask(stream);
    if (stream_of(stream)->idle()) return cudaSuccess;
    return last_error = cudaErrorNotReady;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    may_call_unsafe();
    *event = new CUevent_st;
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    may_call_unsafe();
    delete event;
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    may_call_unsafe();
    std::lock_guard lock(event->state->mutex);
    if (event->state->reached >= event->state->recorded) return cudaSuccess;
    return last_error = cudaErrorNotReady;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    uint64_t number;
    {
        std::lock_guard lock(event->state->mutex);
        number = ++event->state->recorded;
    }
    emulator::queue(stream, [state = event->state, number] {
        {
            std::lock_guard lock(state->mutex);
            state->reached = std::max(state->reached, number);
        }
        state->changed.notify_all();
    });
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    uint64_t number;
    {
        std::lock_guard lock(event->state->mutex);
        number = event->state->recorded;
    }
    emulator::queue(stream, [state = event->state, number] {
        std::unique_lock lock(state->mutex);
        state->changed.wait(lock, [&] { return state->reached >= number; });
    });
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long*, cudaGraph_t* graph, void*, void*,
                                     size_t*) {
    *graph = stream_of(stream)->capture;
    *status = *graph != nullptr ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    may_call();
    std::swap(capture_mode, *mode);
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    if (mode != cudaStreamCaptureModeGlobal) return cudaErrorInvalidValue;
    stream_of(stream)->capture = new CUgraph_st;
    ++num_captures;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    *graph = stream_of(stream)->capture.exchange(nullptr);
    --num_captures;
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    std::thread([graph] {
        ends_graph = true;
        for (CUuserObject_st* object : graph->kept) {
            object->destroy(object->data);
            delete object;
        }
        delete graph;
    }).detach();
    return cudaSuccess;
}
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* data, void (*destroy)(void*),
                                 unsigned, unsigned) {
    *object = new CUuserObject_st{data, destroy};
    return cudaSuccess;
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned,
                                      unsigned) {
    std::lock_guard lock(graph->mutex);
    graph->kept.push_back(object);
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    may_call_unsafe();
    attributes->sharedSizeBytes = static_shared;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
    may_call_unsafe();
    if (value + static_shared > emulator::kSharedBytes) return cudaErrorInvalidValue;
    std::lock_guard lock(kernels_mutex);
    dynamic_shared_bytes[kernel] = value;
    return cudaSuccess;
}
