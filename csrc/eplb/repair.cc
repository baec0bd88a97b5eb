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
    Repair(Cell& cell, std::span<const int32_t> origin, double target, bool spread_out)
        : c_(cell),
          target_(target),
          spread_out_(spread_out),
          num_words_((cell.num_ranks() + 63) / 64),
          origin_(size_t(cell.num_experts()) * cell.num_ranks(), 0),
          is_new_(size_t(cell.num_experts()) * num_words_, 0),
          came_(size_t(cell.num_experts()) * num_words_, 0),
          relief_(cell.num_experts()),
          harm_(cell.num_experts()),
          rests_until_(cell.num_slots(), 0) {
        for (size_t q = 0; q < origin.size(); ++q) {
            if (origin[q] >= 0) ++origin_[at(c_.rank_of(static_cast<int>(q)), origin[q])];
        }
        for (int e = 0; e < c_.num_experts(); ++e) {
            for (int r = 0; r < c_.num_ranks(); ++r) compare(r, e);
        }
    }

    bool run() {
        double least = std::numeric_limits<double>::infinity();
        for (int idle = 0; idle < kPatience; ++now_) {
            const int rank = c_.heaviest_rank();
            if (c_.rank_load(rank) <= target_) {
                take_back();
                return true;
            }
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
        return false;
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
    int per_rank() const { return c_.slots_per_rank(); }

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

    double total_excess() const {
        double sum = 0;
        for (int r = 0; r < c_.num_ranks(); ++r) sum += excess(c_.rank_load(r));
        return sum;
    }

    // What one replica more or fewer of each expert does to the ranks that hold one.
    void weigh_counts() {
        for (int e = 0; e < c_.num_experts(); ++e) {
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

    // Most relief that `replace` can give: without what the new replica does to the slot's rank.
    double most_relief(int slot, int expert) const {
        const int gone = c_.slots()[slot], r = c_.rank_of(slot);
        const double more = c_.held(r, gone) * (c_.unit_fewer(gone) - c_.unit(gone));
        return relief_[expert] - harm_[gone] + excess(c_.rank_load(r) + more);
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
        const int gone = c_.slots()[step.slot];
        if (step.other >= 0) {
            c_.swap(step.slot, step.other);
            for (const int e : {gone, int{c_.slots()[step.slot]}})
                compare(c_.rank_of(step.other), e);
        } else {
            c_.replace(step.slot, step.expert);
        }
        for (const int e : {gone, int{c_.slots()[step.slot]}}) compare(c_.rank_of(step.slot), e);
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
        const int first = rank * per_rank();
        for (int r = 0; r < c_.num_ranks(); ++r) {
            const double room = std::max(0.0, target_ - c_.rank_load(r));
            const double most = std::min(excess(c_.rank_load(rank)), room);
            if (r == rank || most <= least) continue;
            for (int mine = first; mine < first + per_rank(); ++mine) {
                const int e = c_.slots()[mine];
                if (rests(mine) || c_.clashes(e, r)) continue;
                for (int q = r * per_rank(); q < (r + 1) * per_rank(); ++q) {
                    const int theirs = c_.slots()[q];
                    if (c_.unit(theirs) >= c_.unit(e) || rests(q)) continue;
                    const int moves = moves_of_swap(mine, q);
                    if (worth_of(most, moves) < best.worth || c_.clashes(theirs, rank)) continue;
                    const Step step = swap(mine, q, moves);
                    if (step.relief > least) consider(step, best);
                }
            }
        }
    }

    void find_replacement(int rank, double least, Step& best) const {
        const auto try_one = [&](int slot, int expert) {
            if (expert == c_.slots()[slot] || c_.clashes(expert, c_.rank_of(slot))) return;
            const double most = most_relief(slot, expert);
            const int moves = moves_of_replacement(slot, expert);
            if (most <= least || worth_of(most, moves) < best.worth) return;
            const Step step = replace(slot, expert, moves);
            if (step.relief > least) consider(step, best);
        };
        for (int q = 0; q < c_.num_slots(); ++q) {
            if (c_.count(c_.slots()[q]) < 2 || rests(q)) continue;
            if (c_.rank_of(q) == rank) {
                for (int e = 0; e < c_.num_experts(); ++e) try_one(q, e);
            } else {
                for (int i = 0; i < per_rank(); ++i) try_one(q, c_.slots()[rank * per_rank() + i]);
            }
        }
    }

    // ---- back home ----

    // Takes back moves that turned out not to be needed.
    void take_back() {
        for (bool changed = true; changed;) {
            changed = false;
            weigh_counts();
            for (int q = 0; q < c_.num_slots(); ++q) {
                if (!came(c_.rank_of(q), c_.slots()[q])) continue;
                const Step step = way_back(q);
                if (step.slot < 0) continue;
                apply(step);
                weigh_counts();
                changed = true;
            }
        }
    }

    // The step that saves most moves and lifts no rank above the target.
    Step way_back(int slot) const {
        const int r = c_.rank_of(slot), e = c_.slots()[slot];
        Step best;
        const auto try_one = [&](const Step& step) {
            if (step.relief >= 0) best = step;
        };
        for (int q = 0; q < c_.num_slots(); ++q) {
            const int theirs = c_.slots()[q], other = c_.rank_of(q);
            if (is_new(r, theirs) || other == r || theirs == e) continue;
            if (c_.clashes(e, other) || c_.clashes(theirs, r)) continue;
            const int moves = moves_of_swap(slot, q);
            if (moves < best.moves) try_one(swap(slot, q, moves));
        }
        for (int other = 0; other < c_.num_experts() && c_.count(e) > 1; ++other) {
            if (is_new(r, other) || other == e || c_.clashes(other, r)) continue;
            const int moves = moves_of_replacement(slot, other);
            if (moves < best.moves) try_one(replace(slot, other, moves));
        }
        return best;
    }

    Cell& c_;
    const double target_;
    const bool spread_out_;
    const int num_words_;                  // 64 ranks each
    std::vector<uint16_t> origin_;         // [num_experts, num_ranks] replicas at first
    std::vector<uint64_t> is_new_, came_;  // [num_experts, words] bit r: see there
    std::vector<double> relief_, harm_;    // [num_experts] of a replica more, of one fewer
    std::vector<int> rests_until_;         // [num_slots] step
    int now_ = 0;
    bool stuck_ = false;
};

}  // namespace

bool repair(Cell& cell, std::span<const int32_t> origin, double target) {
    const std::vector<int32_t> start(cell.slots().begin(), cell.slots().end());
    Repair first(cell, origin, target, true);
    const bool reached = first.run();
    if (reached && !first.stuck()) return true;
    const std::vector<int32_t> found(cell.slots().begin(), cell.slots().end());
    const int moves = first.moves();
    cell.restore(start);
    Repair second(cell, origin, target, false);
    if (second.run() && (!reached || second.moves() < moves)) return true;
    cell.restore(found);
    return reached;
}

}  // namespace ep::eplb
