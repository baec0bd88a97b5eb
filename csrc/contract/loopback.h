// Nodes that are pretended: what goes wrong between them, on purpose (device/rail_loopback.cuh).
#pragma once

#include <cstdint>

#include "contract/config.h"

namespace ep {

inline constexpr int kMaxHeld = 8;  // puts a warp may hold back

struct Trouble {
    uint32_t seed = 0;
    int32_t max_held = 0;       // puts held back, at most kMaxHeld
    int64_t max_delay_ns = 0;   // of puts, of signals, and of who finds one there; from 0 to this
    int32_t stalled_peer = -1;  // nothing we send to it arrives
    bool is_silent = false;     // nothing we send arrives anywhere
    bool is_mapped = false;     // our stores reach other nodes, as in one NVLink domain
    int64_t lost_from = 0;      // signals of words that lie before it are not lost, nor their data
};

}  // namespace ep
