// What follows from a call's arguments alone, the same on every backend: the descriptor that all
// ranks must agree on, and the record that travels beside a row.
#pragma once

#include <cstdint>

#include "contract/args.h"
#include "contract/layout.h"
#include "contract/records.h"

namespace ep {

inline Descriptor describe(const DispatchArgs& a) {
    Descriptor d;
    d[Field::kLayout] = static_cast<int64_t>(a.layout);
    d[Field::kDtype] = static_cast<int64_t>(a.dtype);
    d[Field::kHidden] = a.hidden;
    d[Field::kQuantize] = static_cast<int64_t>(a.quantize);
    d[Field::kScaleBlock] = a.scale_bytes > 0 ? a.scale_block : 0;
    d[Field::kScaleBytes] = a.scale_bytes;
    d[Field::kTopk] = a.num_topk;
    d[Field::kAlignment] = a.alignment;
    d[Field::kCapacity] = a.given_capacity;
    d[Field::kFlags] = (a.with_weights ? kFlagWeights : 0) | (a.is_static ? kFlagStatic : 0) |
                       (a.cached ? kFlagCached : 0);
    d[Field::kRouting] = static_cast<int64_t>(a.routing);
    return d;
}

inline Descriptor describe(const CombineArgs& a) {
    Descriptor d;
    d[Field::kLayout] = static_cast<int64_t>(a.layout);
    d[Field::kDtype] = static_cast<int64_t>(a.dtype);
    d[Field::kHidden] = a.hidden;
    d[Field::kTopk] = a.num_topk;
    d[Field::kFlags] = (a.with_weights ? kFlagWeights : 0) | (a.weighted ? kFlagWeighted : 0) |
                       (a.per_rank ? kFlagPerRank : 0);
    d[Field::kRouting] = static_cast<int64_t>(a.routing);
    return d;
}

// Whether a call of the cpu backend goes on without masked ranks. Small batches on GPUs: is_staged.
inline bool can_lack_ranks(const DispatchArgs& a) {
    return a.layout == RecvLayout::kSlab && !a.cached;
}
inline bool can_lack_ranks(const CombineArgs& a) {
    return a.layout == RecvLayout::kSlab && !a.with_weights;
}

EP_HD constexpr MetaLayout meta_layout(const DispatchArgs& a) {
    return MetaLayout(a.num_topk, !a.cached, a.with_weights, a.layout != RecvLayout::kCompact,
                      a.scale_bytes, a.paranoid);
}

}  // namespace ep
