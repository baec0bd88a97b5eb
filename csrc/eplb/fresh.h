// A layer's plan without regard for what is in force: experts to groups, groups to nodes, replicas
// to ranks.
#pragma once

#include "eplb/cell.h"
#include "eplb/layer.h"

namespace ep::eplb {

struct Solved {
    Slots slots;
    double heaviest = 0;   // rank
    bool repeats = false;  // some rank holds an expert twice
};

Solved fresh_plan(const Layer& layer);

}  // namespace ep::eplb
