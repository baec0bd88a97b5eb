#include "eplb/cell.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>
#include <numeric>
#include <queue>
#include <utility>

namespace ep::eplb {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kProgress = 1e-9;    // a step gains at least this much of the heaviest rank
constexpr double kGoodEnough = 1e-6;  // above the bound: nothing is left to gain

// A full-period generator with fixed constants (Steele, Vigna: "Computationally easy, spectrally
// good multipliers"); the high half is used.
uint32_t next_random(uint64_t& state) {
    state = state * 0xd1342543de82ef95u + 0x9e3779b97f4a7c15u;
    return static_cast<uint32_t>(state >> 32);
}

int below(uint64_t& state, int limit) {
    return static_cast<int>((uint64_t{next_random(state)} * static_cast<uint64_t>(limit)) >> 32);
}

}  // namespace

std::vector<int32_t> descending(std::span<const double> load) {
    std::vector<int32_t> order(load.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return load[a] > load[b]; });
    return order;
}

Cell::Cell(std::vector<double> load, int num_ranks, int slots_per_rank, bool distinct)
    : num_experts_(static_cast<int>(load.size())),
      num_ranks_(num_ranks),
      slots_per_rank_(slots_per_rank),
      words_((num_ranks + 63) / 64),
      distinct_(distinct && slots_per_rank <= num_experts_),
      load_(std::move(load)),
      rank_of_(size_t(num_ranks) * slots_per_rank),
      slot_(size_t(num_ranks) * slots_per_rank, -1),
      count_(num_experts_, 0),
      unit_(num_experts_, 0),
      unit_more_(num_experts_, 0),
      unit_fewer_(num_experts_, 0),
      held_(size_t(num_experts_) * num_ranks, 0),
      ranks_of_(size_t(num_experts_) * words_, 0),
      rank_load_(num_ranks, 0) {
    for (int q = 0; q < num_slots(); ++q) rank_of_[q] = q / slots_per_rank_;
    const double mean = std::accumulate(load_.begin(), load_.end(), 0.0) / num_ranks_;
    const auto best = count_replicas(std::vector<int32_t>(num_experts_, 1), num_slots());
    bound_ = mean;
    for (int e = 0; e < num_experts_; ++e) bound_ = std::max(bound_, share(e, best[e]));
}

// ---- greedy ----

// Gives replicas to whoever has the heaviest, until there are `total`; of equally heavy ones, to
// who has fewer. This minimizes the heaviest replica.
std::vector<int32_t> Cell::count_replicas(std::vector<int32_t> count, int total) const {
    const auto lighter = [&](int a, int b) {
        const double left = share(a, count[a]), right = share(b, count[b]);
        if (left != right) return left < right;
        return count[a] != count[b] ? count[a] > count[b] : a > b;
    };
    std::priority_queue<int, std::vector<int>, decltype(lighter)> heap(lighter);
    const int most = distinct_ ? num_ranks_ : num_slots();
    for (int e = 0; e < num_experts_; ++e) {
        if (count[e] < most) heap.push(e);
    }
    for (int given = std::accumulate(count.begin(), count.end(), 0); given < total; ++given) {
        const int e = heap.top();
        heap.pop();
        if (++count[e] < most) heap.push(e);
    }
    return count;
}

void Cell::place() {
    assign(std::vector<int32_t>(slot_.size(), -1),
           count_replicas(std::vector<int32_t>(num_experts_, 1), num_slots()));
    std::vector<int> free(num_ranks_, slots_per_rank_);
    // Ranks with room, the lightest first, of equally light ones the first.
    using Room = std::pair<double, int>;
    std::priority_queue<Room, std::vector<Room>, std::greater<>> open;
    const auto reopen = [&] {
        open = {};
        for (int r = 0; r < num_ranks_; ++r) {
            if (free[r] > 0) open.emplace(rank_load_[r], r);
        }
    };
    reopen();
    std::vector<int> holders;  // with room for others, not for one more of this expert
    for (const int e : descending(unit_)) {
        holders.clear();
        int left = count_[e];
        for (; left > 0 && !open.empty(); --left) {
            const int rank = open.top().second;
            open.pop();
            set(first_free(rank), e);
            if (--free[rank] == 0) continue;
            if (distinct_) {
                holders.push_back(rank);
            } else {
                open.emplace(rank_load_[rank], rank);
            }
        }
        for (const int r : holders) open.emplace(rank_load_[r], r);
        if (left == 0) continue;
        for (; left > 0; --left) put(e, free);
        reopen();
    }
}

