// The first half of a small dispatch: rows are put in front of their receivers, and everybody is told what
// comes. Nobody is waited for but for the slot.
//
// defines: TokenCounter, count_load, publish_counts, PieceLines, Sender, sender_of
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
#include "kernels/usual.cuh"

namespace ep::kernels {

// ---- counting ----

// Of a warp, one of `warps`; each takes as many tokens at once as have a lane for every slot. Tokens below `own`
// are before the block's; all of them, when it publishes. kAhead: times that ids are asked for before any is there.
template <class F, int kAhead = 1>
struct TokenCounter {
    const DispatchJob& job;
    const StageSpread& spread;
    int own, middle, end, t, step;
    int64_t ids[kAhead];  // what the slot of this lane is, of token t and those behind it
    bool publishes;

    // Tokens before `first`, and those before `mid`, should that be another. `warp`: among those that count.
    __device__ __forceinline__ TokenCounter(const DispatchJob& j, const StageSpread& s, int first,
                                            int mid, bool tells, int warp, int warps)
        : job(j), spread(s), own(first), middle(mid > first ? mid : 0), publishes(tells) {
        const int at_once = s.tokens_at_once, turn = turn_of_lane();
        end = turn >= at_once ? 0 : tells ? static_cast<int>(j.args.num_tokens) : max(own, middle);
        step = warps * at_once;
        t = warp * at_once + turn;
    }
    // The first ids are on their way.
    __device__ __forceinline__ void look() {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            ids[i] = -1;
            if (t + i * step < end) ids[i] = id_of(t + i * step);
        }
    }
    __device__ __forceinline__ void run() {
        if (!F::kIsUsual && job.args.replicas.num_logical != 0) return count_logical(*this);
        count([](int, int64_t id) { return id; });
    }

private:
    __device__ __forceinline__ int turn_of_lane() const {
        return spread.turn_of_lane(static_cast<int>(ptx::lane_id()));
    }
    __device__ __forceinline__ int slot_of_lane() const {
        return static_cast<int>(ptx::lane_id()) - turn_of_lane() * job.args.num_topk;
    }
    __device__ __forceinline__ int64_t id_of(int token) const {
        return job.args.topk_idx[int64_t{token} * job.args.num_topk + slot_of_lane()];
    }
    __device__ __noinline__ static void count_logical(TokenCounter counter) {
        counter.count([&](int token, int64_t id) { return replica_of(counter.job, token, id); });
    }

    template <class ExpertOf>
    __device__ __forceinline__ void count(ExpertOf expert_of_id) {
        const StageTables tables{spread, job.view.shape};
        const int turn = turn_of_lane();
#pragma unroll 1
        for (; __any_sync(~0u, t < end); t += step) {
            const int64_t id = t < end ? expert_of_id(t, ids[0]) : -1;
            const int behind = t + kAhead * step;
#pragma unroll
            for (int i = 0; i + 1 < kAhead; ++i) ids[i] = ids[i + 1];
            if (behind < end) ids[kAhead - 1] = id_of(behind);
            const Expert expert = tables.expert(id);
            const bool chosen = expert.position >= 0;
            const int dst = chosen ? staged_rank(expert.code) : -1;
            const uint32_t same = __match_any_sync(~0u, chosen ? turn << 8 | dst : -1);
            const bool brings = chosen && (same & ptx::lanemask_lt()) == 0;
            const int column = tables.shape.num_ranks + expert.position;
            const auto count_in = [&](int32_t* columns) {
                if (chosen) atomicAdd(columns + column, 1);
                if (brings) atomicAdd(columns + dst, 1);
            };
            if (t < own) count_in(tables.before());
            if (!F::kIsUsual && t < middle) count_in(tables.middle());
            if (!publishes) continue;
            count_in(tables.all());
            if (chosen || id == -1) continue;
            atomicAdd(&tables.bad()[0], 1);
            atomicMin(&tables.bad()[1], t * job.args.num_topk + slot_of_lane());
        }
    }
};

