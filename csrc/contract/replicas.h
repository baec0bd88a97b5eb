// Which replica of a logical expert a token goes to: the one rule of every backend.
//
// A source chooses among the replicas on its own rank, else on its node, else among all: that is
// decided once, in the tables it is given. Among those the choice follows from the token alone, so
// notify and push agree without memory, and equal calls go equal ways.
#pragma once

#include <cstdint>

#include "contract/config.h"

namespace ep {

// One layer's tables of one source; ep_comm/replicas.py makes them.
struct Replicas {
    const int32_t* first = nullptr;   // [num_logical + 1] where an expert's candidates start
    const int32_t* slot = nullptr;    // [first[num_logical]] physical expert of each candidate
    const uint32_t* until = nullptr;  // same: largest spread that goes there, ascending; the last
                                      // of each expert is 2^32 - 1
    int32_t num_logical = 0;          // 0 = no tables: ids name physical experts
};

// Golden-ratio steps: any run of tokens is spread evenly over [0, 2^32) (Knuth, TAOCP 3, 6.4).
EP_HD constexpr uint32_t spread_of(int64_t token, int source) {
    return static_cast<uint32_t>((token + int64_t{source} * 40503) * int64_t{2654435769});
}

EP_HD constexpr int32_t choose_replica(const Replicas& r, int64_t expert, uint32_t spread) {
    int32_t i = r.first[expert];
    while (spread > r.until[i]) ++i;
    return r.slot[i];
}

}  // namespace ep
