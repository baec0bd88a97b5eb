// One layer as the planner sees it: its loads, its groups, and the parts that cells are made of.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "eplb/plan.h"

namespace ep::eplb {

using Slots = std::vector<int32_t>;  // expert of each slot, -1 = none

// Some experts of a layer, heaviest first, as one cell; `id` turns its experts into the layer's.
struct Part {
    std::vector<int32_t> id;
    std::vector<double> load;

    Part(std::span<const int32_t> experts, std::span<const double> of);
    // -1 for experts of other parts.
    Slots to_local(std::span<const int32_t> slots, int num_experts) const;
    void to_layer(std::span<const int32_t> local, std::span<int32_t> slots) const;
};

struct Layer {
    Layer(const PlanArgs& args, int layer);

    // The experts of a node: those of its groups, and the shared ones with that node's part of
    // their tokens.
    Part part_of(int node, std::span<const int> node_of_group) const;
    Part everybody() const;
    std::vector<Part> parts_of(std::span<const int> node_of_group) const;

    int group_size() const { return a.num_experts / a.num_groups; }
    int groups_per_node() const { return a.num_groups / a.num_nodes; }
    int node_slots() const { return a.num_slots / a.num_nodes; }
    std::span<int32_t> of_node(Slots& slots, int node) const {
        return {slots.data() + size_t(node) * node_slots(), size_t(node_slots())};
    }

    const PlanArgs& a;
    const int num_all;  // experts, shared ones too
    const std::vector<double> load;
    const int slots_per_rank, ranks_per_node;
    const float* together = nullptr;   // as in PlanArgs, of this layer
    std::span<const int32_t> current;  // the same; empty = none
    // Hierarchical: groups, heaviest first, and their loads. Elsewhere a group is its place here.
    std::vector<int32_t> group;
    std::vector<double> group_load;
};

// [num_groups] node of each group, from a cell whose ranks are nodes and whose experts are groups.
std::vector<int> nodes_of(std::span<const int32_t> group_slots, int groups_per_node);

}  // namespace ep::eplb
