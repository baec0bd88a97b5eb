#include "eplb/nodes.h"

#include <numeric>
#include <utility>

namespace ep::eplb {
namespace {

constexpr int kPasses = 32;  // each over all pairs; mostly it ends after a few

}  // namespace

void gather(const Affinity& affinity, std::span<const double> load, double limit, int num_nodes,
            std::vector<int>& node) {
    const int n = affinity.num_units;
    std::vector<double> node_load(num_nodes, 0), with(size_t(n) * num_nodes, 0);
    const auto to = [&](int unit, int on) -> double& {
        return with[size_t(unit) * num_nodes + on];
    };
    for (int u = 0; u < n; ++u) {
        node_load[node[u]] += load[u];
        for (int v = 0; v < n; ++v) {
            if (v != u) to(u, node[v]) += affinity.at(u, v);
        }
    }
    const double total = std::accumulate(with.begin(), with.end(), 0.0);
    const auto fits = [&](int u, int v) {
        const double less = load[u] - load[v];
        return (less >= 0 || node_load[node[u]] - less <= limit) &&
               (less <= 0 || node_load[node[v]] + less <= limit);
    };
    const auto gain = [&](int u, int v) {
        return to(u, node[v]) + to(v, node[u]) - to(u, node[u]) - to(v, node[v]) -
               2 * affinity.at(u, v);
    };
    bool changed = true;
    for (int pass = 0; changed && pass < kPasses; ++pass) {
        changed = false;
        for (int u = 0; u < n; ++u) {
            for (int v = u + 1; v < n; ++v) {
                if (node[u] == node[v] || gain(u, v) <= 1e-9 * total || !fits(u, v)) continue;
                const int a = node[u], b = node[v];
                for (int w = 0; w < n; ++w) {
                    const double moved =
                        (w != u ? affinity.at(w, u) : 0) - (w != v ? affinity.at(w, v) : 0);
                    to(w, a) -= moved;
                    to(w, b) += moved;
                }
                node_load[a] += load[v] - load[u];
                node_load[b] += load[u] - load[v];
                std::swap(node[u], node[v]);
                changed = true;
            }
        }
    }
}

}  // namespace ep::eplb
