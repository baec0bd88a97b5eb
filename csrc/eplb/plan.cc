// Experts to groups, groups to nodes, replicas to ranks; then, with a placement to stay close to,
// repair of that instead, wherever it reaches what the fresh plan reaches (and a little more).
#include "eplb/plan.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "eplb/cell.h"
#include "eplb/nodes.h"
#include "eplb/repair.h"

namespace ep::eplb {
namespace {

// Evaluations of the searches of a layer; some hundred microseconds.
constexpr int64_t kSearchRanks = 100'000;
constexpr int64_t kSearchNodes = 10'000;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Above the bound, relative: good enough to stop the search.
constexpr double kEvenRanks = 1e-6;
constexpr double kEvenNodes = 2e-4;

using Slots = std::vector<int32_t>;

// Some experts of a layer, heaviest first, as one cell; `id` turns its experts into the layer's.
struct Part {
    std::vector<int32_t> id;
    std::vector<double> load;

    Part(std::span<const int32_t> experts, std::span<const double> of) {
        std::vector<double> unsorted;
        for (const int32_t e : experts) unsorted.push_back(of[e]);
        for (const int32_t i : descending(unsorted)) {
            id.push_back(experts[i]);
            load.push_back(unsorted[i]);
        }
    }
    // -1 for experts of other parts.
    Slots to_local(std::span<const int32_t> slots, int num_experts) const {
        std::vector<int32_t> place(num_experts, -1);
        for (size_t i = 0; i < id.size(); ++i) place[id[i]] = static_cast<int32_t>(i);
        Slots local;
        for (const int32_t e : slots) local.push_back(e < 0 ? -1 : place[e]);
        return local;
    }
    void to_layer(std::span<const int32_t> local, std::span<int32_t> slots) const {
        for (size_t q = 0; q < local.size(); ++q) slots[q] = id[local[q]];
    }
};

struct Solved {
    Slots slots;
    double heaviest = 0;
};

Solved lighter(Solved first, Solved second) {
    return second.heaviest < first.heaviest ? std::move(second) : std::move(first);
}

class LayerPlan {
public:
    LayerPlan(const PlanArgs& args, int layer)
        : a_(args),
          num_all_(args.num_experts + args.num_shared),
          load_(args.load + size_t(layer) * num_all_, args.load + size_t(layer + 1) * num_all_),
          slots_per_rank_(args.num_slots / args.num_ranks),
          ranks_per_node_(args.num_ranks / args.num_nodes) {
        const size_t e = args.num_experts;
        if (args.together != nullptr) together_ = args.together + layer * e * e;
        if (args.current != nullptr) {
            current_ = {args.current + size_t(layer) * args.num_slots, size_t(args.num_slots)};
        }
        if (a_.hierarchical) sort_groups();
    }

    Slots run() {
        Solved fresh = a_.hierarchical ? hierarchical() : global();
        if (current_.empty()) {
            sort_ranks(fresh.slots);
            return std::move(fresh.slots);
        }
        const double target = fresh.heaviest * (1 + a_.slack);
        Slots repaired(current_.begin(), current_.end());
        if (a_.hierarchical ? repair_nodes(target, repaired) : repair_all(target, repaired)) {
            const Slots plan = repaired;  // where an expert left its rank and came back
            for (int r = 0; r < a_.num_ranks; ++r) keep_slots(plan, r, repaired, r);
            return repaired;
        }
        relabel(fresh.slots);
        return std::move(fresh.slots);
    }

private:
    std::vector<int32_t> everybody() const {
        std::vector<int32_t> all(num_all_);
        std::iota(all.begin(), all.end(), 0);
        return all;
    }

