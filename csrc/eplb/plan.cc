#include "eplb/plan.h"

#include <algorithm>

#include "eplb/fresh.h"
#include "eplb/layer.h"
#include "eplb/stay.h"

namespace ep::eplb {
namespace {

// Ranks list their experts in ascending order.
void sort_ranks(Slots& slots, int slots_per_rank) {
    for (auto first = slots.begin(); first != slots.end(); first += slots_per_rank) {
        std::sort(first, first + slots_per_rank);
    }
}

}  // namespace

void plan(const PlanArgs& args) {
    for (int i = 0; i < args.num_layers; ++i) {
        const Layer layer(args, i);
        Solved fresh = fresh_plan(layer);
        if (layer.current.empty()) {
            sort_ranks(fresh.slots, layer.slots_per_rank);
        } else {
            fresh.slots = stay_close(layer, fresh);
        }
        std::copy(fresh.slots.begin(), fresh.slots.end(), args.expert + size_t(i) * args.num_slots);
    }
}

}  // namespace ep::eplb
