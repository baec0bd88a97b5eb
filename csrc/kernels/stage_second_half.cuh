// The second half of a small dispatch: all blocks hear everybody, come to the verdict, and their warps take what
// has come, piece by piece, to its rows.
//
// defines: tell_outputs, explain_any, catch_up, fill_rest, take_nothing, receive
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "contract/stage.h"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/direct_notes.cuh"
#include "kernels/enter.cuh"
#include "kernels/leave.cuh"
#include "kernels/notices.cuh"
#include "kernels/origins.cuh"
#include "kernels/stage.cuh"
#include "kernels/stage_fill.cuh"
#include "kernels/stage_first_half.cuh"
#include "kernels/stage_hear.cuh"
#include "kernels/stage_masks.cuh"
#include "kernels/stage_receive.cuh"
#include "kernels/stage_tables.cuh"
#include "kernels/usual.cuh"

namespace ep::kernels {

// What the host and kernels behind this one need to know, and what callers read. One warp of one block. Not out
// of line: there every parameter would be a load.
template <class F>
__device__ __forceinline__ void tell_outputs(const DispatchJob& job, const StageSpread& spread,
                                             const Entering& in, bool ok, int64_t num_logged) {
    const StageTables tables{spread, job.view.shape};
    const RankView& view = job.view;
    const DispatchArgs& a = job.args;
    const int lane = ptx::lane_id(), num_ranks = view.shape.num_ranks, me = view.peers.rank;
    const int first = tables.first()[me], num_local = tables.first()[me + 1] - first;
    int64_t group_end = 0;
#pragma unroll 1
    for (int e0 = 0; e0 < num_local; e0 += 32) {
        const int e = e0 + lane, count = ok && e < num_local ? tables.total(first + e) : 0;
        if (e < num_local) a.expert_counts[e] = count;
        if (e < num_local && a.recv_stats != nullptr) a.recv_stats[e] += count;
        if (F::kIsUsual || job.out.offsets == nullptr) continue;
        int sum = (count + a.alignment - 1) / a.alignment * a.alignment;
        const int rows = sum;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += other;
        }
        if (e < num_local) job.out.offsets[e] = static_cast<int32_t>(group_end + sum - rows);
        group_end += __shfl_sync(~0u, sum, 31);
    }
    if (!F::kIsUsual && job.out.offsets != nullptr && lane == 0) {
        job.out.offsets[num_local] = static_cast<int32_t>(group_end);
    }
#pragma unroll 1
    for (int p = lane; p < num_ranks; p += 32) {
        a.rank_counts[num_ranks + p] = ok ? tables.rows(p + 1, me) - tables.rows(p, me) : 0;
        if (!ok || without<F>(in, p)) a.rank_counts[p] = 0;
    }
    if (lane == 0) {
        OpState state{in.seq, ok ? int{kOk} : int{in.outcome.incident.code}, in.slot, 0, 0, 0};
        if (ok) {
            state.num_recv = tables.total_rows(me);
            state.num_rows = rows_of<F>(job, tables, me);
            state.index_rows = group_end;
            state.num_logged = num_logged;
        }
        *view.state.op = state;
        if (ok) report(view, job.begin, in.seq, nullptr, state);
        if (job.status != nullptr) *job.status = state.code;
        if (job.num_recv != nullptr) *job.num_recv = static_cast<int32_t>(state.num_recv);
    }
    const bool tells = a.rank_ends != nullptr || job.out.source_range != nullptr;
    if (!F::kIsUsual && tells) tell_origins(job, in, ok);
}

// An index of rows whose size does not depend on what comes has to hold it.
__device__ __forceinline__ void judge_index(const DispatchJob& job, const StageTables& tables,
                                            Entering& in) {
    const RankView& view = job.view;
    const DispatchArgs& a = job.args;
#pragma unroll 1
    for (int p = threadIdx.x; p < view.shape.num_ranks; p += blockDim.x) {
        int64_t rows = 0;
#pragma unroll 1
        for (int e = tables.first()[p]; e < tables.first()[p + 1]; ++e) {
            rows += (tables.total(e) + a.alignment - 1) / a.alignment * a.alignment;
        }
        if (rows <= a.index_capacity || without(in, p)) continue;
        atomicMin(&in.size_bad, objection(kSizeObjection, p));
    }
    __syncthreads();
}