// Blocks of 32 elements are rare: out of the way of the code of others.
template <DType kSource>
__device__ __noinline__ void quantize_finely(std::byte* row, std::byte* scales, int elements,
                                             bool ue8m0) {
    device::quantize_blocks<kSource, 32>(row, scales, elements, ue8m0);
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
template <class F>
__device__ __forceinline__ void publish_counts(const DispatchJob& job, const StageTables& tables,
                                               Entering& in) {
    using L = NoticeLayout;
    const DispatchArgs& a = job.args;
    const Shape& shape = job.view.shape;
    if (tables.bad()[0] > 0) {
        if (threadIdx.x == 0) {
            const int64_t at = tables.bad()[1];
            in.code = kBadExpertId;
            in.detail[0] = tables.bad()[0];
            in.detail[1] = at / a.num_topk;
            in.detail[2] = at % a.num_topk;
            in.detail[3] = a.topk_idx[at];
        }
        __syncthreads();
    }
    const NoticeLayout layout(shape);
    publish_words<true, F>(job.view, tables.control(), in, 0, layout.end, [&](int i) {
        if (i < L::kRows) return head_word(job.begin, in, i);
        if (i >= layout.expected && i < layout.selections) return 0u;
        const int c = i < layout.expected ? i - L::kRows : shape.num_ranks + i - layout.selections;
        const int number = tables.all()[c];
        if (c < shape.num_ranks) a.rank_counts[c] = number;
        return static_cast<uint32_t>(number);
    });
}

// ---- sending ----

// What a lane has of the lines of a piece. kAtOnce: steps of a piece, or more.
template <int kAtOnce>
struct PieceLines {
    static constexpr int kApart = device::LineLane::kAtOnce * kLineUnits;       // units
    static constexpr int kLinesApart = device::LineLane::kAtOnce * kLineBytes;  // bytes there

    int left = 0;  // units from the first one of its line on
    device::Words words[kAtOnce] = {};

    PieceLines() = default;
    // Of a row, and the scales behind it, in shared memory.
    __device__ __forceinline__ PieceLines(const std::byte* row, const std::byte* scales,
                                          int row_units, int units) {
        const device::LineLane at;
        const std::byte* behind = scales - row_units * kUnitBytes;
        left = units - kLineUnits * at.line;
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
            const int i = at.index(0) + v * kApart;
            if (at.is_last() || i >= units) continue;
            words[v] = device::words_of(
                ptx::ld_shared_v4((i < row_units ? row : behind) + i * kUnitBytes));
        }
    }
    // Of the last lane of a line.
    __device__ __forceinline__ void number(uint64_t seq) {
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) words[v].b = seq;
    }
    // `to`: where the lane's part of its first line goes. Lanes of a line come here together.
    __device__ __forceinline__ void put(std::byte* to) const {
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
            if (left > v * kApart) device::put_line(to + v * kLinesApart, words[v]);
        }
    }
};

// Of a warp.
template <class F>
struct Sender {
    const DispatchJob& job;
    const StageSpread& spread;
    StageTables tables;
    StageView<F> stage;
    // The warp's shared memory for pieces; they take turns.
    std::byte* memory;
    uint64_t* loaded;
    const Entering& in;
    int turn = 0;          // of the piece that is worked at
    uint32_t loading = 0;  // a bit for each buffer

    __device__ const DispatchArgs& args() const { return job.args; }
    __device__ std::byte* record_at(int p, int t) const {
        const RankView& view = job.view;
        return stage.place(p, int64_t{view.peers.rank} * view.shape.max_tokens + t);
    }
    // Piece p of token t, as it is given.
    __device__ __forceinline__ const std::byte* source(int t, int p) const {
        return args().x + t * args().x_stride + int64_t{p} * spread.source_bytes;
    }
    __device__ __forceinline__ int source_bytes(int p) const {
        return spread.elements_of(p) * dtype_bytes(args().dtype);
    }

    __device__ __forceinline__ bool has_two() const { return !F::kIsUsual && spread.buffers == 2; }
    __device__ __forceinline__ int buffer_of(int n) const { return has_two() ? n & 1 : 0; }
    __device__ __forceinline__ device::Stage stage_of(int n) const {
        const int buffer = buffer_of(n);
        const int before = has_two() ? n >> 1 : n;
        return {memory + buffer * spread.piece_bytes, loaded + buffer, uint32_t(before) & 1};
    }
    __device__ __forceinline__ std::byte* data() const {
        return memory + buffer_of(turn) * spread.piece_bytes;
    }

