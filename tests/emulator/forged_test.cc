// A peer that writes what it likes: one rank runs, the words of the other are forged, one at a time. What
// becomes an address or a length is refused where it cannot be (E240), nothing outside the extents that
// were granted is touched, and every call ends.
//
// The other rank's words are those of a call that went well, kept, and put into the block of a rank that
// begins the same call alone.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <climits>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../cpp/check.h"
#include "contract/calls.h"
#include "contract/stage.h"
#include "device/packed.cuh"
#include "host/device_rank.h"

namespace {

using namespace ep;

constexpr int kRanks = 2, kExperts = 6, kTopk = 3, kHidden = 24, kVictim = 0, kForger = 1;
constexpr int64_t kArenaBytes = 1 << 19;
constexpr std::byte kPoison{0xe7};
constexpr int kTokens[kRanks] = {9, 7};
constexpr PeerClocks kPatient{60, 60, 60};  // longer than any machine pauses
constexpr PeerClocks kRunsOut{60, 6, 60};   // where one must run out behind an honest call
constexpr PeerClocks kQuick{5, 1, 0.3};     // where a call may end by them, and many do

struct Kind {
    RecvLayout layout = RecvLayout::kCompact;
    bool staged = false;  // a small batch
    bool combines = false;

    std::string name() const {
        const char* names[] = {"compact", "grouped", "slab"};
        return std::string(names[static_cast<int>(layout)]) + (staged ? ", small" : "") +
               (combines ? ", combine" : "");
    }
};

Shape shape_of(const Kind& kind) {
    Shape s;
    s.num_ranks = kRanks;
    s.num_experts = kExperts;
    s.max_local_experts = kExperts / kRanks;
    s.num_topk = kTopk;
    s.max_tokens = *std::max_element(kTokens, kTokens + kRanks);
    if (kind.staged) s.stage_bytes = stage_bytes_for(s, kHidden);
    return s;
}

// Both ranks; the memory of each between pages that nobody may touch.
struct World {
    struct Rank {
        std::vector<uint16_t> x, out;
        std::vector<int64_t> ids, rank_counts = std::vector<int64_t>(2 * kRanks);
        std::vector<float> weights;
        std::vector<int32_t> send_row, counts, offsets, numbers;
        std::shared_ptr<DeviceArena> arena;
        std::unique_ptr<DeviceRank> device;
        std::shared_ptr<Flight> flight;
        cudaStream_t stream = nullptr;
    };
    Kind kind;
    Shape shape;
    std::vector<DevicePeer> peers;
    std::vector<Rank> ranks;

    explicit World(const Kind& k, const PeerClocks& clocks = kPatient)
        : kind(k), shape(shape_of(k)), ranks(kRanks) {
        std::mt19937 random(3);
        std::vector<int32_t> owner;
        for (int e = 0; e < kExperts; ++e) owner.push_back(e * kRanks / kExperts);
        for (int r = 0; r < kRanks; ++r) {
            for (int i = 0; i < kTokens[r] * kTopk; ++i) {
                ranks[r].ids.push_back(static_cast<int>(random() % (kExperts + 1)) - 1);
                ranks[r].weights.push_back(static_cast<float>(random() % 100));
            }
            for (int i = 0; i < kTokens[r] * kHidden; ++i) {
                ranks[r].x.push_back(static_cast<uint16_t>(0x3c00 + random() % 0x700));
            }
            peers.push_back({DeviceMemory::create(0, ControlLayout(shape).end),
                             DeviceMemory::create(0, kArenaBytes),
                             {-1, -1, 0}});
            std::fill_n(peers[r].arena->data(), kArenaBytes, kPoison);
        }
        for (int r = 0; r < kRanks; ++r) {
            ranks[r].arena = std::make_shared<DeviceArena>(peers[r].arena);
            ranks[r].device = std::make_unique<DeviceRank>(
                shape, r, 1, owner, peers, ranks[r].arena, clocks, 16, [](OpKind, int, double) {});
            cudaStreamCreateWithFlags(&ranks[r].stream, cudaStreamNonBlocking);
        }
    }
    ~World() {
        for (Rank& r : ranks) r.flight.reset();
        cudaDeviceSynchronize();
        for (Rank& r : ranks) r.device.reset();
        for (Rank& r : ranks) cudaStreamDestroy(r.stream);
    }

