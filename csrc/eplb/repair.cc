#include "eplb/repair.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace ep::eplb {
namespace {

constexpr int kPatience = 64;        // steps that may pass without less excess
constexpr int kRest = 16;            // steps that a slot rests after it changed, once we are stuck
constexpr double kProgress = 1e-12;  // of the target: a step takes at least so much

// What a step is worth; one without moves, which may also take some back, is worth most.
double worth_of(double relief, int moves) {
    constexpr double kPerMove[] = {1e6, 1, 0.5};
    return relief > 0 ? relief * kPerMove[std::clamp(moves, 0, 2)] : relief;
}

struct Step {
    int slot = -1, other = -1;  // other: the second slot of a swap
    int expert = -1;            // of a replacement
    int moves = 0;
    double relief = 0;  // excess that it takes away, all ranks together
    double worth = -std::numeric_limits<double>::infinity();
    double heavier = 0;  // load of the heavier rank it changes
};

class Repair {
public:
    // spread_out: of equally good steps that which leaves ranks lighter, else the first.
    // budget: evaluations; it goes down.
    Repair(Cell& cell, std::span<const int32_t> origin, double target, bool spread_out,
           int64_t& budget)
        : c_(cell),
          budget_(budget),
          target_(target),
          spread_out_(spread_out),
          num_words_((cell.num_ranks() + 63) / 64),
          home_(origin.begin(), origin.end()),
          origin_(size_t(cell.num_experts()) * cell.num_ranks(), 0),
          is_new_(size_t(cell.num_experts()) * num_words_, 0),
          came_(size_t(cell.num_experts()) * num_words_, 0),
          changed_(cell.num_ranks()),
          relief_(cell.num_experts()),
          harm_(cell.num_experts()),
          is_stale_(cell.num_experts(), false),
          rests_until_(cell.num_slots(), 0) {
        for (size_t q = 0; q < origin.size(); ++q) {
            if (origin[q] >= 0) ++origin_[at(c_.rank_of(static_cast<int>(q)), origin[q])];
        }
        for (int e = 0; e < c_.num_experts(); ++e) {
            for (int r = 0; r < c_.num_ranks(); ++r) compare(r, e);
            outdate(e);
        }
        for (int r = 0; r < c_.num_ranks(); ++r) see_whether_changed(r);
    }

    bool run() {
        double least = std::numeric_limits<double>::infinity();
        for (int idle = 0;; ++now_) {
            const int rank = c_.heaviest_rank();
            if (c_.rank_load(rank) <= target_) break;
            if (idle == kPatience || budget_ <= 0) return false;
            Step step = best_step(rank, false);
            if (step.slot < 0) {
                stuck_ = true;
                step = best_step(rank, true);
                if (step.slot < 0) return false;
            }
            apply(step);
            if (stuck_) rest(step);
            const double left = total_excess();
            idle = left < least ? 0 : idle + 1;
            least = std::min(least, left);
        }
        take_back();
        return true;
    }

    bool stuck() const { return stuck_; }

    int moves() const {
        int sum = 0;
        for (int r = 0; r < c_.num_ranks(); ++r) {
            for (int e = 0; e < c_.num_experts(); ++e)
                sum += std::max(0, c_.held(r, e) - origin_[at(r, e)]);
        }
        return sum;
    }

private:
    size_t at(int rank, int expert) const { return size_t(expert) * c_.num_ranks() + rank; }
    double excess(double load) const { return std::max(0.0, load - target_); }

    // ---- what a move is ----

    // 1: another one of `expert` would be new to the rank.
    int is_new(int rank, int expert) const { return bit(is_new_, rank, expert); }
    // 1: one of those that the rank holds was not there at first.
    int came(int rank, int expert) const { return bit(came_, rank, expert); }

    int bit(const std::vector<uint64_t>& bits, int rank, int expert) const {
        return bits[size_t(expert) * num_words_ + rank / 64] >> (rank % 64) & 1;
    }
    void compare(int rank, int expert) {
        const int held = c_.held(rank, expert), first = origin_[at(rank, expert)];
        const size_t word = size_t(expert) * num_words_ + rank / 64;
        const uint64_t mask = uint64_t{1} << (rank % 64);
        is_new_[word] = held >= first ? is_new_[word] | mask : is_new_[word] & ~mask;
        came_[word] = held > first ? came_[word] | mask : came_[word] & ~mask;
    }

    void see_whether_changed(int rank) {
        const auto held = c_.on_rank(rank);
        changed_[rank] =
            std::any_of(held.begin(), held.end(), [&](int e) { return came(rank, e); });
    }

    double total_excess() const {
        double sum = 0;
        for (int r = 0; r < c_.num_ranks(); ++r) sum += excess(c_.rank_load(r));
        return sum;
    }

