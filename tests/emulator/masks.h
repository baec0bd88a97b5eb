// Ranks that are lost, and what comes of it: what the tests of masks share.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "world.h"

namespace world {

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
inline void check_left(World& w, int rounds) {
    for (int round = 0; round < rounds; ++round) {
        w.dispatch();
        const Expected e = expect_of(w);
        for (int d : w.left()) check_rank(w, e, d, false);
        check_combine(w, e, round % 2 == 0);
    }
}

inline void check_masked(const World& w) {
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
inline void dispatch_and_lose(World& w, int rank, int alone, Lose lose) {
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

inline std::byte* block_of(const World& w, int at) { return w.peers[at].control->data(); }

inline void wipe_words(const World& w, int at, int slot, int src, int begin, int end) {
    const ControlLayout layout(w.shape);
    auto* words = reinterpret_cast<uint64_t*>(block_of(w, at) + layout.notice(slot, src));
    std::fill(words + begin, words + end, 0);
}

// Lines of a record from `first` on.
inline void wipe_record(const World& w, int at, int slot, int64_t place, const Record& record,
                        int first) {
    const ControlLayout layout(w.shape);
    std::byte* lines = block_of(w, at) + layout.stage(slot) + place * record.bytes();
    for (int64_t line = first; line < record.bytes() / kLineBytes; ++line) {
        reinterpret_cast<uint64_t*>(lines + line * kLineBytes)[kNumberWord] = 0;
    }
}

// ---- what comes of it ----

// A survivor that had counted on the rows of `src`: they are zero and nobody's, all others as they should be.
inline void check_lost_rows(const World& w, const Expected& e, int d, int src) {
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
inline Expected as_owners_see(const World& w, Expected all, const Expected& without, int alone) {
    for (int s = 0; s < w.c.ranks; ++s) {
        for (size_t i = 0; i < all.send_row[s].size(); ++i) {
            const int64_t id = w.ranks[s].ids[i];
            if (id >= 0 && w.owner[id] == alone) all.send_row[s][i] = without.send_row[s][i];
        }
    }
    return all;
}

// Masked by hand, by one of those that are left.
inline void run_explicit(const Case& c, std::set<int> who) {
    World w(c);
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

// They make no call any more, and are found dead when the others wait for them.
inline void run_absent(const Case& c, std::set<int> who) {
    World w(c);
    check_left(w, 2);
    for (int rank : who) w.gone[rank] = true;
    const FoundDead found(w, who);
    check_left(w, 5);
    check_masked(w);
}

// The same, and nobody but the clock tells.
inline void run_late(const Case& c, std::set<int> who) {
    World w(c);
    for (int rank : who) w.gone[rank] = true;
    check_left(w, 3);
    check_masked(w);
}

// One survivor of three is a whole operation ahead of another when a rank is found to be lost.
inline void run_apart(const Case& c) {
    World w(c);
    w.gone[2] = true;
    w.queue(0, w.args_of(0), true);
    std::this_thread::sleep_for(std::chrono::milliseconds(int(1500 * c.limit_s)));
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

// Of what a rank holds for rank s of its node in a combine, something had not come; or, where it holds nothing,
// its notice.
inline void lose_in_combine(const World& w, int s, int rank) {
    CombineArgs a;
    a.hidden = w.c.hidden;
    const Record record = record_of(a);
    const int slot = w.ranks[s].begun[1].slot;
    for (int t = w.tokens(s) - 1; t >= 0; --t) {
        for (int k = 0; k < w.c.topk; ++k) {
            const int64_t id = w.ranks[s].ids[t * w.c.topk + k];
            if (id < 0 || w.owner[id] != rank) continue;
            const int64_t place =
                w.c.per_rank ? rank * w.shape.max_tokens + t : int64_t{t} * w.c.topk + k;
            return wipe_record(w, s, slot, place, record, record.num_pieces > 1 ? 3 : 0);
        }
    }
    wipe_words(w, s, slot, rank, 0, 1);
}

// Its notice of a combine had come to all; of what it holds for others, not everything had.
template <class Lose>
inline void run_lost_in_combine(const Case& given, int rank, Lose lose) {
    World w(given);
    w.dispatch();
    const Expected e = expect_of(w);
    for (int d : w.left()) check_rank(w, e, d, false);
    std::unique_ptr<FoundDead> found;
    check_combine(w, e, true, [&] {
        for (int i : w.left()) cudaStreamSynchronize(w.ranks[i].stream);
        for (int s : w.left()) {
            if (s != rank) lose(w, s, rank);
        }
        w.gone[rank] = true;
        found = std::make_unique<FoundDead>(w, std::set{rank});
    });
    check_left(w, 3);
    check_masked(w);
}

// A call that some of those that are left refuse.
inline void run_refused(const Case& c, int gone, int refuser) {
    World w(c);
    w.gone[gone] = true;
    const FoundDead found(w, {gone});
    Outcome why;
    why.incident.code = kNeedsAll;
    for (int round = 0; round < 4; ++round) {
        for (int i : w.left()) {
            if (i != refuser) w.queue(i, w.args_of(i), true);
        }
        w.ranks[refuser].device->refuse(OpKind::kDispatch, why, w.ranks[refuser].stream);
        for (int i : w.left()) {
            Rank& r = w.ranks[i];
            if (i == refuser) continue;
            r.device->finish(*r.flight, r.stream);
            while (!r.device->await_report(*r.flight, std::chrono::milliseconds(50))) {
            }
            expect_eq(code_of(r), int{kNeedsAll});
        }
    }
    check_left(w, 3);
    check_masked(w);
}

// All call it, also who had been masked; then everything is as before, but for those that died.
inline void unmask(World& w, const std::set<int>& dead = {}) {
    uint64_t seq = 0, stay = 0;
    for (int i = 0; i < w.c.ranks; ++i) {
        w.gone[i] = dead.count(i) > 0;
        if (w.gone[i]) stay |= uint64_t{1} << i;
    }
    for (int i : w.left()) seq = std::max(seq, w.ranks[i].device->masked_and_seq().second);
    for (int i : w.left()) w.ranks[i].device->unmask(seq, stay);
}

}  // namespace world