// `slot`, which is free, gets a replica.
void Cell::set(int slot, int expert) {
    slot_[slot] = expert;
    hold(rank_of(slot), expert);
    sum_load(rank_of(slot));
}

int Cell::lightest_rank(int expert, std::span<const int> free) const {
    int best = -1;
    for (int r = 0; r < num_ranks_; ++r) {
        if (free[r] == 0 || clashes(expert, r)) continue;
        if (best < 0 || rank_load_[r] < rank_load_[best]) best = r;
    }
    return best;
}

int Cell::first_free(int rank) const {
    int slot = rank * slots_per_rank_;
    while (slot_[slot] >= 0) ++slot;
    return slot;
}

// Puts one more replica of `expert` on the lightest rank with room.
void Cell::put(int expert, std::vector<int>& free) {
    int rank = lightest_rank(expert, free);
    int slot = -1;
    if (rank >= 0) {
        slot = first_free(rank);
    } else {
        // All ranks with room hold one already. A full rank without one gives up a replica that
        // the lightest of them lacks: it has more different experts, so there is such a replica.
        for (int r = 0; r < num_ranks_; ++r) {
            if (free[r] > 0 && (rank < 0 || rank_load_[r] < rank_load_[rank])) rank = r;
        }
        int given = -1;
        for (int q = 0; q < num_slots() && distinct_; ++q) {
            const int r = rank_of(q);
            if (slot_[q] < 0 || held(r, expert) > 0 || held(rank, slot_[q]) > 0) continue;
            if (given < 0 || rank_load_[r] < rank_load_[rank_of(given)]) given = q;
        }
        slot = first_free(rank);
        if (given >= 0) {
            const int moved = slot_[given], from = rank_of(given);
            slot_[slot] = moved;
            let_go(from, moved);
            hold(rank, moved);
            sum_load(rank);
            slot = given;
        }
    }
    --free[rank];
    set(slot, expert);
}

// ---- state ----

void Cell::hold(int rank, int expert) {
    ++held_[size_t(expert) * num_ranks_ + rank];
    ranks_of_[size_t(expert) * words_ + rank / 64] |= uint64_t{1} << (rank % 64);
}

void Cell::let_go(int rank, int expert) {
    if (--held_[size_t(expert) * num_ranks_ + rank] > 0) return;
    ranks_of_[size_t(expert) * words_ + rank / 64] &= ~(uint64_t{1} << (rank % 64));
}

void Cell::set_count(int expert, int replicas) {
    count_[expert] = replicas;
    unit_[expert] = share(expert, replicas);
    unit_more_[expert] = share(expert, replicas + 1);
    unit_fewer_[expert] = replicas > 1 ? share(expert, replicas - 1) : kInfinity;
}

void Cell::sum_load(int rank) {
    double sum = 0;  // anew, in one order: no drift, however many steps there were
    for (int i = 0; i < slots_per_rank_; ++i) {
        const int e = slot_[rank * slots_per_rank_ + i];
        if (e >= 0) sum += unit_[e];
    }
    rank_load_[rank] = sum;
}

