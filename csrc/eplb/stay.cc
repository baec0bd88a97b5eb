#include "eplb/stay.h"

#include <algorithm>
#include <span>
#include <vector>

#include "eplb/cell.h"
#include "eplb/repair.h"

namespace ep::eplb {
namespace {

class StayClose {
public:
    explicit StayClose(const Layer& layer) : l_(layer), a_(layer.a) {}

    Slots run(const Solved& fresh) const {
        const double target = fresh.heaviest * (1 + a_.slack);
        Slots repaired(l_.current.begin(), l_.current.end());
        if (a_.hierarchical ? repair_nodes(target, repaired) : repair_all(target, repaired)) {
            const Slots plan = repaired;  // where an expert left its rank and came back
            for (int r = 0; r < a_.num_ranks; ++r) keep_slots(plan, r, repaired, r);
            return repaired;
        }
        Slots renamed = fresh.slots;
        relabel(renamed);
        return renamed;
    }

private:
    bool repair_all(double target, Slots& slots) const {
        const Part part = l_.everybody();
        Cell cell(part.load, a_.num_ranks, l_.slots_per_rank, a_.distinct);
        const Slots before = part.to_local(slots, l_.num_all);
        if (!cell.adopt(before) || !repair(cell, before, target)) return false;
        part.to_layer(cell.slots(), slots);
        return true;
    }

    // Groups stay where they are, as far as the target allows; then each node repairs itself.
    bool repair_nodes(double target, Slots& slots) const {
        const int per_node = a_.num_groups / a_.num_nodes;
        Slots group_slots;
        if (!groups_by_node(slots, group_slots)) return false;
        Cell groups(l_.group_load, a_.num_nodes, per_node, true);
        double shared = 0;  // of every node alike
        for (int s = a_.num_experts; s < l_.num_all; ++s) shared += l_.load[s] / a_.num_nodes;
        if (!groups.adopt(group_slots) ||
            !repair(groups, group_slots, target * l_.ranks_per_node - shared)) {
            return false;
        }
        const std::vector<int> node_of_group = nodes_of(groups.slots(), per_node);
        for (int n = 0; n < a_.num_nodes; ++n) {
            const Part part = l_.part_of(n, node_of_group);
            const std::span<int32_t> mine = l_.of_node(slots, n);
            Cell cell(part.load, l_.ranks_per_node, l_.slots_per_rank, a_.distinct);
            const Slots before = part.to_local(mine, l_.num_all);
            if (!cell.adopt(before) || !repair(cell, before, target)) return false;
            part.to_layer(cell.slots(), mine);
        }
        return true;
    }

    // Groups of each node, as a cell takes them; false when a group is on more than one node.
    bool groups_by_node(const Slots& slots, Slots& group_slots) const {
        const int per_node = a_.num_groups / a_.num_nodes;
        std::vector<int> place(a_.num_groups), node(a_.num_groups, -1), next(a_.num_nodes, 0);
        for (int i = 0; i < a_.num_groups; ++i) place[l_.group[i]] = i;
        for (int q = 0; q < a_.num_slots; ++q) {
            if (slots[q] < 0 || slots[q] >= a_.num_experts) continue;
            int& at = node[place[slots[q] / l_.group_size()]];
            if (at >= 0 && at != q / l_.node_slots()) return false;
            at = q / l_.node_slots();
        }
        group_slots.assign(a_.num_groups, -1);
        for (int i = 0; i < a_.num_groups; ++i) {
            if (node[i] < 0) continue;
            if (next[node[i]] == per_node) return false;
            group_slots[node[i] * per_node + next[node[i]]++] = i;
        }
        return true;
    }

    // ---- names of ranks and slots ----

    // Renames nodes, then ranks inside them, then slots, so that most experts are where they were.
    void relabel(Slots& slots) const {
        const Slots plan = slots;
        const std::vector<int> node_as = match(plan, l_.node_slots(), 0, a_.num_nodes, 0);
        for (int n = 0; n < a_.num_nodes; ++n) {
            const int first = n * l_.ranks_per_node, as_first = node_as[n] * l_.ranks_per_node;
            const std::vector<int> as =
                match(plan, l_.slots_per_rank, first, l_.ranks_per_node, as_first);
            for (int r = 0; r < l_.ranks_per_node; ++r)
                keep_slots(plan, first + r, slots, as_first + as[r]);
        }
    }

    // Pairs `num` blocks of the plan with as many of the current placement, most common experts
    // first. Returns for each the current block, counted from the first.
    std::vector<int> match(const Slots& plan, int block, int first, int num,
                           int current_first) const {
        struct Pair {
            int common, mine, theirs;
        };
        std::vector<Pair> pairs;
        std::vector<int> seen(l_.num_all);
        for (int i = 0; i < num; ++i) {
            for (int j = 0; j < num; ++j) {
                std::fill(seen.begin(), seen.end(), 0);
                for (int q = 0; q < block; ++q) {
                    const int32_t e = l_.current[size_t(current_first + j) * block + q];
                    if (e >= 0) ++seen[e];
                }
                int common = 0;
                for (int q = 0; q < block; ++q)
                    common += seen[plan[size_t(first + i) * block + q]]-- > 0;
                pairs.push_back({common, i, j});
            }
        }
        std::stable_sort(pairs.begin(), pairs.end(),
                         [](const Pair& x, const Pair& y) { return x.common > y.common; });
        std::vector<int> as(num, -1);
        std::vector<bool> taken(num, false);
        for (const Pair& p : pairs) {
            if (as[p.mine] >= 0 || taken[p.theirs]) continue;
            as[p.mine] = p.theirs;
            taken[p.theirs] = true;
        }
        return as;
    }

    // Rank `as` of `slots` gets what `rank` of the plan holds; what stays keeps its slot.
    void keep_slots(const Slots& plan, int rank, Slots& slots, int as) const {
        const auto first = plan.begin() + rank * l_.slots_per_rank;
        std::vector<int32_t> left(first, first + l_.slots_per_rank);
        std::sort(left.begin(), left.end());
        const int out = as * l_.slots_per_rank;
        for (int i = 0; i < l_.slots_per_rank; ++i) {
            const auto stays = std::find(left.begin(), left.end(), l_.current[out + i]);
            slots[out + i] = stays == left.end() ? -1 : *stays;
            if (stays != left.end()) left.erase(stays);
        }
        auto next = left.begin();
        for (int i = 0; i < l_.slots_per_rank; ++i) {
            if (slots[out + i] < 0) slots[out + i] = *next++;
        }
    }

    const Layer& l_;
    const PlanArgs& a_;
};

}  // namespace

Slots stay_close(const Layer& layer, const Solved& fresh) { return StayClose(layer).run(fresh); }

}  // namespace ep::eplb
