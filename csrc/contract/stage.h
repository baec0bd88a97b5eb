// Small batches: a source puts its rows in front of their receivers at once, where each has a place of
// its own, and hears nobody first. Here is how a row travels and where it stands.
//
// A record is a run of lines of 128 bytes: seven units of 16 bytes and the number of the operation, which
// travel together (device/lines.cuh). So rows need no flag behind them, and places are never cleared.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "contract/args.h"
#include "contract/config.h"
#include "contract/shape.h"

namespace ep {

inline constexpr int kUnitBytes = 16;
inline constexpr int kLineBytes = 128, kLineUnits = 7, kLineWords = 2 * kLineUnits;
inline constexpr int kNumberWord = 15;  // of a line: the number of its operation
// Every block of a dispatch looks at all tokens before its own, and at what all ranks bring to all
// experts.
inline constexpr int kMostStagedTokens = 1024, kMostStagedRanks = 64;
inline constexpr int kMostStagedCounts = 12 * 1024;

constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// A row in pieces, one for a warp. Of a dispatch the first lines say what becomes of the row, and every
// piece has its share of the scales behind it.
struct Record {
    int32_t meta_lines = 0;
    int32_t num_pieces = 1;
    int32_t piece_bytes = 0;  // of the row; the last one may be shorter
    int32_t scale_bytes = 0;  // of a piece
    int32_t piece_lines = 0;

    EP_HD constexpr int64_t bytes() const {
        return int64_t{kLineBytes} * (meta_lines + num_pieces * piece_lines);
    }
};
static_assert(std::is_trivially_copyable_v<Record>);

// Pieces of about `lines`. `unit`: bytes of which a piece is a multiple.
constexpr Record record_of(int64_t row_bytes, int64_t scale_bytes, int64_t unit, int lines) {
    const int64_t room = int64_t{lines} * kLineUnits * kUnitBytes;
    const auto with_scales = [=](int64_t bytes) {
        const int64_t scales = divide_up(scale_bytes * bytes, std::max<int64_t>(row_bytes, 1));
        return bytes + divide_up(scales, kUnitBytes) * kUnitBytes;
    };
    int64_t most = std::max(room / unit * unit, unit);
    while (most > unit && with_scales(most) > room) most -= unit;
    Record r;
    const int64_t pieces = std::max<int64_t>(divide_up(row_bytes, most), 1);
    r.piece_bytes = static_cast<int32_t>(divide_up(divide_up(row_bytes, pieces), unit) * unit);
    r.num_pieces = static_cast<int32_t>(
        std::max<int64_t>(divide_up(row_bytes, std::max(r.piece_bytes, 1)), 1));
    r.scale_bytes = static_cast<int32_t>(4 * divide_up(scale_bytes / 4, r.num_pieces));
    r.piece_lines = static_cast<int32_t>(
        divide_up(r.piece_bytes + divide_up(r.scale_bytes, kUnitBytes) * kUnitBytes,
                  kLineUnits * kUnitBytes));
    return r;
}

// Divides by a number that the host knows, by a multiplication: exact while dividend * divisor < 2^31.
struct Divisor {
    int32_t value = 1;
    uint32_t inverse = uint32_t{1} << kShift;

    Divisor() = default;
    constexpr explicit Divisor(int64_t by)
        : value(static_cast<int32_t>(by)),
          inverse(static_cast<uint32_t>(divide_up(int64_t{1} << kShift, by))) {}
    EP_HD constexpr int quotient(int n) const {
        return static_cast<int>(uint64_t{static_cast<uint32_t>(n)} * inverse >> kShift);
    }

private:
    static constexpr int kShift = 31;
};

// How warps go through the pieces of rows: each has a run of some of one row, then of another row. What is known of
// a row is looked up once a run; with many short ones no warp has much more than others.
struct Runs {
    Divisor per_row;         // runs
    int32_t pieces = 1;      // of a run; the last one of a row may be shorter
    int32_t num_pieces = 1;  // of a row

