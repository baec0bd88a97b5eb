// The sending side of dispatch: each token is read (or quantized) once and written to every rank
// that wants it, with its metadata record beside it.
//
// Records are small and go to many places: they are gathered for each rank and written some at a
// time, past the cache as the rows are, or each would pull two lines of a peer's memory in.
#pragma once

#include <memory>
#include <vector>

#include "contract/args.h"
#include "contract/layout.h"
#include "cpu/operation.h"
#include "cpu/simd.h"

namespace ep::cpu {

class Push {
public:
    // All bases have been acquired.
    Push(Operation& op, const DispatchArgs& args, const MetaLayout& meta);

    // Sends token t; tokens go in ascending order. False: `refusal()` says which row does not
    // exist.
    bool token(int64_t t);
    // Releases every row and record pushed so far.
    void arrive();

    const Outcome& refusal() const { return refusal_; }

private:
    // Where one token goes.
    struct Route {
        int32_t owner[kMaxTopk];  // rank of each slot's expert, -1 = none
        int32_t local[kMaxTopk];  // id of each slot's expert there
        int32_t row[kMaxTopk];    // row of each slot at its owner
        int first[kMaxTopk];      // slots that are the first of their rank
        int num_destinations = 0;
    };
    struct Payload {
        const std::byte* row = nullptr;     // [row_bytes] as it travels
        const std::byte* scales = nullptr;  // [scale_bytes]
    };

    // What has been gathered for a rank: `count` records, of which the last is of row
    // next_compact_ - 1.
    struct Gathered {
        std::unique_ptr<std::byte[]> records;
        int64_t count = 0;
    };

    void find_owners(int64_t t, const int64_t* ids, Route& route);
    void assign_rows(int64_t t, const int64_t* ids, Route& route);
    Payload load(int64_t t);
    void gather_record(int64_t t, int dst, int64_t row, const Route& route, const Payload& payload);
    void write_gathered(int dst);

    Operation& op_;
    const DispatchArgs& a_;
    const MetaLayout& meta_;
    const Simd& simd_;
    void (*copy_)(std::byte*, const std::byte*, int64_t);
    std::vector<int64_t> next_compact_;  // [num_ranks] compact row of our next token there
    std::vector<int64_t> pushed_;        // [num_ranks]
    std::vector<int64_t> last_token_;    // [num_ranks] the last token that went there
    std::vector<Gathered> gathered_;     // [num_ranks]
    int64_t most_gathered_ = 0;          // records
    std::vector<int64_t> next_row_;      // [num_experts] by position: row of our next selection
    std::vector<std::byte> scratch_;     // a quantized row and its scales
    Outcome refusal_;
};

}  // namespace ep::cpu