// Takes over slots and counts, and everything that follows from them.
void Cell::assign(std::span<const int32_t> slots, std::span<const int32_t> count) {
    for (int q = 0; q < num_slots(); ++q) {
        if (slot_[q] >= 0) let_go(rank_of(q), slot_[q]);
    }
    std::copy(slots.begin(), slots.end(), slot_.begin());
    for (int e = 0; e < num_experts_; ++e) set_count(e, count[e]);
    for (int q = 0; q < num_slots(); ++q) {
        if (slot_[q] >= 0) hold(rank_of(q), slot_[q]);
    }
    for (int r = 0; r < num_ranks_; ++r) sum_load(r);
}

int Cell::heaviest_rank() const {
    return static_cast<int>(std::max_element(rank_load_.begin(), rank_load_.end()) -
                            rank_load_.begin());
}

bool Cell::repeats() const {
    return std::any_of(held_.begin(), held_.end(), [](uint16_t n) { return n > 1; });
}

// ---- steps ----

// A replica of `rank` changes places with a lighter one of another rank.
void Cell::find_swap(int rank, Step& best) {
    const double before = rank_load_[rank];
    const int first = rank * slots_per_rank_;
    double limit = before * (1 - kProgress);
    for (int r = 0; r < num_ranks_; ++r) {
        --budget_;
        // Whatever they swap, one of the two has half of what both carry.
        if (r == rank || (before + rank_load_[r]) / 2 >= limit) continue;
        budget_ -= slots_per_rank_ * slots_per_rank_;
        for (int i = 0; i < slots_per_rank_; ++i) {
            const int mine = slot_[first + i];
            if (clashes(mine, r)) continue;
            for (int j = 0; j < slots_per_rank_; ++j) {
                const int theirs = slot_[r * slots_per_rank_ + j];
                const double less = unit(mine) - unit(theirs);
                const double result = std::max(before - less, rank_load_[r] + less);
                if (less <= 0 || result >= limit || clashes(theirs, rank)) continue;
                best = {first + i, r * slots_per_rank_ + j, -1, result};
                limit = result;
            }
        }
    }
}

// The heaviest rank touched when `slot` gets `expert`; infinity when it reaches the limit.
double Cell::result_of_replacement(int slot, int expert, double limit) {
    const int gone = slot_[slot], at = rank_of(slot);
    const double less = unit_more(expert) - unit(expert);
    const double more = unit_fewer(gone) - unit(gone);
    const auto after = [&](int rank) {
        return rank_load_[rank] + held(rank, expert) * less + held(rank, gone) * more;
    };
    double result = after(at) + unit_more(expert) - unit_fewer(gone);
    if (result >= limit) return kInfinity;  // mostly it ends here
    const uint64_t* of_expert = &ranks_of_[size_t(expert) * words_];
    const uint64_t* of_gone = &ranks_of_[size_t(gone) * words_];
    for (int w = 0; w < words_; ++w) {
        for (uint64_t left = of_expert[w] | of_gone[w]; left != 0; left &= left - 1) {
            const int r = w * 64 + std::countr_zero(left);
            --budget_;
            if (r == at) continue;
            result = std::max(result, after(r));
            if (result >= limit) return kInfinity;
        }
    }
    return result;
}

// Somewhere a replica that is not the last of its expert makes way: for one of an expert on `rank`,
// which lightens all of those, or on `rank` itself.
void Cell::find_replacement(int rank, Step& best) {
    double limit = rank_load_[rank] * (1 - kProgress);
    const auto try_one = [&](int slot, int expert) {
        if (expert == slot_[slot] || clashes(expert, rank_of(slot))) return;
        --budget_;
        const double result = result_of_replacement(slot, expert, limit);
        if (result >= limit) return;
        best = {slot, -1, expert, result};
        limit = result;
    };
    for (int q = 0; q < num_slots(); ++q) {
        if (count_[slot_[q]] < 2) continue;
        if (rank_of(q) == rank) {
            for (int e = 0; e < num_experts_; ++e) try_one(q, e);
        } else {
            for (int i = 0; i < slots_per_rank_; ++i) try_one(q, slot_[rank * slots_per_rank_ + i]);
        }
    }
}

