#include "cpu/stage.h"

#include <algorithm>

#include "cpu/simd.h"

namespace ep::cpu {
namespace {

// All rings together: a fifth of the output, within these bounds.
constexpr int64_t kLeastBytes = int64_t{512} << 10;
constexpr int64_t kMostBytes = int64_t{4} << 20;  // beyond it they would leave the caches
constexpr int64_t kOutputShare = 5;

}  // namespace

void add_part(const CombineArgs& a, const int32_t* rows, int count, std::byte* out) {
    const std::byte* row[kMaxTopk];
    float weights[kMaxTopk];
    for (int i = 0; i < count; ++i) {
        row[i] = a.x + rows[i] * a.row_bytes();
        if (a.weighted) weights[i] = a.row_weights[rows[i]];
    }
    simd().sum(a.dtype,
               {out, row, a.weighted ? weights : nullptr, nullptr, nullptr, a.hidden, count});
}

Stage::Stage(Operation& op, const CombineArgs& args) : op_(op), a_(args), sources_(op.num_ranks) {
    if (!streams()) return;
    int64_t most = 0, token = 0;
    for (int src = 0; src < op.num_ranks; ++src) {
        Source& source = sources_[src];
        source.token = token;
        const int64_t received = std::max<int64_t>(args.rank_counts[op.num_ranks + src], 0);
        token = std::min(token + received, args.num_recv);
        source.end = token;
        if (src == op.me || op.without(src)) continue;
        Source walk = source;
        for (skip_none(walk); walk.token < walk.end; step(walk)) ++source.num_rows;
        skip_none(source);
        most = std::max(most, source.num_rows);
        left_ += source.num_rows;
    }
    if (left_ == 0) return;
    const int64_t budget =
        std::clamp(args.num_tokens * args.row_bytes() / kOutputShare, kLeastBytes, kMostBytes);
    // A source needs all rows of a token at once.
    const int64_t least = 2 * int64_t{args.num_topk};
    const int64_t affordable = budget / args.row_bytes() / (op.num_ranks - 1);
    ring_rows_ = std::min(std::max(affordable, least), most);
}

// Rows stand in the order of (token, slot), which is that in which the source asks for them.
int64_t Stage::row_at(const Source& source) const {
    if (a_.layout == RecvLayout::kCompact) return source.token;
    return a_.recv_row[source.token * a_.num_topk + source.slot];
}

void Stage::step(Source& source) const {
    if (a_.one_per_rank() || ++source.slot == a_.num_topk) {
        ++source.token;
        source.slot = 0;
    }
    skip_none(source);
}

void Stage::skip_none(Source& source) const {
    if (a_.layout == RecvLayout::kCompact) {
        source.end = std::min(source.end, a_.num_rows);
        return;
    }
    while (source.token < source.end) {
        const int64_t row = row_at(source);
        if (row >= 0 && row < a_.num_rows) return;
        if (++source.slot == a_.num_topk) {
            ++source.token;
            source.slot = 0;
        }
    }
}

void Stage::stage_row(std::byte* to, const Source& source) const {
    if (!a_.per_rank) {
        return simd().copy(to, a_.x + row_at(source) * a_.row_bytes(), a_.row_bytes());
    }
    int32_t rows[kMaxTopk];
    int count = 0;
    for (int k = source.slot; k < a_.num_topk; ++k) {
        const int32_t row = a_.recv_row[source.token * a_.num_topk + k];
        if (row >= 0 && row < a_.num_rows) rows[count++] = row;
    }
    add_part(a_, rows, count, to);
}

int64_t Stage::taken(int src) const {
    // Pairs with the release in CombineOp::publish_taken.
    const uint64_t ever = load_acquire(op_.at<uint64_t>(op_.me, op_.layout.taken_word(src)));
    return static_cast<int64_t>(ever - op_.flow(src).staged);
}

bool Stage::has_room(int src) const {
    const Source& source = sources_[src];
    if (source.staged == source.num_rows) return false;
    const int64_t room = ring_rows_ - (source.staged - taken(src));
    if (room <= 0 || room > ring_rows_) return false;
    return is_worth_telling(room, ring_rows_) || room >= source.num_rows - source.staged;
}

int Stage::first_with_room() const {
    for (int src = 0; left_ > 0 && src < op_.num_ranks; ++src) {
        if (has_room(src)) return src;
    }
    return -1;
}

int Stage::blocked_on() const {
    for (int src = 0; src < op_.num_ranks; ++src) {
        if (sources_[src].staged < sources_[src].num_rows) return src;
    }
    return op_.me;
}

void Stage::drop(int src) {
    Source& source = sources_[src];
    left_ -= source.num_rows - source.staged;
    source.num_rows = source.staged;
}

int64_t Stage::progress() const {
    int64_t sum = 0;
    for (int src = 0; src < op_.num_ranks; ++src) sum += taken(src);
    return sum;
}

bool Stage::advance() {
    bool any = false;
    for (int src = 0; left_ > 0 && src < op_.num_ranks; ++src) {
        if (!has_room(src)) continue;
        Source& source = sources_[src];
        const int64_t until = std::min(source.num_rows, taken(src) + ring_rows_);
        std::byte* rows = rings_ + ring_of(op_.me, src) * ring_rows_ * a_.row_bytes();
        for (; source.staged < until; ++source.staged, --left_, step(source)) {
            stage_row(rows + source.staged % ring_rows_ * a_.row_bytes(), source);
        }
        // Releases the rows; pairs with the acquire in CombineOp::staged_by.
        store_release(op_.at<uint64_t>(src, op_.layout.staged_word(op_.me)),
                      op_.flow(src).staged + static_cast<uint64_t>(source.staged));
        ring(op_.rank.header(src), op_.me);
        any = true;
    }
    return any;
}

}  // namespace ep::cpu
