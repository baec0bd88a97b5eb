// Clusters of pretended nodes on a CPU, compared with plain loops, bit for bit: every shape, every layout,
// slow and disordered rails, and what goes wrong.
//
// hybrid_test stress [seconds] [seed]: random clusters, calls and delays for so long.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "cluster.h"

namespace {

using namespace world;

// Every rank's stores reach all nodes; or those of some, as where nodes share an NVLink domain by twos.
Case mapped(Case c, bool all = true) {
    for (size_t r = 0; r < c.trouble.size(); ++r) c.trouble[r].is_mapped = all || r % 2 == 0;
    return c;
}

// All that can be asked of a call, on a cluster of three nodes with two ranks each.
template <class Change>
void run_on_cluster(Case c, Change change) {
    run(with(cluster(3, 2, c), change));
}

void expect_good(World& w) {
    w.dispatch();
    const Expected e = expect_of(w);
    for (int d = 0; d < w.c.ranks; ++d) check_rank(w, e, d, false);
}

// ---- random clusters ----

Case random_case(std::mt19937& random) {
    const auto draw = [&](int below) { return static_cast<int>(random() % below); };
    const std::pair<int, int> shapes[] = {{2, 1}, {2, 2}, {3, 1}, {2, 3}, {3, 2}, {4, 2}, {5, 1}};
    const auto [nodes, per_node] = shapes[draw(7)];
    const RecvLayout layouts[] = {RecvLayout::kCompact, RecvLayout::kGrouped, RecvLayout::kSlab};
    Case c;
    c.seed = random();
    c = cluster(nodes, per_node, c);
    c.layout = layouts[draw(3)];
    c.arena_bytes = 64 << 20;
    c.topk = 1 + draw(8);
    c.experts = c.ranks + draw(3 * c.ranks);
    c.hidden = 32 * (1 + draw(4));
    c.tokens.clear();
    for (int r = 0; r < 3; ++r) c.tokens.push_back(draw(4) == 0 ? 0 : draw(40));
    c.channels = 1 + draw(4);
    c.ring_shift = draw(3);
    c.chunk_tokens = 1 + draw(3);
    c.num_sms = 1 + draw(4);
    c.num_warps = 3 + draw(5);
    c.one_expert = draw(8) == 0;
    c.weights = draw(3) != 0;
    c.wide = draw(2) == 0;
    c.is_static = draw(3) == 0;
    if (c.layout == RecvLayout::kGrouped) c.alignment = 1 + draw(4);
    if (c.layout == RecvLayout::kSlab) c.capacity = c.ranks * 40 * c.topk;
    c.per_rank = c.layout != RecvLayout::kCompact && draw(3) == 0;
    c.weighted = c.weights && c.layout != RecvLayout::kCompact && draw(2) == 0;
    c.sum_weights = c.layout == RecvLayout::kCompact && draw(3) == 0;
    if (draw(4) == 0) c.quantize = Quantize::kFp8;
    if (c.quantize == Quantize::kNone && draw(3) == 0) c.scale_words = 1 + draw(5);
    for (Trouble& t : c.trouble) t = slow(random(), draw(200));
    return draw(2) == 0 ? mapped(c, draw(2) == 0) : c;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1 && std::string(argv[1]) == "stress") {
        return stress(argc > 2 ? std::atof(argv[2]) : 60, argc > 3 ? std::atoi(argv[3]) : 1,
                      random_case);
    }
    for (const auto& [nodes, per_node] :
         {std::pair{2, 1}, {3, 1}, {2, 2}, {2, 4}, {4, 2}, {4, 4}, {8, 2}}) {
        const std::string name = std::to_string(nodes) + " x " + std::to_string(per_node);
        test(name.c_str(), [&] { run(cluster(nodes, per_node)); });
    }
    test("grouped", [] { run_on_cluster(grouped(), [](Case&) {}); });
    test("grouped, weighted, static, with scales", [] {
        run_on_cluster(grouped(),
                       [](Case& c) { c.is_static = c.weighted = true, c.scale_words = 3; });
    });
    test("slab", [] { run_on_cluster(slab(), [](Case& c) { c.capacity = 70; }); });
    test("slab, weighted, static, with scales", [] {
        run_on_cluster(slab(), [](Case& c) {
            c.capacity = 70, c.is_static = c.weighted = true, c.scale_words = 4;
        });
    });
    test("static, row index, origins", [] {
        run_on_cluster({}, [](Case& c) { c.is_static = true; });
        run_on_cluster({}, [](Case& c) { c.row_index = true, c.alignment = 4; });
        run_on_cluster({}, [](Case& c) { c.origins = true; });
        run_on_cluster(grouped(), [](Case& c) { c.origins = c.is_static = true; });
    });
    test("narrow ids, no weights, top 1, top 32", [] {
        run_on_cluster({}, [](Case& c) { c.wide = c.weights = false; });
        run_on_cluster({}, [](Case& c) { c.topk = 1; });
        run_on_cluster({}, [](Case& c) { c.topk = 32, c.experts = 40; });
    });
    test("owners add up their rows", [] {
        for (const Case& base : {grouped(), slab()}) {
            run_on_cluster(base, [](Case& c) {
                c.per_rank = true, c.topk = 5;
                if (c.capacity > 0) c.capacity = 90;
            });
            run_on_cluster(base, [](Case& c) {
                c.per_rank = c.weighted = true, c.topk = 5;
                if (c.capacity > 0) c.capacity = 90;
            });
        }
    });
    test("statistics", [] {
        run_stats(cluster(2, 2));
        run_stats(cluster(3, 1, grouped()));
    });
    test("weights that are summed",
         [] { run_on_cluster({}, [](Case& c) { c.sum_weights = true; }); });
    test("quantized, beside shared memory that a linker has added", [] {
        emulator::set_static_shared(9584);
        run(with(cluster(2, 1), [](Case& c) {
            c.tokens = {2, 1};
            c.hidden = 7040, c.quantize = Quantize::kFp8, c.num_warps = 0, c.weights = false;
            c.trouble.clear();
        }));
        emulator::set_static_shared(2048);
    });
    test("scales in units, and not", [] {
        run_on_cluster({}, [](Case& c) { c.scale_words = 4; });
        run_on_cluster({}, [](Case& c) { c.scale_words = 3; });
    });
    test("quantized on the way", [] {
        for (const Case& base : {Case{}, grouped(), slab()}) {
            run_on_cluster(base, [](Case& c) {
                c.quantize = Quantize::kFp8, c.hidden = 128;
                if (c.layout == RecvLayout::kSlab) c.capacity = 70;
            });
        }
    });
    test("replicas", [] { run_on_cluster({}, [](Case& c) { c.replicas = true; }); });
    test("all to one expert, and nobody to any", [] {
        run_on_cluster({}, [](Case& c) { c.one_expert = true; });
        run_on_cluster({}, [](Case& c) { c.tokens = {0}; });
    });
    test("staging of a chunk of one token", [] {
        for (const Case& base : {Case{}, grouped()}) {
            run_on_cluster(base, [](Case& c) { c.ring_shift = 0, c.chunk_tokens = 1; });
        }
    });
    test("blocks and channels of any number", [] {
        run_on_cluster({}, [](Case& c) { c.channels = 5, c.num_sms = 2; });
        run_on_cluster({}, [](Case& c) { c.channels = 3, c.num_sms = 1, c.num_warps = 3; });
        run_on_cluster(grouped(), [](Case& c) { c.channels = 1, c.num_sms = 4, c.num_warps = 16; });
    });
    test("nodes whose memory is mapped", [] {
        for (const bool all : {true, false}) {
            run(mapped(cluster(2, 2), all));
            run(mapped(cluster(3, 2, grouped()), all));
            run(mapped(with(cluster(3, 1), [](Case& c) { c.hidden = 256, c.chunk_bytes = 384; }),
                       all));
            run(mapped(with(cluster(2, 2), [](Case& c) { c.ring_shift = 0, c.chunk_tokens = 1; }),
                       all));
        }
        run(mapped(with(cluster(2, 2, slab()), [](Case& c) {
            c.weighted = true, c.quantize = Quantize::kFp8, c.hidden = 128, c.capacity = 70;
        })));
        run(mapped(with(cluster(2, 2), [](Case& c) { c.sum_weights = true; })));
    });
    test("many tokens", [] {
        run(with(cluster(2, 2),
                 [](Case& c) { c.tokens = {300, 171}, c.hidden = 8, c.chunk_tokens = 4; }));
    });
    test("rows in pieces: of a stage, of a chunk, of both", [] {
        const auto wide = [](Case& c) { c.hidden = 20000, c.tokens = {3, 2}; };
        run(with(with(cluster(3, 1), wide), [](Case& c) { c.chunk_tokens = 1; }));
        run_on_cluster(grouped(), [](Case& c) { c.hidden = 256, c.chunk_bytes = 384; });
        run(with(with(cluster(3, 1), wide), [](Case& c) { c.chunk_bytes = 9000; }));
        run_on_cluster(
            {}, [](Case& c) { c.hidden = 256, c.chunk_bytes = 256, c.quantize = Quantize::kFp8; });
    });
    test("bad ids fail everywhere, and the next call works", [] {
        World w(cluster(2, 2));
        const int64_t good = w.ranks[2].ids[7];
        w.ranks[2].ids[7] = 99;
        w.dispatch();
        for (const Rank& r : w.ranks) {
            expect_eq(code_of(r), int{kBadExpertId});
            expect_eq(r.flight->report.outcome.incident.peer, int16_t{2});
            expect_eq(r.flight->report.outcome.detail[3], int64_t{99});
        }
        w.ranks[2].ids[7] = good;
        expect_good(w);
    });
    test("too many rows fail everywhere, and no memory for them", [] {
        World w(with(cluster(2, 2), [](Case& c) { c.capacity = 2; }));
        w.dispatch();
        for (const Rank& r : w.ranks) expect_eq(code_of(r), int{kOverCapacity});
        World v(cluster(2, 2));
        auto hold = v.ranks[1].arena->grant(v.c.arena_bytes - 2 * kExtentAlign, v.ranks[1].stream);
        v.dispatch();
        for (const Rank& r : v.ranks) {
            expect_eq(code_of(r), int{kOutOfArena});
            expect_eq(r.flight->report.outcome.incident.peer, int16_t{1});
        }
        hold.reset();
        expect_good(v);
    });
    test("refusals, several in a row, fail everywhere: who refuses relays", [] {
        World w(cluster(3, 2));
        for (const int rank : {3, 3, 3, 0, 5}) refuse_on(w, rank);
        expect_good(w);
    });
    test("a changed handle fails everywhere", [] { run_changed_handle(cluster(2, 2), 2); });
    test("a rail that stalls while rows cross is named by both its ends", [] {
        World w(with(cluster(2, 2), [](Case& c) { c.limit_s = kRunsOut, c.tokens = {40}; }));
        w.dispatch();
        // From now on rank 1 sends nothing to rank 3 but its notices: what it announces never comes.
        Trouble t;
        t.stalled_peer = 3, t.lost_from = RailLayout(w.rail).tails.offset;
        w.ranks[1].rails->set_trouble(t);
        w.dispatch();
        // Its credits are lost, too. A rank of the same node may see first that rows are missing.
        expect_stall(w, 3, {Site::kRailChunk, Site::kRailCredit, Site::kRows}, 1);
        expect_stall(w, 1, {Site::kRailCredit, Site::kRows}, 3);
        for (const Rank& r : w.ranks) expect(r.device->failed(), "a rank goes on");
    });
    test("a rank that falls silent is named by all on its rail", [] {
        World w(with(cluster(3, 1), [](Case& c) { c.limit_s = kRunsOut; }));
        w.dispatch();
        Trouble t;
        t.is_silent = true;
        w.ranks[2].rails->set_trouble(t);
        for (int i = 0; i < 3; ++i) w.queue(i, w.args_of(i), true);
        w.finish(true);
        for (const int r : {0, 1}) {
            const Incident incident = w.ranks[r].device->verdict().incident;
            expect_eq(int{incident.code}, int{kPeerAbsent});
            expect_eq(int{incident.peer}, 2);
            // Who relays waits for it, and who waits for the relay.
            expect(incident.site == Site::kRailNotice || incident.site == Site::kEntry, "a wait");
        }
    });
    test("what has crossed is counted", [] {
        World w(cluster(2, 2));
        w.dispatch();
        for (int r = 0; r < 4; ++r) {
            int64_t home = 0, out = 0;
            for (int t = 0; t < w.tokens(r); ++t) {
                bool visits[2] = {false, false};
                for (int k = 0; k < w.c.topk; ++k) {
                    const int64_t id = w.ranks[r].ids[t * w.c.topk + k];
                    if (id >= 0) visits[w.node(w.owner[id])] = true;
                }
                home += visits[w.node(r)];
                out += visits[1 - w.node(r)];
            }
            const std::vector<uint64_t> ever = w.ranks[r].device->rails()->counters();
            expect_eq(ever[int(RailCounter::kTokens)], uint64_t(w.tokens(r)));
            expect_eq(ever[int(RailCounter::kHomeVisits)], uint64_t(home));
            expect_eq(ever[int(RailCounter::kRecordsOut)], uint64_t(out));
        }
    });
    return finish();
}