    void dispatch(int i) { dispatch(i, kind.layout, kind.staged); }
    void dispatch(int i, RecvLayout layout, bool staged) {
        Rank& r = ranks[i];
        r.send_row.assign(kTokens[i] * kTopk, -7);
        r.counts.assign(shape.max_local_experts, -7);
        r.offsets.assign(shape.max_local_experts + 1, -7);
        r.numbers.assign(2, -7);
        DispatchArgs a;
        a.x = reinterpret_cast<std::byte*>(r.x.data());
        a.topk_idx = r.ids.data();
        a.topk_weights = r.weights.data();
        a.with_weights = true;
        a.send_row = r.send_row.data();
        a.rank_counts = r.rank_counts.data();
        a.expert_counts = r.counts.data();
        a.num_tokens = kTokens[i];
        a.hidden = kHidden;
        a.x_stride = 2 * kHidden;
        a.num_topk = kTopk;
        a.layout = layout;
        if (layout == RecvLayout::kSlab) a.capacity = kRanks * shape.max_tokens;
        if (layout == RecvLayout::kCompact && staged) {
            a.is_static = true;
            a.capacity = kRanks * shape.max_tokens;
        }
        DispatchWants w;
        w.status = &r.numbers[0];
        w.num_recv = &r.numbers[1];
        w.num_sms = 2;
        w.reports = true;
        if (layout == RecvLayout::kGrouped) w.offsets = r.offsets.data();
        expect_eq(is_staged(shape, a), staged);
        r.flight = r.device->dispatch(a, w, r.stream);
    }

    // The code of a dispatch that was queued; its extents become what was reported.
    int finish(int i) {
        Rank& r = ranks[i];
        while (!r.device->await_report(*r.flight, std::chrono::milliseconds(20))) {
        }
        const int code = r.flight->report.outcome.incident.code;
        if (code == kOk) r.device->settle(*r.flight);
        cudaStreamSynchronize(r.stream);
        return code != kOk ? code : r.device->verdict().incident.code;
    }

    void combine(int i) {
        Rank& r = ranks[i];
        const UnpackArgs& received = r.flight->job.out;
        r.out.assign(kTokens[i] * kHidden, 7);
        CombineArgs a;
        a.x = (*r.flight)[Out::kX].data();
        a.arena_offset = (*r.flight)[Out::kX].offset();
        a.topk_idx = r.ids.data();
        a.send_row = r.send_row.data();
        a.rank_counts = r.rank_counts.data();
        a.recv_src = received.recv_src;
        a.recv_row = received.recv_row;
        a.out = reinterpret_cast<std::byte*>(r.out.data());
        a.num_tokens = kTokens[i];
        a.num_recv = r.flight->report.num_recv;
        a.num_rows = r.flight->report.num_rows;
        a.hidden = kHidden;
        a.num_topk = kTopk;
        a.layout = kind.layout;
        CombineWants wants;
        wants.num_sms = 2;
        r.device->combine(a, wants, r.stream);
    }
    int finish_combine(int i) {
        Rank& r = ranks[i];
        cudaStreamSynchronize(r.stream);
        const int code = r.device->verdict().incident.code;
        if (code != kOk) return code;
        const auto deferred = r.device->take_deferred();
        return deferred ? int{deferred->incident.code} : int{kOk};
    }

    // Number of the operation that is forged.
    uint64_t seq() const { return kind.combines ? 2 : 1; }
    int slot() const { return static_cast<int>(seq() % shape.num_slots); }

    // What of the victim's block the forger writes in this operation.
    std::vector<Region> forged() const {
        const ControlLayout layout(shape);
        std::vector<Region> regions{
            {layout.notice(slot(), kForger), NoticeLayout(shape).words * 8},
            {layout.arrived_word(slot(), kForger), 8},
            {layout.pulled_word(slot(), kForger), 8},
        };
        if (kind.staged) regions.push_back({layout.stage(slot()), shape.stage_bytes});
        return regions;
    }
    std::byte* control(int64_t offset) const { return peers[kVictim].control->data() + offset; }

