// Which expert each physical slot holds, layer by layer.
#pragma once

#include <cstdint>
#include <type_traits>

namespace ep::eplb {

// Whether replicas of an expert go to different ranks, where there are enough of those.
enum class Distinct : int32_t {
    kNever,   // no matter
    kPrefer,  // yes, unless the public greedy, which does not care, has a lighter heaviest rank
              // than all that is found; then cells heavier than its are free to do the same
    kAlways,  // even if that is less even
};

// Slots stand rank by rank, ranks node by node. num_slots is a multiple of num_ranks, that of
// num_nodes; hierarchical: num_groups a multiple of num_nodes, num_experts one of num_groups.
struct PlanArgs {
    // in
    const double* load = nullptr;      // [num_layers, num_experts + num_shared], >= 0, finite
    const float* together = nullptr;   // [num_layers, num_experts, num_experts] tokens that chose
                                       // both, symmetric; or null
    const int32_t* current = nullptr;  // [num_layers, num_slots] to stay close to, or null
    // out
    int32_t* expert = nullptr;  // [num_layers, num_slots]
    // scalars
    int32_t num_layers = 0;
    int32_t num_experts = 0;  // without shared ones
    int32_t num_shared = 0;   // behind them; hierarchical: on every node
    int32_t num_slots = 0;
    int32_t num_ranks = 1;
    int32_t num_nodes = 1;
    int32_t num_groups = 1;  // of experts, consecutive, that stay on one node
    bool hierarchical = false;
    Distinct distinct = Distinct::kPrefer;
    double slack = 0.02;       // of the heaviest rank, given away to move less
    double node_slack = 0.01;  // of the heaviest node, given away for less traffic
};
static_assert(std::is_trivially_copyable_v<PlanArgs>);

void plan(const PlanArgs& args);

}  // namespace ep::eplb