    // Solves cells that share nothing; only the heaviest is worth a search.
    Solved solve(const std::vector<Part>& parts) const {
        const int num_ranks = a_.num_ranks / static_cast<int>(parts.size());
        std::vector<Cell> cells;
        for (const Part& part : parts) {
            cells.emplace_back(part.load, num_ranks, slots_per_rank_, a_.distinct);
            cells.back().place();
            cells.back().descend();
        }
        const auto heavier = [](const Cell& x, const Cell& y) {
            return x.max_load() < y.max_load();
        };
        std::vector<bool> searched(cells.size(), false);
        int64_t budget = kSearchRanks;  // each next cell gets half of what is left
        while (true) {
            const auto heaviest = std::max_element(cells.begin(), cells.end(), heavier);
            const size_t i = heaviest - cells.begin();
            if (searched[i]) break;
            if (cells.size() > 1) budget /= 2;
            heaviest->search(budget, kEvenRanks);
            searched[i] = true;
        }
        Solved all{Slots(a_.num_slots), 0};
        for (size_t i = 0; i < cells.size(); ++i) {
            const size_t per_part = size_t(num_ranks) * slots_per_rank_;
            parts[i].to_layer(cells[i].slots(), {all.slots.data() + i * per_part, per_part});
            all.heaviest = std::max(all.heaviest, cells[i].max_load());
        }
        return all;
    }

    // What the public greedy makes of the cells; infinitely heavy where it puts replicas of an
    // expert on one rank and may not.
    Solved public_greedy(const std::vector<Part>& parts) const {
        const int num_ranks = a_.num_ranks / static_cast<int>(parts.size());
        Solved all{Slots(a_.num_slots), 0};
        for (size_t i = 0; i < parts.size(); ++i) {
            Cell cell(parts[i].load, num_ranks, slots_per_rank_, false);
            cell.place();
            const size_t per_part = size_t(num_ranks) * slots_per_rank_;
            parts[i].to_layer(cell.slots(), {all.slots.data() + i * per_part, per_part});
            const bool forbidden = a_.distinct && cell.repeats();
            all.heaviest = std::max(all.heaviest, forbidden ? kInfinity : cell.max_load());
        }
        return all;
    }

    // ---- global ----

    Solved global() const {
        const std::vector<Part> one{Part(everybody(), load_)};
        Solved all = lighter(solve(one), public_greedy(one));
        if (together_ != nullptr && a_.num_nodes > 1) gather_ranks(all.slots);
        return all;
    }

    // Ranks whose experts are chosen together go to one node; no rank's load changes.
    void gather_ranks(Slots& slots) const {
        std::vector<int> count(num_all_, 0);
        for (const int32_t e : slots) ++count[e];
        Affinity between(a_.num_ranks);
        for (int p = 0; p < a_.num_slots; ++p) {
            for (int q = 0; q < a_.num_slots; ++q) {
                between.at(p / slots_per_rank_, q / slots_per_rank_) +=
                    tokens(slots[p], slots[q]) / (double(count[slots[p]]) * count[slots[q]]);
            }
        }
        std::vector<int> node(a_.num_ranks);
        for (int r = 0; r < a_.num_ranks; ++r) node[r] = r / ranks_per_node_;
        gather(between, std::vector<double>(a_.num_ranks, 0), 1, a_.num_nodes, node);
        Slots moved(slots.size());
        std::vector<int> next(a_.num_nodes);
        for (int n = 0; n < a_.num_nodes; ++n) next[n] = n * ranks_per_node_;
        for (int r = 0; r < a_.num_ranks; ++r) copy_rank(slots, r, moved, next[node[r]]++);
        slots = std::move(moved);
    }

    double tokens(int a, int b) const {  // shared experts are chosen with everything alike
        if (a >= a_.num_experts || b >= a_.num_experts) return 0;
        return together_[size_t(a) * a_.num_experts + b];
    }

    bool repair_all(double target, Slots& slots) const {
        const Part part(everybody(), load_);
        Cell cell(part.load, a_.num_ranks, slots_per_rank_, a_.distinct);
        const Slots before = part.to_local(slots, num_all_);
        if (!cell.adopt(before) || !repair(cell, before, target)) return false;
        part.to_layer(cell.slots(), slots);
        return true;
    }

    // ---- hierarchical ----

    int group_size() const { return a_.num_experts / a_.num_groups; }
    int node_slots() const { return a_.num_slots / a_.num_nodes; }
    std::span<int32_t> of_node(Slots& slots, int node) const {
        return {slots.data() + size_t(node) * node_slots(), size_t(node_slots())};
    }

