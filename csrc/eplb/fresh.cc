#include "eplb/fresh.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "eplb/nodes.h"

namespace ep::eplb {
namespace {

// Evaluations of the searches of a layer; some hundred microseconds.
constexpr int64_t kSearchRanks = 100'000;
constexpr int64_t kSearchNodes = 10'000;
// Above the bound, relative: good enough to stop the search.
constexpr double kEvenRanks = 1e-6;
constexpr double kEvenNodes = 2e-4;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

Solved lighter(Solved first, Solved second) {
    return second.heaviest < first.heaviest ? std::move(second) : std::move(first);
}

class FreshPlan {
public:
    explicit FreshPlan(const Layer& layer) : l_(layer), a_(layer.a) {}

    Solved run() const { return a_.hierarchical ? hierarchical() : global(); }

private:
    // Solves cells that share nothing; only the heaviest is worth a search.
    Solved solve(const std::vector<Part>& parts) const {
        const int num_ranks = a_.num_ranks / static_cast<int>(parts.size());
        std::vector<Cell> cells;
        for (const Part& part : parts) {
            cells.emplace_back(part.load, num_ranks, l_.slots_per_rank, a_.distinct);
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
        return whole(parts, cells);
    }

    Solved whole(const std::vector<Part>& parts, const std::vector<Cell>& cells) const {
        Solved all{Slots(a_.num_slots), 0};
        const size_t per_part = a_.num_slots / parts.size();
        for (size_t i = 0; i < cells.size(); ++i) {
            parts[i].to_layer(cells[i].slots(), {all.slots.data() + i * per_part, per_part});
            all.heaviest = std::max(all.heaviest, cells[i].max_load());
        }
        return all;
    }

    // What the public greedy makes of the cells; infinitely heavy where it puts replicas of an
    // expert on one rank and may not.
    Solved public_greedy(const std::vector<Part>& parts) const {
        const int num_ranks = a_.num_ranks / static_cast<int>(parts.size());
        std::vector<Cell> cells;
        for (const Part& part : parts) {
            cells.emplace_back(part.load, num_ranks, l_.slots_per_rank, false);
            cells.back().place();
        }
        Solved all = whole(parts, cells);
        const auto repeats = [](const Cell& cell) { return cell.repeats(); };
        if (a_.distinct && std::any_of(cells.begin(), cells.end(), repeats))
            all.heaviest = kInfinity;
        return all;
    }

    // ---- global ----

    Solved global() const {
        const std::vector<Part> one{l_.everybody()};
        Solved all = lighter(solve(one), public_greedy(one));
        if (l_.together != nullptr && a_.num_nodes > 1) gather_ranks(all.slots);
        return all;
    }

    // Ranks whose experts are chosen together go to one node; no rank's load changes.
    void gather_ranks(Slots& slots) const {
        std::vector<int> count(l_.num_all, 0);
        for (const int32_t e : slots) ++count[e];
        Affinity between(a_.num_ranks);
        for (int p = 0; p < a_.num_slots; ++p) {
            for (int q = 0; q < a_.num_slots; ++q) {
                between.at(p / l_.slots_per_rank, q / l_.slots_per_rank) +=
                    tokens(slots[p], slots[q]) / (double(count[slots[p]]) * count[slots[q]]);
            }
        }
        std::vector<int> node(a_.num_ranks);
        for (int r = 0; r < a_.num_ranks; ++r) node[r] = r / l_.ranks_per_node;
        gather(between, std::vector<double>(a_.num_ranks, 0), 1, a_.num_nodes, node);
        Slots moved(slots.size());
        std::vector<int> next(a_.num_nodes);
        for (int n = 0; n < a_.num_nodes; ++n) next[n] = n * l_.ranks_per_node;
        for (int r = 0; r < a_.num_ranks; ++r) {
            std::copy_n(slots.begin() + r * l_.slots_per_rank, l_.slots_per_rank,
                        moved.begin() + next[node[r]]++ * l_.slots_per_rank);
        }
        slots = std::move(moved);
    }

    double tokens(int a, int b) const {  // shared experts are chosen with everything alike
        if (a >= a_.num_experts || b >= a_.num_experts) return 0;
        return l_.together[size_t(a) * a_.num_experts + b];
    }

    // ---- hierarchical ----

    Solved hierarchical() const {
        Cell cell(l_.group_load, a_.num_nodes, l_.groups_per_node(), true);
        cell.place();
        const std::vector<int> greedy = nodes_of(cell.slots(), l_.groups_per_node());
        cell.descend();
        cell.search(kSearchNodes, kEvenNodes);
        std::vector<int> improved = nodes_of(cell.slots(), l_.groups_per_node());
        if (l_.together != nullptr) {
            gather(affinity_of_groups(), l_.group_load, cell.max_load() * (1 + a_.node_slack),
                   a_.num_nodes, improved);
            return solve(l_.parts_of(improved));
        }
        // Lighter nodes are mostly lighter ranks; where one expert outweighs a rank, not always.
        Solved best = solve(l_.parts_of(improved));
        const std::vector<Part> parts = l_.parts_of(greedy);
        const double mean = std::accumulate(l_.load.begin(), l_.load.end(), 0.0) / a_.num_ranks;
        if (improved != greedy && best.heaviest > mean * (1 + kEvenNodes)) {
            best = lighter(std::move(best), solve(parts));
        }
        return lighter(std::move(best), public_greedy(parts));
    }

    Affinity affinity_of_groups() const {
        const int size = l_.group_size();
        Affinity sum(a_.num_groups);
        for (int i = 0; i < a_.num_groups; ++i) {
            for (int j = 0; j < a_.num_groups; ++j) {
                const int first = l_.group[i] * size, second = l_.group[j] * size;
                for (int k = 0; k < size; ++k) {
                    const float* row = l_.together + size_t(first + k) * a_.num_experts + second;
                    sum.at(i, j) += std::accumulate(row, row + size, 0.0);
                }
            }
        }
        return sum;
    }

    const Layer& l_;
    const PlanArgs& a_;
};

}  // namespace

Solved fresh_plan(const Layer& layer) { return FreshPlan(layer).run(); }

}  // namespace ep::eplb
