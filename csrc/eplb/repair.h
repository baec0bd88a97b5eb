// Brings the ranks of a cell down to a target with few moves.
//
// A move is a replica on a rank that did not hold it at first; changing it once more is no further
// one. Excess is what a rank carries above the target. The heaviest rank takes the step that is
// worth most: the excess it takes from all ranks, per move, for a replica more relieves everybody
// who holds the expert. Where there is no such step it takes the least bad one, and the slots that
// changed rest a while (tabu search; Glover 1989). In the end moves nobody needs are taken back.
#pragma once

#include <cstdint>
#include <span>

#include "eplb/cell.h"

namespace ep::eplb {

// origin: [num_slots] expert of each slot at first, -1 = none; where moves are counted from.
// budget: evaluations, some ten nanoseconds each; what it takes is subtracted.
// False: some rank is still above the target, and the cell somewhere on the way.
bool repair(Cell& cell, std::span<const int32_t> origin, double target, int64_t& budget);

}  // namespace ep::eplb
