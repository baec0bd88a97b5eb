// The rails of a GPU rank: what its operations need beside what they need on one node.
//
// How bytes get to other nodes is the business of the kernels it is given: those of the core for pretended
// nodes, those of the plugin for NVSHMEM.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "contract/direct.h"
#include "contract/gpu.h"
#include "contract/rail.h"
#include "kernels/rail_kernels.h"

namespace ep {

struct RailSetup {
    RailShape shape;
    const kernels::RailKernels* kernels = nullptr;
    std::shared_ptr<void> keeps;  // the kernels, the segment, and whatever they need
};

class Rails {
public:
    // On the current device.
    Rails(const Shape& shape, int rank, RailSetup setup, int smem_bytes);
    ~Rails();
    Rails(const Rails&) = delete;
    Rails& operator=(const Rails&) = delete;

    const NodeShape& nodes() const { return view_.shape.nodes; }
    // Whether a call goes straight to the ranks of other nodes; see contract/direct.h.
    bool is_direct() const { return view_.shape.is_direct(); }
    template <class Args>
    bool is_direct(const Shape& shape, const Args& args) const {
        return ep::is_direct(shape, view_.shape, args);
    }
    int num_channels() const { return view_.shape.num_channels; }  // a block each, at most
    std::byte* blank_header() const {
        return blank_;
    }  // device: of ranks whose memory we do not reach
    // Of what a dispatch logs, at most; 0 when its handle keeps what it has.
    int64_t log_bytes(const DispatchArgs& args) const;
    static int64_t log_bytes(const DispatchArgs& args, int64_t num_logged);

    // Each queues a kernel and returns a cudaError_t. `log`: log_bytes(args), or null.
    int dispatch(const DispatchJob& job, int32_t* log, const LaunchPlan& plan,
                 kernels::Stream stream) const;
    int combine(const CombineJob& job, const LaunchPlan& plan, kernels::Stream stream) const;
    int direct_dispatch(const DispatchJob& job, int32_t* log, Half half, int num_blocks,
                        kernels::Stream stream) const;
    int direct_combine(const CombineJob& job, Half half, int num_blocks,
                       kernels::Stream stream) const;
    int refuse(const RankView& view, const Begin& begin, kernels::Stream stream) const;
    // See kernels/rail_kernels.h.
    int hear_masks(const RankView& view, kernels::Stream stream) const;
    int mask(const RankView& view, int rank, kernels::Stream stream) const;
    int unmask(const RankView& view, uint64_t seq, uint64_t gone, kernels::Stream stream) const;

    // What has crossed, by RailCounter. Waits for the device.
    std::vector<uint64_t> counters() const;

private:
    RailView view_of(const DispatchJob& job, int32_t* log) const;

    RailSetup setup_;
    RailView view_;
    std::byte *data_ = nullptr, *blank_ = nullptr;
    const int64_t max_tokens_;
    const int rank_;
    kernels::RailRoom room_;
};

}  // namespace ep
