// What a rank on a GPU tells every rank when it enters an operation: what the call is, what it brings to
// everybody, and where they may write.
//
// It travels as packed words (device/packed.cuh): 32 bits and the number of the operation each. Its head
// has one word for each lane of a warp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "contract/config.h"
#include "contract/records.h"
#include "contract/shape.h"
#include "contract/status.h"

namespace ep {

// Extents a rank's host has granted to a dispatch before it began, as pages of its arena.
struct Grant {
    enum Extent {
        kX,        // rows
        kIds,      // of compact per row and slot, else per row; local, -1 = none
        kWeights,  // the same
        kSrc,      // [max_recv, 2] source rank and token
        kRows,     // [max_recv, num_topk] grouped, slab: row of each selection, -1 = not here
        kScales,   // of compact per row, else per received token
        kExtents,
    };
    static constexpr uint32_t kNone = ~uint32_t{0};  // not wanted

    uint32_t page[kExtents] = {kNone, kNone, kNone, kNone, kNone, kNone};
    int32_t max_rows = 0, max_recv = 0;
    uint32_t free_pages = 0;  // when it was not enough
    uint32_t wide_ids = 0;    // ids are int64, not int32
};

// Where the rows of an expert output lie in the arena of their rank.
struct Output {
    uint32_t y[2] = {0, 0};  // offset
    int32_t num_rows = 0;
    uint32_t weights[2] = {~uint32_t{0}, ~uint32_t{0}};  // of y; all ones = none
};

struct NoticeHead {
    uint32_t what = 0;               // OpKind << 16 | kOk, or the poison of a call its rank refused
    uint32_t signature[2] = {0, 0};  // of the descriptor
    int32_t num_tokens = 0;          // of the source
    Grant grant;                     // dispatch
    Output output;                   // combine
    uint32_t unused[13] = {};

    constexpr void set(OpKind kind, int code) {
        what = static_cast<uint32_t>(kind) << 16 | static_cast<uint32_t>(code);
    }
};
static_assert(sizeof(NoticeHead) == 32 * 4 && std::is_trivially_copyable_v<NoticeHead>);

EP_HD constexpr OpKind kind_of(uint32_t what) { return static_cast<OpKind>(what >> 16); }
EP_HD constexpr int code_of(uint32_t what) { return static_cast<int>(what & 0xffff); }

// Why a call was refused; told only with a code.
struct Refusal {
    int64_t detail[4] = {0, 0, 0, 0};
    char reason[kReasonBytes] = {0};
};
static_assert(std::is_trivially_copyable_v<Refusal>);

// Which word is what. Words of two notices never share a cache line.
struct NoticeLayout {
    // Of the head.
    static constexpr int kWhat = 0, kSignature = offsetof(NoticeHead, signature) / 4;
    static constexpr int kTokens = offsetof(NoticeHead, num_tokens) / 4;
    static constexpr int kGrant = offsetof(NoticeHead, grant) / 4;
    static constexpr int kMaxRows = kGrant + offsetof(Grant, max_rows) / 4;
    static constexpr int kMaxRecv = kGrant + offsetof(Grant, max_recv) / 4;
    static constexpr int kFreePages = kGrant + offsetof(Grant, free_pages) / 4;
    static constexpr int kWideIds = kGrant + offsetof(Grant, wide_ids) / 4;
    static constexpr int kOutput = offsetof(NoticeHead, output) / 4;
    static constexpr int kNumRows = kOutput + offsetof(Output, num_rows) / 4;
    static constexpr int kYWeights = kOutput + offsetof(Output, weights) / 4;
    static constexpr int kHead = 32;
    static constexpr int kDescriptorWords = sizeof(Descriptor) / 4;
    static constexpr int kRefusalWords = sizeof(Refusal) / 4;

    // Behind the head, for who wants to know what differs; then, of a dispatch, rows for every rank, rows
    // a handle expects from every rank, selections of every expert by position.
    static constexpr int kDescriptor = kHead, kRefusal = kDescriptor + kDescriptorWords;
    static constexpr int kRows = kRefusal + kRefusalWords;
    int32_t expected, selections, end, words;

    EP_HD constexpr explicit NoticeLayout(const Shape& s)
        : expected(kRows + s.num_ranks),
          selections(expected + s.num_ranks),
          end(selections + s.num_experts),
          words((end + 15) / 16 * 16) {}
};

// FNV-1a over the fields: calls that differ have different signatures, or somebody wins a lottery.
constexpr void sign(NoticeHead& head, const Descriptor& descriptor) {
    uint64_t hash = 0xcbf29ce484222325;
    for (const int64_t value : descriptor.value) {
        for (int byte = 0; byte < 8; ++byte) {
            hash = (hash ^ (static_cast<uint64_t>(value) >> 8 * byte & 0xff)) * 0x100000001b3;
        }
    }
    head.signature[0] = static_cast<uint32_t>(hash);
    head.signature[1] = static_cast<uint32_t>(hash >> 32);
}

}  // namespace ep