    // What one replica more or fewer of an expert does to the ranks that hold one, for those
    // experts where that has changed.
    void weigh_counts() {
        for (const int e : stale_) {
            is_stale_[e] = false;
            const double less = c_.unit(e) - c_.unit_more(e);
            const double more = c_.count(e) > 1 ? c_.unit_fewer(e) - c_.unit(e) : 0;
            double relief = 0, harm = 0;
            c_.for_each_rank_of(e, [&](int r) {
                const double load = c_.rank_load(r), now = excess(load);
                relief += now - excess(load - c_.held(r, e) * less);
                harm += excess(load + c_.held(r, e) * more) - now;
            });
            relief_[e] = relief;
            harm_[e] = harm;
        }
        stale_.clear();
    }

    void outdate(int expert) {
        if (is_stale_[expert]) return;
        is_stale_[expert] = true;
        stale_.push_back(expert);
    }
    void outdate_rank(int rank) {
        for (const int e : c_.on_rank(rank)) outdate(e);
    }

    // ---- single steps ----

    int moves_of_swap(int slot, int other) const {
        const int a = c_.rank_of(slot), b = c_.rank_of(other);
        const int mine = c_.slots()[slot], theirs = c_.slots()[other];
        return is_new(b, mine) - came(a, mine) + is_new(a, theirs) - came(b, theirs);
    }

    Step swap(int slot, int other, int moves) const {
        const double less = c_.unit(c_.slots()[slot]) - c_.unit(c_.slots()[other]);
        const double a = c_.rank_load(c_.rank_of(slot)), b = c_.rank_load(c_.rank_of(other));
        const double relief = excess(a) + excess(b) - excess(a - less) - excess(b + less);
        return {
            slot, other, -1, moves, relief, worth_of(relief, moves), std::max(a - less, b + less)};
    }

    int moves_of_replacement(int slot, int expert) const {
        const int rank = c_.rank_of(slot);
        return is_new(rank, expert) - came(rank, c_.slots()[slot]);
    }

    // Exact at the slot's rank; elsewhere a rank that holds both experts is taken for two, which
    // makes the step look worse at most: excess is convex.
    Step replace(int slot, int expert, int moves) const {
        const int gone = c_.slots()[slot], r = c_.rank_of(slot);
        const double load = c_.rank_load(r), now = excess(load);
        const double less = c_.held(r, expert) * (c_.unit(expert) - c_.unit_more(expert));
        const double more = c_.held(r, gone) * (c_.unit_fewer(gone) - c_.unit(gone));
        const double after = load - less + c_.unit_more(expert) + more - c_.unit_fewer(gone);
        const double there = excess(load + more) - excess(after) - (now - excess(load - less));
        const double relief = relief_[expert] - harm_[gone] + there;
        return {slot, -1, expert, moves, relief, worth_of(relief, moves), after};
    }

    void apply(const Step& step) {
        const int gone = c_.slots()[step.slot], rank = c_.rank_of(step.slot);
        const int expert = step.other >= 0 ? c_.slots()[step.other] : step.expert;
        if (step.other >= 0) {
            const int other = c_.rank_of(step.other);
            outdate_rank(rank);
            outdate_rank(other);
            c_.swap(step.slot, step.other);
            compare(other, gone);
            compare(other, expert);
            see_whether_changed(other);
        } else {
            for (const int e : {gone, expert})
                c_.for_each_rank_of(e, [&](int r) { outdate_rank(r); });
            c_.replace(step.slot, step.expert);
            outdate(expert);  // it may have been nowhere near
            outdate_rank(rank);
        }
        compare(rank, gone);
        compare(rank, expert);
        see_whether_changed(rank);
    }

    // ---- the best one ----

    void consider(const Step& step, Step& best) const {
        if (step.worth > best.worth ||
            (step.worth == best.worth && spread_out_ && step.heavier < best.heavier)) {
            best = step;
        }
    }

    // For `rank`; if `any`, it may add excess.
    Step best_step(int rank, bool any) {
        weigh_counts();
        const double least = any ? -std::numeric_limits<double>::infinity() : kProgress * target_;
        Step best;
        find_swap(rank, least, best);
        find_replacement(rank, least, best);
        return best;
    }

    bool rests(int slot) const { return rests_until_[slot] > now_; }
    void rest(const Step& step) {
        for (const int slot : {step.slot, step.other}) {
            if (slot >= 0) rests_until_[slot] = now_ + kRest;
        }
    }

    void find_swap(int rank, double least, Step& best) const {
        for (int r = 0; r < c_.num_ranks(); ++r) {
            const double room = std::max(0.0, target_ - c_.rank_load(r));
            const double most = std::min(excess(c_.rank_load(rank)), room);
            const bool all_new = !changed_[rank] && !changed_[r];  // each swap is two moves
            if (r == rank || most <= least || (all_new && worth_of(most, 2) < best.worth)) continue;
            budget_ -= c_.slots_per_rank() * c_.slots_per_rank();
            for (int mine = c_.first_slot(rank); mine < c_.first_slot(rank + 1); ++mine) {
                const int e = c_.slots()[mine];
                if (rests(mine) || c_.clashes(e, r)) continue;
                for (int q = c_.first_slot(r); q < c_.first_slot(r + 1); ++q) {
                    const int theirs = c_.slots()[q];
                    if (c_.unit(theirs) >= c_.unit(e) || rests(q)) continue;
                    const Step step = swap(mine, q, all_new ? 2 : moves_of_swap(mine, q));
                    if (step.relief > least && !c_.clashes(theirs, rank)) consider(step, best);
                }
            }
        }
    }

