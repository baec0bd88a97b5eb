#include "eplb/stay.h"

#include <algorithm>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "eplb/cell.h"
#include "eplb/repair.h"

namespace ep::eplb {
namespace {

// Evaluations of the search for a node that cannot be repaired.
constexpr int64_t kSearchRanks = 20'000;
// Evaluations of all repairs of a layer, for each slot and at most, where the load has drifted; half
// of it where more than a part of all load is above the target: there is less to save.
constexpr int64_t kRepairPerSlot = 800;
constexpr int64_t kRepairAtMost = 500'000;
constexpr double kFarAway = 0.1;

// Pairs blocks of `plan` with as many of `current`, most common experts first; experts are below
// `num_experts`, -1 is none. Returns for each block of the plan that of `current`.
std::vector<int> match(std::span<const int32_t> plan, std::span<const int32_t> current, int block,
                       int num_experts) {
    struct Pair {
        int common, mine, theirs;
    };
    const int num = static_cast<int>(plan.size()) / block;
    std::vector<Pair> pairs;
    std::vector<int> seen(num_experts, 0);
    for (int i = 0; i < num; ++i) {
        const auto mine = plan.subspan(size_t(i) * block, block);
        for (int j = 0; j < num; ++j) {
            const auto theirs = current.subspan(size_t(j) * block, block);
            for (const int32_t e : mine) ++seen[e];
            int common = 0;
            for (const int32_t e : theirs) common += e >= 0 && seen[e]-- > 0;
            for (const int32_t e : theirs) {
                if (e >= 0) seen[e] = 0;
            }
            for (const int32_t e : mine) seen[e] = 0;
            if (common > 0) pairs.push_back({common, i, j});
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
    int next = 0;  // those with nothing in common take what is left, in order
    for (int& a : as) {
        if (a >= 0) continue;
        while (taken[next]) ++next;
        a = next++;
    }
    return as;
}

// The plan with its blocks named as those of `current` that they have most in common with.
Slots rename(std::span<const int32_t> plan, std::span<const int32_t> current, int block,
             int num_experts) {
    const std::vector<int> as = match(plan, current, block, num_experts);
    Slots renamed(plan.size());
    for (size_t i = 0; i < as.size(); ++i)
        std::copy_n(plan.begin() + i * block, block, renamed.begin() + size_t(as[i]) * block);
    return renamed;
}

class StayClose {
public:
    StayClose(const Layer& layer, const Solved& fresh)
        : l_(layer),
          a_(layer.a),
          fresh_(fresh),
          target_(fresh.heaviest * (1 + a_.slack)),
          budget_(std::min(kRepairAtMost, kRepairPerSlot * a_.num_slots) / (far_away() ? 2 : 1)) {}

    Slots run() {
        Slots best;
        int fewest = 0;
        const auto offer = [&](std::optional<Slots> slots) {
            if (!slots) return;
            keep_places(*slots);
            const int moves = count_moves(*slots);
            if (!best.empty() && moves >= fewest) return;
            best = std::move(*slots);
            fewest = moves;
        };
        if (a_.hierarchical) {
            const auto ways = groupings();
            for (size_t i = 0; i < ways.size(); ++i) {  // each has a part of what is left
                const int64_t kept = budget_ - budget_ / static_cast<int64_t>(ways.size() - i);
                budget_ -= kept;
                offer(settle_nodes(ways[i]));
                budget_ += kept;
            }
        } else {
            offer(settle(l_.everybody(), l_.current));
        }
        if (best.empty()) offer(name_fresh());
        return best;
    }

private:
    std::optional<Slots> settle_nodes(const std::vector<int>& node_of_group) {
        Slots all;
        for (int n = 0; n < a_.num_nodes; ++n) {
            const size_t first = size_t(n) * l_.node_slots();
            const auto slots =
                settle(l_.part_of(n, node_of_group), l_.current.subspan(first, l_.node_slots()));
            if (!slots) return std::nullopt;
            all.insert(all.end(), slots->begin(), slots->end());
        }
        return all;
    }

    // The slots of some ranks, none above the target; replicas apart where that will do.
    std::optional<Slots> settle(const Part& part, std::span<const int32_t> current) {
        std::optional<Slots> slots;
        if (a_.distinct != Distinct::kNever) slots = settle(part, current, true);
        if (slots || (a_.distinct != Distinct::kNever && !fresh_.repeats)) return slots;
        return settle(part, current, false);
    }

    // What they hold, repaired; else new ones, named and repaired so that most experts stay.
    std::optional<Slots> settle(const Part& part, std::span<const int32_t> current, bool distinct) {
        const Slots before = part.to_local(current, l_.num_all);
        const int num_ranks = static_cast<int>(current.size()) / l_.slots_per_rank;
        Cell cell(part.load, num_ranks, l_.slots_per_rank, distinct);
        if (!cell.adopt(before) || !repair(cell, before, target_, budget_)) {
            if (a_.hierarchical) {
                cell.place();
                cell.descend();
                if (cell.max_load() > target_)
                    cell.search(kSearchRanks, target_ / cell.bound() - 1);
            } else {
                cell.restore(part.to_local(fresh_.slots, l_.num_all));
            }
            cell.restore(name_ranks(cell.slots(), before, cell.num_experts()));
            if (!repair(cell, before, target_, budget_)) return std::nullopt;
        }
        Slots slots(current.size());
        part.to_layer(cell.slots(), slots);
        return slots;
    }

    // The fresh plan, named and repaired like that.
    Slots name_fresh() {
        Slots slots = name_ranks(fresh_.slots, l_.current, l_.num_all);
        const std::vector<int> node = a_.hierarchical
                                          ? nodes_of(*groups_by_node(slots), l_.groups_per_node())
                                          : std::vector<int>{};
        const size_t block = a_.hierarchical ? l_.node_slots() : slots.size();
        for (size_t first = 0; first < slots.size(); first += block) {
            const Part part = a_.hierarchical ? l_.part_of(static_cast<int>(first / block), node)
                                              : l_.everybody();
            const std::span<int32_t> mine(slots.data() + first, block);
            const int num_ranks = static_cast<int>(block) / l_.slots_per_rank;
            const bool distinct = a_.distinct != Distinct::kNever && !fresh_.repeats;
            Cell cell(part.load, num_ranks, l_.slots_per_rank, distinct);
            cell.restore(part.to_local(mine, l_.num_all));
            repair(cell, part.to_local(l_.current.subspan(first, block), l_.num_all), target_,
                   budget_);
            part.to_layer(cell.slots(), mine);
        }
        return slots;
    }

    // ---- groups ----

    // Ways to have groups on nodes, each as [num_groups] node: those in force, repaired as far as
    // the target demands it; the same with room left for uneven ranks; those of the fresh plan.
    std::vector<std::vector<int>> groupings() {
        std::vector<std::vector<int>> found;
        const Slots renamed = rename(fresh_.slots, l_.current, l_.node_slots(), l_.num_all);
        const std::vector<int> theirs = nodes_of(*groups_by_node(renamed), l_.groups_per_node());
        double shared = 0;  // of every node alike
        for (int s = a_.num_experts; s < l_.num_all; ++s) shared += l_.load[s] / a_.num_nodes;
        const double most = target_ * l_.ranks_per_node - shared;
        std::vector<double> node_load(a_.num_nodes, 0);
        for (int i = 0; i < a_.num_groups; ++i) node_load[theirs[i]] += l_.group_load[i];
        const double least = *std::max_element(node_load.begin(), node_load.end());
        if (const auto mine = groups_by_node(l_.current)) {
            for (const double limit : {most, (most + least) / 2}) {
                Cell groups(l_.group_load, a_.num_nodes, l_.groups_per_node(), true);
                if (!groups.adopt(*mine) || !repair(groups, *mine, limit, budget_)) continue;
                found.push_back(nodes_of(groups.slots(), l_.groups_per_node()));
            }
        }
        found.push_back(theirs);
        return found;
    }

    // Groups of each node, as a cell takes them; nothing when one is on more than one node.
    std::optional<Slots> groups_by_node(std::span<const int32_t> slots) const {
        const int per_node = l_.groups_per_node();
        std::vector<int> place(a_.num_groups), node(a_.num_groups, -1), next(a_.num_nodes, 0);
        for (int i = 0; i < a_.num_groups; ++i) place[l_.group[i]] = i;
        for (int q = 0; q < a_.num_slots; ++q) {
            if (slots[q] < 0 || slots[q] >= a_.num_experts) continue;
            int& at = node[place[slots[q] / l_.group_size()]];
            if (at >= 0 && at != q / l_.node_slots()) return std::nullopt;
            at = q / l_.node_slots();
        }
        Slots groups(a_.num_groups, -1);
        for (int i = 0; i < a_.num_groups; ++i) {
            if (node[i] < 0) continue;
            if (next[node[i]] == per_node) return std::nullopt;
            groups[node[i] * per_node + next[node[i]]++] = i;
        }
        return groups;
    }

    // What ranks carry above the target now is more than a part of all load.
    bool far_away() const {
        std::vector<int> count(l_.num_all, 0);
        for (const int32_t e : l_.current) ++count[e];
        double above = 0, total = 0;
        for (int r = 0; r < a_.num_ranks; ++r) {
            double load = 0;
            for (const int32_t e :
                 l_.current.subspan(size_t(r) * l_.slots_per_rank, l_.slots_per_rank))
                load += l_.load[e] / count[e];
            total += load;
            above += std::max(0.0, load - target_);
        }
        return above > kFarAway * total;
    }

    // ---- names of ranks and slots ----

    // Ranks, named so that most experts are where they were; where it matters which of them stand
    // together on a node, nodes first.
    Slots name_ranks(std::span<const int32_t> plan, std::span<const int32_t> current,
                     int num_experts) const {
        const bool nodes_first = a_.hierarchical || l_.together != nullptr;
        const size_t block = nodes_first ? l_.node_slots() : plan.size();
        Slots renamed = rename(plan, current, static_cast<int>(block), num_experts);
        for (size_t first = 0; first < renamed.size(); first += block) {
            const std::span<int32_t> mine(renamed.data() + first, block);
            const Slots ranks =
                rename(mine, current.subspan(first, block), l_.slots_per_rank, num_experts);
            std::copy(ranks.begin(), ranks.end(), mine.begin());
        }
        return renamed;
    }

    // What stays on a rank keeps its slot; the rest follows in ascending order.
    void keep_places(Slots& slots) const {
        for (int r = 0; r < a_.num_ranks; ++r) {
            const int first = r * l_.slots_per_rank;
            Slots left(slots.begin() + first, slots.begin() + first + l_.slots_per_rank);
            std::sort(left.begin(), left.end());
            for (int q = first; q < first + l_.slots_per_rank; ++q) {
                const auto stays = std::find(left.begin(), left.end(), l_.current[q]);
                slots[q] = stays == left.end() ? -1 : *stays;
                if (stays != left.end()) left.erase(stays);
            }
            auto next = left.begin();
            for (int q = first; q < first + l_.slots_per_rank; ++q) {
                if (slots[q] < 0) slots[q] = *next++;
            }
        }
    }

    // Of slots whose experts kept their places.
    int count_moves(const Slots& slots) const {
        int moves = 0;
        for (size_t q = 0; q < slots.size(); ++q) moves += slots[q] != l_.current[q];
        return moves;
    }

    const Layer& l_;
    const PlanArgs& a_;
    const Solved& fresh_;
    const double target_;
    int64_t budget_;  // of all repairs together
};

}  // namespace

Slots stay_close(const Layer& layer, const Solved& fresh) { return StayClose(layer, fresh).run(); }

}  // namespace ep::eplb
