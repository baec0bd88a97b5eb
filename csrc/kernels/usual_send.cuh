// The first half of a usual dispatch (kernels/usual.cuh): what kernels/stage_first_half.cuh does, of a block that has
// one token or none.
//
// One chain of dependent instructions decides how long it takes: ids and rows come, a barrier tells the number of the
// operation, lines leave. So all that does not need what kernels ahead have written is worked out before they have
// ended, and what does not need the number before that barrier.
//
// defines: kDescriber, OwnSlot, offset_of_record, record_of_lane, record_at, TokenNote, UsualNotice, OnePiece, send_usual
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "contract/stage.h"
#include "device/lines.cuh"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "device/quantize.cuh"
#include "kernels/enter.cuh"
#include "kernels/stage.cuh"
#include "kernels/stage_send.cuh"
#include "kernels/stage_tables.cuh"
#include "kernels/usual.cuh"

namespace ep::kernels {

// The warp of a block that describes its token; those before it may have pieces of it to send.
template <class F>
constexpr int kDescriber = F::kWarps - 3;

// What the warp that describes a block's token knows of its slots, each lane of its own.
struct OwnSlot {
    Expert expert{kNoStagedExpert, -1};
    int number =
        -1;  // compact: of the token among ours at its rank; slab: the turn of the selection among ours

    __device__ __forceinline__ bool chosen() const { return expert.position >= 0; }
    __device__ __forceinline__ int dst() const { return staged_rank(expert.code); }
};

// Where the record of our token t begins in the control block of a rank, in slot 0.
__device__ __forceinline__ int64_t offset_of_record(const RankView& view, const Record& record,
                                                    int t) {
    const int64_t place = int64_t{view.peers.rank} * view.shape.max_tokens + t;
    return view.layout.stage(0) + place * record.bytes();
}
// The same in memory, of the rank with the number of the lane.
__device__ __forceinline__ uint64_t record_of_lane(const StageTables& tables, int64_t offset) {
    const auto lane = static_cast<int>(ptx::lane_id());
    if (lane >= tables.shape.num_ranks) return 0;
    return reinterpret_cast<uint64_t>(tables.control()[lane] + offset);
}
// That of rank p.
__device__ __forceinline__ std::byte* record_at(uint64_t of_lane, int p) {
    return reinterpret_cast<std::byte*>(__shfl_sync(~0u, of_lane, p));
}

// What is told of a token, of which each lane has two words. In two steps: first without the turns of its selections,
// for which there is room.
struct TokenNote {
    int num_topk, first = 2 * device::LineLane().index(0);

    __device__ __forceinline__ bool is_slot(int word) const { return first + word <= num_topk; }

    __device__ __forceinline__ device::Words of(const Expert& expert, float weight) const {
        uint64_t word[2];
#pragma unroll
        for (int w = 0; w < 2; ++w) {
            const int i = first + w, pair = 2 * (i - 1 - num_topk);
            const uint32_t code = __shfl_sync(~0u, expert.code, (i - 1) & 31);
            const uint32_t low = __shfl_sync(~0u, __float_as_uint(weight), pair & 31);
            const uint32_t high = __shfl_sync(~0u, __float_as_uint(weight), (pair + 1) & 31);
            word[w] = is_slot(w) ? code : uint64_t{high} << 32 | low;
        }
        return {word[0], word[1]};
    }
    __device__ __forceinline__ void add_turns(device::Words& words, int turn) const {
        const uint64_t one = static_cast<uint32_t>(__shfl_sync(~0u, turn, (first - 1) & 31));
        const uint64_t other = static_cast<uint32_t>(__shfl_sync(~0u, turn, first & 31));
        if (is_slot(0)) words.a |= one << 32;
        if (is_slot(1)) words.b |= other << 32;
    }
};

// What we tell everybody, a word a thread. Where it stands in shared memory is known before its value is there.
template <class F>
struct UsualNotice {
    const DispatchJob& job;
    const StageTables& tables;
    Entering& in;
    NoticeLayout layout{tables.shape};
    const uint32_t* first = source_of(threadIdx.x);

