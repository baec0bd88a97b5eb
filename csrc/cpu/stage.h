// The owner's side of a combine whose y lies outside the arena, or whose owners add up their rows of a
// token: rows, or sums, stream to each source through a ring of its own, in the order in which the
// source adds them.
//
// A ring is small: the rows are read while they are still in a cache, and a call needs little memory
// beside its output.
#pragma once

#include <cstdint>
#include <vector>

#include "contract/args.h"
#include "cpu/operation.h"

namespace ep::cpu {

// What rows of y come to in the order given, rounded: what an owner sends of a token, per_rank.
void add_part(const CombineArgs& args, const int32_t* rows, int count, std::byte* out);

class Stage {
public:
    Stage(Operation& op, const CombineArgs& args);

    // Whether anything goes through rings; else sources read y where it lies.
    bool streams() const { return a_.arena_offset < 0 || a_.per_rank; }
    // What the rings take of the arena; 0 = no source reads rows of ours.
    int64_t bytes() const { return (op_.num_ranks - 1) * ring_rows_ * a_.row_bytes(); }
    int64_t ring_rows() const { return ring_rows_; }
    int64_t rows_for(int src) const { return sources_[src].num_rows; }
    void place(std::byte* rings) { rings_ = rings; }

    // Copies rows as far as the rings have room; whether there was any.
    bool advance();
    bool can_advance() const { return first_with_room() >= 0; }
    bool over() const { return left_ == 0; }
    // This source takes no more.
    void drop(int src);
    // The first source whose ring is full.
    int blocked_on() const;
    // Changes while sources take rows.
    int64_t progress() const;

    // Room is made and used in large parts of a ring: each part may cost a rank its turn.
    static bool is_worth_telling(int64_t rows, int64_t ring_rows) { return 4 * rows >= ring_rows; }

    // Which ring of an owner is a source's: there is none for its own rows.
    static int ring_of(int owner, int src) { return src < owner ? src : src - 1; }

private:
    struct Source {
        int64_t token = 0, end = 0;  // received tokens that are still to be staged
        int slot = 0;                // of `token`; one row for all slots: the first it has
        int64_t num_rows = 0;        // in all
        int64_t staged = 0;
    };

    int64_t row_at(const Source& source) const;
    void stage_row(std::byte* to, const Source& source) const;
    void step(Source& source) const;
    void skip_none(Source& source) const;
    int64_t taken(int src) const;
    int first_with_room() const;
    bool has_room(int src) const;

    Operation& op_;
    const CombineArgs& a_;
    std::vector<Source> sources_;  // [num_ranks]
    std::byte* rings_ = nullptr;   // [num_ranks - 1][ring_rows][row_bytes]
    int64_t ring_rows_ = 0;
    int64_t left_ = 0;  // rows to be staged, for all sources
};

}  // namespace ep::cpu
