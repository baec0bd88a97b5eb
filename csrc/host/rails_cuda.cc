#include <cuda_runtime_api.h>

#include "host/cuda_check.h"
#include "host/rails.h"
#include "transport/beside_captures.h"

namespace ep {
namespace {

int64_t header_bytes() { return (int64_t{sizeof(ControlHeader)} + 127) / 128 * 128; }

}  // namespace

Rails::Rails(const Shape& shape, int rank, RailSetup setup, int smem_bytes)
    : setup_(std::move(setup)), max_tokens_(shape.max_tokens), rank_(rank) {
    const BesideCaptures beside;
    EP_CUDA(setup_.kernels->load(smem_bytes, room_));
    const RailStateLayout layout(shape, setup_.shape);
    EP_CUDA(cudaMalloc(reinterpret_cast<void**>(&data_), layout.end + header_bytes()));
    EP_CUDA(cudaMemset(data_, 0, layout.end + header_bytes()));
    const auto words = [this](const Region& region) {
        return reinterpret_cast<uint64_t*>(data_ + region.offset);
    };
    blank_ = data_ + layout.end;
    view_.shape = setup_.shape;
    view_.layout = RailLayout(setup_.shape);
    view_.state = {words(layout.sent),     words(layout.taken),  words(layout.brings),
                   words(layout.incoming), words(layout.visits), words(layout.ever),
                   words(layout.puts),     words(layout.coming), words(layout.missed),
                   words(layout.masks)};
}

Rails::~Rails() {
    const BesideCaptures beside;
    cudaFree(data_);
}

int64_t Rails::log_bytes(const DispatchArgs& args, int64_t num_logged) {
    return int64_t{4} * RailLog{args.num_topk, args.with_weights}.words() * num_logged;
}

int64_t Rails::log_bytes(const DispatchArgs& args) const {
    if (args.cached && !args.with_weights) return 0;
    return log_bytes(args, view_.shape.num_peers() * max_tokens_);
}

RailView Rails::view_of(const DispatchJob& job, int32_t* log) const {
    RailView view = view_;
    view.log = log;
    view.num_logged = view.shape.num_peers() * max_tokens_;
    view.log_has_weights = job.args.with_weights;
    return view;
}

int Rails::dispatch(const DispatchJob& job, int32_t* log, const LaunchPlan& plan,
                    kernels::Stream stream) const {
    return setup_.kernels->dispatch(setup_.kernels->rail, job, view_of(job, log), plan,
                                    room_.dispatch, stream);
}

int Rails::direct_dispatch(const DispatchJob& job, int32_t* log, Half half, int num_blocks,
                           kernels::Stream stream) const {
    return setup_.kernels->direct_dispatch(setup_.kernels->rail, job, view_of(job, log), half,
                                           num_blocks, stream);
}

int Rails::direct_combine(const CombineJob& job, Half half, int num_blocks,
                          kernels::Stream stream) const {
    return setup_.kernels->direct_combine(setup_.kernels->rail, job, view_, half, num_blocks,
                                          stream);
}

int Rails::combine(const CombineJob& job, const LaunchPlan& plan, kernels::Stream stream) const {
    RailView view = view_;
    view.log = job.args.rail_log;
    view.num_logged = job.args.num_logged;
    view.log_has_weights = job.args.log_has_weights;
    return setup_.kernels->combine(setup_.kernels->rail, job, view, plan, room_.combine, stream);
}

int Rails::refuse(const RankView& view, const Begin& begin, kernels::Stream stream) const {
    return setup_.kernels->refuse(setup_.kernels->rail, view, begin, view_, stream);
}

int Rails::hear_masks(const RankView& view, kernels::Stream stream) const {
    return setup_.kernels->hear_masks(setup_.kernels->rail, view, view_, stream);
}

int Rails::mask(const RankView& view, int rank, kernels::Stream stream) const {
    return setup_.kernels->mask(setup_.kernels->rail, view, view_, rank, stream);
}

int Rails::unmask(const RankView& view, uint64_t seq, uint64_t gone, kernels::Stream stream) const {
    return setup_.kernels->unmask(setup_.kernels->rail, view, view_, seq, gone, stream);
}

std::vector<uint64_t> Rails::counters() const {
    const BesideCaptures beside;
    std::vector<uint64_t> values(static_cast<int>(RailCounter::kCount));
    EP_CUDA(cudaMemcpy(values.data(), view_.state.ever, 8 * values.size(), cudaMemcpyDeviceToHost));
    return values;
}

}  // namespace ep
