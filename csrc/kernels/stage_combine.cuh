// Combine of a small batch, bound by latency: owners put rows of outputs, or what their rows of a token
// come to, in front of the token's source; sources add up what has come (kernels/stage.cuh).
//
// Sums are those of pull.cu, bit for bit. Of a call with per_rank an owner adds its rows in the order of
// slots and rounds, and a source adds what owners send in ascending order.
//
// Of other nodes a source first adds up what each of them sends, and rounds, as when sums cross by rails: what
// comes out does not depend on the way.
//
// defines: launch_staged_combine, load_staged_combine
#pragma once

#include <cuda_runtime_api.h>

#include "contract/gpu.h"
#include "contract/rail.h"
#include "contract/stage.h"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.cuh"
#include "kernels/leave.cuh"
#include "kernels/notices.cuh"
#include "kernels/stage.cuh"
#include "kernels/stage_masks.cuh"
#include "kernels/stage_owner.cuh"
#include "kernels/stage_source.cuh"
#include "kernels/usual.cuh"
#include "kernels/usual_owner.cuh"

namespace ep::kernels {

// Nobody has more to say than that it is there.
struct HearNothing {
    __device__ __forceinline__ bool operator()(int, const NoticeWords&, const Head&) const {
        return true;
    }
};
// Where ranks may be masked: all threads; false: leave.
template <class F>
__device__ __noinline__ bool hear_together(const RankView& view, const F& far, const Begin& begin,
                                           Entering& in) {
    if (!await_notices<true>(view, far, begin, in, HearNothing{})) return false;
    return settle_masked<F>(view, in) || await_notices<true>(view, far, begin, in, HearNothing{});
}

// The verdict on all notices by a warp, which looks at those words that it depends on; each warp of every
// block comes to the same. Where nobody can be masked, so that blocks need not agree on whom they go
// without, a warp need not wait for others that have more to send. In two steps, so that loads are on their way while
// other things are done.
struct Hearing {
    const RankView& view;
    Entering& in;
    uint64_t looked = 0;  // this lane's word of the first ranks

    // One warp.
    __device__ __forceinline__ void look() {
        if (is_asked(turn())) looked = ptx::ld_relaxed_sys(word_of(turn()));
    }
    // One warp; false: leave.
    __device__ __forceinline__ bool hear(bool& good) const {
        const Operation op{OpKind::kCombine, in.seq};
        uint32_t bad = kNoObjection;
        bool ok = true;
#pragma unroll 1
        for (int first = 0; ok && first < view.shape.num_ranks; first += kRanks) {
            const int p = first + turn();
            if (is_asked(p)) {
                uint64_t word = looked;
                ok = (first == 0 && device::is_of(word, op.seq)) ||
                     device::wait_packed_word(view.watch, op, p, word_of(p), word);
                bad = min(bad, judge_word(in, p, of_rank(), word));
            }
            ok = __all_sync(~0u, ok);
        }
        bad = __reduce_min_sync(~0u, bad);
        good = bad == kNoObjection;
        if (ok && !good && ptx::lane_id() == 0) atomicMin(&in.first_bad, bad);
        return ok;
    }

private:
    using L = NoticeLayout;
    static_assert(L::kWhat == 0 && L::kSignature == 1);
    static constexpr int kWords = 3, kRanks = 32 / kWords;