    void sort_groups() {
        std::vector<double> sums(a_.num_groups, 0);
        for (int g = 0; g < a_.num_groups; ++g) {
            std::vector<double> members(load_.begin() + g * group_size(),
                                        load_.begin() + (g + 1) * group_size());
            std::sort(members.begin(), members.end());  // sums do not depend on the numbering
            sums[g] = std::accumulate(members.begin(), members.end(), 0.0);
        }
        group_ = descending(sums);
        for (const int32_t g : group_) group_load_.push_back(sums[g]);
    }

    // The experts of a node: those of its groups, and the shared ones with that node's part of
    // their tokens.
    Part part_of(int node, const std::vector<int>& node_of_group) const {
        std::vector<int32_t> experts;
        for (int i = 0; i < a_.num_groups; ++i) {
            if (node_of_group[i] != node) continue;
            for (int k = 0; k < group_size(); ++k) experts.push_back(group_[i] * group_size() + k);
        }
        std::sort(experts.begin(), experts.end());
        std::vector<double> load = load_;
        for (int s = a_.num_experts; s < num_all_; ++s) {
            experts.push_back(s);
            load[s] /= a_.num_nodes;
        }
        return Part(experts, load);
    }

    // [num_groups] node of each, heaviest group first.
    static std::vector<int> nodes_of(const Cell& cell, int per_node) {
        std::vector<int> node(cell.slots().size());
        for (size_t q = 0; q < node.size(); ++q)
            node[cell.slots()[q]] = static_cast<int>(q) / per_node;
        return node;
    }

    Solved hierarchical() const {
        const int per_node = a_.num_groups / a_.num_nodes;
        Cell cell(group_load_, a_.num_nodes, per_node, true);
        cell.place();
        const std::vector<int> greedy = nodes_of(cell, per_node);
        cell.descend();
        cell.search(kSearchNodes, kEvenNodes);
        std::vector<int> improved = nodes_of(cell, per_node);
        if (together_ != nullptr) {
            gather(affinity_of_groups(), group_load_, cell.max_load() * (1 + a_.node_slack),
                   a_.num_nodes, improved);
            return solve(parts_of(improved));
        }
        // Lighter nodes are mostly lighter ranks; where one expert outweighs a rank, not always.
        Solved best = solve(parts_of(improved));
        const std::vector<Part> parts = parts_of(greedy);
        const double mean = std::accumulate(load_.begin(), load_.end(), 0.0) / a_.num_ranks;
        if (improved != greedy && best.heaviest > mean * (1 + kEvenNodes)) {
            best = lighter(std::move(best), solve(parts));
        }
        return lighter(std::move(best), public_greedy(parts));
    }

    std::vector<Part> parts_of(const std::vector<int>& node_of_group) const {
        std::vector<Part> parts;
        for (int n = 0; n < a_.num_nodes; ++n) parts.push_back(part_of(n, node_of_group));
        return parts;
    }

    Affinity affinity_of_groups() const {
        Affinity sum(a_.num_groups);
        for (int i = 0; i < a_.num_groups; ++i) {
            for (int j = 0; j < a_.num_groups; ++j) {
                const int first = group_[i] * group_size(), second = group_[j] * group_size();
                for (int k = 0; k < group_size(); ++k) {
                    const float* row = together_ + size_t(first + k) * a_.num_experts + second;
                    sum.at(i, j) += std::accumulate(row, row + group_size(), 0.0);
                }
            }
        }
        return sum;
    }

