// The planner without Python: a cell by hand, and random layers in every mode, for sanitizers, too.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "check.h"
#include "contract/replicas.h"
#include "eplb/cell.h"
#include "eplb/plan.h"
#include "eplb/repair.h"

namespace {

using ep::eplb::Distinct;
using ep::eplb::PlanArgs;

struct World {
    PlanArgs args;
    std::vector<double> load;
    std::vector<float> together;
    std::vector<int32_t> current, expert;
};

World random_world(std::mt19937& random) {
    const auto pick = [&](int low, int high) {
        return std::uniform_int_distribution<int>(low, high)(random);
    };
    World w;
    PlanArgs& a = w.args;
    a.num_layers = 2;
    a.num_nodes = pick(1, 3);
    a.num_ranks = a.num_nodes * pick(1, 4);
    a.num_groups = a.num_nodes * pick(1, 2);
    a.num_experts = a.num_groups * pick(1, 4);
    a.num_shared = pick(0, 1);
    a.hierarchical = pick(0, 1) == 1;
    a.distinct = static_cast<Distinct>(pick(0, 2));
    const int nodes = a.hierarchical ? a.num_nodes : 1;
    const int cell = a.num_experts / nodes + a.num_shared, ranks = a.num_ranks / nodes;
    a.num_slots = a.num_ranks * ((cell + ranks - 1) / ranks + pick(0, 3));
    const int all = a.num_experts + a.num_shared;
    for (int i = 0; i < a.num_layers * all; ++i) {
        w.load.push_back(pick(0, 4) == 0 ? 0.0 : std::exp2(pick(-4, 8)) + pick(0, 9) / 10.0);
    }
    const int n = a.num_experts;
    w.together.resize(size_t(a.num_layers) * n * n, 0);
    for (float& pairs : w.together) pairs = static_cast<float>(pick(0, 5));
    w.expert.resize(size_t(a.num_layers) * a.num_slots, -1);
    a.load = w.load.data();
    a.expert = w.expert.data();
    return w;
}

void expect_valid(const World& w) {
    const PlanArgs& a = w.args;
    const int per_rank = a.num_slots / a.num_ranks, all = a.num_experts + a.num_shared;
    const int nodes = a.hierarchical ? a.num_nodes : 1;
    const bool always = a.distinct == Distinct::kAlways;
    const int different = a.num_experts / nodes + a.num_shared;
    for (int layer = 0; layer < a.num_layers; ++layer) {
        const int32_t* slots = w.expert.data() + size_t(layer) * a.num_slots;
        std::set<int32_t> placed(slots, slots + a.num_slots);
        ep::expect_eq(static_cast<int>(placed.size()), all);
        ep::expect_eq(*placed.begin(), 0);
        ep::expect_eq(*placed.rbegin(), all - 1);
        for (int r = 0; r < a.num_ranks && always && per_rank <= different; ++r) {
            const std::set<int32_t> held(slots + r * per_rank, slots + (r + 1) * per_rank);
            ep::expect_eq(static_cast<int>(held.size()), per_rank);
        }
    }
}

double heaviest(const ep::eplb::Cell& cell) { return std::round(cell.max_load() * 1e6) / 1e6; }

}  // namespace

