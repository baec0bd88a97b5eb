// Ranks as threads of one process over shared memory: what the thread sanitizer looks at.
//
// Every row carries its source and token, so a row in a wrong place shows.
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/communicator.h"

namespace {

using namespace ep;

constexpr int kRanks = 3, kExperts = 6, kTopk = 4, kHidden = 8, kMaxTokens = 40;
constexpr int64_t kArenaBytes = int64_t{1} << 20;

float value_of(int rank, int64_t token) { return static_cast<float>(1000 * rank + token); }

std::vector<int32_t> owners() {
    std::vector<int32_t> owner(kExperts);
    for (int e = 0; e < kExperts; ++e) owner[e] = e * kRanks / kExperts;
    return owner;
}

// One rank's inputs and what a handle keeps. Routings are random, with -1 and duplicates.
struct Call {
    int rank;
    int64_t tokens;
    std::vector<float> x;
    std::vector<int64_t> topk_idx, kept_idx;
    std::vector<int32_t> send_row, expert_counts, recv_src, recv_row;
    std::vector<int64_t> rank_counts;
    DispatchArgs args;

    Call(int r, int seed, RecvLayout layout) : rank(r) {
        std::mt19937 random(static_cast<unsigned>(seed * 100 + r));
        tokens = random() % (kMaxTokens + 1);
        x.resize(tokens * kHidden);
        topk_idx.resize(tokens * kTopk);
        for (int64_t i = 0; i < tokens * kHidden; ++i) x[i] = value_of(r, i / kHidden);
        for (int64_t& id : topk_idx) id = static_cast<int64_t>(random() % (kExperts + 1)) - 1;
        send_row.resize(tokens * kTopk);
        kept_idx.resize(tokens * kTopk);
        expert_counts.resize(kExperts);
        rank_counts.resize(2 * kRanks);
        args.x = reinterpret_cast<const std::byte*>(x.data());
        args.topk_idx = topk_idx.data();
        args.routed_idx = kept_idx.data();
        args.send_row = send_row.data();
        args.rank_counts = rank_counts.data();
        args.expert_counts = expert_counts.data();
        args.num_tokens = tokens;
        args.x_stride = kHidden * sizeof(float);
        args.hidden = kHidden;
        args.num_topk = kTopk;
        args.layout = layout;
        if (layout == RecvLayout::kSlab) args.capacity = kRanks * kMaxTokens * kTopk;
        args.dtype = DType::kF32;
    }

    // How many contributions a token gets back: one per rank (compact) or per selection.
    int copies(int64_t token) const {
        const std::vector<int32_t> owner = owners();
        std::multiset<int> ranks;
        for (int k = 0; k < kTopk; ++k) {
            if (const int64_t id = kept_idx[token * kTopk + k]; id >= 0) ranks.insert(owner[id]);
        }
        if (args.layout != RecvLayout::kCompact) return static_cast<int>(ranks.size());
        return static_cast<int>(std::set<int>(ranks.begin(), ranks.end()).size());
    }
};

// Unpacks, checks the rows that arrived, and returns them as an expert output outside the arena.
std::vector<float> receive(cpu::Communicator& comm, Call& call, const cpu::Dispatched& got) {
    call.recv_src.assign(2 * got.num_recv, -2);
    call.recv_row.assign(kTopk * got.num_recv, -2);
    UnpackArgs out;
    out.recv_src = call.recv_src.data();
    out.recv_row = call.recv_row.data();
    out.max_recv = got.num_recv;
    out.max_rows = got.num_rows;
    expect(comm.rank().unpack(got, call.args, out), "unpack refused the metadata");
    expect(call.kept_idx == call.topk_idx, "the ids kept are not those given");
    call.topk_idx.assign(call.topk_idx.size(), 0);  // from here on the handle needs its own only
    const bool slab = call.args.layout == RecvLayout::kSlab;
    const int64_t rows = got.num_rows * (slab ? comm.rank().experts().num_local(call.rank) : 1);
    std::vector<float> y(rows * kHidden, 0.0f);
    if (got.x) {
        std::memcpy(y.data(), comm.rank().arena_data() + got.x->extent().offset,
                    y.size() * sizeof(float));
    }
    for (int64_t i = 0; i < got.num_recv; ++i) {
        const float want = value_of(call.recv_src[2 * i], call.recv_src[2 * i + 1]);
        if (call.args.layout == RecvLayout::kCompact) expect_eq(y[i * kHidden], want);
        for (int k = 0; k < kTopk && call.args.layout != RecvLayout::kCompact; ++k) {
            const int32_t row = call.recv_row[i * kTopk + k];
            if (row >= 0) expect_eq(y[row * kHidden + kHidden - 1], want);
        }
    }
    return y;
}

CombineArgs combine_args(const Call& call, const cpu::Dispatched& got, const std::vector<float>& y,
                         std::vector<float>& out) {
    out.assign(call.tokens * kHidden, -1.0f);
    CombineArgs args;
    args.x = reinterpret_cast<const std::byte*>(y.data());
    args.topk_idx = call.kept_idx.data();
    args.send_row = call.send_row.data();
    args.rank_counts = call.rank_counts.data();
    args.recv_src = call.recv_src.data();
    args.recv_row = call.recv_row.data();
    args.out = reinterpret_cast<std::byte*>(out.data());
    args.num_tokens = call.tokens;
    args.num_recv = got.num_recv;
    args.num_rows = static_cast<int64_t>(y.size()) / kHidden;
    args.hidden = kHidden;
    args.num_topk = kTopk;
    args.layout = call.args.layout;
    args.dtype = DType::kF32;
    args.routing = got.seq;
    return args;
}

void expect_combined(const Call& call, const std::vector<float>& out) {
    for (int64_t t = 0; t < call.tokens; ++t) {
        const float want = static_cast<float>(call.copies(t)) * value_of(call.rank, t);
        expect_eq(out[t * kHidden], want);
        expect_eq(out[t * kHidden + kHidden - 1], want);
    }
}

// Runs `body(communicator, rank)` on a thread for each rank of a fresh group.
template <class Body>
void with_ranks(Body body) {
    const Shape shape{kRanks, 2, kExperts, kExperts / kRanks, kTopk, kMaxTokens};
    std::vector<cpu::Peer> peers;
    for (int r = 0; r < kRanks; ++r) {
        peers.push_back({Segment::create("control", ControlLayout(shape).end),
                         Segment::create("arena", kArenaBytes),
                         {}});
    }
    std::vector<std::unique_ptr<cpu::Communicator>> comms;
    for (int r = 0; r < kRanks; ++r) {
        auto arena = std::make_shared<Arena>(kArenaBytes, peers[r].arena);
        comms.push_back(std::make_unique<cpu::Communicator>(std::make_unique<cpu::Rank>(
            shape, r, 42, owners(), peers, std::move(arena), cpu::Clocks{})));
    }
    std::vector<std::thread> threads;
    for (int r = 0; r < kRanks; ++r) threads.emplace_back([&, r] { body(*comms[r], r); });
    for (std::thread& thread : threads) thread.join();
}

const cpu::WaitHooks kNoHooks{nullptr, nullptr};

// per_rank: with statistics, too.
void round_trip(cpu::Communicator& comm, int rank, int seed, RecvLayout layout,
                bool per_rank = false) {
    Call call(rank, seed, layout);
    std::vector<int32_t> rows(kExperts, 7);
    std::vector<int64_t> waits(kRanks, 7);
    if (per_rank) call.args.recv_stats = rows.data(), call.args.wait_stats = waits.data();
    const cpu::Dispatched got = comm.dispatch(call.args, kNoHooks);
    expect_eq(int{got.outcome.incident.code}, int{kOk});
    if (!got.outcome.ok()) return;
    const std::vector<float> y = receive(comm, call, got);
    std::vector<float> out;
    CombineArgs back = combine_args(call, got, y, out);
    back.per_rank = per_rank;
    if (per_rank) back.wait_stats = waits.data();
    const Outcome outcome = comm.combine(back, kNoHooks);
    expect_eq(int{outcome.incident.code}, int{kOk});
    expect_combined(call, out);
    if (!per_rank) return;
    for (int e = 0; e < comm.rank().experts().num_local(rank); ++e) {
        expect_eq(rows[e], 7 + call.expert_counts[e]);
    }
    expect_eq(waits[rank], int64_t{7});
    for (const int64_t waited : waits) expect(waited >= 7, "a wait shorter than nothing");
}

}  // namespace

