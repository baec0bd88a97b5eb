// A rank whose peer writes nonsense: no number of a peer may become an address before it was bounded.
//
// Rank 0 is real, rank 1 is this test. Everything rank 0 will wait for is written beforehand, so
// nothing waits and one thread plays both. What the sanitizers and the guard pages do not report is
// checked here: an outcome is either one of our codes or a result whose memory exists.
//
//     hostile_test [number of inputs] [seed]
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "contract/calls.h"
#include "cpu/rank.h"

namespace {

using namespace ep;

constexpr int kExperts = 5, kTopk = 3, kHidden = 8, kMaxTokens = 6;
constexpr int64_t kArenaBytes = 16 * 4096;

using Random = std::mt19937_64;

int64_t pick(Random& random, int64_t end) { return static_cast<int64_t>(random() % uint64_t(end)); }

// Numbers that break comparisons, products and narrowings.
int64_t hostile_number(Random& random) {
    static constexpr int64_t kNumbers[] = {
        -1,
        0,
        1,
        2,
        kMaxTokens,
        kMaxTokens + 1,
        4096,
        INT32_MAX,
        INT32_MIN,
        INT64_MAX,
        INT64_MIN,
        1 << 16,
        (1 << 16) - 1,
        -4096,
        1LL << 32,
        1LL << 40,
        -(1LL << 40),
        1LL << 60,
        -(1LL << 60),
        kArenaBytes,
        kArenaBytes - 1,
    };
    if (pick(random, 4) == 0) return static_cast<int64_t>(random());
    const auto number = static_cast<uint64_t>(kNumbers[pick(random, std::size(kNumbers))]);
    return static_cast<int64_t>(number + uint64_t(pick(random, 3)) - 1);  // wraps
}

// Overwrites a few aligned 4- or 8-byte words of a record.
void scramble(Random& random, void* record, int64_t bytes, int64_t words) {
    for (int64_t i = 0; i < words; ++i) {
        const int64_t number = hostile_number(random);
        const int64_t size = pick(random, 2) == 0 ? 4 : 8;
        if (bytes < size) continue;
        const int64_t at = pick(random, bytes / size) * size;
        std::memcpy(static_cast<std::byte*>(record) + at, &number, size);
    }
}

struct World {
    Shape shape{2, 2, kExperts, 3, kTopk, kMaxTokens};
    std::vector<int32_t> owner{0, 0, 0, 1, 1};
    ControlLayout layout{shape};
    std::vector<cpu::Peer> peers;
    std::unique_ptr<cpu::Rank> rank;

    explicit World(Random& random) {
        for (int r = 0; r < 2; ++r) {
            peers.push_back({Segment::create("control", layout.end),
                             Segment::create("arena", kArenaBytes),
                             {}});
        }
        // What peers left in the arena lies there when rank 0 takes it.
        if (pick(random, 2) == 0) {
            for (auto& peer : peers) {
                auto* words = reinterpret_cast<int32_t*>(peer.arena->data());
                for (int64_t i = 0; i < kArenaBytes / 4; ++i) {
                    words[i] = static_cast<int32_t>(pick(random, 3) == 0 ? hostile_number(random)
                                                                         : pick(random, 8) - 1);
                }
            }
        }
        auto arena = std::make_shared<Arena>(kArenaBytes, peers[0].arena);
        rank = std::make_unique<cpu::Rank>(shape, 0, 42, owner, peers, std::move(arena),
                                           cpu::Clocks{0.001, 0.002, 0.002});
        std::atomic_ref(header(1).life).store(static_cast<uint32_t>(Life::kAlive));
    }

    ControlHeader& header(int r) { return *at<ControlHeader>(r, layout.header.offset); }

    template <class T>
    T* at(int r, int64_t offset) {
        return reinterpret_cast<T*>(peers[r].control->data() + offset);
    }
    int slot(uint64_t seq) const { return static_cast<int>(seq % 2); }
};

// A dispatch of rank 0, and what its arguments point at: exactly as long as it must be.
struct Call {
    std::vector<float> x, weights;
    std::vector<int64_t> topk_idx, rank_counts;
    std::vector<int32_t> send_row, expert_counts, rank_ends;
    std::vector<std::byte> scales;
    DispatchArgs args;

