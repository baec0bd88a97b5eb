// The first half of a small dispatch: rows are put in front of their receivers, and everybody is told what
// comes. Nobody is waited for but for the slot.
//
// defines: Sender, count_tokens, count_load, publish_counts
#pragma once

#include <cstdint>

#include "contract/direct.h"
#include "contract/gpu.h"
#include "device/copy.cuh"
#include "device/lines.cuh"
#include "device/ptx.cuh"
#include "device/quantize.cuh"
#include "kernels/count.cuh"
#include "kernels/enter.cuh"
#include "kernels/mover.cuh"
#include "kernels/stage.cuh"
#include "kernels/stage_masks.cuh"
#include "kernels/stage_tables.cuh"

namespace ep::kernels {

// ---- counting ----

// A thread takes a token, `threads` of them do. Tokens below `own` are before the block's; all of them, when
// it publishes.
template <class ExpertOf>
__device__ __forceinline__ void count_each(const DispatchJob& job, const StageTables& tables,
                                           int own, bool publishes, int threads,
                                           ExpertOf expert_of_id) {
    const DispatchArgs& a = job.args;
    const int end = publishes ? static_cast<int>(a.num_tokens) : own;
#pragma unroll 1
    for (int t = threadIdx.x; t < end; t += threads) {
        const int64_t* ids = a.topk_idx + int64_t{t} * a.num_topk;
        const bool earlier = t < own;
        uint64_t ranks = 0;
#pragma unroll 8
        for (int k = 0; k < a.num_topk; ++k) {
            const int64_t id = expert_of_id(t, ids[k]);
            const Expert expert = tables.expert(id);
            if (expert.position >= 0) {
                const int column = tables.shape.num_ranks + expert.position;
                ranks |= uint64_t{1} << staged_rank(expert.code);
                if (earlier) atomicAdd(&tables.before()[column], 1);
                if (publishes) atomicAdd(&tables.all()[column], 1);
            } else if (publishes && id != -1) {
                atomicAdd(&tables.bad()[0], 1);
                atomicMin(&tables.bad()[1], t * a.num_topk + k);
            }
        }
#pragma unroll 1
        for (; ranks != 0; ranks &= ranks - 1) {
            const int dst = __ffsll(static_cast<long long>(ranks)) - 1;
            if (earlier) atomicAdd(&tables.before()[dst], 1);
            if (publishes) atomicAdd(&tables.all()[dst], 1);
        }
    }
}

__device__ __noinline__ inline void count_logical(const DispatchJob& job, const StageSpread& spread,
                                                  int own, bool publishes, int threads) {
    count_each(job, StageTables{spread, job.view.shape}, own, publishes, threads,
               [&](int t, int64_t id) { return replica_of(job, t, id); });
}

__device__ __forceinline__ void count_tokens(const DispatchJob& job, const StageSpread& spread,
                                             int own, bool publishes, int threads) {
    if (job.args.replicas.num_logical != 0) {
        return count_logical(job, spread, own, publishes, threads);
    }
    count_each(job, StageTables{spread, job.view.shape}, own, publishes, threads,
               [](int, int64_t id) { return id; });
}

// Selections of logical experts; of a call without a bad id.
__device__ __noinline__ inline void count_load(const DispatchJob& job, bool counts) {
    const DispatchArgs& a = job.args;
    if (!counts) return;
    auto* load = reinterpret_cast<unsigned long long*>(a.logical_load);
    for (int64_t i = threadIdx.x; i < a.num_tokens * a.num_topk; i += blockDim.x) {
        if (a.topk_idx[i] >= 0) atomicAdd(load + a.topk_idx[i], 1ull);
    }
}

// All threads of the block that publishes.
__device__ __forceinline__ void publish_counts(const DispatchJob& job, const StageTables& tables,
                                               Entering& in) {
    using L = NoticeLayout;
    const DispatchArgs& a = job.args;
    const Shape& shape = job.view.shape;
    if (tables.bad()[0] > 0 || in.code != kOk) {
        if (threadIdx.x == 0 && tables.bad()[0] > 0) {
            const int64_t at = tables.bad()[1];
            in.code = kBadExpertId;
            in.detail[0] = tables.bad()[0];
            in.detail[1] = at / a.num_topk;
            in.detail[2] = at % a.num_topk;
            in.detail[3] = a.topk_idx[at];
        } else if (threadIdx.x == 0) {
            for (int i = 0; i < 4; ++i) in.detail[i] = job.begin.refusal.detail[i];
        }
        __syncthreads();
    }
    publish_head(job.view, job.begin, in);
    const NoticeLayout layout(shape);
    publish_words(job.view, in, L::kRows, layout.end, [&](int i) {
        if (i >= layout.expected && i < layout.selections) return 0u;
        const int c = i < layout.expected ? i - L::kRows : shape.num_ranks + i - layout.selections;
        const int number = tables.all()[c];
        if (c < shape.num_ranks) a.rank_counts[c] = number;
        return static_cast<uint32_t>(number);
    });
}

// ---- sending ----

// Of a warp.
template <class F>
struct Sender {
    const DispatchJob& job;
    const StageSpread& spread;
    StageTables tables;
    StageView<F> stage;
    device::Stage piece;  // in shared memory
    const Entering& in;
    bool loading = false;