    // The first piece of this warp. In two steps: nothing of it is touched before the second one.
    struct First {
        const std::byte* at;
        int bytes;
    };
    __device__ __forceinline__ First announce(int t, int p) const {
        const First first{source(t, p), source_bytes(p)};
        if (ptx::lane_id() == 0) device::announce_load(stage_of(0), first.bytes);
        return first;
    }
    __device__ __forceinline__ void load(const First& first) {
        loading |= 1u;
        if (ptx::lane_id() == 0) device::load_announced(stage_of(0), first.at, first.bytes);
    }
    // Piece p of token t, as it is, in turn n.
    __device__ __forceinline__ void load(int t, int p, int n) {
        loading |= 1u << buffer_of(n);
        if (ptx::lane_id() != 0) return;
        device::load_stage(stage_of(n), source(t, p), source_bytes(p));
    }
    // What is loaded for nobody has to arrive all the same.
    __device__ __forceinline__ void abandon() {
#pragma unroll 1
        for (int n = turn; loading != 0; ++n) {
            const uint32_t bit = 1u << buffer_of(n);
            device::Stage late = stage_of(n);
            if ((loading & bit) != 0) device::drain_stage(late);
            loading &= ~bit;
        }
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
    // What callers say of it. In two steps, so that loads are under way while other things are done.
    struct Choice {
        int64_t id = -1;
        float weight = 0.0f;
    };
    __device__ __forceinline__ Choice choice_of(int t) const {
        const DispatchArgs& a = args();
        Choice choice;
        if (static_cast<int>(ptx::lane_id()) >= a.num_topk) return choice;
        const int64_t i = int64_t{t} * a.num_topk + ptx::lane_id();
        choice.id = a.topk_idx[i];
        if (a.topk_weights != nullptr) choice.weight = a.topk_weights[i];
        return choice;
    }
    __device__ __forceinline__ Slot slot_of(int t, const Choice& choice) const {
        const DispatchArgs& a = args();
        Slot slot;
        if (static_cast<int>(ptx::lane_id()) >= a.num_topk) return slot;
        int64_t id = choice.id;
        if constexpr (!F::kIsUsual) {
            id = expert_of(job, t, id);
            const int64_t i = int64_t{t} * a.num_topk + ptx::lane_id();
            if (a.routed_idx != nullptr) a.routed_idx[i] = id;
        }
        slot.expert = tables.expert(id), slot.weight = choice.weight;
        return slot;
    }
    __device__ __forceinline__ Slot slot_of(int t) const { return slot_of(t, choice_of(t)); }

    // Piece p of token t is made ready in shared memory; its load is under way. False: leave.
    template <class Config>
    __device__ __forceinline__ bool prepare(int t, int p) {
        const RankView& view = job.view;
        device::Stage now = stage_of(turn);
        if (!device::await_stage(view.watch, stage.op, now, view.peers.rank)) return false;
        loading &= ~(1u << buffer_of(turn));
        complete<Config, 4>(t, p);
        return true;
    }
    // Piece p of token t is in shared memory, as it is: it gets its scales. kVectors: that a lane works at.
    template <class Config, int kVectors>
    __device__ __forceinline__ void complete(int t, int p) const {
        const DispatchArgs& a = args();
        std::byte* scales = data() + spread.scales_at;
        if constexpr (Config::kQuantizes) {
            const bool ue8m0 = a.quantize == Quantize::kFp8Ue8m0;
            if (F::kIsUsual || a.scale_block == 128) {
                constexpr int kMost = Config::kSource == DType::kF32 ? kVectors / 2 : kVectors;
                device::quantize_blocks<Config::kSource, 128, kMost, true>(
                    data(), scales, spread.elements_of(p), ue8m0);
            } else {
                quantize_finely<Config::kSource>(data(), scales, spread.elements_of(p), ue8m0);
            }
        } else if (a.scale_bytes > 0) {
            load_scales(t, p, scales);
        }
    }

    // The same, where it does not matter how long it takes.
    template <class Config>
    __device__ void prepare_slowly(int t, int p) const {
        const auto* units = reinterpret_cast<const uint4*>(source(t, p));
        auto* to = reinterpret_cast<uint4*>(data());
        __syncwarp();
        for (int i = ptx::lane_id(); i < source_bytes(p) / kUnitBytes; i += 32) to[i] = units[i];
        __syncwarp();
        complete<Config, 2>(t, p);
    }

    // It goes to every rank the token goes to.
    template <class Config>
    __device__ __forceinline__ void send(int t, int p, const Slot& slot) const {
        const int dst = slot.dst();
        const uint32_t same = __match_any_sync(~0u, dst);
        const bool first = dst >= 0 && (same & ptx::lanemask_lt()) == 0 && !without<F>(in, dst);
        std::byte* to = first ? record_at(dst, t) + stage.piece_at(p) : nullptr;
        uint32_t leaders = __ballot_sync(~0u, first);
        if constexpr (F::kAny) {  // once for all that are far
            const uint32_t far = __ballot_sync(~0u, first && stage.is_far(dst));
            const uint32_t one = far & (0u - far);
            if (one >> ptx::lane_id() & 1) to = outgoing(t) + stage.piece_at(p);
            leaders = (leaders & ~far) | one;
        }
        auto ready = lines<Config>(p);
        if (device::LineLane().is_last()) ready.number(stage.op.seq);
        __syncwarp();
#pragma unroll 1
        for (uint32_t more = leaders; more != 0; more &= more - 1) {
            const auto base = __shfl_sync(~0u, reinterpret_cast<uint64_t>(to), __ffs(more) - 1);
            ready.put(reinterpret_cast<std::byte*>(base) + device::LineLane().offset(0));
        }
    }
    // Piece p as it is ready in shared memory.
    template <class Config>
    __device__ __forceinline__ PieceLines<kSteps<Config>> lines(int p) const {
        const int row_units = spread.row_units_of(p);
        return {data(), data() + spread.scales_at, row_units, row_units + spread.scale_units};
    }

    // What becomes of these tokens, to every rank; each in turn, by one warp. `slot`: of the first; `before`: what was
    // counted of the tokens before them.
    __device__ __forceinline__ void describe(Span own, Slot slot, int32_t* before) const {
#pragma unroll 1
        for (int t = own.begin; t < own.end; ++t) {
            Choice next;
            if (t + 1 < own.end) next = choice_of(t + 1);
            describe(t, slot, before);
            if (t + 1 < own.end) slot = slot_of(t + 1, next);
        }
    }
    __device__ __forceinline__ void describe(int t, const Slot& slot, int32_t* before) const {
        const DispatchArgs& a = args();
        const device::LineLane at;
        const int lane = ptx::lane_id();
        const int dst = slot.dst(), position = slot.expert.position;
        const bool chosen = slot.chosen();
        const uint32_t same = __match_any_sync(~0u, dst);
        const bool first = chosen && (same & ptx::lanemask_lt()) == 0;
        const int index = take(before, first, dst, 1);
        const int number = __shfl_sync(~0u, index, __ffs(same) - 1);  // of the token there
        const uint32_t rivals = __match_any_sync(~0u, position);      // who chose none is one, too
        const int ahead = __popc(rivals & ptx::lanemask_lt());
        const int earlier =
            take(before, chosen && ahead == 0, tables.shape.num_ranks + position, __popc(rivals));
        const int turn = __shfl_sync(~0u, earlier, __ffs(rivals) - 1) + ahead;
        const auto told = static_cast<int>(F::kAny ? direct_turn(number, turn) : turn);
        const int unit = 2 * at.index(0);
        device::Words words{word(unit, slot, told), word(unit + 1, slot, told)};
        if (at.is_last()) words.b = stage.op.seq;
#pragma unroll 1
        for (int p = job.view.peers.near_begin; p < job.view.peers.near_end; ++p) {
            if (without<F>(in, p)) continue;
            const uint32_t here = __ballot_sync(~0u, first && dst == p);
            const int n = __shfl_sync(~0u, index, here == 0 ? 0 : __ffs(here) - 1);
            if (lane == 0) words.a = static_cast<uint32_t>(here == 0 ? -1 : n);
            __syncwarp();
            if (at.line < stage.record.meta_lines) {
                device::put_line(record_at(p, t) + at.offset(0), words);
            }
        }
        if constexpr (F::kAny) describe_far(t, words);
        if (lane >= a.num_topk) return;
        const int row = is_compact<F>(a.layout) ? number : turn;
        a.send_row[int64_t{t} * a.num_topk + lane] = chosen ? row : -1;
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
    __device__ __forceinline__ static int take(int32_t* before, bool takes, int column,
                                               int amount) {
        int old = 0;
        if (takes) {
            old = before[column];
            before[column] = old + amount;
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
};

// Of a warp, before the number and the slot of its operation are known. `loaded`: barriers of the warp.
template <class F>
__device__ __forceinline__ Sender<F> sender_of(const DispatchJob& job, const StageSpread& spread,
                                               const StageTables& tables, const F& far,
                                               const Entering& in, uint64_t* loaded) {
    const Operation none{OpKind::kDispatch, 0};
    const StageView<F> stage{job.view, spread.record, tables.control(), none, 0, far};
    return {job, spread, tables, stage, tables.warp_memory(), loaded, in};
}

}  // namespace ep::kernels
