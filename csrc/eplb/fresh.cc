#include "eplb/fresh.h"

#include <algorithm>
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
constexpr int kRegroupings = 200;  // tried, where the public greedy is ahead
// Above the bound, relative: good enough to stop the search.
constexpr double kEvenRanks = 1e-6;
constexpr double kEvenNodes = 2e-4;
constexpr double kLighter = 1e-9;  // relative: less is rounding

Solved lighter(Solved first, Solved second) {
    return second.heaviest < first.heaviest ? std::move(second) : std::move(first);
}

int heaviest_of(const std::vector<Cell>& cells) {
    const auto lighter = [](const Cell& x, const Cell& y) { return x.max_load() < y.max_load(); };
    return static_cast<int>(std::max_element(cells.begin(), cells.end(), lighter) - cells.begin());
}

class FreshPlan {
public:
    explicit FreshPlan(const Layer& layer) : l_(layer), a_(layer.a) {}

    Solved run() const { return a_.hierarchical ? hierarchical() : global(); }

private:
    bool distinct() const { return a_.distinct != Distinct::kNever; }

    Cell make_cell(const std::vector<Part>& parts, size_t i, bool distinct) const {
        const int num_ranks = a_.num_ranks / static_cast<int>(parts.size());
        Cell cell(parts[i].load, num_ranks, l_.slots_per_rank, distinct);
        cell.place();
        return cell;
    }

    // Solves cells that share nothing; only the heaviest is worth a search.
    Solved solve(const std::vector<Part>& parts) const {
        std::vector<Cell> cells;
        for (size_t i = 0; i < parts.size(); ++i) {
            cells.push_back(make_cell(parts, i, distinct()));
            cells.back().descend();
        }
        std::vector<bool> searched(cells.size(), false);
        int64_t budget = kSearchRanks;  // each next cell gets half of what is left
        while (true) {
            const int i = heaviest_of(cells);
            if (searched[i]) break;
            if (cells.size() > 1) budget /= 2;
            cells[i].search(budget, kEvenRanks);
            searched[i] = true;
        }
        return whole(parts, cells);
    }

    Solved whole(const std::vector<Part>& parts, const std::vector<Cell>& cells) const {
        Solved all{Slots(a_.num_slots), 0, false};
        const size_t per_part = a_.num_slots / parts.size();
        for (size_t i = 0; i < cells.size(); ++i) {
            parts[i].to_layer(cells[i].slots(), {all.slots.data() + i * per_part, per_part});
            all.heaviest = std::max(all.heaviest, cells[i].max_load());
            all.repeats |= cells[i].repeats();
        }
        return all;
    }

    // ---- beside the public greedy ----

    // `best`, unless the public greedy makes something lighter of the same groups (global: of all).
    Solved not_worse_than_greedy(Solved best, const std::vector<int>& node_of_group) const {
        const std::vector<Part> parts = parts_of(node_of_group);
        std::vector<Cell> cells;
        for (size_t i = 0; i < parts.size(); ++i) cells.push_back(make_cell(parts, i, false));
        Solved greedy = whole(parts, cells);
        if (greedy.heaviest >= best.heaviest * (1 - kLighter)) return best;
        if (!greedy.repeats || !distinct()) return greedy;
        if (a_.hierarchical) {
            best = lighter(std::move(best), regroup(node_of_group, greedy.heaviest));
        }
        if (greedy.heaviest >= best.heaviest * (1 - kLighter)) return best;
        if (a_.distinct == Distinct::kAlways) return best;
        const double limit = greedy.heaviest * (1 + kLighter);
        for (size_t i = 0; i < parts.size(); ++i) {
            for (const bool apart : {true, false}) {
                cells[i] = make_cell(parts, i, apart);
                cells[i].descend();
                if (cells[i].max_load() > limit) cells[i].search(kSearchRanks, kEvenRanks);
                if (cells[i].max_load() <= limit) break;
            }
        }
        return whole(parts, cells);
    }

    // Groups of the heaviest node change places with others while that makes its ranks lighter and
    // there is one above `enough`. Even nodes are not enough where ranks are few.
    Solved regroup(std::vector<int> node, double enough) const {
        std::vector<Part> parts = l_.parts_of(node);
        std::vector<Cell> cells;
        for (size_t i = 0; i < parts.size(); ++i) {
            cells.push_back(make_cell(parts, i, true));
            cells.back().descend();
        }
        for (int left = kRegroupings; left > 0;) {
            const int h = heaviest_of(cells);
            double best = cells[h].max_load() * (1 - kLighter);
            if (best <= enough) break;
            std::pair<int, int> swapped{-1, -1};
            for (int i = 0; i < a_.num_groups; ++i) {
                for (int j = 0; j < a_.num_groups && node[i] == h; ++j) {
                    if (node[j] == h || left == 0) continue;
                    --left;
                    std::swap(node[i], node[j]);
                    const double result = std::max(even(node, h), even(node, node[i]));
                    std::swap(node[i], node[j]);
                    if (result >= best) continue;
                    best = result;
                    swapped = {i, j};
                }
            }
            if (swapped.first < 0) break;
            std::swap(node[swapped.first], node[swapped.second]);
            parts = l_.parts_of(node);
            for (const int n : {h, node[swapped.first]}) {
                cells[n] = make_cell(parts, n, true);
                cells[n].descend();
            }
        }
        return whole(parts, cells);
    }

    // The heaviest rank of a node.
    double even(const std::vector<int>& node_of_group, int node) const {
        Cell cell(l_.part_of(node, node_of_group).load, l_.ranks_per_node, l_.slots_per_rank, true);
        cell.place();
        cell.descend();
        return cell.max_load();
    }

    std::vector<Part> parts_of(const std::vector<int>& node_of_group) const {
        return a_.hierarchical ? l_.parts_of(node_of_group) : std::vector<Part>{l_.everybody()};
    }

    // ---- global ----

    Solved global() const {
        Solved all = not_worse_than_greedy(solve(parts_of({})), {});
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
        const double mean = std::accumulate(l_.load.begin(), l_.load.end(), 0.0) / a_.num_ranks;
        if (improved != greedy && best.heaviest > mean * (1 + kEvenNodes)) {
            best = lighter(std::move(best), solve(l_.parts_of(greedy)));
        }
        return not_worse_than_greedy(std::move(best), greedy);
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
