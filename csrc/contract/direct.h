// Direct mode: rows of small batches go straight to their ranks on other nodes, as they go inside one
// (contract/stage.h), in one trip over the network and through nobody.
//
// A record is composed in our outbox, whose place is ours alone, and put into the inbox of its rank.
#pragma once

#include <algorithm>
#include <cstdint>

#include "contract/rail.h"
#include "contract/stage.h"

namespace ep {

// Records a rank may have to put in one combine: of each token of another node one, or one a slot.
constexpr int64_t most_rows_out(const Shape& s, const NodeShape& nodes, int each) {
    return int64_t{s.num_ranks - nodes.ranks_per_node} * s.max_tokens * each;
}

// What all slots have, within reason; none where even the least does not fit. The same on all ranks.
constexpr DirectShape direct_shape_for(const Shape& s, const NodeShape& nodes, int64_t hidden) {
    constexpr int64_t kMost = int64_t{1} << 30;  // in all slots
    if (s.stage_bytes == 0 || nodes.num_nodes < 2) return {};
    DispatchArgs widest;
    widest.hidden = hidden, widest.num_topk = s.num_topk, widest.with_weights = true;
    CombineArgs back;
    back.hidden = hidden;
    const Record record = record_of(widest);
    const int64_t record_bytes = std::max(record.bytes(), record_of(back).bytes());
    DirectShape d{s.num_slots, s.num_ranks, s.stage_bytes, 0,
                  int64_t{kLineBytes} * record.meta_lines * s.max_tokens};
    for (const int each : {int{s.num_topk}, 1}) {
        const int64_t most = std::max(most_rows_out(s, nodes, each), s.max_tokens);
        d.outbox_bytes = most * record_bytes;
        if ((d.inbox_bytes + d.outbox_bytes) * s.num_slots <= kMost) return d;
    }
    return {};
}

// Whether a call goes this way: all ranks know what this depends on.
constexpr bool is_direct(const Shape& s, const RailShape& r, const DispatchArgs& a) {
    const Record record = record_of(a);
    return r.is_direct() && is_staged(s, a) &&
           s.max_tokens * record.bytes() <= r.direct.outbox_bytes &&
           int64_t{kLineBytes} * record.meta_lines * s.max_tokens <= r.direct.note_bytes;
}
constexpr bool is_direct(const Shape& s, const RailShape& r, const CombineArgs& a) {
    const int each = a.one_per_rank() ? 1 : a.num_topk;
    return r.is_direct() && is_staged(s, a) &&
           most_rows_out(s, r.nodes, each) * record_of(a).bytes() <= r.direct.outbox_bytes;
}

// What a record says of a slot in direct mode: the turn of its selection at its expert, and the number of
// its token among those of the source there.
static_assert(kMostStagedTokens * kMaxTopk <= 1 << 16);
EP_HD constexpr uint32_t direct_turn(int number, int turn) {
    return static_cast<uint32_t>(number) << 16 | static_cast<uint32_t>(turn);
}
EP_HD constexpr int turn_of(uint32_t told) { return static_cast<int>(told & 0xffff); }
EP_HD constexpr int number_of(uint32_t told) { return static_cast<int>(told >> 16); }

}  // namespace ep
