// Where things lie: the control block of a rank, and the metadata record of a token. One walk each.
//
// Host sizing, device addressing, the CPU backend, Python and docs/protocol.md read the results;
// nobody adds bytes twice.
#pragma once

#include <array>
#include <cstdint>

#include "contract/config.h"
#include "contract/notice.h"
#include "contract/records.h"
#include "contract/shape.h"

namespace ep {

struct Region {
    int64_t offset = 0, bytes = 0;
};

// Hands out disjoint regions, each on its own cache lines.
class Cursor {
public:
    static constexpr int64_t kAlign = 128;

    EP_HD constexpr Region take(int64_t bytes) {
        const Region region{at_, bytes};
        at_ += (bytes + kAlign - 1) / kAlign * kAlign;
        return region;
    }
    EP_HD constexpr int64_t end() const { return at_; }

private:
    int64_t at_ = 0;
};

struct NamedRegion {
    const char* name;
    Region region;
};

// Head of every rank's shared memory: same offsets on every rank. Indices are [slot][rank] unless
// said otherwise.
struct ControlLayout {
    // What small batches name stands last, next to the rest they name of a RankView.
    Region header, entries, counts, bases, expert_rows, arrived, pulled, staged, taken, lives,
        masks, released, notices, rows;
    int64_t end = 0;
    int64_t stage_bytes = 0;
    int32_t num_ranks, num_experts, max_local_experts, notice_words;

    EP_HD constexpr explicit ControlLayout(const Shape& s)
        : stage_bytes(s.stage_bytes),
          num_ranks(s.num_ranks),
          num_experts(s.num_experts),
          max_local_experts(s.max_local_experts),
          notice_words(NoticeLayout(s).words) {
        const int64_t pairs = int64_t{s.num_slots} * s.num_ranks;
        Cursor at;
        header = at.take(sizeof(ControlHeader));
        entries = at.take(pairs * kEntryStride);               // EntryRecord per source
        counts = at.take(pairs * s.max_local_experts * 4);     // int32 per source, local expert
        bases = at.take(pairs * int64_t{sizeof(BaseRecord)});  // BaseRecord per receiver
        expert_rows =
            at.take(int64_t{s.num_slots} * s.num_experts * 4);  // int32 per expert, by owner
        arrived = at.take(pairs * kWordStride);                 // uint64 per source
        pulled = at.take(pairs * kWordStride);                  // uint64 per source
        released = at.take(pairs * kWordStride);                // uint64 per peer
        staged = at.take(s.num_ranks * kWordStride);            // [rank] uint64 per owner
        taken = at.take(s.num_ranks * kWordStride);             // [rank] uint64 per source
        lives = at.take(s.num_ranks * 8);                       // GPU: uint64 Life per rank
        masks = at.take(8);                                     // uint64, a bit per masked rank
        notices = at.take(pairs * notice_words * 8);            // GPU: packed words per source
        rows = at.take(s.num_slots * s.stage_bytes);            // GPU: lines, see stage.h
        end = at.end();
    }

    static constexpr int64_t kEntryStride = 384;  // EntryRecord, padded to cache lines
    static constexpr int64_t kWordStride =
        64;  // one flag, one cache line: no two writers share one

    EP_HD constexpr int64_t entry(int slot, int src) const {
        return entries.offset + pair(slot, src) * kEntryStride;
    }
    EP_HD constexpr int64_t count_row(int slot, int src) const {
        return counts.offset + pair(slot, src) * max_local_experts * 4;
    }
    EP_HD constexpr int64_t base(int slot, int dst) const {
        return bases.offset + pair(slot, dst) * int64_t{sizeof(BaseRecord)};
    }
    EP_HD constexpr int64_t expert_row(int slot, int expert_position) const {
        return expert_rows.offset + (int64_t{slot} * num_experts + expert_position) * 4;
    }
    EP_HD constexpr int64_t arrived_word(int slot, int src) const {
        return arrived.offset + pair(slot, src) * kWordStride;
    }
    EP_HD constexpr int64_t pulled_word(int slot, int src) const {
        return pulled.offset + pair(slot, src) * kWordStride;
    }
    EP_HD constexpr int64_t released_word(int slot, int peer) const {
        return released.offset + pair(slot, peer) * kWordStride;
    }
    EP_HD constexpr int64_t staged_word(int owner) const {
        return staged.offset + owner * kWordStride;
    }
    EP_HD constexpr int64_t taken_word(int src) const { return taken.offset + src * kWordStride; }
    EP_HD constexpr int64_t notice(int slot, int src) const {
        return notices.offset + pair(slot, src) * notice_words * 8;
    }

    EP_HD constexpr int64_t stage(int slot) const { return rows.offset + slot * stage_bytes; }
    EP_HD constexpr int64_t life_word(int rank) const { return lives.offset + rank * 8; }

    constexpr std::array<NamedRegion, 14> regions() const {
        return {{{"header", header},
                 {"entries", entries},
                 {"counts", counts},
                 {"bases", bases},
                 {"expert_rows", expert_rows},
                 {"arrived", arrived},
                 {"pulled", pulled},
                 {"released", released},
                 {"staged", staged},
                 {"taken", taken},
                 {"notices", notices},
                 {"lives", lives},
                 {"masks", masks},
                 {"rows", rows}}};
    }

private:
    EP_HD constexpr int64_t pair(int slot, int rank) const {
        return int64_t{slot} * num_ranks + rank;
    }
};
static_assert(sizeof(EntryRecord) <= ControlLayout::kEntryStride);

// One record per received token, in compact order, beside the rows of x.
struct MetaLayout {
    Region src_token;  // int32: index of the token on its source
    Region experts;    // int32 [num_topk]: local expert of each slot, -1 = not here
    Region weights;    // float [num_topk]
    Region rows;       // int32 [num_topk]: row of each slot (grouped, slab)
    Region scales;     // scale_bytes, verbatim, on a unit of 16 bytes
    Region seal;       // paranoid: checksum, row, token; 8 bytes aligned
    int64_t bytes = 0;

    EP_HD constexpr MetaLayout(int num_topk, bool with_routing, bool with_weights, bool with_rows,
                               int64_t scale_bytes, bool with_seal = false) {
        int64_t at = 0;
        const auto take = [&at](bool wanted, int64_t size) {
            const Region region{at, wanted ? size : 0};
            at += region.bytes;
            return region;
        };
        src_token = take(with_routing, 4);
        experts = take(with_routing, int64_t{4} * num_topk);
        weights = take(with_weights, int64_t{4} * num_topk);
        rows = take(with_routing && with_rows, int64_t{4} * num_topk);
        at = (at + kRowAlign - 1) / kRowAlign * kRowAlign;
        scales = take(scale_bytes > 0, scale_bytes);
        if (with_seal) at = (at + 7) / 8 * 8;
        seal = take(with_seal, 16);
        bytes = (at + kRowAlign - 1) / kRowAlign * kRowAlign;
    }
};

}  // namespace ep