    // All threads of the block that publishes.
    __device__ __forceinline__ void publish() const {
        // Who finds a bad id may have written the code by now.
        if (tables.bad()[0] > 0) return refuse(job, tables.spread, in);
        if (in.code != kOk) return refuse(job, tables.spread, in);
        const auto thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
        const int64_t offset = job.view.layout.notice(in.slot, job.view.peers.rank);
        put(offset, thread, *first);
#pragma unroll 1
        for (int i = thread + threads; i < layout.end; i += threads) put(offset, i, *source_of(i));
        if (thread < tables.shape.num_ranks) job.args.rank_counts[thread] = tables.all()[thread];
    }

private:
    __device__ __forceinline__ const uint32_t* source_of(int i) const {
        using L = NoticeLayout;
        const auto* counts = reinterpret_cast<const uint32_t*>(tables.all());
        if (i < L::kRefusal) return in.told + i;
        if (i >= layout.end) return counts;  // not told
        if (i >= layout.selections) return counts + tables.shape.num_ranks + i - layout.selections;
        if (i >= L::kRows && i < layout.expected) return counts + i - L::kRows;
        return reinterpret_cast<const uint32_t*>(tables.bad());  // 0
    }
    __device__ __forceinline__ void put(int64_t offset, int i, uint32_t bits) const {
        const uint64_t word = device::pack(bits, in.seq);
#pragma unroll
        for (int p = 0; p < kUsualRanks; ++p) {
            if (p >= tables.shape.num_ranks) break;
            if (i >= layout.end) continue;
            ptx::st_relaxed_sys(reinterpret_cast<uint64_t*>(tables.control()[p] + offset) + i,
                                word);
        }
    }
    __device__ __noinline__ static void refuse(const DispatchJob& job, const StageSpread& spread,
                                               Entering& in) {
        publish_counts<F>(job, StageTables{spread, job.view.shape}, in);
    }
};

// The only piece of a warp of a usual call. announce(): before the kernels ahead have ended, so that it touches nothing
// of theirs; load(): after that; finish(): it is ready in shared memory. False: leave.
template <class Config, class F>
struct OnePiece {
    Sender<F>& sender;
    device::Bf16Scales scales;
    int t, p;
    typename Sender<F>::First first = {};

    __device__ __forceinline__ void announce() { first = sender.announce(t, p); }
    __device__ __forceinline__ void load() { sender.load(first); }
    __device__ __forceinline__ bool finish() { return sender.template prepare<Config>(t, p); }
};

// It comes to registers, which is sooner than through shared memory, and all of it gets its scales together.
template <class F>
struct OnePiece<Quantized<DType::kBF16>, F> {
    static constexpr int kVectors = kMostQuantized / device::kVectorWidth<DType::kBF16>;

    Sender<F>& sender;
    device::Bf16Scales scales;
    int t, p;
    device::Loaded<DType::kBF16, kVectors> loaded = {};

