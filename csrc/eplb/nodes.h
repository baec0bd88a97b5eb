// Which of equally many units stand together on a node, so that fewer tokens cross between nodes.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace ep::eplb {

// Tokens that chose both of two units, [num_units, num_units], symmetric.
struct Affinity {
    int num_units = 0;
    std::vector<double> together;

    explicit Affinity(int n) : num_units(n), together(size_t(n) * n, 0) {}
    double& at(int a, int b) { return together[size_t(a) * num_units + b]; }
    double at(int a, int b) const { return together[size_t(a) * num_units + b]; }
};

// Swaps units between nodes while that raises the affinity inside nodes and leaves no node above
// `limit` (Kernighan, Lin 1970, single swaps). node: [num_units], equally many units on each.
void gather(const Affinity& affinity, std::span<const double> load, double limit, int num_nodes,
            std::vector<int>& node);

}  // namespace ep::eplb
