// A cell: some ranks, all their slots, and the experts that share them.
//
// The global policy has one cell, the hierarchical policy one per node, and groups on nodes are a
// cell themselves. A replica carries the load of its expert divided by the number of its replicas;
// what counts is the load of the heaviest rank. Greedy first, then steps that lower the heaviest
// rank, then kicks out of local minima. Nothing depends on time or addresses: equal input, equal
// output.
#pragma once

#include <bit>
#include <cstdint>
#include <span>
#include <vector>

namespace ep::eplb {

class Cell {
public:
    // load: [num_experts], descending; num_ranks * slots_per_rank >= num_experts > 0.
    // distinct: replicas of an expert go to different ranks wherever there are enough of those.
    Cell(std::vector<double> load, int num_ranks, int slots_per_rank, bool distinct);

    // The public greedy: a further replica for the heaviest, then longest-processing-time first.
    void place();
    // Lowers the heaviest rank until no step does.
    void descend();
    // Kicks and descends again, for about `budget` evaluations, or until it is `enough` (relative)
    // above the bound; keeps the best.
    void search(int64_t budget, double enough);

    // Takes over an assignment, -1 = free; free slots get the experts that are missing, then
    // further replicas. False: experts are missing and there is no room.
    bool adopt(std::span<const int32_t> slots);
    // Back to an assignment without free slots.
    void restore(std::span<const int32_t> slots);

    // One step from one assignment to another: two slots change places, or one gets another expert.
    void swap(int slot, int other);
    void replace(int slot, int expert);

    // No assignment is below: the mean, and the heaviest replica if replicas are given best.
    double bound() const { return bound_; }
    int num_experts() const { return num_experts_; }
    int num_ranks() const { return num_ranks_; }
    int num_slots() const { return static_cast<int>(slot_.size()); }
    int slots_per_rank() const { return slots_per_rank_; }
    int rank_of(int slot) const { return rank_of_[slot]; }
    int first_slot(int rank) const { return rank * slots_per_rank_; }
    // [num_slots] expert of each slot, rank by rank.
    std::span<const int32_t> slots() const { return slot_; }
    std::span<const int32_t> on_rank(int rank) const {
        return slots().subspan(size_t(rank) * slots_per_rank_, slots_per_rank_);
    }
    int count(int expert) const { return count_[expert]; }
    int held(int rank, int expert) const { return held_[size_t(expert) * num_ranks_ + rank]; }
    bool repeats() const;  // some rank holds an expert twice
    bool has(int rank, int expert) const {
        return ranks_of_[size_t(expert) * words_ + rank / 64] >> (rank % 64) & 1;
    }
    bool clashes(int expert, int rank) const { return distinct_ && has(rank, expert); }
    double unit(int expert) const { return unit_[expert]; }            // of one replica
    double unit_more(int expert) const { return unit_more_[expert]; }  // were there one more
    double unit_fewer(int expert) const { return unit_fewer_[expert]; }
    double rank_load(int rank) const { return rank_load_[rank]; }
    int heaviest_rank() const;
    double max_load() const { return rank_load_[heaviest_rank()]; }

    // f(rank) for each that holds a replica of `expert`.
    template <class F>
    void for_each_rank_of(int expert, F&& f) const {
        for (int w = 0; w < words_; ++w) {
            for (uint64_t left = ranks_of_[size_t(expert) * words_ + w]; left != 0;
                 left &= left - 1) {
                f(w * 64 + std::countr_zero(left));
            }
        }
    }

private:
    struct Step {
        int slot = -1, other = -1;  // other: the second slot of a swap
        int expert = -1;            // of a replacement
        double result = 0;          // heaviest of the ranks it touches
    };

    double share(int expert, int count) const { return load_[expert] / count; }

    std::vector<int32_t> count_replicas(std::vector<int32_t> at_least, int total) const;
    void set_count(int expert, int replicas);
    int lightest_rank(int expert, std::span<const int> free) const;
    void put(int expert, std::vector<int>& free);
    void set(int slot, int expert);
    int first_free(int rank) const;
    double result_of_replacement(int slot, int expert, double limit);
    void find_swap(int rank, Step& best);
    void find_replacement(int rank, Step& best);
    void apply(const Step& step);
    void assign(std::span<const int32_t> slots, std::span<const int32_t> count);
    void hold(int rank, int expert);
    void let_go(int rank, int expert);
    void sum_load(int rank);
    void descend_within_budget();
    void kick(uint64_t& random);

    int num_experts_, num_ranks_, slots_per_rank_;
    int words_;                 // 64 ranks each
    bool distinct_;             // asked for, and there are enough different experts
    std::vector<double> load_;  // [num_experts] descending
    double bound_ = 0;
    std::vector<int32_t> rank_of_;  // [num_slots] asked for so often that division shows
    std::vector<int32_t> slot_;     // [num_slots] expert, -1 = free
    std::vector<int32_t> count_;    // [num_experts] replicas
    std::vector<double> unit_, unit_more_, unit_fewer_;  // [num_experts] divided once per count
    std::vector<uint16_t> held_;                         // [num_experts, num_ranks] replicas
    std::vector<uint64_t> ranks_of_;  // [num_experts, words] bit r = rank r holds one
    std::vector<double> rank_load_;   // [num_ranks]
    int64_t budget_ = 0;              // evaluations left
};

// Indices of `load`, descending; equal loads by index.
std::vector<int32_t> descending(std::span<const double> load);

}  // namespace ep::eplb
