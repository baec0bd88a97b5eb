// Small operations go on without ranks that are lost, wherever in an operation that happens: survivors get
// exact results among themselves. A death is a rank that makes no further call; what it had not stored by
// then at one survivor or another is wiped there before that survivor looks.
#include <cuda_runtime_api.h>

#include <set>
#include <string>
#include <vector>

#include "masks.h"

namespace {

using namespace world;

Case masked(int n, int sms, bool halves = false) {
    return with(ranks(n, sms, slab()), [halves](Case& c) {
        c.staged = c.masks = true;
        c.halves = halves;
        c.capacity = 80;
    });
}

// Its counts had come to all survivors but one.
void run_lost_counts(int n, int rank, int alone) {
    World w(masked(n, 3, true));
    const Expected all = expect_of(w);
    dispatch_and_lose(w, rank, alone, [&] {
        wipe_words(w, alone, w.ranks[alone].begun[0].slot, rank, NoticeLayout::kRows + 1,
                   NoticeLayout(w.shape).words);
    });
    const Expected without = expect_of(w);
    const Expected seen = as_owners_see(w, all, without, alone);
    for (int d : w.left()) check_rank(w, d == alone ? without : all, d, false);
    check_combine(w, seen, true);
    check_left(w, 3);
    check_masked(w);
}

// All had heard it. Some of its rows had not come to one survivor: `first` lines of each had.
void run_lost_rows(int n, int rank, int alone, int first, int hidden = 24) {
    World w(with(masked(n, 4, true), [hidden](Case& c) { c.hidden = hidden; }));
    const Expected all = expect_of(w);
    dispatch_and_lose(w, rank, alone, [&] {
        for (int t = 1; t < w.tokens(rank); t += 2) {
            wipe_record(w, alone, w.ranks[alone].begun[0].slot, rank * w.shape.max_tokens + t,
                        record_of(w.ranks[alone].args), first);
        }
    });
    for (int d : w.left()) {
        if (d == alone) {
            check_lost_rows(w, all, d, rank);
        } else {
            check_rank(w, all, d, false);
        }
    }
    check_combine(w, all, true);
    check_left(w, 3);
    check_masked(w);
}

}  // namespace

int main() {
    for (const bool halves : {false, true}) {
        const std::string how = halves ? ", in halves" : "";
        test(("masked before a call" + how).c_str(), [&] {
            run_explicit(masked(4, 2, halves), {2});
            run_explicit(masked(3, 2, halves), {0});
            run_explicit(masked(2, 2, halves), {1});
            run_explicit(masked(8, 2, halves), {3, 7});
        });
        test(("never came" + how).c_str(), [&] {
            run_absent(masked(3, 3, halves), {1});
            run_absent(masked(4, 3, halves), {0, 2});
            run_absent(masked(5, 3, halves), {4});
        });
    }
    test("died when some had its counts", [] {
        run_lost_counts(3, 2, 0);
        run_lost_counts(4, 0, 3);
        run_lost_counts(5, 2, 0);
    });
    test("died when some had its rows", [] {
        run_lost_rows(3, 2, 0, 0);
        run_lost_rows(4, 0, 2, 1);
        run_lost_rows(3, 2, 1, 20, 2408);
    });
    test("died in a combine", [] {
        for (const int hidden : {24, 2408}) {
            const Case base = with(masked(3, 3, true),
                                   [hidden](Case& c) { c.hidden = hidden, c.weighted = true; });
            run_lost_in_combine(base, 2, lose_in_combine);
            run_lost_in_combine(base, 0, lose_in_combine);
            run_lost_in_combine(with(base, [](Case& c) { c.per_rank = true; }), 0, lose_in_combine);
            run_lost_in_combine(with(base, [](Case& c) { c.topk_order = true; }), 2,
                                lose_in_combine);
        }
    });
    test("the clock of all runs out",
         [] { run_late(with(masked(3, 2), [](Case& c) { c.limit_s = kRunsOut; }), {1}); });
    test("the clock of one rank runs out when another is about to come",
         [] { run_apart(with(masked(3, 2), [](Case& c) { c.limit_s = kRunsOut; })); });
    test("unmasked by all", [] {
        World w(masked(3, 2));
        check_left(w, 2);
        w.gone[1] = true;
        w.ranks[0].device->mask(1);
        check_left(w, 3);
        unmask(w);
        check_left(w, 5);
        check_masked(w);
        w.ranks[2].device->mask(0);
        w.gone[0] = true;
        check_left(w, 3);
        unmask(w);
        check_left(w, 3);
        w.c.staged = false;
        check_left(w, 2);
    });
    test("a refused call is refused without those that are lost",
         [] { run_refused(masked(3, 2), 1, 2); });
    return finish();
}