    void find_replacement(int rank, double least, Step& best) const {
        double most_relief = 0;
        for (const int e : c_.on_rank(rank)) most_relief = std::max(most_relief, relief_[e]);
        const auto try_one = [&](int slot, int expert, double most) {
            if (expert == c_.slots()[slot] || c_.clashes(expert, c_.rank_of(slot))) return;
            const int moves = moves_of_replacement(slot, expert);
            if (worth_of(most, moves) < best.worth) return;
            const Step step = replace(slot, expert, moves);
            if (step.relief > least) consider(step, best);
        };
        for (int r = 0; r < c_.num_ranks(); ++r) {
            for (int q = c_.first_slot(r); q < c_.first_slot(r + 1); ++q) {
                const int gone = c_.slots()[q];
                if (c_.count(gone) < 2 || rests(q)) continue;
                const double more = c_.held(r, gone) * (c_.unit_fewer(gone) - c_.unit(gone));
                // Before what the new replica does to this rank.
                const double harm = harm_[gone] - excess(c_.rank_load(r) + more);
                if (r == rank) {
                    budget_ -= c_.num_experts();
                    for (int e = 0; e < c_.num_experts(); ++e) try_one(q, e, relief_[e] - harm);
                } else if (most_relief - harm > least) {
                    budget_ -= c_.slots_per_rank();
                    for (const int e : c_.on_rank(rank)) try_one(q, e, relief_[e] - harm);
                }
            }
        }
    }

    // ---- back home ----

    // Takes back moves that turned out not to be needed.
    void take_back() {
        for (bool again = true; again;) {
            again = false;
            for (int q = 0; q < c_.num_slots(); ++q) {
                if (!came(c_.rank_of(q), c_.slots()[q])) continue;
                weigh_counts();
                const Step step = way_back(q);
                if (step.slot < 0) continue;
                apply(step);
                again = true;
            }
        }
    }

    // The step that brings an expert back in place of the one that came to `slot`, saves most moves
    // and lifts no rank above the target.
    Step way_back(int slot) const {
        const int r = c_.rank_of(slot), e = c_.slots()[slot];
        Step best;
        const auto consider = [&](const Step& step) {
            if (step.relief >= 0 && step.moves < best.moves) best = step;
        };
        for (int q = c_.first_slot(r); q < c_.first_slot(r + 1); ++q) {
            const int back = home_[q];
            if (back < 0 || back == e || is_new(r, back) || c_.clashes(back, r)) continue;
            if (c_.count(e) > 1) consider(replace(slot, back, moves_of_replacement(slot, back)));
            c_.for_each_rank_of(back, [&](int other) {
                if (other == r || c_.clashes(e, other)) return;
                for (int p = c_.first_slot(other); p < c_.first_slot(other + 1); ++p) {
                    if (c_.slots()[p] == back) consider(swap(slot, p, moves_of_swap(slot, p)));
                }
            });
        }
        return best;
    }

    Cell& c_;
    int64_t& budget_;
    const double target_;
    const bool spread_out_;
    const int num_words_;                  // 64 ranks each
    const std::vector<int32_t> home_;      // [num_slots] expert of each slot at first, -1 = none
    std::vector<uint16_t> origin_;         // [num_experts, num_ranks] replicas at first
    std::vector<uint64_t> is_new_, came_;  // [num_experts, words] bit r: see there
    std::vector<bool> changed_;            // [num_ranks] holds something that came
    std::vector<double> relief_, harm_;    // [num_experts] of a replica more, of one fewer
    std::vector<bool> is_stale_;           // [num_experts] these two are
    std::vector<int> stale_;
    std::vector<int> rests_until_;  // [num_slots] step
    int now_ = 0;
    bool stuck_ = false;
};

}  // namespace

bool repair(Cell& cell, std::span<const int32_t> origin, double target, int64_t& budget) {
    const std::vector<int32_t> start(cell.slots().begin(), cell.slots().end());
    Repair first(cell, origin, target, true, budget);
    const bool reached = first.run();
    if ((reached && !first.stuck()) || budget <= 0) return reached;
    const std::vector<int32_t> found(cell.slots().begin(), cell.slots().end());
    const int moves = first.moves();
    cell.restore(start);
    Repair second(cell, origin, target, false, budget);
    if (second.run() && (!reached || second.moves() < moves)) return true;
    cell.restore(found);
    return reached;
}

}  // namespace ep::eplb