    // Bytes of the victim's arena that were never granted still are what they were.
    bool is_untouched() const {
        const Flight& f = *ranks[kVictim].flight;
        int64_t end = 0;
        for (const Granted& g : f.granted) {
            if (g) end = std::max(end, g.hold->extent().offset + g.hold->extent().bytes);
        }
        if (end == 0) end = kArenaBytes / 2;  // given back; what it was is less than this
        const std::byte* arena = peers[kVictim].arena->data();
        return std::all_of(arena + end, arena + kArenaBytes,
                           [](std::byte b) { return b == kPoison; });
    }
};

// What the victim's memory was after a call in which both took part: regions of its block, its arena.
struct Words {
    std::vector<std::vector<std::byte>> regions;
    std::vector<std::byte> arena;
    int64_t rows = -1, records = 0;  // where recv_row lay, grouped, and its entries
};

Words keep(const Kind& kind) {
    World w(kind);
    for (int i = 0; i < kRanks; ++i) w.dispatch(i);
    for (int i = 0; i < kRanks; ++i) expect_eq(w.finish(i), int{kOk});
    for (int i = 0; kind.combines && i < kRanks; ++i) w.combine(i);
    for (int i = 0; kind.combines && i < kRanks; ++i) expect_eq(w.finish_combine(i), int{kOk});
    Words kept;
    for (const Region& region : w.forged()) {
        kept.regions.emplace_back(w.control(region.offset),
                                  w.control(region.offset + region.bytes));
    }
    const std::byte* arena = w.peers[kVictim].arena->data();
    kept.arena.assign(arena, arena + kArenaBytes);
    const Flight& f = *w.ranks[kVictim].flight;
    if (const Granted& rows = f[Out::kRows]) {
        kept.rows = rows.offset();
        kept.records = f.report.num_recv * kTopk;
    }
    return kept;
}

// The same call of the victim alone. `forge` changes what the other one wrote. With quick clocks the call
// may also end as an honest one does on a machine that pauses.
int attack(const Kind& kind, const Words& kept, const std::function<void(World&)>& forge,
           const PeerClocks& clocks = kPatient) {
    World w(kind, clocks);
    for (int i = 0; kind.combines && i < kRanks; ++i) w.dispatch(i);
    int honest = kOk;
    for (int i = 0; kind.combines && i < kRanks; ++i) honest = std::max(honest, w.finish(i));
    if (honest != kOk) {
        const bool by_clock = honest == kPeerAbsent || honest == kStalled;
        expect(by_clock && clocks.progress_s == kQuick.progress_s, "an honest call fails");
        return honest;
    }
    const auto regions = w.forged();
    for (size_t i = 0; i < regions.size(); ++i) {
        std::copy(kept.regions[i].begin(), kept.regions[i].end(), w.control(regions[i].offset));
    }
    std::copy(kept.arena.begin(), kept.arena.end(), w.peers[kVictim].arena->data());
    forge(w);
    kind.combines ? w.combine(kVictim) : w.dispatch(kVictim);
    const int code = kind.combines ? w.finish_combine(kVictim) : w.finish(kVictim);
    expect(w.is_untouched(), "memory that nobody granted");
    return code;
}

// A word of the notice, its number left as it is.
void forge_word(World& w, int word, uint32_t bits) {
    const ControlLayout layout(w.shape);
    auto* at = reinterpret_cast<uint64_t*>(w.control(layout.notice(w.slot(), kForger))) + word;
    *at = device::pack(bits, w.seq());
}

constexpr uint32_t kOdd[] = {~0u, 0x80000000u, 1u << 20, 64, 0};
constexpr uint32_t kBeyond = 64;  // from here on no number of tokens or rows can be

// Words whose numbers become addresses, lengths or waits, and of which none from kBeyond on can be.
std::set<int> bounded(const Kind& kind) {
    using L = NoticeLayout;
    const NoticeLayout layout(shape_of(kind));
    std::set<int> words;
    if (kind.combines) return {L::kOutput, L::kOutput + 1, L::kNumRows};
    if (kind.staged) words.insert(L::kTokens);
    for (int r = 0; r < kRanks; ++r) words.insert(L::kRows + r);
    const bool counts = kind.staged || kind.layout != RecvLayout::kCompact;
    for (int e = 0; counts && e < kExperts; ++e) words.insert(layout.selections + e);
    for (int i = Grant::kX; !kind.staged && i < Grant::kExtents; ++i) words.insert(L::kGrant + i);
    return words;
}

// Whether a call may end so.
bool is_an_end(int code) {
    const std::set<int> ends{kOk,         kPeerAbsent,  kStalled,  kCallDiffers,
                             kOutOfStep,  kBadCount,    kBadEpoch, kOverCapacity,
                             kOutOfArena, kStaleHandle, kMiscount, kBadExpertId};
    return ends.count(code) != 0;
}

void forge_notices(const Kind& kind) {
    const Words kept = keep(kind);
    expect_eq(attack(kind, kept, [](World&) {}), int{kOk});
    const NoticeLayout layout(shape_of(kind));
    const std::set<int> must = bounded(kind);
    std::vector<int> words;
    for (int i = 0; i <= NoticeLayout::kYWeights + 2; ++i) words.push_back(i);  // and an unused one
    for (int i = NoticeLayout::kRows; !kind.combines && i < layout.end; ++i) words.push_back(i);
    for (const int word : words) {
        for (const uint32_t bits : kOdd) {
            const int extent = word - NoticeLayout::kGrant;
            const bool is_page = !kind.combines && extent >= 0 && extent < Grant::kExtents;
            const bool may_lack = is_page && bits == Grant::kNone &&
                                  (extent == Grant::kIds || extent == Grant::kScales ||
                                   (extent == Grant::kRows && kind.layout == RecvLayout::kCompact));
            const uint32_t beyond = kind.combines ? kArenaBytes
                                    : is_page     ? kArenaBytes / kExtentAlign
                                                  : kBeyond;
            const bool is_bad = must.count(word) != 0 && bits >= beyond && !may_lack;
            const int code = attack(
                kind, kept, [=](World& w) { forge_word(w, word, bits); },
                is_bad ? kPatient : kQuick);
            const std::string what = kind.name() + ": word " + std::to_string(word) + " is " +
                                     std::to_string(bits) + ", code " + std::to_string(code);
            expect(is_bad ? code == kBadCount : is_an_end(code), what.c_str());
        }
    }
}

// A newer number is E241; an older one is waited for.
void forge_numbers(const Kind& kind) {
    const Words kept = keep(kind);
    const auto numbered = [&](uint64_t seq, const PeerClocks& clocks = kPatient) {
        const auto forge = [seq](World& w) {
            const ControlLayout layout(w.shape);
            *reinterpret_cast<uint64_t*>(w.control(layout.notice(w.slot(), kForger))) =
                device::pack(0, seq);
        };
        return attack(kind, kept, forge, clocks);
    };
    const uint64_t seq = kind.combines ? 2 : 1;
    expect_eq(numbered(seq + 1), int{kBadEpoch});
    expect_eq(numbered(seq + 0x40000000), int{kBadEpoch});
    expect_eq(numbered(seq - 1, kind.combines ? kRunsOut : kQuick), int{kPeerAbsent});
}

// Rows of a token, grouped, as its source tells them beside it.
void forge_rows(const Kind& kind) {
    const Words kept = keep(kind);
    // Tokens of the forger come behind the victim's own, which writes its rows itself.
    for (int64_t i = kept.records - 1; i >= kept.records - 2 * kTopk; --i) {
        for (const uint32_t row : {0x80000000u, 0x7fffffffu, 1u << 20, 1000u, ~1u}) {
            const int code = attack(kind, kept, [&](World& w) {
                std::byte* at = w.peers[kVictim].arena->data() + kept.rows + 4 * i;
                *reinterpret_cast<uint32_t*>(at) = row;
            });
            expect_eq(code, int{kBadCount});
        }
    }
}

// What a record of a small dispatch says of its row, and its numbers.
void forge_lines(const Kind& kind) {
    const Words kept = keep(kind);
    const Shape shape = shape_of(kind);
    DispatchArgs a;
    a.hidden = kHidden, a.num_topk = kTopk, a.with_weights = true;
    const Record record = record_of(a);
    const auto forge = [&](int token, int word, uint64_t bits,
                           const PeerClocks& clocks = kPatient) {
        const auto write = [=](World& w) {
            const int64_t place = int64_t{kForger} * shape.max_tokens + token;
            std::byte* at =
                w.control(ControlLayout(shape).stage(w.slot()) + place * record.bytes());
            reinterpret_cast<uint64_t*>(at)[word] = bits;
        };
        return attack(kind, kept, write, clocks);
    };
    const bool compact = kind.layout == RecvLayout::kCompact;
    for (int token = 0; token < kTokens[kForger]; token += 3) {
        // The number of its row among those of the source. Negative: it does not come here.
        for (const uint64_t bits : {0x7fffffffull, 0x7ffffff0ull, 64ull, 1ull << 20}) {
            expect_eq(forge(token, 0, bits), int{kBadCount});
        }
        for (const uint64_t bits : {~0ull, 0x80000000ull}) {
            expect(is_an_end(forge(token, 0, bits, kQuick)), "row");
        }
        // Expert and turn of a slot; the token comes here by number 0.
        for (int slot = 0; slot < kTopk; ++slot) {
            for (const uint64_t turn : {0ull, 18ull, 0x7fffffffull, 0x80000000ull, 0xffffffffull}) {
                for (const int local : {0, 2, 3, 1000, 0xfffff}) {
                    const uint64_t word = turn << 32 | staged_expert(kVictim, local);
                    expect(is_an_end(forge(token, 1 + slot, word, kQuick)), "expert and turn");
                }
            }
            expect(is_an_end(forge(token, 1 + slot, ~0ull, kQuick)), "nobody's");
        }
        // The last word of a line is its number: any other is no line, and is waited for.
        expect_eq(forge(token, kNumberWord, 0, kQuick), int{kStalled});
        expect_eq(forge(token, kNumberWord, 2), int{kBadEpoch});
    }
    if (compact) return;
    // A turn beyond the capacity of an expert that the row has come for.
    int refused = 0;
    for (int token = 0; token < kTokens[kForger]; ++token) {
        refused += forge(token, 1, 18ull << 32 | staged_expert(kVictim, 0), kQuick) == kBadCount;
    }
    expect(refused > 0, "a turn beyond the capacity");
}

// Nobody's word is forged, but one rank sends lines and the other waits for a verdict.
void go_different_ways() {
    World w({RecvLayout::kSlab, true, false});
    for (int round = 0; round < 4; ++round) {
        w.dispatch(0);
        w.dispatch(1, RecvLayout::kGrouped, false);
        for (int i = 0; i < kRanks; ++i) expect_eq(w.finish(i), int{kCallDiffers});
        for (int i = 0; i < kRanks; ++i) w.dispatch(i);
        for (int i = 0; i < kRanks; ++i) expect_eq(w.finish(i), int{kOk});
    }
}

}  // namespace

int main() {
    test("a small batch here, none there", go_different_ways);
    std::vector<Kind> kinds;
    for (const RecvLayout layout :
         {RecvLayout::kCompact, RecvLayout::kGrouped, RecvLayout::kSlab}) {
        if (layout != RecvLayout::kSlab) kinds.push_back({layout, false, false});
        if (layout != RecvLayout::kGrouped) kinds.push_back({layout, true, false});
    }
    kinds.push_back({RecvLayout::kCompact, false, true});
    for (const Kind& kind : kinds) {
        test(("forged notices: " + kind.name()).c_str(), [&] { forge_notices(kind); });
        test(("forged numbers: " + kind.name()).c_str(), [&] { forge_numbers(kind); });
        if (kind.layout == RecvLayout::kGrouped) {
            test(("forged rows: " + kind.name()).c_str(), [&] { forge_rows(kind); });
        }
        if (!kind.staged) continue;
        test(("forged lines: " + kind.name()).c_str(), [&] { forge_lines(kind); });
    }
    return finish();
}