int main() {
    ep::test("a cell is filled greedily, then evened out by a swap", [] {
        // 6 6 4 4 2 2 on two ranks of three: greedy gives 6 + 4 + 2 to each.
        ep::eplb::Cell even({6, 6, 4, 4, 2, 2}, 2, 3, true);
        even.place();
        ep::expect_eq(heaviest(even), 12.0);
        // 5 4 3 3 3 and two ranks of three: the heaviest gets the spare slot, 2.5 each.
        ep::eplb::Cell spare({5, 4, 3, 3, 3}, 2, 3, true);
        spare.place();
        spare.descend();
        ep::expect_eq(spare.count(0), 2);
        ep::expect_eq(heaviest(spare), 9.5);  // 2.5 + 4 + 3 and 2.5 + 3 + 3: nothing is better
    });

    ep::test("adopt fills free slots and refuses what has no room", [] {
        ep::eplb::Cell cell({4, 3, 2, 1}, 2, 3, true);
        const std::vector<int32_t> some{0, -1, 1, 0, -1, -1};
        ep::expect(cell.adopt(some), "there is room");
        ep::expect(!cell.repeats(), "replicas on different ranks");
        ep::expect_eq(cell.slots()[0], 0);
        ep::expect_eq(cell.slots()[2], 1);
        ep::eplb::Cell full({4, 3, 2, 1}, 2, 2, true);
        const std::vector<int32_t> crowded{0, 1, 0, 1};
        ep::expect(!full.adopt(crowded), "two experts are missing, no slot is free");
    });

    ep::test("a repair moves what frees most, and no more than it must", [] {
        const auto repaired = [](std::vector<double> load, int per_rank,
                                 const std::vector<int32_t>& before, double target,
                                 int64_t budget) {
            ep::eplb::Cell cell(std::move(load), 2, per_rank, true);
            ep::expect(cell.adopt(before), "there is room");
            const bool reached = ep::eplb::repair(cell, before, target, budget);
            ep::expect_eq(reached, cell.max_load() <= target);
            int moves = 0;
            for (int r = 0; r < 2; ++r) {
                for (int e = 0; e < cell.num_experts(); ++e) {
                    const auto first = before.begin() + r * per_rank;
                    const auto held = std::count(first, first + per_rank, e);
                    moves += std::max(0, cell.held(r, e) - static_cast<int>(held));
                }
            }
            return moves;
        };
        // 6 + 4 and 3 + 3: the 4 changes places with a 3.
        ep::expect_eq(repaired({6, 4, 3, 3}, 2, {0, 1, 2, 3}, 9, 1000), 2);
        // 8 + 1 + 1 and 2 + 1 + 1: a second 8 in place of a 1 makes 4 + 2 + 1 of both.
        ep::expect_eq(repaired({8, 2, 2, 2}, 3, {0, 1, 2, 3, 1, 2}, 7, 1000), 1);
        // Good enough as it is; and no step without a budget.
        ep::expect_eq(repaired({8, 2, 2, 2}, 3, {0, 1, 2, 3, 1, 2}, 10, 1000), 0);
        ep::expect_eq(repaired({8, 2, 2, 2}, 3, {0, 1, 2, 3, 1, 2}, 7, 0), 0);
    });

    ep::test("random layers are placed whole, in every mode, and stay where they are good", [] {
        std::mt19937 random(7);
        for (int i = 0; i < 300; ++i) {
            World w = random_world(random);
            if (i % 3 == 0) w.args.together = w.together.data();
            ep::eplb::plan(w.args);
            expect_valid(w);
            w.current = w.expert;
            w.args.current = w.current.data();
            ep::eplb::plan(w.args);
            expect_valid(w);
            if (w.args.together == nullptr) ep::expect(w.expert == w.current, "nothing moved");
            for (double& load : w.load) load = std::exp2(random() % 9);
            ep::eplb::plan(w.args);
            expect_valid(w);
        }
    });

    ep::test("tokens spread over replicas by their share of the range", [] {
        const int32_t first[] = {0, 1, 3}, slot[] = {5, 6, 7};
        const uint32_t until[] = {~0u, 0x3fffffffu, ~0u};  // a quarter, and the rest
        const ep::Replicas replicas{first, slot, until, 2};
        int quarter = 0;
        for (int64_t token = 0; token < 4096; ++token) {
            const uint32_t spread = ep::spread_of(token, 3);
            ep::expect_eq(ep::choose_replica(replicas, 0, spread), 5);
            quarter += ep::choose_replica(replicas, 1, spread) == 6;
        }
        ep::expect(std::abs(quarter - 1024) < 8, "a quarter of the tokens");
        // The last token there can be, of the last rank: no overflow (for the sanitizer).
        ep::spread_of(std::numeric_limits<int32_t>::max(), 1023);
    });

    return ep::finish();
}