    // Groups stay where they are, as far as the target allows; then each node repairs itself.
    bool repair_nodes(double target, Slots& slots) const {
        const int per_node = a_.num_groups / a_.num_nodes;
        Slots group_slots;
        if (!groups_by_node(slots, group_slots)) return false;
        Cell groups(group_load_, a_.num_nodes, per_node, true);
        double shared = 0;  // of every node alike
        for (int s = a_.num_experts; s < num_all_; ++s) shared += load_[s] / a_.num_nodes;
        if (!groups.adopt(group_slots) ||
            !repair(groups, group_slots, target * ranks_per_node_ - shared)) {
            return false;
        }
        const std::vector<int> node_of_group = nodes_of(groups, per_node);
        for (int n = 0; n < a_.num_nodes; ++n) {
            const Part part = part_of(n, node_of_group);
            const std::span<int32_t> mine = of_node(slots, n);
            Cell cell(part.load, ranks_per_node_, slots_per_rank_, a_.distinct);
            const Slots before = part.to_local(mine, num_all_);
            if (!cell.adopt(before) || !repair(cell, before, target)) return false;
            part.to_layer(cell.slots(), mine);
        }
        return true;
    }

    // Groups of each node, as a cell takes them; false when a group is on more than one node.
    bool groups_by_node(const Slots& slots, Slots& group_slots) const {
        const int per_node = a_.num_groups / a_.num_nodes;
        std::vector<int> place(a_.num_groups), node(a_.num_groups, -1), next(a_.num_nodes, 0);
        for (int i = 0; i < a_.num_groups; ++i) place[group_[i]] = i;
        for (int q = 0; q < a_.num_slots; ++q) {
            if (slots[q] < 0 || slots[q] >= a_.num_experts) continue;
            int& at = node[place[slots[q] / group_size()]];
            if (at >= 0 && at != q / node_slots()) return false;
            at = q / node_slots();
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

    void copy_rank(const Slots& from, int rank, Slots& to, int as) const {
        std::copy_n(from.begin() + rank * slots_per_rank_, slots_per_rank_,
                    to.begin() + as * slots_per_rank_);
    }

    void sort_ranks(Slots& slots) const {
        for (int r = 0; r < a_.num_ranks; ++r) {
            const auto first = slots.begin() + r * slots_per_rank_;
            std::sort(first, first + slots_per_rank_);
        }
    }

    // Renames nodes, then ranks inside them, then slots, so that most experts are where they were.
    void relabel(Slots& slots) const {
        const Slots plan = slots;
        const std::vector<int> node_as = match(plan, node_slots(), 0, a_.num_nodes, 0);
        for (int n = 0; n < a_.num_nodes; ++n) {
            const int first = n * ranks_per_node_, as_first = node_as[n] * ranks_per_node_;
            const std::vector<int> as =
                match(plan, slots_per_rank_, first, ranks_per_node_, as_first);
            for (int r = 0; r < ranks_per_node_; ++r)
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
        std::vector<int> seen(num_all_);
        for (int i = 0; i < num; ++i) {
            for (int j = 0; j < num; ++j) {
                std::fill(seen.begin(), seen.end(), 0);
                for (int q = 0; q < block; ++q) {
                    const int32_t e = current_[size_t(current_first + j) * block + q];
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
        const auto first = plan.begin() + rank * slots_per_rank_;
        std::vector<int32_t> left(first, first + slots_per_rank_);
        std::sort(left.begin(), left.end());
        const int out = as * slots_per_rank_;
        for (int i = 0; i < slots_per_rank_; ++i) {
            const auto stays = std::find(left.begin(), left.end(), current_[out + i]);
            slots[out + i] = stays == left.end() ? -1 : *stays;
            if (stays != left.end()) left.erase(stays);
        }
        auto next = left.begin();
        for (int i = 0; i < slots_per_rank_; ++i) {
            if (slots[out + i] < 0) slots[out + i] = *next++;
        }
    }

    const PlanArgs& a_;
    const int num_all_;
    const std::vector<double> load_;
    const int slots_per_rank_, ranks_per_node_;
    const float* together_ = nullptr;
    std::span<const int32_t> current_;
    std::vector<int32_t> group_;      // heaviest first
    std::vector<double> group_load_;  // the same order
};

}  // namespace

void plan(const PlanArgs& args) {
    for (int layer = 0; layer < args.num_layers; ++layer) {
        const Slots slots = LayerPlan(args, layer).run();
        std::copy(slots.begin(), slots.end(), args.expert + size_t(layer) * args.num_slots);
    }
}

}  // namespace ep::eplb
