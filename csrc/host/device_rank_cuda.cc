#include <cuda_runtime_api.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <tuple>
#include <utility>

#include "host/cuda_check.h"
#include "host/device_rank.h"
#include "host/graph_hold.h"
#include "kernels/launch.h"
#include "transport/beside_captures.h"

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
    const BesideCaptures beside;
    cudaSetDevice(device);
    const cudaError_t state = cudaStreamQuery(stream);
    return state == cudaSuccess || state == cudaErrorNotReady ? 0 : static_cast<int>(state);
}

// Nothing runs yet of what is being captured, and nobody may ask. Without a context nothing runs.
bool is_busy(cudaStream_t stream) {
    try {
        return !is_capturing(stream) && !is_ready(cudaStreamQuery(stream));
    } catch (const DeviceError&) {
        return false;
    }
}

}  // namespace

DeviceRank::DeviceRank(const Shape& shape, int rank, uint64_t generation,
                       const std::vector<int32_t>& expert_owner, std::vector<DevicePeer> peers,
                       std::shared_ptr<DeviceArena> arena, const PeerClocks& clocks, int max_blocks,
                       std::function<void(OpKind, int, double)> late, const RailSetup* rails,
                       bool can_mask)
    : shape_(shape),
      rank_(rank),
      peers_(std::move(peers)),
      arena_(std::move(arena)),
      view_{shape, ControlLayout(shape), {}, {}, {}},
      can_mask_(can_mask),
      pid_(getpid()) {
    release_dropped();
    const BesideCaptures beside;
    const int device = arena_->device();
    EP_CUDA(cudaSetDevice(device));
    int sms = 0;
    EP_CUDA(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    EP_CUDA(cudaDeviceGetAttribute(&smem_bytes_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    sms = std::min(sms, kMostBlocks);
    max_blocks_ = std::clamp(max_blocks, 1, sms);
    EP_CUDA(kernels::load_kernels(smem_bytes_));
    if (!kernels::fits_shared(shape, smem_bytes_)) {
        throw DeviceError{"Buffer", "more experts than the shared memory of an SM can count"};
    }
    EP_CUDA(
        cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(&order_), cudaEventDisableTiming));
    EP_CUDA(
        cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t*>(&probe_), cudaStreamNonBlocking));
    if (rails != nullptr) rails_ = std::make_shared<Rails>(shape, rank, *rails, smem_bytes_);
    std::vector<std::byte*> control, arenas;
    std::vector<int64_t> arena_bytes;
    std::vector<PeerProcess> processes;
    for (const DevicePeer& peer : peers_) {
        const bool mapped = peer.control != nullptr;
        control.push_back(mapped ? peer.control->data() : rails_->blank_header());
        arenas.push_back(mapped ? peer.arena->data() : nullptr);
        arena_bytes.push_back(mapped ? peer.arena->bytes() : peer.arena_bytes);
        processes.push_back(peer.process);
    }
    state_ = std::make_shared<DeviceState>(shape, rank, expert_owner, control, arenas, arena_bytes);
    kept_ = std::make_shared<
        std::tuple<std::shared_ptr<DeviceState>, std::shared_ptr<Rails>, std::vector<DevicePeer>>>(
        state_, rails_, peers_);
    page_ = state_->page();
    copies_ = std::make_unique<CopyPush>(rank, std::move(arenas), smem_bytes_);
    const double post_s = std::min(clocks.arrival_warn_s, clocks.progress_s);
    view_.peers = state_->peers();
    if (rails_) {
        const NodeShape& nodes = rails_->nodes();
        view_.peers.near_begin = nodes.rank(nodes.node(rank), 0);
        view_.peers.near_end = view_.peers.near_begin + nodes.ranks_per_node;
        view_.peers.relays = !rails_->is_direct();
    }
    view_.state = state_->view();
    view_.overlaps = max_blocks_ == sms;
    view_.early_blocks = sms / 2;
    view_.watch = {view_.layout.lives.offset,
                   view_.layout.masks.offset,
                   state_->abort(),
                   state_->mapped_page(),
                   view_.peers.control,
                   nanoseconds(clocks.arrival_s),
                   nanoseconds(clocks.progress_s),
                   nanoseconds(post_s),
                   rank,
                   shape.num_ranks,
                   view_.peers.near_begin,
                   view_.peers.near_end,
                   false};
    ControlHeader header{};
    header.magic = kControlMagic;
    header.generation = generation;
    header.life = static_cast<uint32_t>(Life::kAlive);
    EP_CUDA(
        cudaMemcpy(peers_[rank].control->data(), &header, sizeof(header), cudaMemcpyHostToDevice));
    EP_CUDA(cudaStreamSynchronize(nullptr));  // what was set above, and by DeviceState and Rails
    const auto broken = [device, stream = static_cast<cudaStream_t>(probe_)] {
        return context_error(device, stream);
    };
    watch_ = std::make_unique<PeerWatch>(rank, page_, std::move(processes), clocks, post_s,
                                         PeerHooks{std::move(late), broken}, can_mask_);
}

DeviceRank::~DeviceRank() { leave(); }

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
    HostPage::Report& report = page_->sync[flight.job.begin.call % kMaxReports];
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
        const BesideCaptures beside;
        const cudaError_t state = cudaStreamQuery(flight.stream);
        if (state == cudaErrorNotReady) return false;
        EP_CUDA(state);
        if (has_report(flight)) return true;
        throw DeviceError{"notify", "the kernel ended without a report"};
    }
}