    __device__ const DispatchArgs& args() const { return job.args; }
    __device__ std::byte* record_at(int p, int t) const {
        const RankView& view = job.view;
        return stage.place(p, int64_t{view.peers.rank} * view.shape.max_tokens + t);
    }
    // Elements of a piece.
    __device__ int elements(int p) const {
        return stage.piece_bytes(p, args().row_bytes()) / dtype_bytes(args().wire_dtype());
    }

    // Piece p of token t, as it is.
    __device__ void load(int t, int p) {
        loading = true;
        if (ptx::lane_id() != 0) return;
        const int size = dtype_bytes(args().dtype);
        const int first = spread.record.piece_bytes / dtype_bytes(args().wire_dtype()) * p;
        device::load_stage(piece, args().x + t * args().x_stride + int64_t{first} * size,
                           elements(p) * size);
    }
    __device__ void abandon() {
        if (loading) device::drain_stage(piece);
        loading = false;
    }

    // What a lane knows of its slot of a token.
    struct Slot {
        Expert expert{kNoStagedExpert, -1};
        float weight = 0.0f;

        __device__ __forceinline__ bool chosen() const { return expert.position >= 0; }
        __device__ __forceinline__ int dst() const {
            return chosen() ? staged_rank(expert.code) : -1;
        }
    };
    __device__ __forceinline__ Slot slot_of(int t) const {
        const DispatchArgs& a = args();
        Slot slot;
        const int64_t i = int64_t{t} * a.num_topk + ptx::lane_id();
        if (static_cast<int>(ptx::lane_id()) >= a.num_topk) return slot;
        const int64_t id = expert_of(job, t, a.topk_idx[i]);
        if (a.topk_weights != nullptr) slot.weight = a.topk_weights[i];
        if (a.routed_idx != nullptr) a.routed_idx[i] = id;
        slot.expert = tables.expert(id);
        return slot;
    }

    // Piece p of token t is made ready in shared memory; its load is under way. False: leave.
    template <class Config>
    __device__ __forceinline__ bool prepare(int t, int p) {
        const DispatchArgs& a = args();
        const RankView& view = job.view;
        loading = false;
        if (!device::await_stage(view.watch, stage.op, piece, view.peers.rank)) return false;
        std::byte* scales = piece.data + spread.scales_at;
        if constexpr (Config::kQuantizes) {
            device::quantize_row<Config::kSource>(piece.data, scales, elements(p), a.scale_block,
                                                  a.quantize == Quantize::kFp8Ue8m0);
        } else if (a.scale_bytes > 0) {
            load_scales(t, p, scales);
        }
        return true;
    }

    // It goes to every rank the token goes to.
    __device__ __forceinline__ void send(int t, int p, const Slot& slot) const {
        const int dst = slot.dst();
        const uint32_t same = __match_any_sync(~0u, dst);
        const bool first = dst >= 0 && (same & ptx::lanemask_lt()) == 0 && !without(in, dst);
        std::byte* to = first ? record_at(dst, t) + stage.piece_at(p) : nullptr;
        uint32_t leaders = __ballot_sync(~0u, first);
        if constexpr (F::kAny) {  // once for all that are far
            const uint32_t far = __ballot_sync(~0u, first && stage.is_far(dst));
            const uint32_t one = far & (0u - far);
            if (one >> ptx::lane_id() & 1) to = outgoing(t) + stage.piece_at(p);
            leaders = (leaders & ~far) | one;
        }
        put_lines(p, piece.data + spread.scales_at, to, leaders);
    }

