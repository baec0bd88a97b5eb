// What a rank queues of each operation: one order for all of them, whatever their streams.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>

#include "contract/calls.h"
#include "host/cuda_check.h"
#include "host/device_rank.h"
#include "host/graph_hold.h"
#include "kernels/launch.h"

namespace ep {
namespace {

Begin begin_of(OpKind kind) {
    Begin begin{};
    begin.head.set(kind, kOk);
    return begin;
}

}  // namespace

int DeviceRank::default_sms(OpKind) const {
    if (rails_) return std::min(rails_->num_channels(), max_blocks_);
    // Those that fill the link, and two, which keep pulls in step with their sums.
    return std::clamp(kernels::link_sms(shape_.num_ranks) + 2, 1, max_blocks_);
}

int DeviceRank::blocks(OpKind kind, int num_sms) const {
    return num_sms > 0 ? std::min(num_sms, max_blocks_) : default_sms(kind);
}

// Fewer warps of an SM take turns less, so a warp is sooner done; with four times the SMs most of them have a
// scheduler each. But where the next kernel starts ahead of time, it has to find SMs of its own: more than half of them
// are only for what is expected, not for what others might bring.
int DeviceRank::small_blocks(StageBlocks needed, int num_sms) const {
    if (num_sms > 0) return std::min({4 * needed.most, num_sms, max_blocks_});
    const int half = std::max(max_blocks_ / 2, 1);
    return std::max(std::min(std::max(4 * needed.expected, needed.most), half),
                    std::min(needed.expected, max_blocks_));
}

// Operations of one buffer run in the order they are begun, whatever their streams.
bool DeviceRank::enter(Stream stream) {
    EP_CUDA(cudaSetDevice(arena_->device()));
    const bool captured = is_capturing(stream);
    if (captured) keep_in_graph(stream, kept_);
    if (has_stream_ && last_stream_ != stream && in_same_graph(stream, last_stream_)) {
        EP_CUDA(cudaEventRecord(static_cast<cudaEvent_t>(order_), last_stream_));
        EP_CUDA(cudaStreamWaitEvent(stream, static_cast<cudaEvent_t>(order_), 0));
    }
    last_stream_ = stream;
    has_stream_ = true;
    return captured;
}

std::shared_ptr<Flight> DeviceRank::dispatch(const DispatchArgs& args, const DispatchWants& wants,
                                             Stream stream) {
    const bool captured = enter(stream);
    auto flight =
        std::make_shared<Flight>(DispatchJob{view_, args, UnpackArgs{}, begin_of(OpKind::kDispatch),
                                             1, 0, wants.status, wants.num_recv});
    DispatchJob& job = flight->job;
    flight->stream = stream;
    flight->is_captured = captured;
    job.begin.describe(describe(args), args.num_tokens);
    job.begin.call = wants.reports ? begun_ + 1 : 0;
    job.begin.report_later = !wants.reports;
    job.begin.head.grant.wide_ids = wants.wide_ids;
    job.out.offsets = wants.offsets;
    job.out.source_range = wants.source_range;
    job.out.recv_row = wants.recv_row;
    job.out.idx_is_int64 = wants.wide_ids;
    job.out.row_alignment = args.alignment;
    job.begun = wants.begun;
    if (!grant(*flight, wants)) return nullptr;
    flight->number = ++begun_;
    flight->num_blocks = blocks(OpKind::kDispatch, wants.num_sms);
    if (wants.by_copies) {
        copies_->begin(*flight, *arena_, max_blocks_);
        return flight;
    }
    if (stages(args)) {
        job.view = small_view();
        launch_staged(*flight, wants.in_halves ? Half::kSend : Half::kBoth, wants.num_sms);
        return flight;
    }
    launch(*flight, wants);
    expand(*flight);
    return flight;
}

void DeviceRank::launch_staged(Flight& flight, Half half, int num_sms) {
    DispatchJob& job = flight.job;
    if (half != Half::kReceive) {
        if (num_sms > 0) job.view.overlaps = false;
        flight.num_blocks = small_blocks(kernels::stage_blocks(job), num_sms);
    }
    if (rails_) {
        auto* log = reinterpret_cast<int32_t*>(flight[Out::kRailLog].data());
        EP_CUDA(rails_->direct_dispatch(job, log, half, flight.num_blocks, flight.stream));
    } else {
        EP_CUDA(kernels::launch_stage_dispatch(job, half, flight.num_blocks, flight.stream));
    }
    flight.half = half;
    if (half == Half::kSend) return;
    EP_CUDA(kernels::launch_row_index(job, state_->num_local(), flight.stream));
    flight[Out::kTokenScales] = {};
}

void DeviceRank::finish(Flight& flight, Stream stream) {
    if (flight.half != Half::kSend) return;
    enter(stream);
    flight.stream = stream;
    launch_staged(flight, Half::kReceive);
}

void DeviceRank::launch(Flight& flight, const DispatchWants& wants) {
    DispatchJob& job = flight.job;
    if (rails_) {
        LaunchPlan plan;
        plan.num_blocks = flight.num_blocks, plan.num_warps = wants.num_warps;
        auto* log = reinterpret_cast<int32_t*>(flight[Out::kRailLog].data());
        EP_CUDA(rails_->dispatch(job, log, plan, flight.stream));
        return;
    }
    if (wants.num_sms == 0) {
        flight.num_blocks =
            std::clamp(kernels::default_sms(job.args, shape_.num_ranks), 1, max_blocks_);
    }
    LaunchPlan plan = kernels::dispatch_plan(job, flight.num_blocks, smem_bytes_);
    if (wants.num_warps > 0) plan.num_warps = std::min(plan.num_warps, wants.num_warps);
    kernels::divide_tokens(job, plan.num_blocks);
    EP_CUDA(kernels::launch_dispatch(job, plan, flight.stream));
}

// Behind the rows, for calls that need it.
void DeviceRank::expand(Flight& flight) {
    const DispatchJob& job = flight.job;
    if (!kernels::needs_expansion(job)) return;
    EP_CUDA(
        kernels::launch_expand(job, state_->num_local(), max_blocks_, smem_bytes_, flight.stream));
    flight[Out::kTokenScales] = {};
}

void DeviceRank::push_copies(Flight& flight) {
    EP_CUDA(cudaSetDevice(arena_->device()));
    copies_->run(flight, *arena_, max_blocks_, flight.num_blocks);
    expand(flight);
}

std::shared_ptr<BegunCombine> DeviceRank::combine(const CombineArgs& args,
                                                  const CombineWants& wants, Stream stream) {
    enter(stream);
    auto begun = std::make_shared<BegunCombine>(
        BegunCombine{{view_, args, begin_of(OpKind::kCombine), nullptr, wants.begun}});
    ++begun_;
    CombineJob& job = begun->job;
    job.begin.report_later = true;
    job.begin.describe(describe(args), args.num_tokens);
    if (stages(args)) {
        job.view = small_view();
        launch_staged(*begun, wants.in_halves ? Half::kSend : Half::kBoth, stream, wants.num_sms);
        return begun;
    }
    Output& output = job.begin.head.output;
    output.num_rows = static_cast<int32_t>(args.num_rows);
    const auto set = [](uint32_t (&words)[2], int64_t offset) {
        words[0] = static_cast<uint32_t>(offset);
        words[1] = static_cast<uint32_t>(static_cast<uint64_t>(offset) >> 32);
    };
    set(output.y, args.arena_offset);

    // Both return to the arena behind the kernels that read them.
    std::shared_ptr<StreamHold> rows, weights;
    const auto grant = [&](int64_t bytes) {
        auto hold = arena_->grant(bytes, stream);
        if (!hold && code_of(job.begin.head.what) == kOk) {
            job.begin.head.set(OpKind::kCombine, kOutOfArena);
            job.begin.refusal.detail[0] = bytes;
            job.begin.refusal.detail[1] = arena_->stats().largest_free;
        }
        return hold;
    };
    const bool has_peers = shape_.num_ranks > 1;
    const bool in_place = args.arena_offset >= 0 || !has_peers;
    if (!in_place || args.per_rank) rows = grant(args.num_rows * args.row_bytes());
    if (rows) {
        job.staged = rows->data();
        set(output.y, rows->extent().offset);
    }
    if (has_peers && args.with_weights) {
        const int64_t per_row = args.layout == RecvLayout::kCompact ? args.num_topk : 1;
        const int64_t bytes = args.num_rows * per_row * int64_t{sizeof(float)};
        weights = grant(bytes);
        if (weights && bytes > 0) {
            EP_CUDA(cudaMemcpyAsync(weights->data(), args.y_weights, bytes,
                                    cudaMemcpyDeviceToDevice, stream));
        }
        if (weights) set(output.weights, weights->extent().offset);
    }
    if (rails_) {
        if (job.staged != nullptr) EP_CUDA(kernels::launch_stage(job, max_blocks_, stream));
        LaunchPlan plan;
        plan.num_blocks = blocks(OpKind::kCombine, wants.num_sms);
        plan.num_stages = wants.num_stages;
        EP_CUDA(rails_->combine(job, plan, stream));
        return begun;
    }
    LaunchPlan plan = kernels::combine_plan(args, shape_.num_ranks,
                                            blocks(OpKind::kCombine, wants.num_sms), smem_bytes_);
    plan.all_blocks = max_blocks_;
    if (wants.num_stages > 0) plan.num_stages = std::min(plan.num_stages, wants.num_stages);
    EP_CUDA(kernels::launch_combine(job, plan, stream));
    return begun;
}

void DeviceRank::launch_staged(BegunCombine& begun, Half half, Stream stream, int num_sms) {
    if (half != Half::kReceive) {
        if (num_sms > 0) begun.job.view.overlaps = false;
        begun.num_blocks = small_blocks(kernels::stage_blocks(begun.job), num_sms);
    }
    if (rails_) {
        EP_CUDA(rails_->direct_combine(begun.job, half, begun.num_blocks, stream));
    } else {
        EP_CUDA(kernels::launch_stage_combine(begun.job, half, begun.num_blocks, stream));
    }
    begun.half = half;
}

void DeviceRank::finish(BegunCombine& begun, Stream stream) {
    if (begun.half != Half::kSend) return;
    enter(stream);
    launch_staged(begun, Half::kReceive, stream);
}

void DeviceRank::refuse(OpKind kind, const Outcome& why, Stream stream) {
    enter(stream);
    ++begun_;
    Begin refusal = begin_of(kind);
    refusal.head.set(kind, why.incident.code);
    std::memcpy(refusal.refusal.detail, why.detail, sizeof(why.detail));
    std::memcpy(refusal.refusal.reason, why.reason, sizeof(why.reason));
    if (rails_) {
        EP_CUDA(rails_->refuse(small_view(), refusal, stream));
    } else {
        EP_CUDA(kernels::launch_refuse(small_view(), refusal, stream));
    }
}

}  // namespace ep