    explicit Call(Random& random) {
        const int64_t tokens = pick(random, kMaxTokens + 1);
        x.assign(tokens * kHidden, 1.5f);
        weights.assign(tokens * kTopk, 0.5f);
        topk_idx.resize(tokens * kTopk);
        for (int64_t& id : topk_idx) id = pick(random, kExperts + 1) - 1;
        send_row.assign(tokens * kTopk, -7);
        rank_counts.assign(4, 0);
        expert_counts.assign(3, 0);
        args.x = reinterpret_cast<const std::byte*>(x.data());
        args.topk_idx = topk_idx.data();
        args.send_row = send_row.data();
        args.rank_counts = rank_counts.data();
        args.expert_counts = expert_counts.data();
        args.num_tokens = tokens;
        args.x_stride = kHidden * sizeof(float);
        args.hidden = kHidden;
        args.num_topk = kTopk;
        args.dtype = DType::kF32;
        args.layout = static_cast<RecvLayout>(pick(random, 3));
        if (args.layout == RecvLayout::kGrouped && pick(random, 2) == 0) args.alignment = 4;
        if (args.layout == RecvLayout::kSlab) args.capacity = 2 * kMaxTokens;
        if (pick(random, 3) == 0) {
            args.is_static = true;
            args.capacity = args.layout == RecvLayout::kSlab ? 2 * kMaxTokens : 64;
        }
        args.given_capacity = args.capacity;
        if (pick(random, 4) == 0) {
            rank_ends.assign(4, -7);
            args.rank_ends = rank_ends.data();
        }
        args.with_weights = pick(random, 2) == 0;
        if (args.with_weights) args.topk_weights = weights.data();
        if (pick(random, 2) == 0) {
            args.scale_bytes = 8;
            scales.resize(tokens * 8);
            args.scales = scales.data();
        }
    }
};

// Rank 1's half of the conversation: honest, then scrambled here and there.
void play_peer(Random& random, World& w, uint64_t seq, OpKind kind, const Descriptor& descriptor,
               int64_t num_topk, int64_t rows = -1) {
    const int slot = w.slot(seq);
    const auto unlucky = [&](int64_t of) { return pick(random, of) == 0; };
    EntryRecord entry{};
    entry.kind = static_cast<int32_t>(kind);
    entry.descriptor = descriptor;
    entry.num_tokens = kMaxTokens;
    entry.num_rows = rows < 0 ? pick(random, kMaxTokens + 1) : rows;
    entry.y_offset = pick(random, 8) * 4096;
    entry.streamed_rows = unlucky(2) ? pick(random, kMaxTokens * num_topk + 1) : -1;
    entry.ring_rows = pick(random, 16);
    entry.weights_offset = pick(random, 8) * 4096;
    int32_t counts[3] = {};
    for (int64_t i = 0; i < entry.num_rows * num_topk; ++i) {
        const int64_t e = pick(random, 4);
        if (e < 3) ++counts[e];
    }
    if (unlucky(3)) scramble(random, &entry.num_tokens, 10 * 8 + kReasonBytes, 1 + pick(random, 2));
    if (unlucky(8)) scramble(random, &entry.code, 4, 1);
    if (unlucky(16)) scramble(random, &entry, sizeof(entry), 1 + pick(random, 3));
    if (unlucky(6)) scramble(random, counts, sizeof(counts), 1);
    entry.seq = unlucky(32) ? static_cast<uint64_t>(hostile_number(random)) : seq;
    std::memcpy(w.at<EntryRecord>(0, w.layout.entry(slot, 1)), &entry, sizeof(entry));
    std::memcpy(w.at<int32_t>(0, w.layout.count_row(slot, 1)), counts, sizeof(counts));

    BaseRecord base{};
    base.x_offset = pick(random, 8) * 4096;
    base.meta_offset = pick(random, 8) * 4096;
    base.row = pick(random, 4);
    base.num_rows = pick(random, 64);
    if (unlucky(3)) scramble(random, &base.x_offset, 48, 1 + pick(random, 2));
    if (unlucky(8)) scramble(random, &base.code, 4, 1);
    base.seq = unlucky(32) ? static_cast<uint64_t>(hostile_number(random)) : seq;
    std::memcpy(w.at<BaseRecord>(0, w.layout.base(slot, 1)), &base, sizeof(base));
    for (int e = 3; e < kExperts; ++e) {
        *w.at<int32_t>(0, w.layout.expert_row(slot, e)) =
            static_cast<int32_t>(unlucky(4) ? hostile_number(random) : pick(random, 32));
    }
    const auto word = [&](uint64_t honest) {
        return unlucky(24) ? static_cast<uint64_t>(hostile_number(random)) : honest;
    };
    *w.at<uint64_t>(0, w.layout.arrived_word(slot, 1)) += word(kMaxTokens);
    *w.at<uint64_t>(0, w.layout.pulled_word(slot, 1)) = word(seq);
    *w.at<uint64_t>(0, w.layout.staged_word(1)) += word(pick(random, 16));
    *w.at<uint64_t>(0, w.layout.taken_word(1)) += word(pick(random, 16));
    *w.at<uint64_t>(0, w.layout.released_word(slot, 1)) = word(seq);

    if (unlucky(12)) {
        ControlHeader& header = w.header(1);
        scramble(random, &header.verdict, sizeof(Incident), 1 + pick(random, 4));
        header.verdict_valid = static_cast<uint64_t>(pick(random, 2));
        header.life = static_cast<uint32_t>(unlucky(4) ? hostile_number(random) : pick(random, 4));
    }
}

bool one_of_ours(int code) {
    static constexpr int kCodes[] = {
        kPeerAbsent,  kStalled,      kPeerDied,   kPeerLeft, kBadDtype, kBadShape, kBadExpertId,
        kCallDiffers, kOverCapacity, kOutOfArena, kBadCount, kBadEpoch, kMiscount, kStaleHandle,
        kOutOfStep,   202,           203,         210,       211};
    for (const int known : kCodes) {
        if (code == known) return true;
    }
    return false;
}

void expect_outcome(const Outcome& outcome) {
    if (outcome.ok()) return;
    expect(one_of_ours(outcome.incident.code), "a code of the peer's own making came out");
    expect(outcome.incident.peer >= -1 && outcome.incident.peer < 2, "blames a rank that is none");
    expect(std::memchr(outcome.reason, '\0', kReasonBytes) != nullptr, "reason without an end");
}

// What Python does with a result: tensors of exactly the sizes the result states.
struct Received {
    std::vector<int32_t> recv_src, recv_row, offsets, index;
    std::vector<int32_t> row_token;
    std::vector<int64_t> topk_idx, source_range;
    std::vector<float> weights;
    std::vector<std::byte> scales;
    UnpackArgs out;

