// Small operations go on without ranks that are lost, wherever in an operation that happens: survivors get
// exact results among themselves. A death is a rank that makes no further call; what it had not stored by
// then at one survivor or another is wiped there before that survivor looks.
#include <cuda_runtime_api.h>

#include <set>
#include <string>
#include <vector>

#include "world.h"

namespace {

using namespace world;

Case masked(int n, int sms, bool halves = false) {
    return with(ranks(n, sms, slab()), [halves](Case& c) {
        c.staged = c.masks = true;
        c.halves = halves;
        c.capacity = 80;
    });
}

// A rank is found to be dead while others wait for it, or before they do.
class FoundDead {
public:
    FoundDead(World& w, std::set<int> who)
        : thread_([&finder = *w.ranks[w.left().front()].device, who] {
              std::this_thread::sleep_for(std::chrono::milliseconds(200));
              for (int rank : who) finder.mask(rank);
          }) {}
    ~FoundDead() { thread_.join(); }
    FoundDead(const FoundDead&) = delete;
    FoundDead& operator=(const FoundDead&) = delete;

private:
    std::thread thread_;
};

// Everybody that is left, and what they do, for some operations; slots go round.
void check_left(World& w, int rounds) {
    for (int round = 0; round < rounds; ++round) {
        w.dispatch();
        const Expected e = expect_of(w);
        for (int d : w.left()) check_rank(w, e, d, false);
        check_combine(w, e, round % 2 == 0);
    }
}

void check_masked(const World& w) {
    uint64_t gone = 0;
    for (int i = 0; i < w.c.ranks; ++i) gone |= uint64_t{w.gone[i]} << i;
    for (int i : w.left()) {
        expect_eq(w.ranks[i].device->masked(), gone);
        expect_eq(w.ranks[i].device->masked_and_seq().first, gone);
    }
}

// First halves of a dispatch, of all ranks; `lose` decides what has become of that. Then second halves, of which
// only that of `alone` waits for anything, until it finds the lost rank dead.
template <class Lose>
void dispatch_and_lose(World& w, int rank, int alone, Lose lose) {
    for (int i : w.left()) w.queue(i, w.args_of(i), true);
    for (int i : w.left()) cudaStreamSynchronize(w.ranks[i].stream);
    w.gone[rank] = true;
    lose();
    for (int i : w.left()) w.ranks[i].device->finish(*w.ranks[i].flight, w.ranks[i].stream);
    for (int i : w.left()) {
        if (i != alone) cudaStreamSynchronize(w.ranks[i].stream);
    }
    w.ranks[alone].device->mask(rank);
    w.finish(true);
}

// ---- what a rank had not stored when it died ----

std::byte* block_of(const World& w, int at) { return w.peers[at].control->data(); }

void wipe_words(const World& w, int at, int slot, int src, int begin, int end) {
    const ControlLayout layout(w.shape);
    auto* words = reinterpret_cast<uint64_t*>(block_of(w, at) + layout.notice(slot, src));
    std::fill(words + begin, words + end, 0);
}

// Lines of a record from `first` on.
void wipe_record(const World& w, int at, int slot, int64_t place, const Record& record, int first) {
    const ControlLayout layout(w.shape);
    std::byte* lines = block_of(w, at) + layout.stage(slot) + place * record.bytes();
    for (int64_t line = first; line < record.bytes() / kLineBytes; ++line) {
        reinterpret_cast<uint64_t*>(lines + line * kLineBytes)[kNumberWord] = 0;
    }
}

// ---- what comes of it ----

// A survivor that had counted on the rows of `src`: they are zero and nobody's, all others as they should be.
void check_lost_rows(const World& w, const Expected& e, int d, int src) {
    const Rank& r = w.ranks[d];
    const UnpackArgs& out = r.flight->job.out;
    const auto* x = reinterpret_cast<const uint16_t*>((*r.flight)[Out::kX].data());
    for (size_t i = 0; i < e.recv[d].size(); ++i) {
        const auto [s, t] = e.recv[d][i];
        const bool lost = s == src;
        expect_eq(out.recv_src[2 * i], lost ? -1 : s);
        expect_eq(out.recv_src[2 * i + 1], lost ? -1 : t);
        for (int k = 0; k < w.c.topk; ++k) {
            const int row = e.recv_row[d][i * w.c.topk + k];
            expect_eq(out.recv_row[i * w.c.topk + k], lost ? -1 : row);
            if (row < 0) continue;
            expect_eq(out.topk_weights[row], lost ? 0.0f : w.ranks[s].weights[t * w.c.topk + k]);
            for (int h = 0; h < w.c.hidden; ++h) {
                const uint16_t sent = w.ranks[s].x[t * w.c.hidden + h];
                expect_eq(x[int64_t{row} * w.c.hidden + h], lost ? uint16_t{0} : sent);
            }
        }
    }
    expect(r.counts == e.counts[d], "counts of who was heard");
}

// Rows as their owners numbered them: those of `alone` went without a rank that the others had heard.
Expected as_owners_see(const World& w, Expected all, const Expected& without, int alone) {
    for (int s = 0; s < w.c.ranks; ++s) {
        for (size_t i = 0; i < all.send_row[s].size(); ++i) {
            const int64_t id = w.ranks[s].ids[i];
            if (id >= 0 && w.owner[id] == alone) all.send_row[s][i] = without.send_row[s][i];
        }
    }
    return all;
}

void run_explicit(int n, std::set<int> who, bool halves) {
    World w(masked(n, 2, halves));
    check_left(w, 1);
    for (int rank : who) {
        w.gone[rank] = true;
        w.ranks[w.left().front()].device->mask(rank);
    }
    check_left(w, 5);
    check_masked(w);
    // Who is masked learns it as soon as it comes.
    for (int rank : who) {
        Rank& r = w.ranks[rank];
        w.queue(rank, w.args_of(rank), true);
        while (!r.device->await_report(*r.flight, std::chrono::milliseconds(50))) {
        }
        expect_eq(code_of(r), int{kMasked});
        expect_eq(r.flight->report.outcome.incident.peer, int16_t(rank));
    }
    check_left(w, 1);
}

void run_absent(int n, std::set<int> who, bool halves) {
    World w(masked(n, 3, halves));
    check_left(w, 2);
    for (int rank : who) w.gone[rank] = true;
    const FoundDead found(w, who);
    check_left(w, 5);
    check_masked(w);
}

void run_late() {
    World w(with(masked(3, 2), [](Case& c) { c.limit_s = kRunsOut; }));
    w.gone[1] = true;
    check_left(w, 3);
    check_masked(w);
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

// Its notice of a combine had come to all; of what it holds for others, not everything had.
void run_lost_in_combine(const Case& given, int rank) {
    World w(given);
    w.dispatch();
    const Expected e = expect_of(w);
    for (int d : w.left()) check_rank(w, e, d, false);
    std::unique_ptr<FoundDead> found;
    check_combine(w, e, true, [&] {
        for (int i : w.left()) cudaStreamSynchronize(w.ranks[i].stream);
        CombineArgs a;
        a.hidden = w.c.hidden;
        const Record record = record_of(a);
        for (int s = 0; s < w.c.ranks; ++s) {
            const int slot = w.ranks[s].begun[1].slot;
            bool wiped = false;
            for (int t = w.tokens(s) - 1; t >= 0 && s != rank; --t) {
                for (int k = 0; k < w.c.topk; ++k) {
                    const int64_t id = w.ranks[s].ids[t * w.c.topk + k];
                    if (wiped || id < 0 || w.owner[id] != rank) continue;
                    const int64_t place =
                        w.c.per_rank ? rank * w.shape.max_tokens + t : int64_t{t} * w.c.topk + k;
                    wipe_record(w, s, slot, place, record, record.num_pieces > 1 ? 3 : 0);
                    wiped = true;
                }
            }
            // Or it had nothing to hold: then its notice is what is missing.
            if (!wiped && s != rank) wipe_words(w, s, slot, rank, 0, 1);
        }
        w.gone[rank] = true;
        found = std::make_unique<FoundDead>(w, std::set{rank});
    });
    check_left(w, 3);
    check_masked(w);
}

// One survivor is a whole operation ahead of another when a rank is found to be lost.
void run_apart() {
    World w(with(masked(3, 2), [](Case& c) { c.limit_s = kRunsOut; }));
    w.gone[2] = true;
    w.queue(0, w.args_of(0), true);
    std::this_thread::sleep_for(std::chrono::milliseconds(int(1500 * kRunsOut)));
    w.queue(1, w.args_of(1), true);
    w.finish(true);
    // The first gave up on both, or on none that came in time.
    expect_eq(code_of(w.ranks[1]), int{kMasked});
    w.gone[1] = true;
    const Expected e = expect_of(w);
    check_rank(w, e, 0, false);
    check_left(w, 3);
    check_masked(w);
}

// All call it, also who had been masked; then everything is as before.
void unmask(World& w) {
    uint64_t seq = 0;
    for (Rank& r : w.ranks) seq = std::max(seq, r.device->masked_and_seq().second);
    for (Rank& r : w.ranks) r.device->unmask(seq, 0);
    w.gone.assign(w.c.ranks, false);
}

}  // namespace

int main() {
    for (const bool halves : {false, true}) {
        const std::string how = halves ? ", in halves" : "";
        test(("masked before a call" + how).c_str(), [&] {
            run_explicit(4, {2}, halves);
            run_explicit(3, {0}, halves);
            run_explicit(2, {1}, halves);
            run_explicit(8, {3, 7}, halves);
        });
        test(("never came" + how).c_str(), [&] {
            run_absent(3, {1}, halves);
            run_absent(4, {0, 2}, halves);
            run_absent(5, {4}, halves);
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
            run_lost_in_combine(base, 2);
            run_lost_in_combine(base, 0);
            run_lost_in_combine(with(base, [](Case& c) { c.per_rank = true; }), 0);
            run_lost_in_combine(with(base, [](Case& c) { c.topk_order = true; }), 2);
        }
    });
    test("the clock of all runs out", [] { run_late(); });
    test("the clock of one rank runs out when another is about to come", [] { run_apart(); });
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
    test("a refused call is refused without those that are lost", [] {
        World w(masked(3, 2));
        w.gone[1] = true;
        const FoundDead found(w, {1});
        Outcome why;
        why.incident.code = kNeedsAll;
        for (int round = 0; round < 4; ++round) {
            w.queue(0, w.args_of(0), true);
            w.ranks[2].device->refuse(OpKind::kDispatch, why, w.ranks[2].stream);
            Rank& r = w.ranks[0];
            while (!r.device->await_report(*r.flight, std::chrono::milliseconds(50))) {
            }
            expect_eq(code_of(r), int{kNeedsAll});
        }
        check_left(w, 3);
        check_masked(w);
    });
    return finish();
}
