#include "cpu/push.h"

#include <cstring>

namespace ep::cpu {
namespace {

// Above this many pushed bytes rows bypass the cache: their reader is another process, and later.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

}  // namespace

Push::Push(Operation& op, const DispatchArgs& args, const MetaLayout& meta)
    : op_(op), a_(args), meta_(meta), simd_(simd()), pushed_(op.num_ranks, 0) {
    int64_t bytes = 0;
    for (int p = 0; p < op.num_ranks; ++p) {
        next_compact_.push_back(op.base_of(p).row);
        bytes += a_.rank_counts[p] * a_.row_bytes();
    }
    copy_ = bytes >= kStreamBytes ? simd_.copy_stream : simd_.copy;
    if (!a_.cached) {
        const int32_t* first = &op.at<int32_t>(op.me, op.layout.expert_row(op.slot, 0));
        next_row_.assign(first, first + op.experts.num_experts());
    }
    if (a_.quantize != Quantize::kNone) scratch_.resize(a_.row_bytes() + a_.scale_bytes);
}

bool Push::token(int64_t t) {
    Route route;
    const int64_t* ids = a_.topk_idx + t * a_.num_topk;
    find_owners(ids, route);
    if (route.num_destinations == 0) {
        std::memset(a_.send_row + t * a_.num_topk, 0xff, sizeof(int32_t) * a_.num_topk);
        return true;
    }
    assign_rows(t, ids, route);
    const Payload payload = load(t);
    for (int i = 0; i < route.num_destinations; ++i) {
        const int slot = route.first[i], dst = route.owner[slot];
        const BaseRecord& base = op_.base_of(dst);
        const int64_t row = route.row[slot];
        if (row < 0 || row >= base.num_rows) {  // of a handle; others already push
            refusal_ = Operation::outcome_of(kMiscount, dst, base.num_rows, row);
            return false;
        }
        copy_(op_.arena_of(dst) + base.x_offset + row * a_.row_bytes(), payload.row,
              a_.row_bytes());
        if (meta_.bytes > 0) write_record(t, dst, route, payload);
        ++next_compact_[dst];
        ++pushed_[dst];
    }
    return true;
}

void Push::arrive() {
    simd_.drain();
    for (int p = 0; p < op_.num_ranks; ++p) {
        // Releases the rows and records of `token`; pairs with the acquire in
        // DispatchOp::await_rows.
        add_release(op_.at<uint64_t>(p, op_.layout.arrived_word(op_.slot, op_.me)), pushed_[p]);
    }
    op_.ring_all();
}

void Push::find_owners(const int64_t* ids, Route& route) const {
    for (int k = 0; k < a_.num_topk; ++k) {
        const int owner = ids[k] < 0 ? -1 : op_.experts.owner(ids[k]);
        route.owner[k] = owner;
        bool first = owner >= 0;
        for (int i = 0; first && i < route.num_destinations; ++i) {
            first = route.owner[route.first[i]] != owner;
        }
        if (first) route.first[route.num_destinations++] = k;
    }
}

// Compact: the token's turn at each rank. Grouped, slab: the selection's turn at each expert.
void Push::assign_rows(int64_t t, const int64_t* ids, Route& route) {
    int32_t* send_row = a_.send_row + t * a_.num_topk;
    for (int k = 0; k < a_.num_topk; ++k) {
        if (!a_.cached) {
            send_row[k] = route.owner[k] < 0 ? -1
                          : a_.layout == RecvLayout::kCompact
                              ? static_cast<int32_t>(next_compact_[route.owner[k]])
                              : static_cast<int32_t>(next_row_[op_.experts.position(ids[k])]++);
        }
        route.row[k] = send_row[k];
    }
}

Push::Payload Push::load(int64_t t) {
    const std::byte* row = a_.x + t * a_.x_stride;
    if (a_.quantize == Quantize::kNone) {
        return {row, a_.scales != nullptr ? a_.scales + t * a_.scale_bytes : nullptr};
    }
    std::byte* scales = scratch_.data() + a_.row_bytes();
    simd_.quantize(a_.dtype, {scratch_.data(), scales, row, a_.hidden, a_.scale_block,
                              a_.quantize == Quantize::kFp8Ue8m0});
    return {scratch_.data(), scales};
}

// Slots of other ranks read as -1 (experts, rows) and 0 (weights).
void Push::write_record(int64_t t, int dst, const Route& route, const Payload& payload) const {
    std::byte* record =
        op_.arena_of(dst) + op_.base_of(dst).meta_offset + next_compact_[dst] * meta_.bytes;
    const int64_t first = t * a_.num_topk;
    const size_t words = sizeof(int32_t) * a_.num_topk;
    if (meta_.src_token.bytes > 0) {
        const auto src_token = static_cast<int32_t>(t);
        int32_t local[kMaxTopk], row[kMaxTopk];
        for (int k = 0; k < a_.num_topk; ++k) {
            const bool here = route.owner[k] == dst;
            local[k] = here ? op_.experts.local(a_.topk_idx[first + k]) : -1;
            row[k] = here ? route.row[k] : -1;
        }
        std::memcpy(record + meta_.src_token.offset, &src_token, sizeof(src_token));
        std::memcpy(record + meta_.experts.offset, local, words);
        if (meta_.rows.bytes > 0) std::memcpy(record + meta_.rows.offset, row, words);
    }
    if (meta_.weights.bytes > 0) {
        float weights[kMaxTopk];
        for (int k = 0; k < a_.num_topk; ++k) {
            weights[k] = route.owner[k] == dst ? a_.topk_weights[first + k] : 0.0f;
        }
        std::memcpy(record + meta_.weights.offset, weights, words);
    }
    if (meta_.scales.bytes > 0) {
        std::memcpy(record + meta_.scales.offset, payload.scales, a_.scale_bytes);
    }
}

}  // namespace ep::cpu
