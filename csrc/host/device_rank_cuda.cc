#include <cuda_runtime_api.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>

#include "contract/calls.h"
#include "host/cuda_check.h"
#include "host/device_rank.h"
#include "host/graph_hold.h"
#include "kernels/launch.h"

namespace ep {
namespace {

constexpr auto kGrace = std::chrono::seconds(2);  // of close() for operations under way

int64_t nanoseconds(double seconds) {
    return seconds < 0 ? -1 : static_cast<int64_t>(seconds * 1e9);
}

uint64_t load_acquire(uint64_t& word) {
    return std::atomic_ref(word).load(std::memory_order_acquire);
}

// An error of the context that no call can mend, or 0. The thread of a watch asks while others
// capture graphs.
int context_error(int device, cudaStream_t stream) {
    auto mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaSetDevice(device);
    const cudaError_t state = cudaStreamQuery(stream);
    cudaThreadExchangeStreamCaptureMode(&mode);
    return state == cudaSuccess || state == cudaErrorNotReady ? 0 : static_cast<int>(state);
}

int64_t slabs_of(const DispatchArgs& a, int num_local) {
    return a.layout == RecvLayout::kSlab ? num_local : 1;
}

}  // namespace

DeviceRank::DeviceRank(const Shape& shape, int rank, uint64_t generation,
                       const std::vector<int32_t>& expert_owner, std::vector<DevicePeer> peers,
                       std::shared_ptr<DeviceArena> arena, const PeerClocks& clocks, int max_blocks,
                       std::function<void(OpKind, int, double)> late)
    : shape_(shape),
      rank_(rank),
      peers_(std::move(peers)),
      arena_(std::move(arena)),
      view_{shape, ControlLayout(shape), {}, {}, {}},
      pid_(getpid()) {
    release_dropped();
    const int device = arena_->device();
    EP_CUDA(cudaSetDevice(device));
    int sms = 0;
    EP_CUDA(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    EP_CUDA(cudaDeviceGetAttribute(&smem_bytes_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    max_blocks_ = std::clamp(max_blocks, 1, sms);
    EP_CUDA(kernels::load_kernels(smem_bytes_));
    if (kernels::notify_warps(shape, smem_bytes_) < 1) {
        throw DeviceError{"Buffer", "more experts than the shared memory of an SM can count"};
    }
    EP_CUDA(
        cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(&order_), cudaEventDisableTiming));
    EP_CUDA(
        cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t*>(&probe_), cudaStreamNonBlocking));
    std::vector<std::byte*> control, arenas;
    std::vector<int64_t> arena_bytes;
    std::vector<PeerProcess> processes;
    for (const DevicePeer& peer : peers_) {
        control.push_back(peer.control->data());
        arenas.push_back(peer.arena->data());
        arena_bytes.push_back(peer.arena->bytes());
        processes.push_back(peer.process);
    }
    state_ = std::make_shared<DeviceState>(shape, rank, expert_owner, control, arenas, arena_bytes);
    kept_ = std::make_shared<std::pair<std::shared_ptr<DeviceState>, std::vector<DevicePeer>>>(
        state_, peers_);
    page_ = state_->page();
    copies_ = std::make_unique<CopyPush>(rank, std::move(arenas), smem_bytes_);
    const double post_s = std::min(clocks.arrival_warn_s, clocks.progress_s);
    view_.peers = state_->peers(rank);
    view_.state = state_->view(0);
    view_.watch = {state_->abort(),
                   state_->mapped_page(),
                   view_.peers.control,
                   nanoseconds(clocks.arrival_s),
                   nanoseconds(clocks.progress_s),
                   nanoseconds(post_s),
                   rank,
                   shape.num_ranks};
    ControlHeader header{};
    header.magic = kControlMagic;
    header.generation = generation;
    header.life = static_cast<uint32_t>(Life::kAlive);
    EP_CUDA(
        cudaMemcpy(peers_[rank].control->data(), &header, sizeof(header), cudaMemcpyHostToDevice));
    EP_CUDA(cudaDeviceSynchronize());
    const auto broken = [device, stream = static_cast<cudaStream_t>(probe_)] {
        return context_error(device, stream);
    };
    watch_ = std::make_unique<PeerWatch>(rank, page_, std::move(processes), clocks, post_s,
                                         PeerHooks{std::move(late), broken});
}

DeviceRank::~DeviceRank() { leave(); }

RankView DeviceRank::view_of(int lane) const {
    RankView view = view_;
    view.state = state_->view(lane);
    return view;
}

int DeviceRank::default_sms(OpKind) const {
    // Those that fill the link, and two: they unpack while the others push, and keep pulls in step
    // with their sums.
    return std::clamp(kernels::link_sms(shape_.num_ranks) + 2, 1, max_blocks_);
}

int DeviceRank::blocks(OpKind kind, int num_sms) const {
    return num_sms > 0 ? std::min(num_sms, max_blocks_) : default_sms(kind);
}

// Operations of one buffer run in the order they are begun, whatever their streams.
void DeviceRank::enter(Stream stream) {
    EP_CUDA(cudaSetDevice(arena_->device()));
    keep_in_graph(stream, kept_);
    if (has_stream_ && last_stream_ != stream && in_same_graph(stream, last_stream_)) {
        EP_CUDA(cudaEventRecord(static_cast<cudaEvent_t>(order_), last_stream_));
        EP_CUDA(cudaStreamWaitEvent(stream, static_cast<cudaEvent_t>(order_), 0));
    }
    last_stream_ = stream;
    has_stream_ = true;
}

Begin DeviceRank::begin(OpKind kind) {
    ++begun_;
    Begin begin{};
    begin.entry.kind = static_cast<int32_t>(kind);
    begin.entry.weights_offset = -1;
    return begin;
}

std::shared_ptr<Flight> DeviceRank::begin_dispatch(const DispatchArgs& args, bool waits, bool apart,
                                                   int32_t* status, int32_t* num_recv, int num_sms,
                                                   Stream stream, bool by_copies) {
    enter(stream);
    auto flight = std::make_shared<Flight>(
        DispatchJob{view_, begin(OpKind::kDispatch), args, Grant{}, 1, 0, status, num_recv});
    DispatchJob& job = flight->job;
    flight->stream = stream;
    // No two operations that are apart at once have the same lane: see num_slots.
    if (apart) job.begin.lane = 1 + static_cast<int>(begun_ % uint64_t(shape_.num_slots));
    job.view = view_of(job.begin.lane);
    job.begin.entry.descriptor = describe(args);
    job.begin.entry.num_tokens = args.num_tokens;
    job.begin.call = waits ? begun_ : 0;
    job.begin.report_later = !waits;
    if (!grant_turns(*flight)) {
        EP_CUDA(kernels::launch_refuse(view_, job.begin, stream));
        return flight;
    }
    grant(*flight);
    flight->num_blocks = blocks(OpKind::kDispatch, num_sms);
    const LaunchPlan plan =
        kernels::push_plan(args, shape_.num_ranks, flight->num_blocks, smem_bytes_);
    kernels::divide_tokens(job, max_blocks_);
    EP_CUDA(kernels::launch_notify(job, stream));
    if (by_copies) {
        copies_->begin(job, stream);
    } else {
        EP_CUDA(kernels::launch_push(job, plan, stream));
    }
    return flight;
}

void DeviceRank::push_copies(Flight& flight) {
    EP_CUDA(cudaSetDevice(arena_->device()));
    const DispatchJob& job = flight.job;
    if (copies_->run(job, *arena_, max_blocks_, flight.stream)) return;
    const LaunchPlan plan =
        kernels::push_plan(job.args, shape_.num_ranks, flight.num_blocks, smem_bytes_);
    EP_CUDA(kernels::launch_push(job, plan, flight.stream));
}

// Turns of more tokens than the state has room for. False: refuse the call, the report says why.
bool DeviceRank::grant_turns(Flight& flight) {
    DispatchJob& job = flight.job;
    const int64_t tokens = job.args.num_tokens;
    if (tokens * job.args.num_topk <= std::min(shape_.max_tokens, kMostTurns) * shape_.num_topk) {
        return true;
    }
    const int64_t bytes = turns_bytes(tokens, job.args.num_topk);
    flight.turns = arena_->grant(bytes, flight.stream);
    if (flight.turns) {
        job.view.state.turn = reinterpret_cast<int32_t*>(flight.turns->data());
        return true;
    }
    EntryRecord& entry = job.begin.entry;
    entry.code = kOutOfArena;
    entry.detail[0] = bytes;
    entry.detail[1] = arena_->stats().largest_free;
    Outcome& outcome = flight.report.outcome;
    outcome.incident.code = kOutOfArena;
    outcome.incident.op = static_cast<uint8_t>(OpKind::kDispatch);
    outcome.incident.rank = outcome.incident.peer = static_cast<int16_t>(rank_);
    outcome.incident.seq = begun_;
    std::copy(std::begin(entry.detail), std::end(entry.detail), outcome.detail);
    return false;
}

// Granted before the size is known: the worst case, or all there is of it. What is too much comes
// back in finish_dispatch.
void DeviceRank::grant(Flight& flight) {
    DispatchJob& job = flight.job;
    const DispatchArgs& args = job.args;
    const int num_local = state_->num_local();
    const int64_t worst = int64_t{shape_.num_ranks} * shape_.max_tokens;
    const bool compact = args.layout == RecvLayout::kCompact;
    const int64_t rows_of_token =
        args.layout == RecvLayout::kGrouped ? std::min(args.num_topk, num_local) : 1;
    int64_t rows = args.capacity * slabs_of(args, num_local);
    if (args.capacity < 0) {
        rows = worst * rows_of_token;
        if (!compact) rows += int64_t{num_local} * (args.alignment - 1);
    }
    int64_t records = compact && args.capacity >= 0 ? std::min(worst, args.capacity) : worst;

    const int64_t row_bytes = std::max<int64_t>(args.row_bytes(), 1);
    const int64_t record_bytes = meta_layout(args).bytes;
    const auto take = [&] {
        if (record_bytes > 0) flight.meta = arena_->grant(records * record_bytes, flight.stream);
        if (args.x_offset < 0) flight.x = arena_->grant(rows * row_bytes, flight.stream);
        return (flight.meta || record_bytes == 0) && (flight.x || args.x_offset >= 0);
    };
    if (!take()) {
        flight.x.reset();
        flight.meta.reset();
        const int64_t free = arena_->reclaim(flight.stream);
        job.grant.free_bytes = free;
        // In one free piece: x of a fixed shape and records with what is left, or as many records as
        // rows they bring.
        int64_t room = std::max<int64_t>(free - 2 * kExtentAlign, 0);
        const bool fixed = args.is_static || args.x_offset >= 0;
        if (fixed && args.x_offset < 0) room = std::max<int64_t>(room - rows * row_bytes, 0);
        const int64_t bytes = record_bytes + (fixed ? 0 : rows_of_token * row_bytes);
        if (bytes > 0) records = std::min(records, room / bytes);
        if (!fixed) rows = std::min(rows, (room - records * record_bytes) / row_bytes);
        if (rows > 0) take();
    }
    const bool has_x = flight.x || args.x_offset >= 0;
    job.grant.max_rows = has_x ? rows : -1;
    job.grant.max_recv = flight.meta ? records : -1;
    job.grant.x_offset = flight.x ? flight.x->extent().offset : args.x_offset;
    job.grant.meta_offset = flight.meta ? flight.meta->extent().offset : -1;
}

std::optional<Outcome> DeviceRank::incident() const {
    if (page_ == nullptr) return last_words_.ok() ? std::nullopt : std::optional(last_words_);
    if (load_acquire(page_->incident_valid) == 0) return std::nullopt;
    Outcome outcome{};
    outcome.incident = page_->incident;
    if (outcome.incident.flags != 0) {  // another rank found out, and told
        outcome.detail[0] = outcome.incident.flags;
        outcome.detail[1] = outcome.incident.epoch;
    }
    return outcome;
}

bool DeviceRank::has_report(Flight& flight) {
    if (!flight.report.outcome.ok()) return true;
    if (page_ == nullptr) {  // closed meanwhile
        flight.report.outcome = last_words_;
        if (last_words_.ok()) {
            flight.report.outcome.incident.code = kClosed;
            flight.report.outcome.incident.rank = static_cast<int16_t>(rank_);
        }
        return true;
    }
    HostPage::Report& report = page_->sync[flight.job.begin.lane];
    if (load_acquire(report.call) == flight.job.begin.call) {
        flight.report = report;
        return true;
    }
    const auto failed = incident();
    if (failed) flight.report.outcome = *failed;
    return failed.has_value();
}

bool DeviceRank::await_report(Flight& flight, std::chrono::milliseconds limit) {
    using Clock = std::chrono::steady_clock;
    const auto end = Clock::now() + limit;
    while (true) {
        for (int spin = 0; spin < 2000; ++spin) {
            if (has_report(flight)) return true;
        }
        if (Clock::now() < end) {
            std::this_thread::yield();
            continue;
        }
        const cudaError_t state = cudaStreamQuery(flight.stream);
        if (state == cudaErrorNotReady) return false;
        EP_CUDA(state);
        if (has_report(flight)) return true;
        throw DeviceError{"notify", "the kernel ended without a report"};
    }
}

void DeviceRank::finish_dispatch(Flight& flight, const UnpackArgs& out) {
    const DispatchArgs& args = flight.job.args;
    if (!args.is_static) {
        const HostPage::Report& report = flight.report;
        if (flight.x) arena_->trim(*flight.x, report.num_rows * args.row_bytes());
        if (flight.meta) arena_->trim(*flight.meta, report.num_recv * meta_layout(args).bytes);
    }
    const UnpackJob job{flight.job, out, state_->num_local()};
    const LaunchPlan plan = kernels::unpack_plan(args, flight.num_blocks, max_blocks_, smem_bytes_);
    EP_CUDA(cudaSetDevice(arena_->device()));
    const Stream stream = flight.stream;
    const bool ranges = args.rank_ends != nullptr || out.source_range != nullptr;
    if (ranges) EP_CUDA(kernels::launch_ranges(job, stream));
    EP_CUDA(kernels::launch_unpack(job, plan, stream));
    if (out.row_token != nullptr) {
        EP_CUDA(kernels::launch_row_tokens(job, flight.num_blocks, stream));
    }
    flight.meta.reset();
    flight.turns.reset();
}

void DeviceRank::combine(const CombineArgs& args, int num_sms, Stream stream) {
    enter(stream);
    CombineJob job{view_, begin(OpKind::kCombine), args, nullptr};
    EntryRecord& entry = job.begin.entry;
    job.begin.report_later = true;
    entry.descriptor = describe(args);
    entry.num_tokens = args.num_tokens;
    entry.num_rows = args.num_rows;
    entry.y_offset = args.arena_offset;

    // Both return to the arena behind the kernels that read them.
    std::shared_ptr<StreamHold> rows, weights;
    const auto grant = [&](int64_t bytes) {
        auto hold = arena_->grant(bytes, stream);
        if (!hold && entry.code == kOk) {
            entry.code = kOutOfArena;
            entry.detail[0] = bytes;
            entry.detail[1] = arena_->stats().largest_free;
        }
        return hold;
    };
    const bool has_peers = shape_.num_ranks > 1;
    if (has_peers && args.arena_offset < 0) rows = grant(args.num_rows * args.row_bytes());
    if (rows) {
        job.staged = rows->data();
        entry.y_offset = rows->extent().offset;
    }
    if (has_peers && args.with_weights) {
        const int64_t per_row = args.layout == RecvLayout::kCompact ? args.num_topk : 1;
        const int64_t bytes = args.num_rows * per_row * int64_t{sizeof(float)};
        weights = grant(bytes);
        if (weights && bytes > 0) {
            EP_CUDA(cudaMemcpyAsync(weights->data(), args.y_weights, bytes,
                                    cudaMemcpyDeviceToDevice, stream));
        }
        if (weights) entry.weights_offset = weights->extent().offset;
    }
    LaunchPlan plan = kernels::combine_plan(args, shape_.num_ranks,
                                            blocks(OpKind::kCombine, num_sms), smem_bytes_);
    plan.all_blocks = max_blocks_;
    EP_CUDA(kernels::launch_combine(job, plan, stream));
}

void DeviceRank::refuse(OpKind kind, const Outcome& why, Stream stream) {
    enter(stream);
    Begin refusal = begin(kind);
    refusal.entry.code = why.incident.code;
    std::memcpy(refusal.entry.detail, why.detail, sizeof(why.detail));
    std::memcpy(refusal.entry.reason, why.reason, sizeof(why.reason));
    EP_CUDA(kernels::launch_refuse(view_, refusal, stream));
}

std::optional<Outcome> DeviceRank::take_deferred() {
    if (page_ == nullptr) return incident();
    const uint64_t call = load_acquire(page_->deferred.call);
    if (call == page_->deferred_seen) return incident();
    const Outcome outcome = page_->deferred.outcome;
    std::atomic_ref(page_->deferred_seen).store(call, std::memory_order_release);
    return outcome;
}

Outcome DeviceRank::verdict() const { return incident().value_or(Outcome{}); }

void DeviceRank::interrupt() {
    if (page_ == nullptr) return;
    std::atomic_ref(page_->abort).store(abort_word(kInterrupted, -1), std::memory_order_release);
}

// What is under way may finish for a while; then every wait in it is cut short.
void DeviceRank::leave() {
    if (left_) return;
    left_ = true;
    if (getpid() != pid_) {  // a fork is not the rank, and has no context
        watch_->stop();
        watch_.release();
        kept_.reset();
        new std::shared_ptr<DeviceState>(std::move(state_));
        new std::vector<DevicePeer>(std::move(peers_));
        copies_.release();
        return;
    }
    cudaSetDevice(arena_->device());
    const auto end = std::chrono::steady_clock::now() + kGrace;
    while (has_stream_ && cudaStreamQuery(last_stream_) == cudaErrorNotReady) {
        if (std::chrono::steady_clock::now() > end) interrupt();
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    const auto probe = static_cast<cudaStream_t>(probe_);
    kernels::launch_leave(view_, probe);
    cudaStreamSynchronize(probe);
    watch_.reset();  // says goodbye, now that our kernels have
    cudaStreamDestroy(probe);
    // Now, not when the last reference dies: freeing waits for every kernel of the device, and then
    // that may be one that waits for this thread. What a graph keeps stays, and says: leave.
    last_words_ = incident().value_or(Outcome{});
    cudaEventDestroy(static_cast<cudaEvent_t>(order_));
    page_ = nullptr;
    copies_.reset();
    kept_.reset();
    state_.reset();
}

}  // namespace ep