    Received(Random& random, const Call& call, const cpu::Dispatched& got) {
        const DispatchArgs& a = call.args;
        const bool compact = a.layout == RecvLayout::kCompact;
        const int64_t slabs = a.layout == RecvLayout::kSlab ? 3 : 1;
        const int64_t rows = got.num_rows * slabs;
        const int64_t max_recv =
            a.is_static ? std::max<int64_t>(got.num_recv, 2 * kMaxTokens) : got.num_recv;
        recv_src.assign(2 * max_recv, -9);
        recv_row.assign(compact ? 0 : max_recv * kTopk, -9);
        topk_idx.assign(compact ? rows * kTopk : rows, -9);
        weights.assign(topk_idx.size(), -9.0f);
        out.recv_src = recv_src.data();
        out.recv_row = recv_row.data();
        out.topk_idx = topk_idx.data();
        if (a.with_weights) out.topk_weights = weights.data();
        if (a.scale_bytes > 0) {
            const int64_t columns = (got.num_rows + 3) / 4 * 4;
            scales.resize(slabs == 1 ? rows * a.scale_bytes : slabs * columns * a.scale_bytes);
            out.scales = scales.data();
        }
        if (!compact && pick(random, 2) == 0) {
            row_token.assign(rows, -9);
            source_range.assign(3 * 2, -9);
            out.row_token = row_token.data();
            out.source_range = source_range.data();
        }
        out.max_recv = max_recv;
        out.max_rows = got.num_rows;
        if (a.layout == RecvLayout::kGrouped || (compact && pick(random, 2) == 0)) {
            offsets.assign(4, -9);
            out.offsets = offsets.data();
        }
        if (compact && out.offsets != nullptr) {
            int64_t total = 0;
            for (const int32_t n : call.expert_counts) total += n;
            index.assign(total, -9);
            out.row_index = index.data();
            out.max_index = total;
        }
    }
};

void combine(Random& random, World& w, const Call& call, const Received& recv,
             const cpu::Dispatched& got) {
    const bool slab = call.args.layout == RecvLayout::kSlab;
    const int64_t rows = got.num_rows * (slab ? 3 : 1);
    std::vector<float> y(rows * kHidden, 2.5f), out(call.args.num_tokens * kHidden, -1.0f);
    std::vector<float> y_weights(rows * kTopk, 0.25f), out_weights(call.args.num_tokens * kTopk);
    CombineArgs a;
    a.x = reinterpret_cast<const std::byte*>(y.data());
    a.topk_idx = call.topk_idx.data();
    a.send_row = call.send_row.data();
    a.rank_counts = call.rank_counts.data();
    a.recv_src = recv.recv_src.data();
    a.recv_row = recv.recv_row.data();
    a.out = reinterpret_cast<std::byte*>(out.data());
    a.num_tokens = call.args.num_tokens;
    a.num_recv = recv.out.max_recv;
    a.num_rows = rows;
    a.hidden = kHidden;
    a.num_topk = kTopk;
    a.layout = call.args.layout;
    a.dtype = DType::kF32;
    a.routing = got.seq;
    a.topk_order = a.layout != RecvLayout::kCompact && pick(random, 2) == 0;
    if (pick(random, 2) == 0) {
        a.with_weights = true;
        a.sum_weights = a.layout == RecvLayout::kCompact && pick(random, 2) == 0;
        a.y_weights = y_weights.data();
        a.out_weights = out_weights.data();
    }
    const uint64_t seq = w.rank->take_seq();
    play_peer(random, w, seq, OpKind::kCombine, describe(a), kTopk);
    expect_outcome(w.rank->combine(seq, a, {nullptr, nullptr}));
}

// Over the same routing, which the peer pretends to remember.
void dispatch_again(Random& random, World& w, Call& call, Received& recv,
                    const cpu::Dispatched& first) {
    call.args.cached = true;
    call.args.routing = first.seq;
    call.args.rank_ends = nullptr;
    const uint64_t seq = w.rank->take_seq();
    play_peer(random, w, seq, OpKind::kDispatch, describe(call.args), kTopk, call.rank_counts[3]);
    const cpu::Dispatched got = w.rank->dispatch(seq, call.args, {nullptr, nullptr});
    expect_outcome(got.outcome);
    if (!got.outcome.ok()) return;
    expect_eq(got.num_rows, first.num_rows);
    recv.out.topk_idx = nullptr;
    recv.out.offsets = recv.out.row_index = recv.out.row_token = nullptr;
    recv.out.source_range = nullptr;
    (void)w.rank->unpack(got, call.args, recv.out);
}

void one_input(uint64_t seed) {
    Random random(seed);
    World w(random);
    for (int op = 0; op < 3; ++op) {
        Call call(random);
        const uint64_t seq = w.rank->take_seq();
        play_peer(random, w, seq, OpKind::kDispatch, describe(call.args), kTopk);
        const cpu::Dispatched got = w.rank->dispatch(seq, call.args, {nullptr, nullptr});
        expect_outcome(got.outcome);
        if (!got.outcome.ok()) continue;
        expect(got.x != nullptr, "a result without rows");
        if (got.x == nullptr) continue;
        Received recv(random, call, got);
        if (!w.rank->unpack(got, call.args, recv.out)) continue;
        combine(random, w, call, recv, got);
        dispatch_again(random, w, call, recv, got);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const uint64_t inputs = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 3000;
    const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
    test("a peer's nonsense ends in an error or in a result, never outside our memory", [&] {
        for (uint64_t seed = first; seed < first + inputs; ++seed) {
            const int before = tally().failures;
            one_input(seed);
            if (tally().failures != before) std::cerr << "seed " << seed << "\n";
        }
    });

    test("memory of a peer is mapped only when it is sealed and as long as it says", [] {
        const auto refused = [](int fd, int64_t bytes) {
            try {
                Segment::map(fd, bytes);
                return false;
            } catch (const SystemError&) {
                return true;
            }
        };
        const auto good = Segment::create("good", 3 * 4096);
        for (const int64_t bytes : {int64_t{0}, int64_t{-1}, int64_t{-4096}, int64_t{3 * 4096 + 1},
                                    INT64_MAX, INT64_MIN, INT64_MAX - 4096}) {
            expect(refused(good->fd(), bytes), "mapped more, or less, than there is");
        }
        expect(!refused(good->fd(), 2 * 4096 + 1), "refused honest memory");
        expect(refused(-1, 4096), "mapped no descriptor");
        const int unsealed = memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        expect_eq(ftruncate(unsealed, 4096), 0);
        expect(refused(unsealed, 4096), "mapped memory that a peer could cut off");
        close(unsealed);
    });
    return finish();
}
