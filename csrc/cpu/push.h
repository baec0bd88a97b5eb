// The sending side of dispatch: each token is read (or quantized) once and written to every rank
// that wants it, with its metadata record beside it.
#pragma once

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
        int owner[kMaxTopk];    // rank of each slot's expert, -1 = none
        int32_t row[kMaxTopk];  // row of each slot at its owner
        int first[kMaxTopk];    // slots that are the first of their rank
        int num_destinations = 0;
    };
    struct Payload {
        const std::byte* row = nullptr;     // [row_bytes] as it travels
        const std::byte* scales = nullptr;  // [scale_bytes]
    };

    void find_owners(const int64_t* ids, Route& route) const;
    void assign_rows(int64_t t, const int64_t* ids, Route& route);
    Payload load(int64_t t);
    void write_record(int64_t t, int dst, const Route& route, const Payload& payload) const;

    Operation& op_;
    const DispatchArgs& a_;
    const MetaLayout& meta_;
    const Simd& simd_;
    void (*copy_)(std::byte*, const std::byte*, int64_t);
    std::vector<int64_t> next_compact_;  // [num_ranks] compact row of our next token there
    std::vector<int64_t> pushed_;        // [num_ranks]
    std::vector<int64_t> next_row_;      // [num_experts] by position: row of our next selection
    std::vector<std::byte> scratch_;     // a quantized row and its scales
    Outcome refusal_;
};

}  // namespace ep::cpu