std::optional<Outcome> DeviceRank::take_deferred() {
    if (page_ == nullptr) return incident();
    const uint64_t call = load_acquire(page_->deferred.call);
    if (call == page_->deferred_seen) return incident();
    const Outcome outcome = page_->deferred.outcome;
    std::atomic_ref(page_->deferred_seen).store(call, std::memory_order_release);
    return outcome;
}

int DeviceRank::fault() const {
    return watch_ ? context_error(arena_->device(), static_cast<cudaStream_t>(probe_)) : 0;
}

Outcome DeviceRank::verdict() const { return incident().value_or(Outcome{}); }

void DeviceRank::interrupt() {
    if (page_ == nullptr) return;
    std::atomic_ref(page_->abort).store(abort_word(kInterrupted, -1), std::memory_order_release);
}

RankView DeviceRank::small_view() const {
    RankView view = view_;
    view.watch.can_mask = can_mask_;
    return view;
}

// Kernels that wait for it now see our page; all later ones the word that ours sets everywhere.
void DeviceRank::mask(int rank) {
    std::atomic_ref(page_->lost[rank]).store(kPeerLeft, std::memory_order_release);
    const BesideCaptures beside;
    EP_CUDA(cudaSetDevice(arena_->device()));
    const auto probe = static_cast<cudaStream_t>(probe_);
    if (rails_) {
        EP_CUDA(rails_->mask(small_view(), rank, probe));
    } else {
        EP_CUDA(kernels::launch_mask(small_view(), rank, probe));
    }
    EP_CUDA(cudaStreamSynchronize(probe));
}

uint64_t DeviceRank::masked() const {
    uint64_t ranks = 0;
    for (int p = 0; can_mask_ && page_ != nullptr && p < shape_.num_ranks; ++p) {
        const bool is = std::atomic_ref(page_->masked[p]).load(std::memory_order_acquire) != 0;
        ranks |= uint64_t{is} << p;
    }
    return ranks;
}

std::pair<uint64_t, uint64_t> DeviceRank::masked_and_seq() const {
    const BesideCaptures beside;
    EP_CUDA(cudaSetDevice(arena_->device()));
    const auto probe = static_cast<cudaStream_t>(probe_);
    uint64_t masked = 0, seq = 0;
    if (rails_ && can_mask_) EP_CUDA(rails_->hear_masks(small_view(), probe));
    const auto read = [probe](uint64_t& word, const void* from) {
        EP_CUDA(cudaMemcpyAsync(&word, from, sizeof(word), cudaMemcpyDeviceToHost, probe));
    };
    read(masked, peers_[rank_].control->data() + view_.layout.masks.offset);
    read(seq, view_.state.seq);
    EP_CUDA(cudaStreamSynchronize(probe));
    return {masked, std::max(seq, begun_)};
}

void DeviceRank::unmask(uint64_t seq, uint64_t masked) {
    const BesideCaptures beside;
    EP_CUDA(cudaSetDevice(arena_->device()));
    const auto probe = static_cast<cudaStream_t>(probe_);
    if (rails_) EP_CUDA(rails_->unmask(small_view(), seq, masked, probe));
    EP_CUDA(kernels::launch_unmask(small_view(), seq, masked, probe));
    EP_CUDA(cudaStreamSynchronize(probe));
    begun_ = seq;
    for (int p = 0; p < shape_.num_ranks; ++p) {
        const auto is = static_cast<uint32_t>(masked >> p & 1);
        std::atomic_ref(page_->masked[p]).store(is, std::memory_order_release);
        if (is == 0) std::atomic_ref(page_->lost[p]).store(0, std::memory_order_release);
    }
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
        new std::shared_ptr<Rails>(std::move(rails_));
        copies_.release();
        return;
    }
    const BesideCaptures beside;
    cudaSetDevice(arena_->device());
    const auto end = std::chrono::steady_clock::now() + kGrace;
    while (has_stream_ && is_busy(last_stream_)) {
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
    rails_.reset();
    state_.reset();
}

}  // namespace ep
