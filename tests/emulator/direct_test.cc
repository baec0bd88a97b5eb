// Small batches that go straight to their ranks on other nodes, on pretended clusters, compared with plain
// loops, bit for bit: whatever is asked of a call, over slow and disordered rails, beside calls that take the
// long way, and what goes wrong.
//
// direct_test stress [seconds] [seed]: random clusters, calls and delays for so long.
#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdlib>
#include <string>
#include <vector>

#include "cluster.h"

namespace {

using namespace world;

Case small(int nodes, int per_node, Case c, bool halves) {
    c = cluster(nodes, per_node, c);
    c.staged = true;
    c.halves = halves;
    if (c.layout == RecvLayout::kCompact) c.is_static = true;
    if (c.layout == RecvLayout::kSlab) c.capacity = 40 * c.topk;
    return c;
}

void expect_direct(World& w) {
    expect(w.ranks[0].device->stages(w.args_of(0)), "goes by rails");
    CombineArgs back;
    back.hidden = w.c.hidden, back.num_topk = w.c.topk;
    back.layout = w.c.layout, back.per_rank = w.c.per_rank;
    expect(w.ranks[0].device->stages(back), "comes back by rails");
}

void run_direct(const Case& c) {
    {
        World w(c);
        expect_direct(w);
    }
    run(c);
}

// Of a cluster of two nodes with two ranks each.
template <class Change>
void run_with(Case base, bool halves, Change change) {
    run_direct(with(small(2, 2, base, halves), change));
}

void expect_good(World& w) {
    w.dispatch();
    const Expected e = expect_of(w);
    for (int d = 0; d < w.c.ranks; ++d) check_rank(w, e, d, false);
    check_combine(w, e, true);
}

// What one rank begins and waits for later.
struct Begun {
    std::vector<std::shared_ptr<Flight>> flights;
    std::vector<std::vector<int32_t>> numbers, send_row, counts;
    std::vector<std::vector<int64_t>> rank_counts;
};

// Two dispatches are begun everywhere; each rank waits for them in an order of its own.
void run_outstanding(World& w, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<Begun> all(w.c.ranks);
    for (int round = 0; round < 2; ++round) {
        for (int i = 0; i < w.c.ranks; ++i) {
            Rank& r = w.ranks[i];
            r.begun[0] = r.begun[1] = {};
            (void)w.args_of(i);  // makes room
            Begun& begun = all[i];
            begun.numbers.emplace_back(2 + sizeof(ep::Begun) / 4, -7);
            begun.send_row.push_back(r.send_row);
            begun.counts.push_back(r.counts);
            begun.rank_counts.push_back(r.rank_counts);
        }
        for (int i = 0; i < w.c.ranks; ++i) {
            Rank& r = w.ranks[i];
            Begun& begun = all[i];
            DispatchArgs a = w.args_of(i);
            a.send_row = begun.send_row[round].data();
            a.expert_counts = begun.counts[round].data();
            a.rank_counts = begun.rank_counts[round].data();
            DispatchWants wants;
            wants.status = begun.numbers[round].data();
            wants.num_recv = wants.status + 1;
            wants.begun = reinterpret_cast<ep::Begun*>(wants.status + 2);
            wants.num_sms = w.c.num_sms;
            wants.wide_ids = w.c.wide;
            wants.reports = !w.c.is_static;
            wants.in_halves = true;
            begun.flights.push_back(r.device->dispatch(a, wants, r.stream));
        }
    }
    for (int i = 0; i < w.c.ranks; ++i) {
        const int first = static_cast<int>(random() % 2);
        for (const int n : {first, 1 - first}) {
            w.ranks[i].device->finish(*all[i].flights[n], w.ranks[i].stream);
        }
    }
    const Expected e = expect_of(w);
    for (int round = 0; round < 2; ++round) {
        for (int i = 0; i < w.c.ranks; ++i) {
            Rank& r = w.ranks[i];
            r.flight = all[i].flights[round];
            if (!w.c.is_static) {
                while (!r.device->await_report(*r.flight, std::chrono::milliseconds(100))) {
                }
            }
            r.device->settle(*r.flight);
            cudaStreamSynchronize(r.stream);
            r.numbers.assign(all[i].numbers[round].begin(), all[i].numbers[round].begin() + 2);
            r.send_row = all[i].send_row[round];
            r.counts = all[i].counts[round];
            r.rank_counts = all[i].rank_counts[round];
            r.args = r.flight->job.args;
        }
        for (int d = 0; d < w.c.ranks; ++d) check_rank(w, e, d, false);
        check_combine(w, e, true);
    }
}

// A rail from rank `from` loses what is put behind notices: rows of small batches, and chunks.
Trouble loses_rows(const World& w, int to) {
    Trouble t;
    t.stalled_peer = to, t.lost_from = RailLayout(w.rail).came.offset;
    return t;
}

Case random_case(std::mt19937& random) {
    const auto draw = [&](int below) { return static_cast<int>(random() % below); };
    const std::pair<int, int> shapes[] = {{2, 1}, {2, 2}, {3, 1}, {2, 3}, {3, 2}, {4, 2}, {5, 1}};
    const auto [nodes, per_node] = shapes[draw(7)];
    Case c = draw(2) == 0 ? slab() : Case{};
    c.seed = random();
    const bool is_wide = draw(4) == 0;  // with fewer rows, which have to fit
    c.topk = 1 + draw(is_wide ? 2 : 8);
    c.hidden = is_wide ? 2432 : 32 * (1 + draw(4));
    c = small(nodes, per_node, c, draw(2) == 0);
    c.experts = c.ranks + draw(3 * c.ranks);
    c.tokens.clear();
    for (int r = 0; r < 3; ++r) c.tokens.push_back(draw(4) == 0 ? 0 : draw(40));
    c.arena_bytes = 64 << 20;
    c.num_sms = 1 + draw(4);
    c.one_expert = draw(8) == 0;
    c.weights = draw(3) != 0;
    c.wide = draw(2) == 0;
    if (c.layout == RecvLayout::kSlab) {
        c.capacity = c.ranks * 40 * c.topk;
        c.is_static = draw(2) == 0;
        c.per_rank = draw(3) == 0;
        c.weighted = c.weights && draw(2) == 0;
    }
    if (draw(4) == 0) c.quantize = Quantize::kFp8;
    if (c.quantize == Quantize::kNone && draw(3) == 0) c.scale_words = 1 + draw(5);
    for (Trouble& t : c.trouble) t = slow(random(), draw(200));
    return c;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1 && std::string(argv[1]) == "stress") {
        return stress(argc > 2 ? std::atof(argv[2]) : 60, argc > 3 ? std::atoi(argv[3]) : 1,
                      random_case);
    }
    for (const bool halves : {false, true}) {
        const std::string how = halves ? ", in halves" : "";
        for (const auto& [nodes, per_node] :
             {std::pair{2, 1}, {3, 1}, {2, 2}, {2, 4}, {4, 2}, {8, 2}}) {
            const std::string shape = std::to_string(nodes) + " x " + std::to_string(per_node);
            test((shape + how).c_str(), [&] {
                run_direct(small(nodes, per_node, slab(), halves));
                run_direct(small(nodes, per_node, {}, halves));
            });
        }
        test(("slab, compact, static, narrow, without weights" + how).c_str(), [&] {
            run_with(slab(), halves, [](Case& c) { c.is_static = true; });
            for (const Case& base : {Case{}, slab()}) {
                run_with(base, halves, [](Case& c) { c.wide = c.weights = false; });
                run_with(base, halves, [](Case& c) { c.origins = true; });
            }
        });
        test(("top 1, top 32, blocks of any number" + how).c_str(), [&] {
            for (const Case& base : {Case{}, slab()}) {
                run_with(base, halves, [](Case& c) { c.topk = 1; });
                run_with(base, halves,
                         [](Case& c) { c.topk = 32, c.experts = 40, c.capacity = 600; });
                run_with(base, halves, [](Case& c) { c.num_sms = 1; });
                run_with(base, halves, [](Case& c) { c.num_sms = 7; });
            }
        });
        test(("few of the SMs that it takes are enough" + how).c_str(), [&] {
            emulator::set_resident(2);
            for (const Case& base : {Case{}, slab()}) {
                run_with(base, halves, [](Case& c) { c.num_sms = 7; });
                run_direct(with(small(4, 1, base, halves), [](Case& c) { c.num_sms = 7; }));
            }
            emulator::set_resident(0);
        });
        test(("rows in pieces, scales, quantized" + how).c_str(), [&] {
            for (const Case& base : {Case{}, slab()}) {
                run_with(base, halves, [](Case& c) { c.hidden = 2408, c.scale_words = 7; });
                run_with(base, halves, [](Case& c) { c.scale_words = 1; });
                run_with(base, halves,
                         [](Case& c) { c.hidden = 2432, c.quantize = Quantize::kFp8; });
            }
        });
        test(("no tokens, one, all to one expert" + how).c_str(), [&] {
            for (const Case& base : {Case{}, slab()}) {
                run_with(base, halves, [](Case& c) { c.tokens = {0}; });
                run_with(base, halves, [](Case& c) { c.tokens = {0, 1}; });
                run_with(base, halves, [](Case& c) { c.one_expert = true; });
            }
        });
        test(("sums of rows, of ranks, weighted" + how).c_str(), [&] {
            for (const int hidden : {24, 2408}) {
                const auto wide = [hidden](Case& c) { c.hidden = hidden, c.topk = 5; };
                run_with(slab(), halves, [&](Case& c) { wide(c), c.weighted = true; });
                run_with(slab(), halves, [&](Case& c) { wide(c), c.per_rank = true; });
                run_with(slab(), halves, [&](Case& c) { wide(c), c.per_rank = c.weighted = true; });
                run_with({}, halves, wide);
            }
        });
        test(("replicas" + how).c_str(),
             [&] { run_with({}, halves, [](Case& c) { c.replicas = true; }); });
        test(("statistics" + how).c_str(), [&] {
            run_stats(small(2, 2, slab(), halves));
            run_stats(small(3, 1, {}, halves));
        });
        test(("slots go round, and calls that take the rails in between" + how).c_str(), [&] {
            World w(small(2, 2, slab(), halves));
            expect_direct(w);
            for (int round = 0; round < 6; ++round) {
                expect_good(w);
                if (round % 2 == 0) continue;
                const Case kept = w.c;
                w.c.layout = RecvLayout::kGrouped, w.c.alignment = 4, w.c.capacity = -1;
                w.c.staged = w.c.halves = false;
                expect(!w.ranks[0].device->stages(w.args_of(0)), "goes straight");
                expect_good(w);
                w.c = kept;
            }
        });
        test(("what came straight goes back by rails, and the other way round" + how).c_str(), [&] {
            for (const Case& base : {Case{}, slab()}) {
                for (const bool weights : {false, true}) {
                    World w(with(small(3, 2, base, halves),
                                 [&](Case& c) { c.weights = c.weighted = weights; }));
                    if (base.layout == RecvLayout::kCompact) w.c.weighted = false;
                    expect_direct(w);
                    w.dispatch();
                    const Expected e = expect_of(w);
                    for (int d = 0; d < w.c.ranks; ++d) check_rank(w, e, d, false);
                    w.c.staged = w.c.halves = false;  // weights come back, too
                    check_combine(w, e, true);
                }
            }
            World w(with(small(2, 2, grouped(), halves), [](Case& c) { c.topk = 2; }));
            w.c.halves = false;
            w.dispatch();
            w.c.halves = halves;
            check_combine(w, expect_of(w), false);
        });
        test(("bad ids fail everywhere, and the next call works" + how).c_str(), [&] {
            World w(small(2, 2, slab(), halves));
            const int64_t good = w.ranks[2].ids[7];
            for (int round = 0; round < 3; ++round) {
                w.ranks[2].ids[7] = 99;
                w.dispatch();
                for (const Rank& r : w.ranks) {
                    expect_eq(code_of(r), int{kBadExpertId});
                    expect_eq(r.flight->report.outcome.incident.peer, int16_t{2});
                    expect_eq(r.flight->report.outcome.detail[3], int64_t{99});
                }
            }
            w.ranks[2].ids[7] = good;
            expect_good(w);
        });
        test(("too many rows fail everywhere, and calls that differ" + how).c_str(), [&] {
            World w(small(2, 2, slab(), halves));
            w.c.capacity = 1;
            w.dispatch();
            for (const Rank& r : w.ranks) expect_eq(code_of(r), int{kOverCapacity});
            w.c.capacity = 120;
            // Rank 1 takes the rails, all others go straight.
            for (int i = 0; i < w.c.ranks; ++i) {
                DispatchArgs a = w.args_of(i);
                if (i == 1) a.layout = RecvLayout::kGrouped, a.capacity = a.given_capacity = -1;
                if (i == 1) w.c.layout = RecvLayout::kGrouped;
                w.queue(i, a, true);
                w.c.layout = RecvLayout::kSlab;
            }
            w.finish(true);
            for (const Rank& r : w.ranks) expect_eq(code_of(r), int{kCallDiffers});
            expect_good(w);
        });
        test(("refusals, several in a row, fail everywhere" + how).c_str(), [&] {
            World w(small(3, 2, slab(), halves));
            for (const int rank : {3, 3, 3, 0, 5}) refuse_on(w, rank);
            expect_good(w);
        });
        test(("rows that a rail loses are missed, and their source is named" + how).c_str(), [&] {
            World w(with(small(2, 2, slab(), halves),
                         [](Case& c) { c.limit_s = kRunsOut, c.tokens = {12}; }));
            w.dispatch();
            w.ranks[3].rails->set_trouble(loses_rows(w, 0));
            w.dispatch();
            expect_stall(w, 0, {Site::kRailChunk}, 3);
        });
        test(("a rank that falls silent is named by all on other nodes" + how).c_str(), [&] {
            World w(with(small(2, 2, slab(), halves), [](Case& c) { c.limit_s = kRunsOut; }));
            w.dispatch();
            Trouble t;
            t.is_silent = true;
            w.ranks[3].rails->set_trouble(t);
            for (int i = 0; i < w.c.ranks; ++i) w.queue(i, w.args_of(i), true);
            w.finish(true);
            for (const int r : {0, 1}) {
                const Incident incident = w.ranks[r].device->verdict().incident;
                expect_eq(int{incident.code}, int{kPeerAbsent});
                expect_eq(int{incident.peer}, 3);
                const bool waits = incident.site == Site::kRailNotice ||
                                   incident.site == Site::kEntry || incident.site == Site::kSlot;
                expect(waits, "a wait");
            }
        });
    }
    for (const Case& base : {Case{}, slab()}) {
        test("two outstanding, waited for in any order", [&] {
            World w(small(2, 2, base, true));
            for (unsigned round = 0; round < 4; ++round) run_outstanding(w, round);
        });
    }
    test("what is put straight is counted", [] {
        World w(small(2, 2, slab(), false));
        w.dispatch();
        for (int r = 0; r < 4; ++r) {
            int64_t out = 0;
            for (int t = 0; t < w.tokens(r); ++t) {
                std::vector<bool> visits(w.c.ranks, false);
                for (int k = 0; k < w.c.topk; ++k) {
                    const int64_t id = w.ranks[r].ids[t * w.c.topk + k];
                    if (id >= 0) visits[w.owner[id]] = true;
                }
                for (int p = 0; p < w.c.ranks; ++p) out += visits[p] && w.node(p) != w.node(r);
            }
            const std::vector<uint64_t> ever = w.ranks[r].device->rails()->counters();
            expect_eq(ever[int(RailCounter::kDirectOut)], uint64_t(out));
            expect_eq(ever[int(RailCounter::kRecordsOut)], uint64_t{0});
        }
    });
    return finish();
}