void Cell::swap(int slot, int other) {
    const int a = rank_of(slot), b = rank_of(other);
    let_go(a, slot_[slot]);
    let_go(b, slot_[other]);
    std::swap(slot_[slot], slot_[other]);
    hold(a, slot_[slot]);
    hold(b, slot_[other]);
    sum_load(a);
    sum_load(b);
}

void Cell::replace(int slot, int expert) {
    const int gone = slot_[slot], at = rank_of(slot);
    let_go(at, gone);
    set_count(gone, count_[gone] - 1);
    slot_[slot] = expert;
    hold(at, expert);
    set_count(expert, count_[expert] + 1);
    const auto sum = [&](int rank) { sum_load(rank); };
    for_each_rank_of(gone, sum);
    for_each_rank_of(expert, sum);
}

void Cell::apply(const Step& step) {
    if (step.other >= 0) {
        swap(step.slot, step.other);
    } else {
        replace(step.slot, step.expert);
    }
}

// ---- search ----

void Cell::descend_within_budget() {
    while (true) {
        const int rank = heaviest_rank();
        if (budget_ <= 0 || rank_load_[rank] <= bound_ * (1 + kGoodEnough)) return;
        Step best;
        find_swap(rank, best);
        if (best.slot < 0) find_replacement(rank, best);
        if (best.slot < 0) return;
        apply(best);
    }
}

// A few steps that nobody asked for, at least one of them on the heaviest rank.
void Cell::kick(uint64_t& random) {
    const int rank = heaviest_rank();
    for (int n = 2 + below(random, 3); n > 0; --n) {
        const int slot = n == 2 ? rank * slots_per_rank_ + below(random, slots_per_rank_)
                                : below(random, num_slots());
        const int other = below(random, num_slots());
        const int a = rank_of(slot), b = rank_of(other);
        if (count_[slot_[slot]] > 1 && below(random, 2) == 0) {
            const int expert = slot_[other];
            if (expert != slot_[slot] && !clashes(expert, a)) replace(slot, expert);
        } else if (a != b && !clashes(slot_[slot], b) && !clashes(slot_[other], a)) {
            swap(slot, other);
        }
    }
}

void Cell::descend() {
    budget_ = std::numeric_limits<int64_t>::max() / 2;
    descend_within_budget();  // ends by itself: sorted loads fall in lexical order
}

void Cell::search(int64_t budget, double enough) {
    budget_ = budget;
    std::vector<int32_t> best_slots = slot_, best_count = count_;
    double best = max_load();
    uint64_t random = 1;
    while (budget_ > 0 && best > bound_ * (1 + enough)) {
        kick(random);
        descend_within_budget();
        budget_ -= num_slots();
        if (max_load() < best * (1 - kProgress)) {
            best = max_load();
            best_slots = slot_, best_count = count_;
        } else {
            assign(best_slots, best_count);
        }
    }
    assign(best_slots, best_count);
}

bool Cell::adopt(std::span<const int32_t> slots) {
    std::vector<int32_t> before(num_experts_, 0);
    for (const int32_t e : slots) {
        if (e >= 0) ++before[e];
    }
    const auto free_slots = std::count(slots.begin(), slots.end(), -1);
    const auto missing = std::count(before.begin(), before.end(), 0);
    if (missing > free_slots) return false;
    std::vector<int32_t> at_least = before;
    for (int32_t& n : at_least) n = std::max(n, 1);
    assign(slots, count_replicas(std::move(at_least), num_slots()));
    std::vector<int> free(num_ranks_, 0);
    for (int q = 0; q < num_slots(); ++q) free[rank_of(q)] += slot_[q] < 0;
    for (const int e : descending(unit_)) {
        for (int i = before[e]; i < count_[e]; ++i) put(e, free);
    }
    return true;
}

void Cell::restore(std::span<const int32_t> slots) {
    std::vector<int32_t> count(num_experts_, 0);
    for (const int32_t e : slots) ++count[e];
    assign(slots, count);
}

}  // namespace ep::eplb
