// The sizes all ranks of a buffer agree on; checked by the handshake, then constant.
#pragma once

#include <cstdint>

namespace ep {

struct Shape {
    int32_t num_ranks = 1;
    int32_t num_slots = 2;  // operations that may be in flight
    int32_t num_experts = 1;
    int32_t max_local_experts = 1;  // of the rank that owns most
    int32_t num_topk = 1;           // largest top-k of any call
    int64_t max_tokens = 0;         // per rank and call
    int64_t stage_bytes = 0;        // GPU: of a slot, for rows of small batches, see stage.h

    bool operator==(const Shape&) const = default;
};

}  // namespace ep
