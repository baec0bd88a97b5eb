// Small batches: a record holds its row, places lie in what a slot has for them, and that is bounded; how warps
// divide pieces among themselves.
#include "contract/stage.h"

#include <algorithm>
#include <vector>

#include "check.h"
#include "contract/layout.h"

namespace {

using namespace ep;

std::vector<Shape> shapes() {
    std::vector<Shape> all;
    for (const int ranks : {1, 2, 8, 64}) {
        for (const int slots : {2, 5}) {
            for (const int topk : {1, 8, 32}) {
                for (const int tokens : {1, 128, 1024}) {
                    all.push_back({ranks, slots, 128, 128 / ranks, topk, tokens});
                }
            }
        }
    }
    return all;
}

constexpr int64_t kHidden[] = {8, 64, 2880, 7168, 16384};
constexpr int64_t kMost = int64_t{320} << 20;

template <class Body>
void for_each(Body body) {
    for (Shape shape : shapes()) {
        for (const int64_t hidden : kHidden) {
            shape.stage_bytes = stage_bytes_for(shape, hidden);
            body(shape, hidden);
        }
    }
}

DispatchArgs dispatch(const Shape& shape, int64_t hidden, Quantize quantize) {
    DispatchArgs a;
    a.hidden = hidden, a.num_topk = shape.num_topk, a.with_weights = true;
    a.layout = RecvLayout::kSlab;
    a.quantize = quantize;
    if (quantize != Quantize::kNone) a.scale_bytes = 4 * hidden / a.scale_block;
    if (quantize == Quantize::kFp8Ue8m0) a.scale_bytes /= 4;
    return a;
}

void check_record(const Record& r, int64_t row_bytes, int64_t scale_bytes, int64_t unit) {
    expect(int64_t{r.num_pieces} * r.piece_bytes >= row_bytes, "pieces hold the row");
    expect(int64_t{r.num_pieces - 1} * r.piece_bytes < row_bytes, "every piece has some of it");
    expect(int64_t{r.num_pieces} * r.scale_bytes >= scale_bytes, "pieces hold the scales");
    expect_eq(r.piece_bytes % unit, 0);
    const int64_t room = int64_t{r.piece_lines} * kLineWords * 8;
    expect(room >= r.piece_bytes + (r.scale_bytes + 7) / 8 * 8, "lines hold a piece");
    expect_eq(r.bytes() % kLineBytes, 0);
}

}  // namespace

