// A layer's plan close to what is in force: that repaired, wherever it gets to what a fresh plan
// reaches and a little more; else the fresh plan, with names that leave most experts in place.
#pragma once

#include "eplb/fresh.h"
#include "eplb/layer.h"

namespace ep::eplb {

Slots stay_close(const Layer& layer, const Solved& fresh);

}  // namespace ep::eplb
