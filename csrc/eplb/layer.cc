#include "eplb/layer.h"

#include <algorithm>
#include <numeric>

#include "eplb/cell.h"

namespace ep::eplb {

Part::Part(std::span<const int32_t> experts, std::span<const double> of) {
    std::vector<double> unsorted;
    for (const int32_t e : experts) unsorted.push_back(of[e]);
    for (const int32_t i : descending(unsorted)) {
        id.push_back(experts[i]);
        load.push_back(unsorted[i]);
    }
}

Slots Part::to_local(std::span<const int32_t> slots, int num_experts) const {
    std::vector<int32_t> place(num_experts, -1);
    for (size_t i = 0; i < id.size(); ++i) place[id[i]] = static_cast<int32_t>(i);
    Slots local;
    for (const int32_t e : slots) local.push_back(e < 0 ? -1 : place[e]);
    return local;
}

void Part::to_layer(std::span<const int32_t> local, std::span<int32_t> slots) const {
    for (size_t q = 0; q < local.size(); ++q) slots[q] = id[local[q]];
}

Layer::Layer(const PlanArgs& args, int layer)
    : a(args),
      num_all(args.num_experts + args.num_shared),
      load(args.load + size_t(layer) * num_all, args.load + size_t(layer + 1) * num_all),
      slots_per_rank(args.num_slots / args.num_ranks),
      ranks_per_node(args.num_ranks / args.num_nodes) {
    const size_t e = a.num_experts;
    if (a.together != nullptr) together = a.together + layer * e * e;
    if (a.current != nullptr) {
        current = {a.current + size_t(layer) * a.num_slots, size_t(a.num_slots)};
    }
    if (!a.hierarchical) return;
    std::vector<double> sums(a.num_groups, 0);
    for (int g = 0; g < a.num_groups; ++g) {
        std::vector<double> members(load.begin() + g * group_size(),
                                    load.begin() + (g + 1) * group_size());
        std::sort(members.begin(), members.end());  // sums do not depend on the numbering
        sums[g] = std::accumulate(members.begin(), members.end(), 0.0);
    }
    group = descending(sums);
    for (const int32_t g : group) group_load.push_back(sums[g]);
}

Part Layer::everybody() const {
    std::vector<int32_t> all(num_all);
    std::iota(all.begin(), all.end(), 0);
    return Part(all, load);
}

Part Layer::part_of(int node, std::span<const int> node_of_group) const {
    std::vector<int32_t> experts;
    for (int i = 0; i < a.num_groups; ++i) {
        if (node_of_group[i] != node) continue;
        for (int k = 0; k < group_size(); ++k) experts.push_back(group[i] * group_size() + k);
    }
    std::sort(experts.begin(), experts.end());
    std::vector<double> shares = load;
    for (int s = a.num_experts; s < num_all; ++s) {
        experts.push_back(s);
        shares[s] /= a.num_nodes;
    }
    return Part(experts, shares);
}

std::vector<Part> Layer::parts_of(std::span<const int> node_of_group) const {
    std::vector<Part> parts;
    for (int n = 0; n < a.num_nodes; ++n) parts.push_back(part_of(n, node_of_group));
    return parts;
}

std::vector<int> nodes_of(std::span<const int32_t> group_slots, int groups_per_node) {
    std::vector<int> node(group_slots.size());
    for (size_t q = 0; q < node.size(); ++q) {
        node[group_slots[q]] = static_cast<int>(q) / groups_per_node;
    }
    return node;
}

}  // namespace ep::eplb