    __device__ __forceinline__ static int turn() {
        return static_cast<int>(ptx::lane_id()) / kWords;
    }
    __device__ __forceinline__ static int of_rank() {
        return static_cast<int>(ptx::lane_id()) - turn() * kWords;
    }
    __device__ __forceinline__ bool is_asked(int p) const {
        return turn() < kRanks && p < view.shape.num_ranks;
    }
    __device__ __forceinline__ const uint64_t* word_of(int p) const {
        return NoticeWords(view, in.slot, p).words + of_rank();
    }
};

// An owner was lost when some of its rows had been added: now by one warp, without it.
template <DType kDtype, class F>
__device__ __noinline__ void add_again(const CombineJob& job, const CombineSpread& spread,
                                       std::byte* const* control, const F& far, Entering& in,
                                       uint64_t lost) {
    const Operation op{OpKind::kCombine, in.seq};
    const StageView<F> stage{job.view, spread.record, control, op, in.slot, far};
    if (ptx::lane_id() == 0) in.unheard |= lost;
    __syncwarp();
    PartReceiver<kDtype, F> receiver{job, spread, stage, in};
    receiver.enter(op, in.slot);
    const auto part = receiver.part_of(0);
    // Nothing of the others is missing.
    (void)receiver.run({spread.added, 0}, 1, part, [] {});
}

// What blocks have yet to send that have not started. One warp. False: leave.
template <DType kDtype, class F, int kUnits>
__device__ __noinline__ bool send_rest(const CombineJob& job, const CombineSpread& spread,
                                       std::byte* const* control, const F& far, const Entering& in,
                                       int2* list) {
    const auto blocks = static_cast<int>(gridDim.x);
    uint64_t masked = in.masked;
    if constexpr (F::kAny) masked = far.skipped();
    const Operation op{OpKind::kCombine, in.seq};
    const PartSender<kDtype, F, kUnits> sender{
        job, spread, {job.view, spread.record, control, op, in.slot, far}, list, masked};
    bool ok = true;
#pragma unroll 1
    for (int turn = 0; ok && (turn = take_turn(job.view)) >= 0;) {
#pragma unroll 1
        for (int warp = 0; ok && warp < F::kCombineWarps; ++warp) {
            const Pieces pieces(spread.sent, warp * blocks + turn);
            auto token = sender.look(pieces.item);
            typename PartSender<kDtype, F, kUnits>::Ahead ahead;
            sender.look(token, pieces.piece, ahead);
            ok = sender.run(pieces, F::kCombineWarps * blocks, token, ahead);
        }
    }
    if constexpr (F::kAny) far.rail.flush();
    return ok;
}

// ---- the kernel ----

// All threads of the block that publishes: what we put to each rank, as many as tokens of it came here.
template <class F>
__device__ __forceinline__ void tell_rows(const CombineJob& job, const Record& record, const F& far,
                                          const Entering& in) {
    const CombineArgs& a = job.args;
    const RankView& view = job.view;
    const int num_nodes = far.nodes().num_nodes, channels = far.shape().num_channels;
    const RailNoticeLayout notice(view.shape, num_nodes, channels);
    const auto each =
        static_cast<uint64_t>(record.num_pieces * (a.one_per_rank() ? 1 : a.num_topk));
#pragma unroll 1
    for (int i = threadIdx.x; i < num_nodes * channels; i += blockDim.x) {  // nothing by rings
        in.outbox[notice.records + i] = device::pack(0, in.seq);
    }
    const auto tokens = [&](int p) {
        return static_cast<uint64_t>(a.rank_counts[view.shape.num_ranks + p]);
    };
    far.publish(view, in, tokens, [&](int p) { return tokens(p) * each; });
}

// kUnits: of PartSender.
template <DType kDtype, Half kHalf, class F, int kUnits>
__global__ void __launch_bounds__(F::kCombineWarps * 32, 1)
    stage_combine_kernel(const __grid_constant__ CombineJob job,
                         const __grid_constant__ CombineSpread spread,
                         const __grid_constant__ F far) {
    auto** control = reinterpret_cast<std::byte**>(ptx::dynamic_shared());  // [num_ranks] blocks
    __shared__ Uninitialized<Entering> entering;
    __shared__ int2 lists[F::kCombineWarps][32];
    Entering& in = entering.get();
    const RankView& view = job.view;
    const Record& record = spread.record;
    const int warp = uniform_warp();
    ptx::griddepcontrol_launch_dependents();
    if (starts_early(view)) {
        if (warp == F::kCombineWarps - 2) fetch_parameter(job, in.sinks[0]);
        if (warp == F::kCombineWarps - 3) fetch_parameter(spread, in.sinks[1]);
    }
    for (int p = threadIdx.x; p < view.shape.num_ranks; p += blockDim.x) {
        control[p] = view.peers.control[p];
    }
    const int first = static_cast<int>(warp * gridDim.x) + turn_of_block();
    const auto step = static_cast<int>(F::kCombineWarps * gridDim.x);
    const Pieces sent(spread.sent, first);
    // That this warp adds up first.
    const int behind = first - spread.first_adder, adder = behind < 0 ? behind + step : behind;
    const int item = spread.added.row_of(adder);
    const Operation none{OpKind::kCombine, 0};
    using Sender = PartSender<kDtype, F, kUnits>;
    Sender sender{job, spread, {view, record, control, none, 0, far}, lists[warp]};
    PartReceiver<kDtype, F> receiver{job, spread, sender.stage, in};
    const bool begins = warp == F::kCombineWarps - 1;
    bool ok = true;
    constexpr bool kOwns = kAlwaysSums<F>;
    using Owner = std::conditional_t<kOwns, UsualOwner<kDtype, F, kUnits>, NoOwner>;
    Owner owner(sender);
    if constexpr (kOwns) owner.announce(sent);
    init_told(job.begin, in);
    const Releases releases(view, begins);
    __syncthreads();
    ptx::griddepcontrol_wait();
    typename Sender::Token token;
    typename Sender::Ahead ahead;
    typename PartReceiver<kDtype, F>::Slot slot;
    // Where owners add up, one warp does all of that, while its rows are on their way like those of all others: these
    // hold their rows and no more.
    const bool claims = warp == F::kCombineWarps - (kOwns ? 1 : 2);
    Claim claim;
    bool left = false;
    if (claims) claim = claim_own<kHalf>(view), left = device::gave_up(view.watch);
    if constexpr (kOwns) {
        Beginning beginning{releases};
        if (begins) beginning.ask(view);
        owner.look();
        slot = receiver.slot_of(item);
        if (begins) ok = beginning.enter(view, job.begin, far, in);
    } else {
        if constexpr (kHalf != Half::kReceive) token = sender.look(sent.item);
        if constexpr (kHalf != Half::kSend) slot = receiver.slot_of(item);
        if constexpr (kHalf == Half::kReceive) {
            if (begins) ok = resume_half(view, job.begin, far, job.begun, in);
        } else if (begins) {
            ok = begin_half(view, job.begin, far, releases, in);
        } else {
            sender.look(token, sent.piece, ahead);
        }
    }
    if (claims) {
        if (ptx::lane_id() == 0) in.sends = claim.is_ours();
        ok = ok && !left;
    }
    if (!__syncthreads_and(ok)) return;
    sender.stage.op.seq = in.seq, sender.stage.slot = in.slot;
    sender.masked = in.masked;
    const Operation op = sender.stage.op;
    receiver.enter(op, in.slot);
    if constexpr (kHalf != Half::kSend) receiver.find_owner(slot);
    if constexpr (kHalf != Half::kReceive) {
        if (publishes_stage()) {
            publish_head<F>(view, control, job.begin, in);
            if constexpr (F::kAny) tell_rows(job, record, far, in);
        }
        if constexpr (kOwns) {
            ok = !in.sends || send_usual(owner, first, step, in);
        } else {
            if (begins) sender.look(token, sent.piece, ahead);
            ok = !in.sends || sender.run(sent, step, token, ahead);
        }
        if constexpr (F::kAny) far.rail.flush();
    }
    if constexpr (kHalf != Half::kSend) {
        Hearing hearing{view, in};
        if (!masks<F>(view)) hearing.look();
        auto part = receiver.part_of(item, slot);
        if constexpr (F::kAny) (void)far.hear(view, op, in, F::kCombineWarps - 1);
        const bool times = publishes_stage() && warp == F::kCombineWarps - 1;
        if (!F::kIsUsual && times && job.args.wait_stats != nullptr) {
            time_notices(view, far, in, op, job.args.wait_stats);
        }
        // Others of this block may wait for rows meanwhile.
        const bool looks = kHalf == Half::kBoth && begins;
        Unclaimed unsent;
        if (looks) unsent.look(view);
        // Rows are still on their way when notices are there.
        bool is_good = false;
        if (!masks<F>(view)) {
            ok = ok && hearing.hear(is_good);
        } else {
            ok = __syncthreads_and(ok) && hear_together(view, far, job.begin, in);
            is_good = in.first_bad == kNoObjection;
            part = receiver.part_of(item);
        }
        if constexpr (kHalf == Half::kBoth) {
            if (!unsent.none() && is_good) {
                ok = ok && send_rest<kDtype, F, kUnits>(job, spread, control, far, in, lists[warp]);
            }
        }
        const bool counts = Readers::are_for<F>(view);
        Readers readers;
        if (ok && is_good) {
            ok = receiver.run({spread.added, adder}, step, part, [&] {
                if (counts) readers.count(view, in);
            });
        }
        if (counts && is_good) {
            const bool is_end = ok && readers.are_all(view);
            if (is_end) end_half<kHalf>(view, control, job.begun, far, op, in);
            return;
        }
    }
    if (!__syncthreads_and(ok) || threadIdx.x >= 32 || !last_block(view)) return;
    if constexpr (kHalf != Half::kSend) {
        if (const uint64_t lost = take_lost(view, in)) {
            add_again<kDtype>(job, spread, control, far, in, lost);
        }
    }
    if (in.first_bad == kNoObjection) return end_half<kHalf>(view, control, job.begun, far, op, in);
    if (ptx::lane_id() == 0) explain(view, job.begin, in);
    __syncwarp();
    if constexpr (F::kAny) {
        if (!far.leave(view, op, in)) return;
    }
    fail_call(view, job.begin, in, kHalf == Half::kBoth);
}

template <class F>
using StageCombineKernel = void (*)(CombineJob, CombineSpread, F);

// Every kernel that exists, in one place.
template <Half kHalf, class F, int kUnits>
StageCombineKernel<F> stage_combine_of(DType dtype) {
    switch (dtype) {
        case DType::kBF16:
            return stage_combine_kernel<DType::kBF16, kHalf, F, kUnits>;
        case DType::kF16:
            return stage_combine_kernel<DType::kF16, kHalf, F, kUnits>;
        default:
            return stage_combine_kernel<DType::kF32, kHalf, F, kUnits>;
    }
}

template <class F, int kUnits = kUnitsAdded>
StageCombineKernel<F> stage_combine_for(DType dtype, Half half) {
    switch (half) {
        case Half::kBoth:
            return stage_combine_of<Half::kBoth, F, kUnits>(dtype);
        case Half::kSend:
            return stage_combine_of<Half::kSend, F, kUnits>(dtype);
        default:
            return stage_combine_of<Half::kReceive, F, kUnitsAdded>(dtype);
    }
}
template <class F>
StageCombineKernel<F> stage_combine_for(DType dtype, Half half, int units_sent) {
    const bool wide = !F::kAny && units_sent > kUnitsAdded;
    if constexpr (F::kIsUsual) {
        return wide ? stage_combine_kernel<DType::kBF16, Half::kBoth, F, 2 * kUnitsAdded>
                    : stage_combine_kernel<DType::kBF16, Half::kBoth, F, kUnitsAdded>;
    } else {
        if constexpr (!F::kAny) {
            if (wide) return stage_combine_for<F, 2 * kUnitsAdded>(dtype, half);
        }
        return stage_combine_for<F>(dtype, half);
    }
}

// Calls that kernels with Usual are for, but for their layout.
inline bool is_usual(const CombineJob& job, Half half) {
    const CombineArgs& a = job.args;
    // A lane of UsualOwner knows what came from a rank.
    return half == Half::kBoth && !job.view.watch.can_mask && job.view.shape.num_ranks <= 32 &&
           a.dtype == DType::kBF16 && a.wait_stats == nullptr && a.bias0 == nullptr &&
           a.bias1 == nullptr;
}

template <class F>
int launch_staged_combine(const F& far, const CombineJob& job, Half half, int num_blocks,
                          Stream stream) {
    const int control_bytes = 8 * job.view.shape.num_ranks;
    const CombineSpread spread(job.view, job.args, num_blocks * F::kCombineWarps, !F::kAny);
    return launch_dependent(stage_combine_for<F>(job.args.dtype, half, spread.units_sent),
                            {num_blocks, F::kCombineWarps * 32, control_bytes}, job.view.overlaps,
                            stream, job, spread, far);
}

template <class F>
int load_staged_combine(int smem_bytes) {
    for (const Half half : {Half::kBoth, Half::kSend, Half::kReceive}) {
        for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
            for (const int units : {kUnitsAdded, 2 * kUnitsAdded}) {
                const auto kernel =
                    reinterpret_cast<const void*>(stage_combine_for<F>(dtype, half, units));
                if (const int error = load_kernel(kernel, smem_bytes)) return error;
            }
        }
    }
    return 0;
}

}  // namespace ep::kernels