int main() {
    test("a record holds its row, its scales and what is said of them", [] {
        for_each([](const Shape& shape, int64_t hidden) {
            for (const Quantize q : {Quantize::kNone, Quantize::kFp8, Quantize::kFp8Ue8m0}) {
                const int64_t unit = q == Quantize::kNone ? 16 : q == Quantize::kFp8 ? 128 : 512;
                if (2 * hidden % 16 != 0 || (q != Quantize::kNone && hidden % unit != 0)) continue;
                const DispatchArgs a = dispatch(shape, hidden, q);
                const Record r = record_of(a);
                check_record(r, a.row_bytes(), a.scale_bytes, unit);
                const int words = 1 + a.num_topk + (a.num_topk + 1) / 2;
                expect(r.meta_lines * kLineWords >= words, "lines hold what is said");
                expect(r.meta_lines <= 4, "one load of a warp");
            }
            CombineArgs c;
            c.hidden = hidden, c.num_topk = shape.num_topk;
            check_record(record_of(c), c.row_bytes(), 0, 16);
            expect_eq(record_of(c).meta_lines, 0);
        });
    });

    test("what a slot has is bounded, and enough for rows of 16 bits", [] {
        for_each([](const Shape& shape, int64_t hidden) {
            expect(shape.stage_bytes * shape.num_slots <= kMost, "more than a rank gives");
            const bool any = shape.stage_bytes > 0;
            for (const Quantize q : {Quantize::kNone, Quantize::kFp8}) {
                if (q != Quantize::kNone && hidden % 128 != 0) continue;
                const DispatchArgs a = dispatch(shape, hidden, q);
                expect_eq(is_staged(shape, a), any);
            }
            CombineArgs c;
            c.hidden = hidden, c.num_topk = shape.num_topk, c.layout = RecvLayout::kSlab;
            for (const bool per_rank : {false, true}) {
                c.per_rank = per_rank;
                expect_eq(is_staged(shape, c), any);
            }
        });
    });

    test("places of the last slot lie in the control block, on lines of their own", [] {
        for_each([](const Shape& shape, int64_t hidden) {
            const ControlLayout layout(shape);
            for (int slot = 0; slot < shape.num_slots; ++slot) {
                expect_eq(layout.stage(slot) % kLineBytes, 0);
                expect(layout.stage(slot) + shape.stage_bytes <= layout.end, "passes the end");
            }
            Shape without = shape;
            without.stage_bytes = 0;
            expect_eq(layout.end - ControlLayout(without).end, shape.stage_bytes * shape.num_slots);
            const DispatchArgs a = dispatch(shape, hidden, Quantize::kNone);
            if (!is_staged(shape, a)) return;
            const int64_t places = int64_t{shape.num_ranks} * shape.max_tokens;
            expect(places * record_of(a).bytes() <= shape.stage_bytes, "the last place");
        });
    });

    test("runs cover every piece of every row once, and differ little", [] {
        for_each([](const Shape& shape, int64_t hidden) {
            const Record record = record_of(dispatch(shape, hidden, Quantize::kNone));
            for (const int warps : {1, 128, 2112}) {
                const int64_t rows = int64_t{shape.num_ranks} * shape.max_tokens;
                const Runs runs(record.num_pieces, rows, warps);
                const int per_row = runs.per_row.value;
                expect(per_row * runs.pieces - record.num_pieces <= record.num_pieces / 10, "even");
                expect((per_row - 1) * runs.pieces < record.num_pieces, "no run is empty");
                // The first ones and the last ones: products only grow.
                for (const int64_t row : {int64_t{0}, int64_t{1}, rows - 1, rows}) {
                    for (int i = 0; i < per_row; ++i) {
                        const auto run = static_cast<int>(row * per_row + i);
                        expect_eq(runs.row_of(run), static_cast<int>(row));
                        expect_eq(runs.first_piece(run), i * runs.pieces);
                    }
                }
            }
        });
    });

    test("a divisor is exact for all that is divided", [] {
        for (int by = 1; by <= kMostStagedTokens; by = by * 5 / 4 + 1) {
            const Divisor divisor(by);
            const int64_t end = std::min(int64_t{1} << 31, (int64_t{1} << 31) / by);
            for (int64_t n = 0; n < end; n += 1 + n / 3) {
                expect_eq(divisor.quotient(static_cast<int>(n)), static_cast<int>(n / by));
            }
            const auto last = static_cast<int>(end - 1);
            expect_eq(divisor.quotient(last), last / by);
        }
    });

    test("a call too large for it goes the other way", [] {
        Shape shape{8, 2, 256, 32, 8, 1025};
        expect_eq(stage_bytes_for(shape, 7168), int64_t{0});
        shape.max_tokens = 128;
        shape.stage_bytes = stage_bytes_for(shape, 1024);
        expect(is_staged(shape, dispatch(shape, 1024, Quantize::kNone)), "as it was made for");
        expect(!is_staged(shape, dispatch(shape, 2048, Quantize::kNone)), "longer rows");
        DispatchArgs a = dispatch(shape, 1024, Quantize::kNone);
        a.layout = RecvLayout::kCompact;
        expect(!is_staged(shape, a), "sizes are not known beforehand");
        a.is_static = true;
        expect(is_staged(shape, a), "they are");
        a.cached = true;
        expect(!is_staged(shape, a), "cached");
    });
    return finish();
}
