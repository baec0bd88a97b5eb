// What ranks write into each other's control blocks. docs/protocol.md tells who, when and why it is
// safe.
//
// A record is published by a release-store of its `seq`, last; its reader acquires `seq`, then
// reads the rest.
#pragma once

#include <cstdint>
#include <type_traits>

#include "contract/config.h"
#include "contract/status.h"

namespace ep {

// Fields of a call that every rank must pass alike (E220 names the first that differs).
enum class Field : int32_t {
    kLayout,
    kDtype,
    kHidden,
    kQuantize,
    kScaleBlock,
    kScaleBytes,
    kTopk,
    kAlignment,
    kCapacity,
    kFlags,    // which optional tensors travel, static mode, weighted combine
    kRouting,  // sequence number of the dispatch a handle came from; 0 for a fresh one, or the key
               // of the placement it goes by
    kCount,
};

inline constexpr const char* kFieldNames[] = {
    "layout", "dtype",     "hidden",   "quantize", "scale_block", "scale_bytes",
    "top_k",  "alignment", "capacity", "flags",    "routing",
};
inline constexpr int kNumFields = static_cast<int>(Field::kCount);
static_assert(sizeof(kFieldNames) / sizeof(kFieldNames[0]) == kNumFields);

struct Descriptor {
    int64_t value[kNumFields] = {};

    EP_HD int64_t& operator[](Field f) { return value[static_cast<int>(f)]; }
    EP_HD int64_t operator[](Field f) const { return value[static_cast<int>(f)]; }
};

// Bits of Field::kFlags.
inline constexpr int64_t kFlagWeights =
    1;                                     // top-k weights travel (dispatch) or come back (combine)
inline constexpr int64_t kFlagStatic = 2;  // sync=False
inline constexpr int64_t kFlagCached = 4;  // routing of a handle
inline constexpr int64_t kFlagWeighted = 8;  // combine multiplies by the top-k weights
inline constexpr int64_t kFlagPerRank = 16;  // owners add up their rows of a token first

// "I entered operation seq, and this is what I bring you." Written by a source into every
// receiver's block.
struct EntryRecord {
    uint64_t seq;
    int32_t kind;  // OpKind
    int32_t code;  // kOk, or the poison of a call its rank refused
    Descriptor descriptor;
    int64_t num_tokens;      // of the source, in total
    int64_t num_rows;        // dispatch: rows it will push to this receiver; combine: rows of its y
    int64_t y_offset;        // combine: rows of y in the source's arena
    int64_t streamed_rows;   // combine: rows for this source that stream; -1 = y lies at y_offset
    int64_t ring_rows;       // combine: rows of each ring that lies there instead
    int64_t weights_offset;  // combine: weights of y in the source's arena, or -1
    int64_t detail[4];
    char reason[kReasonBytes];
};
static_assert(sizeof(EntryRecord) == 296 && std::is_trivially_copyable_v<EntryRecord>);

// "You may write here." Written by a receiver into every source's block; publishing it is the
// credit.
struct BaseRecord {
    uint64_t seq;
    int32_t code;  // kOk, or the poison of a receiver that cannot place the rows
    int32_t reserved;
    int64_t x_offset;  // extents in the receiver's arena
    int64_t meta_offset;
    int64_t row;        // first compact row of this source
    int64_t num_rows;   // rows of x in the extent
    int64_t detail[2];  // why not: have, want
};
static_assert(sizeof(BaseRecord) == 64 && std::is_trivially_copyable_v<BaseRecord>);

// Life of a rank, readable by its peers.
enum class Life : uint32_t { kUnborn = 0, kAlive, kLeft, kFailed };

struct ControlHeader {
    uint64_t magic;
    uint64_t generation;    // of the buffer; random, equal on all ranks
    uint32_t doorbell;      // bumped by whoever published something here, then futex-woken
    uint32_t waiting_for;   // rank + 1 whose publication this rank sleeps for; 0: none, ~0: any
    uint32_t life;          // Life
    uint32_t entered_kind;  // OpKind of the last operation entered
    uint64_t entered_seq;
    uint64_t finished_seq;
    uint64_t verdict_valid;  // release-stored after `verdict`
    Incident verdict;        // why life is kFailed
};
static_assert(sizeof(ControlHeader) == 120 && std::is_trivially_copyable_v<ControlHeader>);

inline constexpr uint64_t kControlMagic = 0x4c52544e4f435045;  // "EPCONTRL"

}  // namespace ep
