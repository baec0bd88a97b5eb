// Plans of the kernels across nodes fit the shared memory that a block has, whatever is asked for, and
// whatever a kernel has taken of it by itself.
#include <cuda_runtime_api.h>

#include <string>

#include "../cpp/check.h"
#include "device/rail_loopback.cuh"
#include "kernels/hybrid_combine.cuh"
#include "kernels/hybrid_dispatch.cuh"

namespace {

using namespace ep;
using device::LoopbackRail;

constexpr int kOwn[] = {512, 1536, 9584};  // of kernels: by themselves, and linked with NVSHMEM
constexpr int kMostQuantized = 64 * 1024;  // bytes of a row; ep_comm/backends/hybrid.py

struct Sizes {
    int nodes, per_node, experts, topk, hidden, tokens, sms;

    std::string name() const {
        std::string text;
        for (int n : {nodes, per_node, experts, topk, hidden, tokens, sms}) {
            text += std::to_string(n) + " ";
        }
        return text;
    }
};

template <class Check>
void for_all_sizes(Check check) {
    for (const auto& [nodes, per_node] : {std::pair{2, 1}, {2, 8}, {4, 4}, {8, 8}, {16, 8}}) {
        for (int experts : {1, 8, 32}) {  // of a rank
            for (int topk : {1, 8}) {
                for (int hidden : {256, 2048, 4096, 7040, 7168, 8192, 16384}) {
                    for (int tokens : {0, 1, 128, 4096, 16384}) {
                        for (int sms : {1, 8, 20}) {
                            check({nodes, per_node, experts * nodes * per_node, topk, hidden,
                                   tokens, sms});
                        }
                    }
                }
            }
        }
    }
}

Shape shape_of(const Sizes& s) {
    Shape shape;
    shape.num_ranks = s.nodes * s.per_node;
    shape.num_slots = 2;
    shape.num_experts = s.experts;
    shape.max_local_experts = s.experts / shape.num_ranks;
    shape.num_topk = s.topk;
    shape.max_tokens = std::max(s.tokens, 1);
    return shape;
}

RailView rails_of(const Sizes& s) {
    const RailHeadLayout head(s.topk, true, true, 4 * (s.hidden / 32));
    RailView rails{};
    rails.shape = divide_staging({s.nodes, s.per_node}, 20, head.bytes + 2 * s.hidden);
    rails.num_blocks = std::min(s.sms, rails.shape.num_channels);
    return rails;
}

void expect_fits(const std::string& name, const kernels::Grid& grid, int room, int most_threads) {
    if (grid.smem_bytes <= room && grid.threads <= most_threads) return;
    fail(name + ": " + std::to_string(grid.smem_bytes) + " B of " + std::to_string(room) + ", " +
             std::to_string(grid.threads) + " threads",
         std::source_location::current());
}

void check_dispatch(const Sizes& s, RecvLayout layout, Quantize quantize, DType dtype, int room) {
    const Shape shape = shape_of(s);
    DispatchJob job{
        RankView{shape, ControlLayout(shape), {}, {}, {}}, {}, {}, {}, 1, 0, nullptr, nullptr};
    DispatchArgs& a = job.args;
    a.layout = layout;
    a.num_topk = s.topk;
    a.hidden = s.hidden;
    a.num_tokens = s.tokens;
    a.dtype = dtype;
    a.quantize = quantize;
    if (quantize != Quantize::kNone) a.scale_block = 128, a.scale_bytes = 4 * (s.hidden / 128);
    if (quantize != Quantize::kNone && kernels::stage_of(a) > kMostQuantized) return;
    const RailView rails = rails_of(s);
    job.num_chunks = rails.num_blocks;
    job.tokens_per_chunk = s.tokens / rails.num_blocks + 1;
    const auto h = kernels::spread_dispatch(LoopbackRail{}, job, rails, 0, room);
    expect_fits("dispatch " + s.name(), kernels::grid_of(h), room, 32 * kernels::kMaxHybridWarps);
}

void check_combine(const Sizes& s, DType dtype, int room) {
    CombineArgs a;
    a.num_topk = s.topk;
    a.hidden = s.hidden;
    a.dtype = dtype;
    const RailView rails = rails_of(s);
    const kernels::RailSpread spread(rails.shape, 0, rails.num_blocks, kernels::kMaxGroups / 2);
    const auto g = kernels::divide_groups(a, s.nodes * s.per_node, spread.end, room);
    const int bytes = g.rings + static_cast<int>(g.count * g.ring_bytes());
    expect_fits("combine " + s.name(), {1, 32 * g.num_warps(), bytes}, room,
                32 * kernels::kMaxPullWarps);
}

}  // namespace

int main() {
    test("dispatch across nodes", [] {
        for_all_sizes([](const Sizes& s) {
            for (int own : kOwn) {
                const int room = emulator::kSharedBytes - own;
                for (auto layout : {RecvLayout::kCompact, RecvLayout::kGrouped}) {
                    check_dispatch(s, layout, Quantize::kNone, DType::kBF16, room);
                    check_dispatch(s, layout, Quantize::kFp8, DType::kBF16, room);
                    check_dispatch(s, layout, Quantize::kFp8, DType::kF32, room);
                }
            }
        });
    });
    test("combine across nodes", [] {
        for_all_sizes([](const Sizes& s) {
            for (auto dtype : {DType::kBF16, DType::kF32}) {
                check_combine(s, dtype, emulator::kSharedBytes - kOwn[2]);
            }
        });
    });
    return finish();
}
