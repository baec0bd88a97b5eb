// What a caller hands to an operation: plain addresses and numbers, filled by name from Python.
//
// Every pointer is to memory of the calling rank; shapes stand beside it. Nothing here is owned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "contract/config.h"
#include "contract/records.h"
#include "contract/replicas.h"

namespace ep {

struct DispatchArgs {
    // in
    const std::byte* x = nullptr;       // [num_tokens, hidden] of dtype, rows x_stride bytes apart
    const std::byte* scales = nullptr;  // [num_tokens, scale_bytes], given with already quantized x
    const int64_t* topk_idx = nullptr;  // [num_tokens, num_topk] global expert, -1 = none
    const float* topk_weights = nullptr;  // [num_tokens, num_topk] or null
    Replicas replicas;  // of a fresh call: topk_idx names logical experts, else physical ones
    // out of a fresh call, null = not wanted
    int64_t* routed_idx = nullptr;    // [num_tokens, num_topk] ids that the handle keeps: a copy of
                                      // topk_idx; with replicas, which need it, the physical expert
                                      // chosen, -1 = none
    int64_t* logical_load = nullptr;  // [num_logical] adds the selections of this call; replicas
    // out of a fresh call, in of a cached one
    int32_t* send_row = nullptr;       // [num_tokens, num_topk] row at the owner, -1 = none
    int64_t* rank_counts = nullptr;    // [2, num_ranks] unique tokens sent to, received from
    int32_t* expert_counts = nullptr;  // [num_local_experts] selections received
    // out, null = not wanted
    int32_t* rank_ends = nullptr;   // [num_ranks, num_ranks] where the rows of each source end at
                                    // each owner: inclusive prefix sums over sources
    int32_t* recv_stats = nullptr;  // [num_local_experts] adds the selections received
    int64_t* wait_stats =
        nullptr;  // [num_ranks] adds the nanoseconds waited for each rank to enter
                  // and for its rows
    // scalars
    int64_t num_tokens = 0;
    int64_t x_stride = 0;
    int64_t hidden = 0;
    int64_t scale_bytes = 0;      // per token, as it travels: given, or made by `quantize`
    int64_t capacity = -1;        // rows (slab: per expert), -1 = whatever arrives
    int64_t index_capacity = -1;  // entries of a static row index, -1 = none or as it comes
    int64_t x_offset = -1;        // slab: of x in our arena when the caller gives it, -1 = granted
    int64_t given_capacity = -1;  // as the caller passed it, the same on all ranks; -1 = left out
    int32_t num_topk = 0;
    int32_t alignment = 1;
    int32_t scale_block = 128;
    RecvLayout layout = RecvLayout::kCompact;
    DType dtype = DType::kBF16;
    Quantize quantize = Quantize::kNone;
    bool with_weights = false;  // the same on all ranks, also on one without tokens
    bool is_static = false;     // capacity rows, whatever arrives
    bool cached = false;
    bool paranoid = false;  // of the buffer: rows are sealed by their source and checked here
    uint64_t routing = 0;   // cached: of the handle; with replicas: key of their placement

    EP_HD constexpr DType wire_dtype() const {
        return quantize == Quantize::kNone ? dtype : DType::kE4M3;
    }
    EP_HD constexpr int64_t row_bytes() const { return hidden * dtype_bytes(wire_dtype()); }
};
static_assert(std::is_trivially_copyable_v<DispatchArgs>);

// Where the receiver unpacks what came beside the rows; null = not wanted.
struct UnpackArgs {
    int32_t* recv_src = nullptr;  // [num_recv, 2] source rank, source token
    int32_t* recv_row = nullptr;  // [num_recv, num_topk] grouped, slab; in of a cached call
    void* topk_idx = nullptr;  // compact [num_recv, num_topk]; grouped, slab [num_rows]; local, -1
    float* topk_weights = nullptr;  // the same shape
    std::byte* scales =
        nullptr;  // [num_rows, scale_bytes]; slab: per expert [scale words][capacity4]
    int32_t* offsets = nullptr;       // grouped, row index: [num_local_experts + 1]
    int32_t* row_index = nullptr;     // compact: [max_index], see row_alignment
    int32_t* row_token = nullptr;     // [num_rows] source token of each row, -1 in padding
    int64_t* source_range = nullptr;  // grouped, slab: [num_local_experts, num_ranks], first row
                                      // in the group << 32 | rows
    int64_t max_recv = 0;             // rows of recv_src (static: padded with -1)
    int64_t max_rows = 0;             // rows of x
    int64_t max_index = 0;            // entries of row_index (static: padded with -1)
    int32_t row_alignment = 1;        // of row_index groups
    bool idx_is_int64 = true;
};

struct CombineArgs {
    // in
    const std::byte* x = nullptr;      // [num_rows, hidden] expert output, dtype, contiguous
    const float* y_weights = nullptr;  // to send back: [num_recv, num_topk] or [num_rows]; or null
    const float* row_weights = nullptr;    // [num_rows] top-k weight of each row; weighted per_rank
    const int64_t* topk_idx = nullptr;     // [num_tokens, num_topk] of the handle
    const float* topk_weights = nullptr;   // [num_tokens, num_topk], applied when weighted
    const int32_t* send_row = nullptr;     // [num_tokens, num_topk] of the handle
    const int64_t* rank_counts = nullptr;  // [2, num_ranks] of the handle
    const int32_t* recv_src = nullptr;     // [num_recv, 2] of the handle
    const int32_t* recv_row = nullptr;     // [num_recv, num_topk] of the handle
    const std::byte* bias0 = nullptr;      // [num_tokens, hidden] or null
    const std::byte* bias1 = nullptr;
    // out
    std::byte* out = nullptr;       // [num_tokens, hidden]
    float* out_weights = nullptr;   // [num_tokens, num_topk] or null
    int64_t* wait_stats = nullptr;  // [num_ranks] adds the nanoseconds waited for each rank's rows
    // scalars
    int64_t num_tokens = 0, num_recv = 0, num_rows = 0, hidden = 0;
    int64_t arena_offset = -1;  // of x when it lies in the arena
    int32_t num_topk = 0;
    RecvLayout layout = RecvLayout::kCompact;
    DType dtype = DType::kBF16;
    bool weighted = false;
    bool with_weights = false;  // weights come back; the same on all ranks
    bool sum_weights = false;   // compact: add what all ranks of the token hold for a slot
    bool topk_order = false;    // add in slot order, whoever owns the expert
    bool per_rank = false;  // owners add up their rows of a token and round, the source the rest
    uint64_t routing = 0;
    // Across nodes: what tokens of our rail left here, of the handle (contract/rail.h, RailLog).
    int32_t* rail_log = nullptr;
    int64_t num_logged = 0;
    bool log_has_weights = false;

    EP_HD constexpr int64_t row_bytes() const { return hidden * dtype_bytes(dtype); }
    // What a source adds of a token: one row of each rank, or one of each slot; and whether it
    // multiplies rows, which owners do otherwise.
    EP_HD constexpr bool one_per_rank() const { return layout == RecvLayout::kCompact || per_rank; }
    EP_HD constexpr bool source_weighs() const { return weighted && !per_rank; }
};
static_assert(std::is_trivially_copyable_v<CombineArgs>);

}  // namespace ep