    __device__ __forceinline__ void announce() {
        loaded.announce(sender.source(t, p), sender.spread.elements_of(p));
    }
    __device__ __forceinline__ void load() { loaded.load(); }
    __device__ __forceinline__ bool finish() {
        const bool ue8m0 = sender.args().quantize == Quantize::kFp8Ue8m0;
        std::byte *data = sender.data(), *to = data + sender.spread.scales_at;
        const auto scale = [&](uint32_t most, int block, bool writes) {
            return scales.scale_block(most, ue8m0, to, block, writes);
        };
        loaded.template quantize<128>(data, scale);
        return true;
    }
};

// All threads; false: leave. `prepared`: has yet to be stored. `loaded`: barriers of the warp. `own`: of the warp that
// describes.
template <class Config, class F>
__device__ __forceinline__ bool send_usual(const DispatchJob& job, const StageSpread& spread,
                                           const StageTables& tables, const F& far, Entering& in,
                                           const Prepared& prepared, uint64_t* loaded,
                                           device::Bf16Scales scales, OwnSlot& own) {
    const RankView& view = job.view;
    const DispatchArgs& a = job.args;
    const device::LineLane at;
    const int warp = uniform_warp(), t = turn_of_block();
    const auto lane = static_cast<int>(ptx::lane_id());
    const bool publishes = publishes_stage(), has_token = t < a.num_tokens;
    const bool begins = warp == F::kWarps - 1, claims = warp == F::kWarps - 2;
    const bool describes = warp == kDescriber<F> && has_token;
    const bool moves = warp < spread.record.num_pieces && has_token;
    const bool has_slot = has_token && lane < a.num_topk;
    const int64_t slot = int64_t{t} * a.num_topk + lane;
    const int64_t* ids = a.topk_idx + slot;
    int64_t offset = offset_of_record(view, spread.record, t);
    const int64_t piece_at =
        moves ? kLineBytes * (spread.record.meta_lines + warp * spread.record.piece_lines) : 0;
    Sender<F> sender = sender_of(job, spread, tables, far, in, loaded);
    const UsualNotice<F> notice{job, tables, in};
    // Warps that have no piece count.
    const int pieces = has_token && !publishes ? spread.record.num_pieces : 0;
    TokenCounter<F, 4> counter(job, spread, has_token ? t : 0, 0, publishes, warp - pieces,
                               F::kWarps - 2 - pieces);
    const bool counts = warp >= pieces && (publishes || has_token);
    const Releases releases(view, begins);
    OnePiece<Config, F> piece{sender, scales, t, warp};
    ptx::pin(ids), ptx::pin(offset);
    uint32_t to = 0;  // ranks the token goes to
    int ahead = 0;    // selections of its slots before the lane's that are of the same expert
    const TokenNote note{a.num_topk};
    PieceLines<kSteps<Config>> lines;  // the first words of it may be of a note
    bool ok = true;
    prepared.store(job, tables);
    __syncwarp();  // barriers of the warp are there
    if (moves) piece.announce();
    __syncthreads();
    ptx::griddepcontrol_wait();
    if (begins) {
        ok = begin_half(view, job.begin, far, releases, in);
    } else if (claims) {
        const Claim claim = claim_own<Half::kBoth>(view);
        ok = !device::gave_up(view.watch);
        if (ptx::lane_id() == 0) in.sends = claim.is_ours();
    } else if (moves || describes) {
        if (moves) piece.load();
        const int64_t id = has_slot ? *ids : -1;
        const bool weighs = describes && has_slot && a.topk_weights != nullptr;
        const float weight = weighs ? a.topk_weights[slot] : 0.0f;
        if (counts) counter.look();
        own.expert = tables.expert(id);
        to = __reduce_or_sync(~0u, own.chosen() ? 1u << own.dst() : 0);
        if (describes) {
            const uint32_t rivals = __match_any_sync(~0u, own.expert.position);
            ahead = __popc(rivals & ptx::lanemask_lt());
            lines.words[0] = note.of(own.expert, weight);
        }
        if (moves) {
            ok = piece.finish();
            lines = sender.template lines<Config>(warp);
        }
        if (counts) counter.run();
    } else if (counts) {
        counter.look();
        counter.run();
    }
    const uint64_t records = record_of_lane(tables, offset);
    if (!__syncthreads_and(ok)) {
        sender.abandon();
        return false;
    }
    if (publishes) notice.publish();
    const int64_t behind = int64_t{in.slot} * view.layout.stage_bytes + at.offset(0) + piece_at;
    if (moves && in.sends) {
        if (at.is_last()) lines.number(in.seq);
#pragma unroll 1
        for (uint32_t more = to; more != 0; more &= more - 1) {
            lines.put(record_at(records, __ffs(more) - 1) + behind);
        }
    }
    if (describes && in.sends) {
        const int32_t* before = tables.before();
        const int column = own.chosen() ? own.expert.position : 0;
        const int turn = before[view.shape.num_ranks + column] + ahead;
        device::Words& words = lines.words[0];
        note.add_turns(words, turn);
        if (at.is_last()) words.b = in.seq;
#pragma unroll 1
        for (int rank = 0; rank < view.shape.num_ranks; ++rank) {
            std::byte* record = record_at(records, rank);
            if (lane == 0) words.a = static_cast<uint32_t>(to >> rank & 1 ? before[rank] : -1);
            __syncwarp();
            if (at.line < spread.record.meta_lines) device::put_line(record + behind, words);
        }
        if (own.chosen()) own.number = is_compact<F>(a.layout) ? before[own.dst()] : turn;
        // Should the second half not go the usual way.
        if (has_slot) a.send_row[slot] = own.number;
    }
    return true;
}

}  // namespace ep::kernels
