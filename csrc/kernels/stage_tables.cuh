// Shared memory of a block of a small dispatch: what it counts of its own rank's tokens, what it hears from
// everybody, and the pieces its warps are at. One walk, for the host that sizes it and the kernel.
//
// defines: kSteps, Heard, Expert, Filling, StageSpread, StageTables, Prepared
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "contract/gpu.h"
#include "contract/stage.h"
#include "device/lines.cuh"
#include "device/ptx.cuh"
#include "kernels/stage.cuh"
#include "kernels/tables.cuh"

namespace ep::kernels {

// Lines of a piece, or more, as a warp has them in flight: in steps of four. A kernel that does not quantize may be the
// second half of one that does.
template <class Config>
constexpr int kSteps =
    (Config::kQuantizes ? kQuantizedLines : kRowLines) / device::LineLane::kAtOnce;

// What the notice of a rank says about itself.
struct Heard {
    int32_t num_tokens;
    int32_t max_rows, max_recv;  // granted
    uint32_t free_pages;
};

// What is known of an expert.
struct Expert {
    uint32_t code;     // see staged_expert
    int32_t position;  // counted owner by owner
};

// Of an output of fixed shape: what items have that nobody sent.
struct Filling {
    uint32_t* at;
    int32_t words, items;  // of an item; of the output
    uint32_t value;
};

struct StageSpread {
    static constexpr int kMostFillings = 5;

    Record record;
    int32_t row_bytes;  // as they travel
    // Of a piece of a row, of its last piece, and behind each.
    int32_t row_units, last_row_units, scale_units;
    // Of a piece: elements, and bytes as they are given; elements of the last one.
    int32_t elements, source_bytes, last_elements;
    Runs taken;  // by warps that receive
    Divisor pieces_of_row, places_of_source;
    Divisor scale_words;  // of a piece
    // Of a usual call (kernels/usual.cuh): ranks; 1 << shares_log warps share the rows of a piece here.
    Divisor sources;
    int32_t shares_log = 0;
    int32_t tokens_per_block;
    int32_t tokens_at_once, turns;  // of a warp that has a lane for every slot; see turn_of_lane
    // Byte offsets.
    int32_t arena, control, first, experts, before, middle, all, heard, prefix, pieces, end;
    int32_t piece_bytes;  // of shared memory
    int32_t buffers;      // for so many pieces of a warp: the next one is loaded meanwhile
    int32_t scales_at;    // in it, behind the piece as it is loaded
    int32_t fillers;      // warps that have something to fill in, at most
    int32_t num_fillings = 0;
    Filling fillings[kMostFillings];