__device__ __noinline__ inline void explain_any(const DispatchJob& job, const StageSpread& spread,
                                                Entering& in) {
    if (ptx::lane_id() == 0 && in.first_bad < objection(kNumberObjection, 0)) {
        explain(job.view, job.begin, in);
    } else if (ptx::lane_id() == 0) {
        explain_stage(job, StageTables{spread, job.view.shape}, in);
    }
    __syncwarp();
}

// Everybody's heads, and if there is nothing wrong with them, their counts: each thread knows its columns.
// All threads; false: leave.
template <class F>
__device__ __forceinline__ bool hear(const DispatchJob& job, const StageTables& tables,
                                     const F& far, Entering& in, bool& good) {
    if (!await_notices<true>(job.view, far, job.begin, in, HeadListener{tables})) return false;
    good = in.first_bad == kNoObjection;
    return !good || CountsListener<F>{job, tables, in}.take(far);
}

// The same, and judged. Should ranks be masked, blocks agree on whom they go without, and may have to hear once
// more. All threads; false: leave.
template <class F>
__device__ __forceinline__ bool hear_slowly(const DispatchJob& job, const StageTables& tables,
                                            const F& far, Entering& in) {
    if (threadIdx.x == 0) in.first_bad = in.size_bad = kNoObjection;
    __syncthreads();
#pragma unroll 1
    for (bool settled = !masks<F>(job.view);; settled = true) {
        bool good;
        if (!__syncthreads_and(hear(job, tables, far, in, good))) return false;
        if (settled || settle_masked<F>(job.view, in)) break;
    }
    const bool good = in.first_bad == kNoObjection;
    __syncthreads();
    if (good) judge_stage(job, tables, in);
    __syncthreads();
    return true;
}

// Most calls hear all they need at the first look, and want no index of rows, and all their blocks run. For the
// others, what is missing. All threads; false: leave.
template <class Config, Half kHalf, class F>
__device__ __noinline__ bool catch_up(const DispatchJob& job, const StageSpread& spread,
                                      const F& far, Entering& in, bool has_all, bool all_sent) {
    const StageTables tables{spread, job.view.shape};
    if (!has_all && !hear_slowly(job, tables, far, in)) return false;
    const bool good = in.first_bad == kNoObjection;
    if (!F::kIsUsual && good && job.args.index_capacity >= 0) judge_index(job, tables, in);
    if constexpr (kHalf == Half::kBoth) {
        const bool fits = min(in.first_bad, in.size_bad) == kNoObjection;
        if (!__syncthreads_and(all_sent) && fits) send_rest<Config>(job, spread, far, in);
    }
    return true;
}

// A look at everything at once: heads, counts, and the piece of this warp. True: all has come, has been judged,
// and needs nothing that takes longer. All threads; `ok` becomes false: leave.
template <class F, class R>
__device__ __forceinline__ bool hear_at_once(const DispatchJob& job, const StageTables& tables,
                                             Entering& in, const R& receiver,
                                             const typename R::Run& run, typename R::Ahead& ahead,
                                             const Unclaimed& left, bool& ok) {
    FirstLook<F> first{job, tables, in};
    if (!first.is_enough()) {
        ok = __syncthreads_and(ok);
        return false;
    }
    typename R::Peek peek{receiver, run, ahead};
    const bool all = first.run(peek);
    receiver.understand(ahead);
    const HeadListener listener{tables};
    const uint64_t head = all ? device::pack(first.head, in.seq) : nothing_yet(in.seq);
    const bool heard =
        hear_heads<true>(job.view, receiver.stage.far, job.begin, in, listener, head);
    const int column = first_column();
    if (all) {
        judge_column<F>(job, tables, in, column, column < tables.columns(), first.limits);
    }
    const bool all_sent = left.none();
    if (__syncthreads_and(ok && all && heard && all_sent)) return settle_masked<F>(job.view, in);
    ok = __syncthreads_and(ok && heard);
    return false;
}

// The warp that tells the outputs has little else to do.
template <class F>
__device__ __forceinline__ bool tells_outputs() {
    return publishes_stage() && threadIdx.x / 32 == F::kWarps - 1;
}

