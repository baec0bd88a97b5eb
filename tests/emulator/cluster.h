// Clusters of pretended nodes: what the tests of all that crosses share.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "world.h"

namespace world {

// Puts that are held back, handed out in any order, and slow; the same for signals and for whoever finds one.
inline Trouble slow(uint32_t seed, int64_t max_delay_us) {
    Trouble t;
    t.seed = seed;
    t.max_held = static_cast<int32_t>(seed % (kMaxHeld + 1));
    t.max_delay_ns = 1000 * max_delay_us;
    return t;
}

inline Case cluster(int nodes, int per_node, Case c = {}) {
    c.nodes = nodes;
    c.ranks = nodes * per_node;
    c.tokens = {7, 0, 12, 3, 5};
    c.experts = 2 * c.ranks;
    c.num_sms = 2;
    c.num_warps = 5;
    for (uint32_t r = 0; r < 5; ++r) c.trouble.push_back(slow(c.seed * 5 + r, 20));
    return c;
}

// The rank has failed: where it waited, and whom it blames.
inline void expect_stall(World& w, int rank, const std::vector<Site>& sites, int blamed) {
    const DeviceRank& device = *w.ranks[rank].device;
    expect(device.failed(), "a rank that waited did not fail");
    const Incident& incident = device.verdict().incident;
    expect_eq(int{incident.code}, int{kStalled});
    expect_eq(int{incident.peer}, blamed);
    expect(std::count(sites.begin(), sites.end(), incident.site) == 1, "another wait");
}

inline void refuse_on(World& w, int rank) {
    Outcome why;
    why.incident.code = kBadShape;
    std::snprintf(why.reason, sizeof(why.reason), "a reason");
    for (int i = 0; i < w.c.ranks; ++i) {
        if (i == rank) {
            w.ranks[i].device->refuse(OpKind::kDispatch, why, w.ranks[i].stream);
        } else {
            w.queue(i, w.args_of(i), true);
        }
    }
    for (int i = 0; i < w.c.ranks; ++i) {
        Rank& r = w.ranks[i];
        if (i == rank) continue;
        r.device->finish(*r.flight, r.stream);
        while (!r.device->await_report(*r.flight, std::chrono::milliseconds(50))) {
        }
        expect_eq(code_of(r), int{kBadShape});
        expect_eq(std::string(r.flight->report.outcome.reason), std::string("a reason"));
        expect_eq(int{r.flight->report.outcome.incident.peer}, rank);
    }
}

// Random cases for so long.
inline int stress(double seconds, unsigned seed, Case (*random_case)(std::mt19937&)) {
    using Clock = std::chrono::steady_clock;
    const auto end = Clock::now() + std::chrono::duration<double>(seconds);
    std::mt19937 random(seed);
    for (int n = 0; Clock::now() < end; ++n) {
        const Case c = random_case(random);
        const std::string name = "random " + std::to_string(n) + ": " + std::to_string(c.nodes) +
                                 " x " + std::to_string(c.per_node()) + ", seed " +
                                 std::to_string(c.seed);
        test(name.c_str(), [&] { run(c); });
    }
    return finish();
}

}  // namespace world