    // What becomes of the block's tokens, to every rank; each in turn, by one warp. `slot`: of the first.
    __device__ __forceinline__ void describe(Span own, Slot slot) const {
        const DispatchArgs& a = args();
        const device::LineLane at;
        const int lane = ptx::lane_id();
        const bool compact = a.layout == RecvLayout::kCompact;
#pragma unroll 1
        for (int t = own.begin; t < own.end; ++t) {
            const int dst = slot.dst(), position = slot.expert.position;
            const bool chosen = slot.chosen();
            const uint32_t same = __match_any_sync(~0u, dst);
            const bool first = chosen && (same & ptx::lanemask_lt()) == 0;
            const int index = take(first, dst, 1);
            const int number = __shfl_sync(~0u, index, __ffs(same) - 1);  // of the token there
            const uint32_t rivals = __match_any_sync(~0u, chosen ? position : ~lane);
            const int ahead = __popc(rivals & ptx::lanemask_lt());
            const int earlier =
                take(chosen && ahead == 0, tables.shape.num_ranks + position, __popc(rivals));
            const int turn = __shfl_sync(~0u, earlier, __ffs(rivals) - 1) + ahead;
            const auto told = static_cast<int>(F::kAny ? direct_turn(number, turn) : turn);
            device::Words words{word(at.word(0), slot, told), word(at.word(0) + 1, slot, told)};
            if (at.is_last()) words.b = stage.op.seq;
#pragma unroll 1
            for (int p = job.view.peers.near_begin; p < job.view.peers.near_end; ++p) {
                if (without(in, p)) continue;
                const uint32_t here = __ballot_sync(~0u, first && dst == p);
                const int n = __shfl_sync(~0u, index, here == 0 ? 0 : __ffs(here) - 1);
                if (lane == 0) words.a = static_cast<uint32_t>(here == 0 ? -1 : n);
                __syncwarp();
                if (at.line < stage.record.meta_lines) {
                    device::put_line(record_at(p, t) + at.offset(0), words);
                }
            }
            if constexpr (F::kAny) describe_far(t, words);
            if (lane < a.num_topk) {
                a.send_row[int64_t{t} * a.num_topk + lane] = !chosen ? -1 : compact ? number : turn;
            }
            if (t + 1 < own.end) slot = slot_of(t + 1);
        }
    }

private:
    // Our record of token t for other nodes.
    __device__ std::byte* outgoing(int t) const {
        return stage.far.outgoing(stage.slot, t * stage.record.bytes());
    }
    // There a record's place is its number, and it says which token it is; the rail hears of all tokens.
    __device__ __forceinline__ void describe_far(int t, device::Words words) const {
        const device::LineLane at;
        if (ptx::lane_id() == 0) words.a = static_cast<uint32_t>(t);
        __syncwarp();
        if (at.line >= stage.record.meta_lines) return;
        device::put_line(outgoing(t) + at.offset(0), words);
        device::put_line(stage.far.own_note(stage.slot, t, stage.record) + at.offset(0), words);
    }

    // Adds to what is counted in a column; what it was before. For lanes with different columns.
    __device__ __forceinline__ int take(bool takes, int column, int amount) const {
        int old = 0;
        if (takes) {
            old = tables.before()[column];
            tables.before()[column] = old + amount;
        }
        __syncwarp();
        return old;
    }

    // Word i of what is told of a token.
    __device__ __forceinline__ uint64_t word(int i, const Slot& slot, int turn) const {
        const int num_topk = args().num_topk;
        const int from = (i - 1) & 31, pair = 2 * (i - 1 - num_topk) & 31;
        const uint32_t code = __shfl_sync(~0u, slot.expert.code, from);
        const uint32_t n = __shfl_sync(~0u, turn, from);
        const uint32_t low = __shfl_sync(~0u, __float_as_uint(slot.weight), pair);
        const uint32_t high = __shfl_sync(~0u, __float_as_uint(slot.weight), pair + 1);
        return i <= num_topk ? uint64_t{n} << 32 | code : uint64_t{high} << 32 | low;
    }

    // Given scales of a piece.
    __device__ __forceinline__ void load_scales(int t, int p, std::byte* to) const {
        const int first = spread.record.scale_bytes / 4 * p;
        const auto words = static_cast<int>(args().scale_bytes / 4);
        const auto* from =
            reinterpret_cast<const uint32_t*>(args().scales + int64_t{t} * args().scale_bytes);
        for (int w = ptx::lane_id(); w < spread.record.scale_bytes / 4; w += 32) {
            reinterpret_cast<uint32_t*>(to)[w] = first + w < words ? from[first + w] : 0;
        }
        __syncwarp();
    }

    __device__ __forceinline__ void put_lines(int p, const std::byte* scales, std::byte* to,
                                              uint32_t leaders) const {
        const device::LineLane at;
        const int row_words = stage.piece_bytes(p, args().row_bytes()) / 8;
        const int words = row_words + (spread.record.scale_bytes + 7) / 8;
        const auto* row = reinterpret_cast<const uint64_t*>(piece.data);
        const auto* behind = reinterpret_cast<const uint64_t*>(scales) - row_words;
        const auto get = [&](int i) { return (i < row_words ? row : behind)[i]; };
#pragma unroll 2
        for (int line = 0; line * kLineWords < words; line += device::LineLane::kAtOnce) {
            const int i = at.word(line);
            const bool here = (line + at.line) * kLineWords < words;
            device::Words w;
            if (here && i < words) w.a = get(i);
            if (here && i + 1 < words) w.b = get(i + 1);
            if (at.is_last()) w.b = stage.op.seq;
            __syncwarp();
#pragma unroll 1
            for (uint32_t left = leaders; left != 0; left &= left - 1) {
                const auto base = __shfl_sync(~0u, reinterpret_cast<uint64_t>(to), __ffs(left) - 1);
                if (here) {
                    device::put_line(reinterpret_cast<std::byte*>(base) + at.offset(line), w);
                }
            }
        }
    }
};

}  // namespace ep::kernels