// What nobody sent. `good`: the call did not fail.
template <class F>
__device__ __forceinline__ void fill_rest(const DispatchJob& job, const StageSpread& spread,
                                          const StageTables& tables, bool good) {
    const auto blocks = static_cast<int>(gridDim.x), warp = static_cast<int>(threadIdx.x) / 32;
    // Warps that had least to take have most to fill in.
    const int last = (F::kWarps - 1 - warp) * blocks - 1 + static_cast<int>(blockIdx.x);
    // Not the warp that tells outputs: its number is -1.
    if (static_cast<uint32_t>(last) >= static_cast<uint32_t>(spread.fillers)) return;
    StagePadder<F>{job, last, F::kWarps * blocks - 1}.run(tables, good);
}

// What follows from counts alone: rows of our own tokens, and what nobody sent.
template <class F>
__device__ __forceinline__ void fill_in(const DispatchJob& job, const StageSpread& spread,
                                        const Entering& in, bool good) {
    const StageTables tables{spread, job.view.shape};
    const Span own = tokens_of_turn(job, spread, turn_of_block());
    if (in.sends) settle_rows<F>(job, tables, own.begin, own.end, in, good);
    fill_rest<F>(job, spread, tables, good);
}

// Of a call that failed.
template <class F>
__device__ __noinline__ void take_nothing(const DispatchJob& job, const StageSpread& spread,
                                          Entering& in) {
    if (tells_outputs<F>()) {
        explain_any(job, spread, in);
        tell_outputs<F>(job, spread, in, false, 0);
    }
    fill_in<F>(job, spread, in, false);
}

// `ok`: false = this warp has given up, and so will all. False: leave; or the call has ended, as far as it is for
// this warp to do.
template <class Config, Half kHalf, class F>
__device__ __forceinline__ bool receive(const DispatchJob& job, const StageSpread& spread,
                                        const StageTables& tables, const F& far, Entering& in,
                                        bool ok) {
    const RankView& view = job.view;
    const int warp = threadIdx.x / 32;
    const Operation op{OpKind::kDispatch, in.seq};
    // The warp that tells has the last turn of the grid, and takes nothing.
    const int from = warp * static_cast<int>(gridDim.x) + turn_of_block();
    const int step = F::kWarps * static_cast<int>(gridDim.x) - 1;
    const StageView<F> stage{view, spread.record, tables.control(), op, in.slot, far};
    using R = Receiver<F, kSteps<Config>>;
    const R receiver{job, tables, stage, in};
    typename R::Run run;
    typename R::Ahead ahead;
    receiver.start(from, run, ahead);
    if constexpr (F::kAny) (void)far.hear(view, op, in, F::kWarps - 1);
    const bool tells = tells_outputs<F>();
    if (tells && job.args.wait_stats != nullptr) {
        time_notices(view, far, in, op, job.args.wait_stats);
    }
    const bool looks = kHalf == Half::kBoth && warp == F::kWarps - 2;  // one warp for all
    Unclaimed left;
    if (looks) left.look(view);
    const bool has_all = hear_at_once<F>(job, tables, in, receiver, run, ahead, left, ok);
    if (!ok) return false;
    if (!has_all || job.args.index_capacity >= 0) {
        if (!catch_up<Config, kHalf>(job, spread, far, in, has_all, left.none())) return false;
        receiver.start(from, run, ahead);
    }
    if (min(in.first_bad, in.size_bad) != kNoObjection) {
        take_nothing<F>(job, spread, in);
        return true;
    }
    Readers readers;
    const bool counts = Readers::are_for<F>(view);
    if (tells) {
        int64_t num_logged = 0;
        if constexpr (F::kAny) {
            ok = count_logged(stage, in, far.nodes().num_nodes, num_logged);
        }
        if (ok) tell_outputs<F>(job, spread, in, true, num_logged);
        if (ok && counts) readers.count(view, in);
    } else {
        ok = receiver.run(step, run, ahead, [&] {
            if (counts) readers.count(view, in);
        });
        if constexpr (F::kAny) ok = ok && RailLogger<F>{job, tables, stage, in}.run(from, step);
    }
    if (!ok) {
        in.leaves = true;
        return false;
    }
    fill_in<F>(job, spread, in, true);
    if (!counts) return true;
    if (readers.are_all(view)) end_half<kHalf>(view, tables.control(), job.begun, far, op, in);
    return false;
}

}  // namespace ep::kernels