    Runs() = default;
    // For about so many rows. Of runs of the same length, or nearly: a short one costs as much as any other.
    constexpr Runs(int pieces_of_row, int64_t rows, int64_t warps) : num_pieces(pieces_of_row) {
        const int64_t each = rows * num_pieces / std::max<int64_t>(warps, 1);
        const auto runs_of = [&](int64_t n) { return divide_up(num_pieces, n); };
        int64_t most = std::clamp<int64_t>(each / 4, 1, num_pieces);
        while (10 * (most * runs_of(most) - num_pieces) > num_pieces) --most;
        pieces = static_cast<int32_t>(most);
        per_row = Divisor(runs_of(most));
    }
    EP_HD constexpr int row_of(int run) const { return per_row.quotient(run); }
    EP_HD constexpr int first_piece(int run) const {
        return (run - row_of(run) * per_row.value) * pieces;
    }
};
static_assert(std::is_trivially_copyable_v<Runs>);

// Of a piece of a dispatch, at most: what a warp has in flight. With fewer, 128 rows of 14 KiB are more pieces than a
// GPU has warps to take them. Those that are quantized are shorter, and each takes a warp longer to make.
inline constexpr int kRowLines = 16, kQuantizedLines = 12;
// So at most its elements, which come in blocks.
inline constexpr int kMostQuantized = kQuantizedLines * kLineUnits * kUnitBytes / 128 * 128;

constexpr Record record_of(const DispatchArgs& a) {
    const int64_t block = a.quantize == Quantize::kNone ? 16 : a.scale_block;
    Record r = record_of(a.row_bytes(), a.scale_bytes,
                         a.quantize == Quantize::kFp8Ue8m0 ? 4 * block : block,
                         a.quantize == Quantize::kNone ? kRowLines : kQuantizedLines);
    // The row's number, then expert and turn of every slot, and weights of two slots a word.
    const int64_t words = 1 + a.num_topk + (a.with_weights ? divide_up(a.num_topk, 2) : 0);
    r.meta_lines = static_cast<int32_t>(divide_up(words, kLineWords));
    return r;
}

inline constexpr int kSumLines =
    8;  // of a piece of a combine: what a warp of a source adds up at once

// Lines of a row stand one after another, so that pieces may be larger where that is faster.
constexpr Record record_of(const CombineArgs& a) {
    const int64_t lines = std::max<int64_t>(divide_up(a.row_bytes(), kLineUnits * kUnitBytes), 1);
    Record r;
    r.num_pieces = static_cast<int32_t>(divide_up(lines, kSumLines));
    r.piece_lines = static_cast<int32_t>(std::min<int64_t>(lines, kSumLines));
    r.piece_bytes = r.piece_lines * kLineUnits * kUnitBytes;
    return r;
}

// A selection as its receiver hears of it: whose expert it is, and its number there.
inline constexpr uint32_t kNoStagedExpert = ~uint32_t{0};
EP_HD constexpr uint32_t staged_expert(int rank, int local) {
    return static_cast<uint32_t>(rank) << 20 | static_cast<uint32_t>(local);
}
EP_HD constexpr int staged_rank(uint32_t code) { return static_cast<int>(code >> 20); }
EP_HD constexpr int staged_local(uint32_t code) { return static_cast<int>(code & 0xfffff); }

// Rows that may come back for a token: one of each rank, or one of each slot.
constexpr int64_t rows_back(const Shape& s, const CombineArgs& a) {
    return a.layout == RecvLayout::kCompact || a.per_rank ? s.num_ranks : a.num_topk;
}

// Whether a call goes this way: all ranks know what this depends on.
constexpr bool fits_stage(const Shape& s) {
    return s.max_tokens <= kMostStagedTokens && s.num_ranks <= kMostStagedRanks &&
           s.num_ranks * s.num_experts <= kMostStagedCounts;
}
constexpr bool is_staged(const Shape& s, const DispatchArgs& a) {
    const bool has_shape =
        a.layout == RecvLayout::kSlab || (a.layout == RecvLayout::kCompact && a.is_static);
    return fits_stage(s) && has_shape && !a.cached && record_of(a).piece_lines <= kRowLines &&
           s.num_ranks * s.max_tokens * record_of(a).bytes() <= s.stage_bytes;
}
constexpr bool is_staged(const Shape& s, const CombineArgs& a) {
    return fits_stage(s) && !a.with_weights &&
           rows_back(s, a) * s.max_tokens * record_of(a).bytes() <= s.stage_bytes;
}

// What a slot has for rows of 16 bits, within reason. The same on all ranks.
constexpr int64_t stage_bytes_for(const Shape& s, int64_t hidden) {
    constexpr int64_t kMost = int64_t{320} << 20;  // in all slots
    if (!fits_stage(s)) return 0;
    DispatchArgs widest;
    widest.hidden = hidden, widest.num_topk = s.num_topk, widest.with_weights = true;
    CombineArgs back;
    back.hidden = hidden;
    const int64_t bytes = std::max(s.num_ranks, s.num_topk) * s.max_tokens *
                          std::max(record_of(widest).bytes(), record_of(back).bytes());
    return bytes * s.num_slots <= kMost ? bytes : 0;
}

}  // namespace ep