    StageSpread(const Shape& s, const DispatchArgs& a, const UnpackArgs& out, int num_blocks)
        : record(record_of(a)),
          row_bytes(static_cast<int32_t>(a.row_bytes())),
          row_units(record.piece_bytes / kUnitBytes),
          last_row_units(row_bytes / kUnitBytes - row_units * (record.num_pieces - 1)),
          scale_units(static_cast<int32_t>(divide_up(record.scale_bytes, kUnitBytes))),
          elements(record.piece_bytes / dtype_bytes(a.wire_dtype())),
          source_bytes(elements * dtype_bytes(a.dtype)),
          last_elements(static_cast<int32_t>(a.hidden) - elements * (record.num_pieces - 1)),
          taken(record.num_pieces, s.num_ranks * a.num_tokens, int64_t{num_blocks} * kStageWarps),
          pieces_of_row(record.num_pieces),
          places_of_source(std::max<int64_t>(s.max_tokens, 1)),
          scale_words(std::max(record.scale_bytes / 4, 1)),
          sources(s.num_ranks),
          tokens_per_block(static_cast<int32_t>(divide_up(a.num_tokens, num_blocks))),
          tokens_at_once(32 / std::max(a.num_topk, 1)),
          turns(static_cast<int32_t>(divide_up(1 << 16, std::max(a.num_topk, 1)))) {
        int at = 0;
        const auto take = [&at](int64_t bytes) {
            const int offset = at;
            at += static_cast<int>(divide_up(bytes, 128) * 128);
            return offset;
        };
        const int64_t columns = s.num_ranks + s.num_experts;
        arena = take(8);
        control = take(8 * s.num_ranks);
        first = take(4 * (s.num_ranks + 1));
        experts = take(s.num_experts * int64_t{sizeof(Expert)});
        before = take(4 * columns);
        middle = take(4 * columns);
        all = take(4 * (columns + 2));
        heard = take(s.num_ranks * int64_t{sizeof(Heard)});
        prefix = take(4 * (s.num_ranks + 1) * columns);
        pieces = at;
        scales_at = static_cast<int32_t>(divide_up(source_bytes, 16) * 16);
        piece_bytes =
            static_cast<int32_t>(divide_up(scales_at + record.scale_bytes + 8, 128) * 128);
        piece_bytes = std::max(piece_bytes, 256);  // for the rows of a token: two words a lane
        // With one token a block no warp has two pieces, and memory is for the kernels beside this one.
        constexpr int kMostBytes = 192 * 1024;
        const bool fit = at + 2 * kStageWarps * piece_bytes <= kMostBytes;
        buffers = tokens_per_block * record.num_pieces > kStageWarps && fit ? 2 : 1;
        end = at + buffers * kStageWarps * piece_bytes;
        list_fillings(s, a, out);
        const int64_t runs = s.num_ranks * std::max<int64_t>(a.num_tokens, 1) * record.num_pieces;
        const int64_t rows = a.layout == RecvLayout::kSlab ? std::min<int64_t>(a.num_topk, 8) : 1;
        while (2 << shares_log <= rows && runs << (shares_log + 1) <= num_blocks * kStageWarps) {
            ++shares_log;
        }
    }
    EP_HD int row_units_of(int piece) const {
        return piece + 1 == record.num_pieces ? last_row_units : row_units;
    }
    EP_HD int elements_of(int piece) const {
        return piece + 1 == record.num_pieces ? last_elements : elements;
    }
    // lane / num_topk
    EP_HD int turn_of_lane(int lane) const { return lane * turns >> 16; }

private:
    void list_fillings(const Shape& s, const DispatchArgs& a, const UnpackArgs& out) {
        const auto recv = static_cast<int32_t>(out.max_recv), topk = a.num_topk;
        const auto rows = static_cast<int32_t>(out.max_rows);  // 0: there was no memory for them
        const bool is_slab = a.layout == RecvLayout::kSlab;
        fillers = is_slab && rows > 0 ? s.max_local_experts : 0;
        fill(out.recv_src, 2, recv, kNone);
        if (is_slab) return fill(out.recv_row, topk, recv, kNone);
        fill(out.topk_idx, out.idx_is_int64 ? 2 * topk : topk, rows, kNone);
        if (a.with_weights) fill(out.topk_weights, topk, rows, 0);
        if (out.row_token != nullptr) fill(out.row_token, 1, rows, kNone);
        fill(out.scales, static_cast<int32_t>(a.scale_bytes / 4), rows, 0);
    }
    static constexpr uint32_t kNone = 0xffffffffu;  // -1, of either width

    void fill(void* at, int32_t words, int32_t items, uint32_t value) {
        if (words == 0 || items == 0) return;
        fillings[num_fillings++] = {static_cast<uint32_t*>(at), words, items, value};
        const int64_t warps = divide_up(int64_t{items} * words, 32);
        fillers = static_cast<int32_t>(std::clamp<int64_t>(warps, fillers, INT32_MAX));
    }
};
static_assert(std::is_trivially_copyable_v<StageSpread>);

// Columns are tokens for every rank, then selections of every expert by position.
struct StageTables {
    const StageSpread& spread;
    const Shape& shape;

