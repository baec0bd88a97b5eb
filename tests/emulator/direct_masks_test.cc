// Small batches across nodes go on without ranks that are lost, as those of one node do (masks_test): whether
// a survivor stands on the node of the lost rank or on another, and whatever rails had brought of it by then. A
// put that was under way when its rank died is one that no signal tells of.
//
// direct_masks_test stress [seconds] [seed]: random clusters, losses and delays for so long.
#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdlib>
#include <set>
#include <string>
#include <vector>

#include "cluster.h"
#include "masks.h"

namespace {

using namespace world;

Case masked(int nodes, int per_node, bool halves = false) {
    return with(cluster(nodes, per_node, slab()), [halves](Case& c) {
        c.staged = c.masks = true;
        c.halves = halves;
        c.capacity = 40 * c.topk;
        c.num_sms = 3;
    });
}

bool is_far(const World& w, int a, int b) { return w.node(a) != w.node(b); }

// ---- what rails had not brought to a survivor ----

void take_back(const World& w, int at, int64_t word) {
    --*reinterpret_cast<uint64_t*>(w.segments[at]->data() + word);
}

void lose_notice(const World& w, int at, int slot, int src) {
    if (is_far(w, at, src)) {
        take_back(w, at, RailLayout(w.rail).entered_word(static_cast<uint64_t>(slot), src));
    } else {
        wipe_words(w, at, slot, src, 0, NoticeLayout(w.shape).words);
    }
}

void lose_record(const World& w, int at, int slot, int src) {
    if (is_far(w, at, src)) return take_back(w, at, RailLayout(w.rail).came_word(slot, src));
    for (int t = 0; t < w.tokens(src); ++t) {
        wipe_record(w, at, slot, src * w.shape.max_tokens + t, record_of(w.ranks[at].args), 0);
    }
}

void lose_sum(const World& w, int at, int rank) {
    if (!is_far(w, at, rank)) return lose_in_combine(w, at, rank);
    const int slot = w.ranks[at].begun[1].slot;
    for (const int64_t id : w.ranks[at].ids) {
        if (id >= 0 && w.owner[id] == rank) {
            return take_back(w, at, RailLayout(w.rail).came_word(slot, rank));
        }
    }
    lose_notice(w, at, slot, rank);
}

// ---- what comes of it ----

// What a handle keeps of the tokens of our rail, in their order: of `lost`, which was counted on, no row.
void check_log(const World& w, const Expected& e, int d, int lost) {
    const Rank& r = w.ranks[d];
    const int per_node = w.c.per_node();
    const RailLog log{w.c.topk, w.c.weights};
    const auto* kept = reinterpret_cast<const int32_t*>(r.rail_log->data());
    int64_t n = 0;
    for (int src = d % per_node; src < w.c.ranks; src += per_node) {
        if (!is_far(w, src, d) || (w.gone[src] && src != lost)) continue;
        for (int t = 0; t < w.tokens(src); ++t) {
            std::vector<int> row(w.c.topk, -1), expert(w.c.topk, -1);
            bool here = false;
            for (int k = 0; k < w.c.topk; ++k) {
                const int64_t id = w.ranks[src].ids[t * w.c.topk + k];
                if (id < 0 || is_far(w, w.owner[id], d)) continue;
                here = true;
                row[k] = src == lost ? -1 : e.send_row[src][t * w.c.topk + k];
                if (row[k] < 0) continue;
                const auto local = static_cast<int>(id) - w.first(w.owner[id]);
                expert[k] = expert_at(w.owner[id] % per_node, local);
            }
            for (int k = 0; here && n < r.num_logged && k < w.c.topk; ++k) {
                expect_eq(kept[n * log.words() + log.row(k)], row[k]);
                expect_eq(kept[n * log.words() + log.expert(k)], expert[k]);
            }
            n += here;
        }
    }
    expect_eq(r.num_logged, n);
}

void check_more(World& w, int rounds) {
    check_left(w, rounds);
    check_masked(w);
    const Expected e = expect_of(w);
    for (int d : w.left()) check_log(w, e, d, -1);
}

// ---- losses ----

// Its notice, or its rows, had come to all survivors of a dispatch but one.
void run_lost_in_dispatch(const Case& c, int rank, int alone, bool heard) {
    World w(c);
    const Expected all = expect_of(w);
    dispatch_and_lose(w, rank, alone, [&] {
        (heard ? lose_record : lose_notice)(w, alone, w.ranks[alone].begun[0].slot, rank);
    });
    const Expected without = expect_of(w);
    for (int d : w.left()) {
        if (d == alone && heard) {
            check_lost_rows(w, all, d, rank);
            check_log(w, all, d, rank);
        } else {
            check_rank(w, d == alone ? without : all, d, false);
        }
    }
    check_combine(w, heard ? all : as_owners_see(w, all, without, alone), true);
    check_more(w, 4);
}

// It had done its part of some calls, but to one survivor had not said that it had left the last one.
void run_lost_at_end(const Case& c, int rank, int alone) {
    World w(c);
    check_left(w, 2);
    const int slot = w.ranks[alone].begun[1].slot;
    take_back(w, alone, RailLayout(w.rail).released_word(slot, rank));
    w.gone[rank] = true;
    const FoundDead found(w, {rank});
    check_more(w, 4);
}

void mask_by_hand(World& w, std::set<int> who) {
    for (int rank : who) w.gone[rank] = true;
    for (int rank : who) w.ranks[w.left().front()].device->mask(rank);
}

// By rails, with all ranks.
void check_long_way(World& w) {
    const Case kept = w.c;
    w.c.layout = RecvLayout::kGrouped, w.c.alignment = 4, w.c.capacity = -1;
    w.c.staged = w.c.halves = false;
    check_left(w, 2);
    w.c = kept;
    w.c.staged = false;  // weights come back
    check_left(w, 1);
    w.c = kept;
}

// The first half of a dispatch by a rank that then makes no more calls; rails bring some of what it sent.
void run_lost_somewhere(World& w, int rank, const Trouble& trouble) {
    w.ranks[rank].rails->set_trouble(trouble);
    for (int i : w.left()) w.queue(i, w.args_of(i), true);
    for (int i : w.left()) cudaStreamSynchronize(w.ranks[i].stream);
    w.gone[rank] = true;
    const FoundDead found(w, {rank});
    w.finish(true);
    for (int i : w.left()) expect_eq(code_of(w.ranks[i]), int{kOk});
    check_more(w, 2);
}

Trouble loses(const World& w, std::mt19937& random) {
    Trouble t = slow(random(), 20);
    t.is_silent = random() % 2 == 0;
    if (!t.is_silent) t.stalled_peer = static_cast<int>(random() % w.c.ranks);
    if (random() % 2 == 0) t.lost_from = RailLayout(w.rail).came.offset;
    return t;
}

int stress_losses(double seconds, unsigned seed) {
    using Clock = std::chrono::steady_clock;
    const auto end = Clock::now() + std::chrono::duration<double>(seconds);
    std::mt19937 random(seed);
    const std::pair<int, int> shapes[] = {{2, 1}, {2, 2}, {3, 1}, {2, 3}, {3, 2}, {4, 1}, {4, 2}};
    for (int n = 0; Clock::now() < end; ++n) {
        const auto [nodes, per_node] = shapes[random() % 7];
        const Case c = with(masked(nodes, per_node, true), [&](Case& c) {
            c.seed = random();
            c.num_sms = 1 + static_cast<int>(random() % 4);
            c.hidden = random() % 4 == 0 ? 2408 : 24;
            c.per_rank = random() % 3 == 0;
            c.weighted = random() % 2 == 0;
            for (Trouble& t : c.trouble) t = slow(random(), random() % 100);
        });
        const std::string name = "random " + std::to_string(n) + ": " + std::to_string(nodes) +
                                 " x " + std::to_string(per_node) + ", seed " +
                                 std::to_string(c.seed);
        test(name.c_str(), [&] {
            World w(c);
            std::set<int> dead;
            check_left(w, static_cast<int>(random() % 3));
            while (w.left().size() > 1 && random() % 5 != 0) {
                const int rank = w.left()[random() % w.left().size()];
                switch (random() % 4) {
                    case 0:
                        mask_by_hand(w, {rank});
                        check_more(w, 1 + static_cast<int>(random() % 3));
                        break;
                    case 1: {
                        w.gone[rank] = true;
                        dead.insert(rank);
                        const FoundDead found(w, {rank});
                        check_more(w, 2);
                        break;
                    }
                    case 2:
                        dead.insert(rank);
                        run_lost_somewhere(w, rank, loses(w, random));
                        break;
                    default:
                        unmask(w, dead);
                        check_more(w, 1 + static_cast<int>(random() % 3));
                }
            }
        });
    }
    return finish();
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1 && std::string(argv[1]) == "stress") {
        return stress_losses(argc > 2 ? std::atof(argv[2]) : 60, argc > 3 ? std::atoi(argv[3]) : 1);
    }
    for (const bool halves : {false, true}) {
        const std::string how = halves ? ", in halves" : "";
        test(("masked before a call" + how).c_str(), [&] {
            run_explicit(masked(2, 2, halves), {2});
            run_explicit(masked(2, 2, halves), {1});
            run_explicit(masked(4, 1, halves), {0});
            run_explicit(masked(2, 1, halves), {1});
            run_explicit(masked(4, 2, halves), {3, 6});
            run_explicit(masked(3, 2, halves), {2, 3});  // a whole node
        });
        test(("never came" + how).c_str(), [&] {
            run_absent(masked(2, 2, halves), {3});
            run_absent(masked(2, 2, halves), {0});
            run_absent(masked(4, 1, halves), {0, 2});
            run_absent(masked(3, 2, halves), {1, 4});
        });
        test(("few of the SMs that it takes are enough" + how).c_str(), [&] {
            emulator::set_resident(2);
            const auto many = [](Case& c) { c.num_sms = 7; };
            run_explicit(with(masked(2, 2, halves), many), {2});
            run_absent(with(masked(2, 2, halves), many), {0});
            emulator::set_resident(0);
        });
        test(("refused without those that are lost" + how).c_str(), [&] {
            run_refused(masked(2, 2, halves), 2, 1);
            run_refused(masked(4, 1, halves), 0, 3);
        });
    }
    test("died when some had its notice", [] {
        run_lost_in_dispatch(masked(2, 2, true), 2, 0, false);
        run_lost_in_dispatch(masked(2, 2, true), 2, 3, false);
        run_lost_in_dispatch(masked(4, 1, true), 0, 2, false);
    });
    test("died when some had its rows", [] {
        run_lost_in_dispatch(masked(2, 2, true), 2, 0, true);
        run_lost_in_dispatch(masked(2, 2, true), 2, 3, true);
        run_lost_in_dispatch(masked(2, 2, true), 2, 1, true);
        run_lost_in_dispatch(masked(4, 1, true), 0, 2, true);
        run_lost_in_dispatch(with(masked(4, 1, true), [](Case& c) { c.hidden = 2408; }), 2, 0,
                             true);
    });
    test("died in a combine", [] {
        for (const auto& [nodes, per_node] : {std::pair{2, 2}, {4, 1}}) {
            for (const int hidden : {24, 2408}) {
                const Case base = with(masked(nodes, per_node, true),
                                       [hidden](Case& c) { c.hidden = hidden, c.weighted = true; });
                run_lost_in_combine(base, 2, lose_sum);
                run_lost_in_combine(base, 0, lose_sum);
                run_lost_in_combine(with(base, [](Case& c) { c.per_rank = true; }), 0, lose_sum);
            }
        }
    });
    test("died before it said that it had left a call", [] {
        run_lost_at_end(masked(2, 2, true), 2, 0);
        run_lost_at_end(masked(4, 1, true), 1, 3);
    });
    test("the clock of all runs out", [] {
        const auto limit = [](Case& c) { c.limit_s = kRunsOut; };
        run_late(with(masked(2, 2), limit), {3});
        run_late(with(masked(4, 1), limit), {1});
        // Two that one warp would wait for, one after the other. So many take their time.
        run_late(with(masked(14, 1), [&](Case& c) { c.limit_s = 3 * kRunsOut, c.num_sms = 1; }),
                 {0, 11});
    });
    test("the clock of one rank runs out when another is about to come",
         [] { run_apart(with(masked(3, 1), [](Case& c) { c.limit_s = kRunsOut; })); });
    for (const auto& [nodes, per_node] : {std::pair{2, 2}, {4, 1}}) {
        const std::string shape = std::to_string(nodes) + " x " + std::to_string(per_node);
        test(("unmasked by all, " + shape).c_str(), [&] {
            World w(masked(nodes, per_node));
            check_left(w, 2);
            for (const std::set<int>& who : {std::set{1}, {2}, {0, 3}, {1, 2, 3}}) {
                mask_by_hand(w, who);
                check_more(w, 3);
                unmask(w);
                check_more(w, 3);
                check_long_way(w);
            }
            // More often than there are words for masks.
            for (int round = 0; round < 2 * int{kMaskAges} + 3; ++round) {
                mask_by_hand(w, {round % 4});
                if (round % 2 == 0) check_left(w, 1);
                unmask(w);
                if (round % 3 == 0) check_more(w, 1);
            }
            check_more(w, 2);
            check_long_way(w);
        });
    }
    test("who died stays masked", [] {
        World w(masked(4, 1));
        check_left(w, 1);
        mask_by_hand(w, {1, 2});
        check_left(w, 2);
        unmask(w, {2});
        check_more(w, 4);
        mask_by_hand(w, {3});
        check_more(w, 2);
        unmask(w, {2});
        check_more(w, 2);
    });
    test("whatever rails had brought of it", [] {
        std::mt19937 random(7);
        for (int round = 0; round < 6; ++round) {
            World w(masked(round % 2 == 0 ? 2 : 4, round % 2 == 0 ? 2 : 1, true));
            check_left(w, 1);
            run_lost_somewhere(w, round % 4, loses(w, random));
        }
    });
    return finish();
}
