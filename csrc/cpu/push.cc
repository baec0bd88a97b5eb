#include "cpu/push.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "cpu/seal.h"

namespace ep::cpu {
namespace {

// Above this many pushed bytes rows bypass the cache: their reader is another process, and later.
constexpr int64_t kStreamBytes = int64_t{4} << 20;
// Records gathered for a rank before they are written: for all ranks they stay in the first caches.
constexpr int64_t kGatherBytes = 4096;

// An array in a record, which starts at a multiple of 16.
template <class T>
T* array_in(std::byte* record, const Region& region) {
    return std::launder(reinterpret_cast<T*>(record + region.offset));
}

}  // namespace

Push::Push(Operation& op, const DispatchArgs& args, const MetaLayout& meta)
    : op_(op),
      a_(args),
      meta_(meta),
      simd_(simd()),
      pushed_(op.num_ranks, 0),
      last_token_(op.num_ranks, -1),
      gathered_(op.num_ranks),
      most_gathered_(meta.bytes > 0 ? std::max(kGatherBytes / meta.bytes, int64_t{1}) : 0) {
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
    find_owners(t, ids, route);
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
        ++next_compact_[dst];
        ++pushed_[dst];
        if (meta_.bytes > 0) gather_record(t, dst, row, route, payload);
    }
    return true;
}

void Push::arrive() {
    for (int p = 0; p < op_.num_ranks; ++p) write_gathered(p);
    simd_.drain();
    for (int p = 0; p < op_.num_ranks; ++p) {
        // Releases the rows and records of `token`; pairs with the acquire in
        // DispatchOp::await_rows.
        add_release(op_.at<uint64_t>(p, op_.layout.arrived_word(op_.slot, op_.me)), pushed_[p]);
    }
    op_.ring_all();
}

void Push::find_owners(int64_t t, const int64_t* ids, Route& route) {
    for (int k = 0; k < a_.num_topk; ++k) {
        const int chosen = ids[k] < 0 ? -1 : op_.experts.owner(ids[k]);
        const bool none = chosen < 0 || op_.without(chosen);
        const int owner = none ? -1 : chosen;
        route.owner[k] = owner;
        route.local[k] = none ? -1 : op_.experts.local(ids[k]);
        if (none || last_token_[owner] == t) continue;
        last_token_[owner] = t;
        route.first[route.num_destinations++] = k;
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
void Push::gather_record(int64_t t, int dst, int64_t row, const Route& route,
                         const Payload& payload) {
    Gathered& gathered = gathered_[dst];
    if (!gathered.records) {
        gathered.records = std::make_unique<std::byte[]>(most_gathered_ * meta_.bytes);
    }
    std::byte* record = gathered.records.get() + gathered.count * meta_.bytes;
    const int num_topk = a_.num_topk;
    if (meta_.src_token.bytes > 0) {
        *array_in<int32_t>(record, meta_.src_token) = static_cast<int32_t>(t);
        int32_t* local = array_in<int32_t>(record, meta_.experts);
        for (int k = 0; k < num_topk; ++k) local[k] = route.owner[k] == dst ? route.local[k] : -1;
    }
    if (meta_.rows.bytes > 0) {
        int32_t* rows = array_in<int32_t>(record, meta_.rows);
        for (int k = 0; k < num_topk; ++k) rows[k] = route.owner[k] == dst ? route.row[k] : -1;
    }
    if (meta_.weights.bytes > 0) {
        float* weights = array_in<float>(record, meta_.weights);
        const float* given = a_.topk_weights + t * num_topk;
        for (int k = 0; k < num_topk; ++k) weights[k] = route.owner[k] == dst ? given[k] : 0.0f;
    }
    if (meta_.scales.bytes > 0) {
        std::memcpy(record + meta_.scales.offset, payload.scales, a_.scale_bytes);
    }
    if (meta_.seal.bytes > 0) {
        Seal& seal = *array_in<Seal>(record, meta_.seal);
        seal.row = static_cast<int32_t>(row);
        seal.token = static_cast<int32_t>(t);
        seal.sum =
            sum_of(seal, op_.seq, op_.me, payload.row, a_.row_bytes(), record, meta_.seal.offset);
    }
    if (++gathered.count == most_gathered_) write_gathered(dst);
}

void Push::write_gathered(int dst) {
    Gathered& gathered = gathered_[dst];
    if (gathered.count == 0) return;
    const int64_t first = next_compact_[dst] - gathered.count, bytes = gathered.count * meta_.bytes;
    std::byte* records = op_.arena_of(dst) + op_.base_of(dst).meta_offset;
    copy_(records + first * meta_.bytes, gathered.records.get(), bytes);
    gathered.count = 0;
}

}  // namespace ep::cpu