    __device__ __forceinline__ int columns() const { return shape.num_ranks + shape.num_experts; }
    // Our own.
    __device__ __forceinline__ std::byte*& arena() const { return *at<std::byte*>(spread.arena); }
    // [num_ranks] control blocks
    __device__ __forceinline__ std::byte** control() const {
        return at<std::byte*>(spread.control);
    }
    // [num_ranks + 1] position of the first expert of each
    __device__ __forceinline__ int32_t* first() const { return at<int32_t>(spread.first); }
    // [num_experts]
    __device__ __forceinline__ Expert* experts() const { return at<Expert>(spread.experts); }
    // [columns] of the tokens before those of this block; then of these, too
    __device__ __forceinline__ int32_t* before() const { return at<int32_t>(spread.before); }
    // [columns] the same of the tokens before the middle one of this block
    __device__ __forceinline__ int32_t* middle() const { return at<int32_t>(spread.middle); }
    // [columns] of the block that publishes: of all tokens
    __device__ __forceinline__ int32_t* all() const { return at<int32_t>(spread.all); }
    // [2] ids that name no expert, and the first of them
    __device__ __forceinline__ int32_t* bad() const { return all() + columns(); }
    // [num_ranks]
    __device__ __forceinline__ Heard* heard() const { return at<Heard>(spread.heard); }
    // [num_ranks + 1][columns] what sources below each rank bring; last: all of them
    __device__ __forceinline__ int32_t* prefix() const { return at<int32_t>(spread.prefix); }

    // Of the warp that asks: for the pieces it sends, then for rows of a token and scales it takes.
    __device__ __forceinline__ std::byte* warp_memory() const {
        const auto warp = static_cast<int>(threadIdx.x) / 32;
        return at<std::byte>(spread.pieces) + warp * spread.buffers * spread.piece_bytes;
    }

    // Nobody's, for ids that name no expert.
    __device__ __forceinline__ Expert expert(int64_t id) const {
        const bool known = static_cast<uint64_t>(id) < static_cast<uint64_t>(shape.num_experts);
        const Expert expert = experts()[known ? static_cast<int>(id) : 0];
        return known ? expert : Expert{kNoStagedExpert, -1};
    }
    // Of tokens for rank `dst`, or of selections, from sources below `src`.
    __device__ __forceinline__ int rows(int src, int dst) const {
        return prefix()[src * columns() + dst];
    }
    __device__ __forceinline__ int selections(int src, int position) const {
        return prefix()[src * columns() + shape.num_ranks + position];
    }
    __device__ __forceinline__ int total_rows(int dst) const { return rows(shape.num_ranks, dst); }
    __device__ __forceinline__ int total(int position) const {
        return selections(shape.num_ranks, position);
    }

private:
    template <class T>
    __device__ __forceinline__ static T* at(int offset) {
        return reinterpret_cast<T*>(ptx::dynamic_shared() + offset);
    }
};

// What tables hold that does not depend on anything that happens on the GPU, a thread's part of it. In two steps, so
// that loads are on their way together, and while other things are done.
struct Prepared {
    std::byte *control = nullptr, *arena = nullptr;
    int first = 0, owner = 0, local = 0, position = 0;

    // There are fewer ranks than threads.
    __device__ __forceinline__ explicit Prepared(const DispatchJob& job) {
        const State& state = job.view.state;
        const Peers& peers = job.view.peers;
        const int num_ranks = job.view.shape.num_ranks, i = threadIdx.x;
        if (i == 0) arena = peers.arena[peers.rank];
        if (i < num_ranks) control = peers.control[i];
        if (i <= num_ranks) first = __ldg(state.first + i);
        if (i >= job.view.shape.num_experts) return;
        owner = __ldg(state.owner + i), local = __ldg(state.local + i);
        position = __ldg(state.position + i);
    }
    // A barrier of the block must follow.
    __device__ __forceinline__ void store(const DispatchJob& job, const StageTables& tables) const {
        const State& state = job.view.state;
        const int num_ranks = job.view.shape.num_ranks, i = threadIdx.x;
        const int threads = blockDim.x, num_experts = job.view.shape.num_experts;
#pragma unroll 1
        for (int c = i; c < tables.columns() + 2; c += threads) {
            if (c < tables.columns()) tables.before()[c] = tables.middle()[c] = 0;
            tables.all()[c] = c == tables.columns() + 1 ? kNoBadId : 0;
        }
#pragma unroll 1
        for (int e = i + threads; e < num_experts; e += threads) {
            const uint32_t code = staged_expert(__ldg(state.owner + e), __ldg(state.local + e));
            tables.experts()[e] = {code, __ldg(state.position + e)};
        }
        if (i == 0) tables.arena() = arena;
        if (i < num_ranks) tables.control()[i] = control;
        if (i <= num_ranks) tables.first()[i] = first;
        if (i < num_experts) tables.experts()[i] = {staged_expert(owner, local), position};
    }
};

}  // namespace ep::kernels
