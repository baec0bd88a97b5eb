#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>

#include "contract/calls.h"
#include "host/cuda_check.h"
#include "host/device_rank.h"
#include "kernels/launch.h"

namespace ep {
namespace {

constexpr double kSmGBps = 50;                    // what one SM stores, wherever it goes
constexpr double kLinkGBps = 370;                 // what NVLink carries one way
constexpr auto kGrace = std::chrono::seconds(2);  // of close() for operations under way

int64_t nanoseconds(double seconds) {
    return seconds < 0 ? -1 : static_cast<int64_t>(seconds * 1e9);
}

uint64_t load_acquire(uint64_t& word) {
    return std::atomic_ref(word).load(std::memory_order_acquire);
}

int64_t slabs_of(const DispatchArgs& a, int num_local) {
    return a.layout == RecvLayout::kSlab ? num_local : 1;
}

}  // namespace

DeviceRank::DeviceRank(const Shape& shape, int rank, uint64_t generation,
                       const std::vector<int32_t>& expert_owner, std::vector<DevicePeer> peers,
                       std::shared_ptr<DeviceArena> arena, const DeviceClocks& clocks,
                       int max_blocks)
    : view_{shape, ControlLayout(shape), {nullptr, nullptr, rank}, {}, {}},
      peers_(std::move(peers)),
      arena_(std::move(arena)) {
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
    EP_CUDA(cudaHostAlloc(reinterpret_cast<void**>(&page_), sizeof(HostPage), cudaHostAllocMapped));
    std::memset(static_cast<void*>(page_), 0, sizeof(HostPage));
    fill_state(expert_owner);
    const StateLayout layout(shape);
    HostPage* mapped = nullptr;
    EP_CUDA(cudaHostGetDevicePointer(reinterpret_cast<void**>(&mapped), page_, 0));
    view_.watch = {reinterpret_cast<uint32_t*>(state_ + layout.abort.offset),
                   mapped,
                   view_.peers.control,
                   nanoseconds(clocks.arrival_s),
                   nanoseconds(clocks.progress_s),
                   rank};
    ControlHeader header{};
    header.magic = kControlMagic;
    header.generation = generation;
    header.life = static_cast<uint32_t>(Life::kAlive);
    EP_CUDA(
        cudaMemcpy(peers_[rank].control->data(), &header, sizeof(header), cudaMemcpyHostToDevice));
    EP_CUDA(cudaDeviceSynchronize());
}

// Tables that never change, then zeros.
void DeviceRank::fill_state(const std::vector<int32_t>& owner) {
    const Shape& shape = view_.shape;
    const StateLayout layout(shape);
    std::vector<std::byte> image(layout.turn.offset);
    const auto table = [&](const Region& region) {
        return reinterpret_cast<int32_t*>(image.data() + region.offset);
    };
    int32_t *local = table(layout.local), *position = table(layout.position),
            *first = table(layout.first);
    std::vector<int32_t> count(shape.num_ranks, 0);
    for (int e = 0; e < shape.num_experts; ++e) {
        table(layout.owner)[e] = owner[e];
        local[e] = count[owner[e]]++;
    }
    for (int r = 0; r < shape.num_ranks; ++r) first[r + 1] = first[r] + count[r];
    for (int e = 0; e < shape.num_experts; ++e) position[e] = first[owner[e]] + local[e];
    num_local_ = count[view_.peers.rank];

    EP_CUDA(cudaMalloc(reinterpret_cast<void**>(&state_), layout.end));
    EP_CUDA(cudaMemset(state_, 0, layout.end));
    EP_CUDA(cudaMemcpy(state_, image.data(), image.size(), cudaMemcpyHostToDevice));
    std::vector<std::byte*> control, arenas;
    for (const DevicePeer& peer : peers_) {
        control.push_back(peer.control->data());
        arenas.push_back(peer.arena->data());
    }
    const size_t bytes = sizeof(std::byte*) * peers_.size();
    EP_CUDA(
        cudaMemcpy(state_ + layout.control.offset, control.data(), bytes, cudaMemcpyHostToDevice));
    EP_CUDA(cudaMemcpy(state_ + layout.arena.offset, arenas.data(), bytes, cudaMemcpyHostToDevice));
    view_.peers.control = reinterpret_cast<std::byte* const*>(state_ + layout.control.offset);
    view_.peers.arena = reinterpret_cast<std::byte* const*>(state_ + layout.arena.offset);
    const auto ints = [&](const Region& region) {
        return reinterpret_cast<int32_t*>(state_ + region.offset);
    };
    view_.state = {reinterpret_cast<OpState*>(state_ + layout.op.offset),
                   ints(layout.owner),
                   ints(layout.local),
                   ints(layout.position),
                   ints(layout.first),
                   reinterpret_cast<uint64_t*>(state_ + layout.expected.offset),
                   ints(layout.first_row),
                   ints(layout.group_start),
                   ints(layout.counts),
                   ints(layout.chunk_row),
                   ints(layout.chunk_slot),
                   ints(layout.turn),
                   ints(layout.chunk_counts),
                   reinterpret_cast<BadIds*>(state_ + layout.bad_ids.offset)};
}

DeviceRank::~DeviceRank() { leave(); }

int DeviceRank::default_sms(OpKind kind) const {
    // As many SMs as move a rank's rows, its own included, while the link carries the others'. Pulls
    // also write their sums.
    const int ranks = view_.shape.num_ranks;
    const double local_share = ranks > 1 ? double(ranks) / (ranks - 1) : 2.0;
    const double moves = kind == OpKind::kDispatch ? local_share : local_share + 0.5;
    const int sms = static_cast<int>(std::ceil(kLinkGBps / kSmGBps * moves));
    return std::clamp(sms, 1, max_blocks_);
}

int DeviceRank::blocks(OpKind kind, int num_sms) const {
    return num_sms > 0 ? std::min(num_sms, max_blocks_) : default_sms(kind);
}

// Operations of one buffer run in the order they are begun, whatever their streams.
void DeviceRank::enter(Stream stream) {
    EP_CUDA(cudaSetDevice(arena_->device()));
    if (has_stream_ && last_stream_ != stream && !is_capturing(stream) &&
        !is_capturing(last_stream_)) {
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

std::shared_ptr<Flight> DeviceRank::begin_dispatch(const DispatchArgs& args, bool waits,
                                                   int32_t* status, int32_t* num_recv, int num_sms,
                                                   Stream stream) {
    enter(stream);
    auto flight = std::make_shared<Flight>(
        DispatchJob{view_, begin(OpKind::kDispatch), args, Grant{}, 1, 0, status, num_recv});
    DispatchJob& job = flight->job;
    job.begin.entry.descriptor = describe(args);
    job.begin.entry.num_tokens = args.num_tokens;
    job.begin.call = waits ? begun_ : 0;
    job.begin.report_later = !waits;

    // Granted before the size is known: the worst case, or all there is of it. What is too much
    // comes back in finish_dispatch.
    const MetaLayout meta = meta_layout(args);
    const int64_t worst = int64_t{view_.shape.num_ranks} * view_.shape.max_tokens;
    const int64_t slabs = slabs_of(args, num_local_);
    int64_t rows = args.capacity * slabs;
    if (args.capacity < 0) {
        rows = worst;
        if (args.layout == RecvLayout::kGrouped) {
            rows = worst * std::min(args.num_topk, num_local_) +
                   int64_t{num_local_} * (args.alignment - 1);
        }
    }
    const int64_t max_recv = args.layout == RecvLayout::kCompact && args.capacity >= 0
                                 ? std::min(worst, args.capacity)
                                 : worst;
    if (meta.bytes > 0) flight->meta = arena_->grant(max_recv * meta.bytes, stream);
    const int64_t row_bytes = std::max<int64_t>(args.row_bytes(), 1);
    flight->x = arena_->grant(rows * row_bytes, stream);
    if (!flight->x) {
        job.grant.free_bytes = arena_->stats().largest_free;
        rows = std::min(rows, job.grant.free_bytes / row_bytes);
        if (!args.is_static && rows > 0) flight->x = arena_->grant(rows * row_bytes, stream);
    }
    job.grant.max_rows = flight->x ? rows : -1;
    job.grant.max_recv = flight->meta ? max_recv : -1;
    job.grant.x_offset = flight->x ? flight->x->extent().offset : -1;
    job.grant.meta_offset = flight->meta ? flight->meta->extent().offset : -1;

    const LaunchPlan plan = kernels::push_plan(args, view_.shape.num_ranks,
                                               blocks(OpKind::kDispatch, num_sms), smem_bytes_);
    flight->num_blocks = plan.num_blocks;
    kernels::divide_tokens(job, max_blocks_);
    EP_CUDA(kernels::launch_notify(job, stream));
    EP_CUDA(kernels::launch_push(job, plan, stream));
    return flight;
}

std::optional<Outcome> DeviceRank::incident() const {
    if (page_ == nullptr) return last_words_.ok() ? std::nullopt : std::optional(last_words_);
    if (load_acquire(page_->incident_valid) == 0) return std::nullopt;
    Outcome outcome{};
    outcome.incident = page_->incident;
    return outcome;
}

bool DeviceRank::await_report(Flight& flight, Stream stream, std::chrono::milliseconds limit) {
    using Clock = std::chrono::steady_clock;
    const auto end = Clock::now() + limit;
    const auto arrived = [&] {
        if (load_acquire(page_->sync.call) == flight.job.begin.call) {
            flight.report = page_->sync;
            return true;
        }
        const auto failed = incident();
        if (failed) flight.report.outcome = *failed;
        return failed.has_value();
    };
    while (true) {
        for (int spin = 0; spin < 2000; ++spin) {
            if (arrived()) return true;
        }
        if (Clock::now() < end) {
            std::this_thread::yield();
            continue;
        }
        const cudaError_t state = cudaStreamQuery(stream);
        if (state == cudaErrorNotReady) return false;
        EP_CUDA(state);
        if (arrived()) return true;
        throw DeviceError{"notify", "the kernel ended without a report"};
    }
}

void DeviceRank::finish_dispatch(Flight& flight, const UnpackArgs& out, Stream stream) {
    const DispatchArgs& args = flight.job.args;
    if (!args.is_static) {
        const HostPage::Report& report = flight.report;
        if (flight.x) arena_->trim(*flight.x, report.num_rows * args.row_bytes());
        if (flight.meta) arena_->trim(*flight.meta, report.num_recv * meta_layout(args).bytes);
    }
    const UnpackJob job{flight.job, out, num_local_};
    const LaunchPlan plan = kernels::unpack_plan(args, flight.num_blocks, max_blocks_, smem_bytes_);
    EP_CUDA(cudaSetDevice(arena_->device()));
    EP_CUDA(kernels::launch_unpack(job, plan, stream));
    flight.meta.reset();
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
    const bool has_peers = view_.shape.num_ranks > 1;
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
    LaunchPlan plan = kernels::combine_plan(view_.shape.num_ranks,
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
    if (call != deferred_seen_) {
        deferred_seen_ = call;
        return page_->deferred.outcome;
    }
    return incident();
}

Outcome DeviceRank::verdict() const { return incident().value_or(Outcome{}); }

void DeviceRank::interrupt() {
    if (page_ != nullptr) std::atomic_ref(page_->abort).store(1, std::memory_order_release);
}

// What is under way may finish for a while; then every wait in it is cut short.
void DeviceRank::leave() {
    if (left_) return;
    left_ = true;
    cudaSetDevice(arena_->device());
    const auto end = std::chrono::steady_clock::now() + kGrace;
    while (has_stream_ && cudaStreamQuery(last_stream_) == cudaErrorNotReady) {
        if (std::chrono::steady_clock::now() > end) interrupt();
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    cudaStream_t stream = nullptr;
    if (cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) != cudaSuccess) return;
    kernels::launch_leave(view_, stream);
    cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
    // Now, not when the last reference dies: freeing waits for every kernel of the device, and then
    // that may be one that waits for this thread.
    last_words_ = incident().value_or(Outcome{});
    cudaEventDestroy(static_cast<cudaEvent_t>(order_));
    cudaFree(state_);
    cudaFreeHost(page_);
    page_ = nullptr;
}

}  // namespace ep
