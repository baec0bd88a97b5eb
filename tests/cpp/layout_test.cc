// Layouts are one walk: regions are disjoint, aligned, inside the end, and every word lies in its
// region.
#include "contract/layout.h"

#include <algorithm>
#include <set>
#include <vector>

#include "check.h"

namespace {

std::vector<ep::Shape> shapes() {
    std::vector<ep::Shape> all;
    for (int ranks : {1, 2, 3, 8, 64}) {
        for (int slots : {1, 2, 5}) {
            for (int experts : {1, 7, 256}) {
                const int most = (experts + ranks - 1) / ranks;
                all.push_back({ranks, slots, experts, most, 8, 128});
            }
        }
    }
    return all;
}

template <class Body>
void for_each_shape(Body body) {
    for (const ep::Shape& shape : shapes()) body(shape, ep::ControlLayout(shape));
}

bool holds(const ep::Region& region, int64_t offset, int64_t bytes) {
    return offset >= region.offset && offset + bytes <= region.offset + region.bytes;
}

}  // namespace

int main() {
    ep::test("regions are disjoint, aligned and inside the end", [] {
        for_each_shape([](const ep::Shape&, const ep::ControlLayout& layout) {
            auto regions = layout.regions();
            std::sort(regions.begin(), regions.end(), [](const auto& a, const auto& b) {
                return a.region.offset < b.region.offset;
            });
            int64_t end = 0;
            for (const ep::NamedRegion& r : regions) {
                ep::expect(r.region.offset >= end, r.name);
                ep::expect_eq(r.region.offset % ep::Cursor::kAlign, 0);
                end = r.region.offset + r.region.bytes;
            }
            ep::expect(end <= layout.end, "a region passes the end");
        });
    });

    ep::test("every flag lies in its region, alone on its cache line", [] {
        for_each_shape([](const ep::Shape& shape, const ep::ControlLayout& layout) {
            std::set<int64_t> lines;
            for (int slot = 0; slot < shape.num_slots; ++slot) {
                for (int rank = 0; rank < shape.num_ranks; ++rank) {
                    const int64_t words[] = {layout.arrived_word(slot, rank),
                                             layout.pulled_word(slot, rank),
                                             layout.released_word(slot, rank)};
                    ep::expect(holds(layout.arrived, words[0], 8), "arrived");
                    ep::expect(holds(layout.pulled, words[1], 8), "pulled");
                    ep::expect(holds(layout.released, words[2], 8), "released");
                    for (int64_t word : words) lines.insert(word / 64);
                }
            }
            for (int rank = 0; rank < shape.num_ranks; ++rank) {
                ep::expect(holds(layout.staged, layout.staged_word(rank), 8), "staged");
                ep::expect(holds(layout.taken, layout.taken_word(rank), 8), "taken");
                lines.insert(layout.staged_word(rank) / 64);
                lines.insert(layout.taken_word(rank) / 64);
            }
            ep::expect_eq(int(lines.size()), (3 * shape.num_slots + 2) * shape.num_ranks);
        });
    });

    ep::test("records and rows of counts lie in their regions", [] {
        for_each_shape([](const ep::Shape& shape, const ep::ControlLayout& layout) {
            const int slot = shape.num_slots - 1, rank = shape.num_ranks - 1;
            ep::expect(holds(layout.entries, layout.entry(slot, rank), sizeof(ep::EntryRecord)),
                       "entry");
            ep::expect(
                holds(layout.counts, layout.count_row(slot, rank), 4 * shape.max_local_experts),
                "counts");
            ep::expect(holds(layout.bases, layout.base(slot, rank), sizeof(ep::BaseRecord)),
                       "base");
            ep::expect(holds(layout.expert_rows, layout.expert_row(slot, shape.num_experts - 1), 4),
                       "expert row");
        });
    });

    ep::test("metadata holds what was asked for, in whole 16-byte units", [] {
        const ep::MetaLayout full(8, true, true, true, 224);
        ep::expect_eq(full.scales.offset, 112);
        ep::expect_eq(full.bytes % ep::kRowAlign, 0);
        ep::expect(full.scales.offset + full.scales.bytes <= full.bytes, "scales pass the end");
        ep::expect_eq(ep::MetaLayout(8, false, false, false, 0).bytes, 0);
    });
    return ep::finish();
}
