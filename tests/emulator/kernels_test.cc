// The kernels of csrc/kernels with their host code, on a CPU: several ranks in one process, compared with
// plain loops, bit for bit.
#include <cuda_runtime_api.h>

#include <memory>
#include <string>
#include <vector>

#include "world.h"

namespace {

using namespace world;

}  // namespace

int main() {
    test("two ranks", [] { run({}); });
    test("one rank, one block", [] { run(ranks(1, 1)); });
    test("three ranks", [] { run(ranks(3, 3)); });
    test("five ranks, one block each", [] { run(ranks(5, 1)); });
    test("narrow ids, no weights",
         [] { run(with(ranks(4, 2), [](Case& c) { c.wide = false, c.weights = false; })); });
    test("top 1, and top 32", [] {
        run(with(ranks(3, 2), [](Case& c) { c.topk = 1; }));
        run(with(ranks(2, 2), [](Case& c) { c.topk = 32, c.experts = 40; }));
    });
    test("all to one expert", [] { run(with(ranks(4, 2), [](Case& c) { c.one_expert = true; })); });
    test("fewer experts than ranks",
         [] { run(with(ranks(4, 2), [](Case& c) { c.experts = 2; })); });
    test("many tokens are counted in chunks",
         [] { run(with(ranks(2, 4), [](Case& c) { c.tokens = {1400, 1026}, c.hidden = 8; })); });
    test("many on one rank, few on the other",
         [] { run(with(ranks(2, 3), [](Case& c) { c.tokens = {1100, 3}, c.hidden = 8; })); });
    test("scales in units, and not", [] {
        run(with(ranks(3, 2), [](Case& c) { c.scale_words = 4; }));
        run(with(ranks(3, 2), [](Case& c) { c.scale_words = 3; }));
    });
    test("static", [] { run(with(ranks(3, 2), [](Case& c) { c.is_static = true; })); });
    test("static with scales and a capacity", [] {
        run(with(ranks(3, 2),
                 [](Case& c) { c.is_static = true, c.capacity = 40, c.scale_words = 4; }));
    });
    test("row index", [] {
        run(with(ranks(3, 2), [](Case& c) { c.row_index = true, c.alignment = 4; }));
        run(with(ranks(3, 2), [](Case& c) { c.row_index = c.is_static = true, c.alignment = 4; }));
    });
    test("origins", [] {
        run(with(ranks(3, 2), [](Case& c) { c.origins = true; }));
        run(with(ranks(3, 2, grouped()), [](Case& c) { c.origins = true; }));
        run(with(ranks(3, 2, slab()), [](Case& c) { c.origins = c.is_static = true; }));
    });
    test("grouped", [] { run(ranks(3, 2, grouped())); });
    test("grouped, static, with scales", [] {
        run(with(ranks(3, 2, grouped()), [](Case& c) { c.is_static = true, c.scale_words = 3; }));
    });
    test("grouped, many tokens", [] {
        run(with(ranks(2, 3, grouped()), [](Case& c) { c.tokens = {1200, 1030}, c.hidden = 8; }));
    });
    test("slab", [] { run(ranks(3, 2, slab())); });
    test("slab, static, with scales", [] {
        run(with(ranks(3, 2, slab()), [](Case& c) { c.is_static = true, c.scale_words = 3; }));
    });
    test("rows in pieces",
         [] { run(with(ranks(2, 2), [](Case& c) { c.hidden = 20000, c.tokens = {3, 2}; })); });
    test("owners add up their rows", [] {
        for (const Case& base : {grouped(), slab()}) {
            for (const int hidden : {24, 2408}) {
                const Case mine = with(ranks(3, 2, base), [hidden](Case& c) {
                    c.hidden = hidden, c.topk = 5, c.per_rank = true;
                });
                run(mine);
                run(with(mine, [](Case& c) { c.weighted = true; }));
                run(with(mine, [](Case& c) { c.weighted = c.is_static = true; }));
            }
            run(with(ranks(1, 2, base), [](Case& c) { c.per_rank = c.weighted = true; }));
            run(with(ranks(4, 1, base), [](Case& c) {
                c.per_rank = c.one_expert = true;
                if (c.capacity > 0) c.capacity = 90;
            }));
        }
        run(with(ranks(2, 3, grouped()), [](Case& c) {
            c.tokens = {1200, 1030}, c.hidden = 8, c.per_rank = c.weighted = true;
        }));
        run(with(ranks(2, 2, grouped()),
                 [](Case& c) { c.topk = 32, c.experts = 40, c.per_rank = c.weighted = true; }));
    });
    test("statistics", [] {
        run_stats(ranks(3, 2));
        run_stats(ranks(3, 2, grouped()));
        run_stats(with(ranks(4, 1, slab()), [](Case& c) { c.is_static = true; }));
        run_stats(with(ranks(3, 4), [](Case& c) { c.by_copies = true; }));
        for (const bool halves : {false, true}) {
            run_stats(with(ranks(3, 2), [halves](Case& c) {
                c.is_static = c.staged = true, c.halves = halves;
            }));
            run_stats(with(ranks(3, 2, slab()),
                           [halves](Case& c) { c.staged = c.per_rank = true, c.halves = halves; }));
        }
        World w(with(ranks(3, 2), [](Case& c) { c.stats = true; }));
        w.ranks[2].ids[7] = 10;
        w.dispatch();
        for (const Rank& r : w.ranks) {
            expect_eq(code_of(r), int{kBadExpertId});
            const auto none = std::count(r.recv_stats.begin(), r.recv_stats.end(), 100);
            expect_eq(size_t(none), r.recv_stats.size());
        }
    });
    test("by copy engine", [] {
        run(with(ranks(3, 4), [](Case& c) { c.by_copies = true, c.tokens = {50, 0, 33}; }));
    });
    for (const bool halves : {false, true}) {
        const std::string how = halves ? ", in halves" : "";
        const auto small = [halves](int ranks_, int sms, Case c) {
            Case all = ranks(ranks_, sms, c);
            all.staged = true, all.halves = halves;
            return all;
        };
        const auto fixed = with({}, [](Case& c) { c.is_static = true; });
        test(("small: compact" + how).c_str(), [&] {
            run(small(3, 2, fixed));
            run(small(1, 1, fixed));
            run(with(small(5, 3, fixed), [](Case& c) { c.wide = c.weights = false; }));
        });
        test(("small: slab" + how).c_str(), [&] {
            run(small(3, 2, slab()));
            run(with(small(2, 5, slab()), [](Case& c) { c.topk = 32, c.experts = 40; }));
            run(with(small(4, 1, slab()), [](Case& c) { c.is_static = true; }));
            run(with(small(3, 2, slab()), [](Case& c) { c.one_expert = true, c.capacity = 90; }));
        });
        test(("small: rows in pieces, scales" + how).c_str(), [&] {
            for (const Case& base : {fixed, slab()}) {
                run(with(small(2, 4, base),
                         [](Case& c) { c.hidden = 2408, c.scale_words = 7, c.tokens = {5, 0}; }));
                run(with(small(3, 2, base), [](Case& c) { c.hidden = 8, c.scale_words = 1; }));
                run(with(small(2, 2, base), [](Case& c) { c.scale_words = 700; }));
            }
        });
        test(("small: sums in every order" + how).c_str(), [&] {
            for (const int hidden : {24, 2408}) {
                const Case base = with(small(3, 4, slab()), [hidden](Case& c) {
                    c.hidden = hidden, c.topk = 5, c.weighted = true;
                });
                run(base);
                run(with(base, [](Case& c) { c.topk_order = true; }));
                run(with(base, [](Case& c) { c.per_rank = true; }));
                run(with(base, [](Case& c) { c.per_rank = true, c.weighted = false; }));
            }
        });
        test(("small: origins, row index, replicas" + how).c_str(), [&] {
            for (const Case& base : {fixed, slab()}) {
                run(with(small(3, 2, base), [](Case& c) { c.origins = true; }));
                run(with(small(3, 2, base), [](Case& c) { c.replicas = true; }));
            }
            run(with(small(3, 2, fixed), [](Case& c) { c.row_index = true, c.alignment = 4; }));
        });
        test(("small: more experts than threads, and more ranks than lanes" + how).c_str(), [&] {
            for (const Case& base : {fixed, slab()}) {
                run(with(small(2, 3, base), [](Case& c) { c.experts = 1100; }));
                run(with(small(34, 1, base),
                         [](Case& c) { c.experts = 68, c.capacity = c.capacity < 0 ? -1 : 200; }));
            }
        });
        test(("small: what fails, fails everywhere" + how).c_str(), [&] {
            World w(with(small(3, 2, slab()), [](Case& c) { c.replicas = true; }));
            const int64_t good = w.ranks[2].logical[7];
            w.ranks[2].logical[7] = 5;
            w.dispatch();
            for (const Rank& r : w.ranks) {
                expect_eq(code_of(r), int{kBadExpertId});
                expect_eq(r.flight->report.outcome.detail[3], int64_t{5});
                expect_eq(r.numbers[0], int{kBadExpertId});
                expect_eq(r.numbers[1], 0);
                expect(r.send_row == std::vector<int32_t>(r.send_row.size(), -1), "send_row");
            }
            expect(w.ranks[2].load == std::vector<int64_t>(5, 0), "load");
            w.ranks[2].logical[7] = good;
            w.c.capacity = 2;
            w.dispatch();
            for (const Rank& r : w.ranks) expect_eq(code_of(r), int{kOverCapacity});
            w.c.capacity = 30;
            for (int i = 0; i < 3; ++i) {
                DispatchArgs a = w.args_of(i);
                if (i == 1) a.num_topk = 2;
                w.queue(i, a, true);
            }
            w.finish(true);
            for (const Rank& r : w.ranks) expect_eq(code_of(r), int{kCallDiffers});
            Outcome why;
            why.incident.code = kBadShape;
            for (int i = 0; i < 2; ++i) w.queue(i, w.args_of(i), true);
            w.ranks[2].device->refuse(OpKind::kDispatch, why, w.ranks[2].stream);
            for (int i = 0; i < 2; ++i) {
                Rank& r = w.ranks[i];
                r.device->finish(*r.flight, r.stream);
                while (!r.device->await_report(*r.flight, std::chrono::milliseconds(50))) {
                }
                expect_eq(code_of(r), int{kBadShape});
            }
            w.dispatch();
            const Expected e = expect_of(w);
            for (int d = 0; d < 3; ++d) check_rank(w, e, d, false);
        });
    }
    test("kernels overlap where no other rank wants their SMs", [] {
        for (const int blocks : {16, 132}) {
            (void)emulator::early_launches();
            for (const int sms : {0, 2}) {  // who was given SMs holds no others while it waits
                run(with(ranks(2, sms, slab()),
                         [blocks](Case& c) { c.staged = true, c.max_blocks = blocks; }));
                expect_eq(emulator::early_launches() > 0, blocks == 132 && sms == 0);
            }
            run(with(ranks(2, 2), [blocks](Case& c) { c.max_blocks = blocks; }));
            expect_eq(emulator::early_launches() > 0, blocks == 132);
        }
    });
    test("no kernel is wider than the share of its rank", [] {
        const Case shared = with(ranks(2, 0), [](Case& c) { c.max_blocks = 3; });
        const Case many = with(shared, [](Case& c) { c.tokens = {50, 33}; });
        for (const Case& c : {
                 many,
                 with(many, [](Case& c) { c.by_copies = true; }),
                 with(many, [](Case& c) { c.by_copies = true, c.max_blocks = 1; }),
                 with(many, [](Case& c) { c.is_static = c.staged = true; }),
                 with(ranks(2, 0, grouped()), [](Case& c) { c.max_blocks = 3, c.per_rank = true; }),
                 with(ranks(2, 0, slab()), [](Case& c) { c.max_blocks = 3, c.staged = true; }),
             }) {
            (void)emulator::widest_launch();
            run(c);
            expect(emulator::widest_launch() <= c.max_blocks, "blocks");
        }
    });
    test("a small batch takes SMs for its tokens, and leaves half to the next kernel", [] {
        const auto widest = [](int tokens, int max_blocks, int sms) {
            (void)emulator::widest_launch();
            run(with(ranks(2, sms), [&](Case& c) {
                c.staged = c.is_static = true;
                c.tokens = {tokens, 1}, c.max_blocks = max_blocks;
            }));
            return emulator::widest_launch();
        };
        // A token a block, one block that tells what comes, and four times that.
        expect_eq(widest(3, 132, 0), 16);
        expect_eq(widest(40, 132, 0), 66);
        expect_eq(widest(3, 16, 0), 8);
        expect_eq(widest(9, 16, 0), 10);  // as many as it has work for all the same
        expect_eq(widest(3, 132, 6), 6);
        expect_eq(widest(3, 132, 40), 16);
    });
    test("a small batch needs few of the SMs that it takes", [] {
        for (const int resident : {1, 3}) {
            emulator::set_resident(resident);
            const Case wide = with(ranks(3, 8), [](Case& c) { c.staged = true; });
            const Case shapeless = with(wide, [](Case& c) { c.is_static = true; });
            const Case by_expert = with(
                wide, [](Case& c) { c.layout = RecvLayout::kSlab, c.capacity = slab().capacity; });
            run(shapeless);
            run(by_expert);
            run(with(by_expert, [](Case& c) { c.per_rank = true, c.scale_words = 4; }));
            run(with(by_expert, [](Case& c) { c.replicas = true; }));
            run(with(shapeless, [](Case& c) { c.halves = true; }));
            run(with(shapeless, [](Case& c) { c.hidden = 2408, c.tokens = {5, 0, 2}; }));
            emulator::set_resident(0);
        }
    });
    test("bad ids fail everywhere, and the next call works", [] {
        World w(ranks(3, 2));
        const int64_t good = w.ranks[2].ids[7];
        w.ranks[2].ids[7] = 10;
        w.dispatch();
        for (const Rank& r : w.ranks) {
            expect_eq(code_of(r), int{kBadExpertId});
            const Outcome& o = r.flight->report.outcome;
            expect_eq(o.incident.peer, int16_t{2});
            expect_eq(o.detail[0], int64_t{1});
            expect_eq(o.detail[1] * 3 + o.detail[2], int64_t{7});
            expect_eq(o.detail[3], int64_t{10});
        }
        w.ranks[2].ids[7] = good;
        w.dispatch();
        const Expected e = expect_of(w);
        for (int d = 0; d < 3; ++d) check_rank(w, e, d, false);
    });
    test("too many rows fail everywhere", [] {
        World w(with(ranks(3, 2), [](Case& c) { c.capacity = 2; }));
        w.dispatch();
        for (const Rank& r : w.ranks) expect_eq(code_of(r), int{kOverCapacity});
    });
    test("no memory for what comes fails everywhere", [] {
        World w(ranks(3, 2));
        auto hold = w.ranks[1].arena->grant(w.c.arena_bytes - 2 * kExtentAlign, w.ranks[1].stream);
        w.dispatch();
        for (const Rank& r : w.ranks) {
            expect_eq(code_of(r), int{kOutOfArena});
            expect_eq(r.flight->report.outcome.incident.peer, int16_t{1});
        }
        hold.reset();
        w.dispatch();
        for (const Rank& r : w.ranks) expect_eq(code_of(r), 0);
    });
    test("replicas are chosen, and load is counted", [] {
        for (const Case& base : {ranks(3, 2), ranks(3, 2, grouped()), ranks(3, 1, slab())}) {
            run(with(base, [](Case& c) { c.replicas = true; }));
        }
        World w(with(ranks(3, 2), [](Case& c) { c.replicas = true; }));
        w.dispatch();
        w.dispatch();
        for (const Rank& r : w.ranks) {
            expect(r.routed == r.ids, "routed ids");
            for (size_t e = 0; e < r.load.size(); ++e) {
                const auto n = std::count(r.logical.begin(), r.logical.end(), int64_t(e));
                expect_eq(r.load[e], 2 * int64_t{n});
            }
        }
    });
    test("a call with an id of no logical expert counts none", [] {
        for (const int tokens : {9, 1100}) {
            World w(with(ranks(2, 3), [tokens](Case& c) {
                c.replicas = true, c.hidden = 8, c.tokens = {tokens, 5};
            }));
            w.ranks[0].logical[13] = w.replicas.tables().num_logical;
            w.dispatch();
            for (const Rank& r : w.ranks) expect_eq(code_of(r), int{kBadExpertId});
            expect(w.ranks[0].load == std::vector<int64_t>(5, 0), "load of the one with the id");
            expect_eq(w.ranks[1].flight->report.outcome.detail[3], int64_t{5});
        }
    });
    test("a refusal, and arguments that differ, fail everywhere", [] {
        World w(ranks(3, 2));
        Outcome why;
        why.incident.code = kBadShape;
        std::snprintf(why.reason, sizeof(why.reason), "a reason");
        for (int i = 0; i < 2; ++i) w.queue(i, w.args_of(i), true);
        w.ranks[2].device->refuse(OpKind::kDispatch, why, w.ranks[2].stream);
        for (int i = 0; i < 2; ++i) {
            Rank& r = w.ranks[i];
            while (!r.device->await_report(*r.flight, std::chrono::milliseconds(50))) {
            }
            expect_eq(code_of(r), int{kBadShape});
            expect_eq(std::string(r.flight->report.outcome.reason), std::string("a reason"));
        }
        for (int i = 0; i < 3; ++i) {
            DispatchArgs a = w.args_of(i);
            if (i == 1) a.alignment = 8;
            w.queue(i, a, true);
        }
        w.finish(true);
        for (const Rank& r : w.ranks) expect_eq(code_of(r), int{kCallDiffers});
        w.dispatch();
        for (const Rank& r : w.ranks) expect_eq(code_of(r), 0);
    });
    test("a changed handle fails everywhere", [] { run_changed_handle(ranks(3, 2), 1); });
    return finish();
}