int main() {
    test("round trips in every layout, more than there are slots", [] {
        with_ranks([](cpu::Communicator& comm, int rank) {
            for (int seed = 0; seed < 12; ++seed) {
                round_trip(comm, rank, seed, static_cast<RecvLayout>(seed % 3));
            }
        });
    });

    test("owners add up their rows, and statistics are filled", [] {
        with_ranks([](cpu::Communicator& comm, int rank) {
            for (int seed = 20; seed < 32; ++seed) {
                const bool slab = seed % 2 == 0;
                round_trip(comm, rank, seed, slab ? RecvLayout::kSlab : RecvLayout::kGrouped, true);
            }
        });
    });

    test("begun operations run in order and may be waited for in any", [] {
        with_ranks([](cpu::Communicator& comm, int rank) {
            Call first(rank, 50, RecvLayout::kCompact), second(rank, 51, RecvLayout::kGrouped);
            const auto a = comm.begin_dispatch(first.args);
            const auto b = comm.begin_dispatch(second.args);
            expect(b->wait(kNoHooks) && a->wait(kNoHooks), "a wait was interrupted");
            const std::vector<float> ya = receive(comm, first, a->dispatched);
            const std::vector<float> yb = receive(comm, second, b->dispatched);
            std::vector<float> out_a, out_b;
            const auto c = comm.begin_combine(combine_args(first, a->dispatched, ya, out_a));
            const auto d = comm.begin_combine(combine_args(second, b->dispatched, yb, out_b));
            expect(d->wait(kNoHooks) && c->wait(kNoHooks), "a wait was interrupted");
            expect_combined(first, out_a);
            expect_combined(second, out_b);
        });
    });

    test("one rank's bad expert id fails the call everywhere, the next one works", [] {
        with_ranks([](cpu::Communicator& comm, int rank) {
            Call call(rank, 60, RecvLayout::kGrouped);
            std::vector<int64_t> bad(kTopk, kExperts);
            if (rank == 1) {
                call.args.topk_idx = bad.data();
                call.args.num_tokens = 1;
                call.x.resize(kHidden);
                call.args.x = reinterpret_cast<const std::byte*>(call.x.data());
                call.send_row.resize(kTopk);
                call.args.send_row = call.send_row.data();
                call.args.routed_idx = nullptr;  // not wanted
            }
            const cpu::Dispatched got = comm.dispatch(call.args, kNoHooks);
            expect_eq(int{got.outcome.incident.code}, int{kBadExpertId});
            round_trip(comm, rank, 61, RecvLayout::kCompact);
        });
    });
    return finish();
}
