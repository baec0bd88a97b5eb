// Dispatch of a small batch, bound by latency: rows leave before anybody is heard (kernels/stage.cuh).
//
// Each block counts the tokens before its own, puts its tokens in front of their receivers and says what
// becomes of them; one tells every rank what we bring. Then all blocks hear everybody, and their warps
// take what has come, piece by piece, to its rows.
//
// defines: launch_staged_dispatch, load_staged_dispatch
#pragma once

#include <cuda_runtime_api.h>

#include "contract/gpu.h"
#include "contract/stage.h"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/direct_notes.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.cuh"
#include "kernels/mover.cuh"
#include "kernels/origins.cuh"
#include "kernels/stage.cuh"
#include "kernels/stage_hear.cuh"
#include "kernels/stage_masks.cuh"
#include "kernels/stage_receive.cuh"
#include "kernels/stage_send.cuh"
#include "kernels/stage_tables.cuh"

namespace ep::kernels {

// What does not depend on anything that happens on the GPU.
__device__ __forceinline__ void prepare(const DispatchJob& job, const StageTables& tables) {
    const State& state = job.view.state;
    const int num_ranks = job.view.shape.num_ranks;
    if (threadIdx.x == 0) tables.arena() = job.view.peers.arena[job.view.peers.rank];
#pragma unroll 1
    for (int p = threadIdx.x; p <= num_ranks; p += blockDim.x) {
        if (p < num_ranks) tables.control()[p] = job.view.peers.control[p];
        tables.first()[p] = __ldg(state.first + p);
    }
#pragma unroll 1
    for (int c = threadIdx.x; c < tables.columns() + 2; c += blockDim.x) {
        if (c < tables.columns()) tables.before()[c] = 0;
        tables.all()[c] = c == tables.columns() + 1 ? kNoBadId : 0;
    }
#pragma unroll 1
    for (int e = threadIdx.x; e < job.view.shape.num_experts; e += blockDim.x) {
        const uint32_t code = staged_expert(__ldg(state.owner + e), __ldg(state.local + e));
        tables.experts()[e] = {code, __ldg(state.position + e)};
    }
}

__device__ __forceinline__ Span tokens_of_turn(const DispatchJob& job, const StageSpread& spread,
                                               int turn) {
    const auto num_tokens = static_cast<int>(job.args.num_tokens);
    const int begin = min(turn * spread.tokens_per_block, num_tokens);
    return {begin, min(begin + spread.tokens_per_block, num_tokens)};
}

// ---- the first half ----

__device__ __forceinline__ std::byte* warp_memory(const StageSpread& spread, int warp) {
    return ptx::dynamic_shared() + spread.pieces + warp * spread.buffers * spread.piece_bytes;
}

// What does not need the number of the operation comes before it is known. All threads; false: leave. `ok` becomes
// false: this warp has given up since.
template <class Config, class F>
__device__ __forceinline__ bool send(const DispatchJob& job, const StageSpread& spread,
                                     const StageTables& tables, const F& far, Entering& in,
                                     uint64_t* loaded, const Releases& releases, bool& ok) {
    const RankView& view = job.view;
    const int warp = threadIdx.x / 32, pieces = spread.record.num_pieces;
    const bool publishes = publishes_stage();
    const Span own = tokens_of_turn(job, spread, turn_of_block());
    Sender<F> sender{job,
                     spread,
                     tables,
                     {view, spread.record, tables.control(), {OpKind::kDispatch, 0}, 0, far},
                     warp_memory(spread, warp),
                     loaded,
                     in};
    // The first warp says what becomes of tokens, others send them.
    constexpr int kMovers = F::kWarps - 3;
    const int all = (own.end - own.begin) * pieces;
    int i = warp == 0 || warp >= F::kWarps - 2 ? all : warp - 1;
    int t, p;
    const auto find = [&](int index, int& token, int& piece) {
        const int row = spread.pieces_of_row.quotient(index);
        token = own.begin + row, piece = index - row * pieces;
    };
    find(i, t, p);
    typename Sender<F>::Slot slot;
    int64_t next_id = -1;
    ok = true;
#pragma unroll 1
    for (bool is_first = true; is_first || i < all; is_first = false) {
        if (is_first && warp == F::kWarps - 1) {
            ok = begin_half(view, job.begin, far, releases, in);
        } else if (is_first && warp == F::kWarps - 2) {
            ok = !device::gave_up(view.watch);
        } else {
            if (i < all && (is_first || !sender.has_two())) sender.load(t, p, sender.turn);
            const int next = i + kMovers;
            int next_t, next_p;
            find(next, next_t, next_p);
            if (next < all && sender.has_two()) sender.load(next_t, next_p, sender.turn + 1);
            if (is_first) {
                TokenCounter counter(job, spread, own.begin, publishes, F::kWarps - 2);
                counter.look();
                if (i < all || (warp == 0 && own.begin < own.end)) {
                    slot = sender.slot_of(warp == 0 ? own.begin : t);
                }
                counter.run();
            } else {
                slot = sender.slot_of(t, {next_id, 0.0f});  // who sends needs no weight
            }
            if (next < all) next_id = sender.choice_of(next_t).id;
            if (i < all) ok = sender.template prepare<Config>(t, p);
        }
        if (is_first) {
            if (!__syncthreads_and(ok)) {
                sender.abandon();
                return false;
            }
            sender.stage.op.seq = in.seq;
            sender.stage.slot = in.slot;
            if (publishes) {
                publish_counts(job, tables, in);
                if constexpr (F::kAny) tell_nodes(job, tables, far, in);
            }
            if (!in.sends) {
                i = all;
            } else if (warp == 0) {
                sender.describe(own, slot);
            }
        }
        if (!ok || i >= all) break;
        sender.send(t, p, slot);
        i += kMovers;
        find(i, t, p);
        ++sender.turn;
        ptx::fence_proxy_async_shared();  // our accesses, before the load that follows
        __syncwarp();
    }
    sender.abandon();
    if (publishes && job.args.logical_load != nullptr) count_load(job, tables.bad()[0] == 0);
    if constexpr (F::kAny) {
        if (!__syncthreads_and(ok)) return false;
        if (in.sends) put_records(job, sender.stage, own, in.masked);
    }
    return true;
}

// What blocks have yet to send that have not started. All threads.
template <class Config, class F>
__device__ __forceinline__ void send_rest(const DispatchJob& job, const StageSpread& spread,
                                          const F& far, Entering& in) {
    __shared__ int next;
    const RankView& view = job.view;
    const StageTables tables{spread, view.shape};
    const int warp = threadIdx.x / 32, pieces = spread.record.num_pieces;
    const Operation op{OpKind::kDispatch, in.seq};
    const Sender<F> sender{job,
                           spread,
                           tables,
                           {view, spread.record, tables.control(), op, in.slot, far},
                           warp_memory(spread, warp),
                           nullptr,
                           in};
    while (true) {
        if (warp == 0) {
            const int turn = take_turn(view);
            if (threadIdx.x == 0) next = turn;
        }
        for (int c = threadIdx.x; c < tables.columns(); c += blockDim.x) tables.before()[c] = 0;
        __syncthreads();
        if (next < 0) return;
        const Span span = tokens_of_turn(job, spread, next);
        TokenCounter counter(job, spread, span.begin, false, F::kWarps);
        counter.look();
        counter.run();
        __syncthreads();
        if (warp == 0 && span.begin < span.end) {
            sender.describe(span, sender.slot_of(span.begin));
        }
        const int all = (span.end - span.begin) * pieces;
        for (int i = warp - 1; warp > 0 && i < all; i += F::kWarps - 1) {
            const int t = span.begin + i / pieces, p = i % pieces;
            sender.template prepare_slowly<Config>(t, p);
            sender.send(t, p, sender.slot_of(t));
        }
        __syncthreads();
        if constexpr (F::kAny) put_records(job, sender.stage, span, far.skipped());
        settle_rows(job, tables, span.begin, span.end, in, true);
        __syncthreads();
    }
}

// ---- the second half ----

// What the host and kernels behind this one need to know, and what callers read. One warp of one block. Not out
// of line: there every parameter would be a load.
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
        if (job.out.offsets == nullptr) continue;
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
    if (job.out.offsets != nullptr && lane == 0) {
        job.out.offsets[num_local] = static_cast<int32_t>(group_end);
    }
#pragma unroll 1
    for (int p = lane; p < num_ranks; p += 32) {
        a.rank_counts[num_ranks + p] = ok ? tables.rows(p + 1, me) - tables.rows(p, me) : 0;
        if (!ok || without(in, p)) a.rank_counts[p] = 0;
    }
    if (lane == 0) {
        OpState state{in.seq, ok ? int{kOk} : int{in.outcome.incident.code}, in.slot, 0, 0, 0};
        if (ok) {
            state.num_recv = tables.total_rows(me);
            state.num_rows = rows_of(job, tables, me);
            state.index_rows = group_end;
            state.num_logged = num_logged;
        }
        *view.state.op = state;
        if (ok) report(view, job.begin, in.seq, nullptr, state);
        if (job.status != nullptr) *job.status = state.code;
        if (job.num_recv != nullptr) *job.num_recv = static_cast<int32_t>(state.num_recv);
    }
    if (a.rank_ends != nullptr || job.out.source_range != nullptr) tell_origins(job, in, ok);
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
    return !good || CountsListener{job, tables, in}.take(far);
}

// The same, and judged. Should ranks be masked, blocks agree on whom they go without, and may have to hear once
// more. All threads; false: leave.
template <class F>
__device__ __forceinline__ bool hear_slowly(const DispatchJob& job, const StageTables& tables,
                                            const F& far, Entering& in) {
    if (threadIdx.x == 0) in.first_bad = in.size_bad = kNoObjection;
    __syncthreads();
#pragma unroll 1
    for (bool settled = !job.view.watch.can_mask;; settled = true) {
        bool good;
        if (!__syncthreads_and(hear(job, tables, far, in, good))) return false;
        if (settled || settle_masked(job.view, in)) break;
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
    if (good && job.args.index_capacity >= 0) judge_index(job, tables, in);
    if constexpr (kHalf == Half::kBoth) {
        const bool fits = min(in.first_bad, in.size_bad) == kNoObjection;
        if (!__syncthreads_and(all_sent) && fits) send_rest<Config>(job, spread, far, in);
    }
    return true;
}

// A look at everything at once: heads, counts, and the piece of this warp. True: all has come, has been judged,
// and needs nothing that takes longer. All threads; `ok` becomes false: leave.
template <class F>
__device__ __forceinline__ bool hear_at_once(const DispatchJob& job, const StageTables& tables,
                                             Entering& in, const Receiver<F>& receiver,
                                             const typename Receiver<F>::Run& run,
                                             typename Receiver<F>::Ahead& ahead, bool all_sent,
                                             bool& ok) {
    FirstLook first{job, tables, in};
    if (!first.is_enough()) {
        ok = __syncthreads_and(ok);
        return false;
    }
    typename Receiver<F>::Peek peek{receiver, run, ahead};
    const bool all = first.run(peek);
    receiver.understand(ahead);
    const HeadListener listener{tables};
    const uint64_t head = all ? device::pack(first.head, in.seq) : nothing_yet(in.seq);
    const bool heard =
        hear_heads<true>(job.view, receiver.stage.far, job.begin, in, listener, head);
    const int column = first_column();
    if (all) judge_column(job, tables, in, column, column < tables.columns(), first);
    if (__syncthreads_and(ok && all && heard && all_sent)) return settle_masked(job.view, in);
    ok = __syncthreads_and(ok && heard);
    return false;
}

// The warp that tells the outputs has little else to do.
template <class F>
__device__ __forceinline__ bool tells_outputs() {
    return publishes_stage() && threadIdx.x / 32 == F::kWarps - 1;
}

// What follows from counts alone: rows of our own tokens, and what nobody sent. `good`: the call did not fail.
template <class F>
__device__ __forceinline__ void fill_in(const DispatchJob& job, const StageSpread& spread,
                                        const Entering& in, bool good) {
    const StageTables tables{spread, job.view.shape};
    const auto blocks = static_cast<int>(gridDim.x), warp = static_cast<int>(threadIdx.x) / 32;
    const Span own = tokens_of_turn(job, spread, turn_of_block());
    if (in.sends) settle_rows(job, tables, own.begin, own.end, in, good);
    // Warps that had least to take have most to fill in.
    const int last = (F::kWarps - 1 - warp) * blocks - 1 + static_cast<int>(blockIdx.x);
    if (!tells_outputs<F>()) StagePadder{job, last, F::kWarps * blocks - 1}.run(tables, good);
}

// Of a call that failed.
template <class F>
__device__ __noinline__ void take_nothing(const DispatchJob& job, const StageSpread& spread,
                                          Entering& in) {
    if (tells_outputs<F>()) {
        explain_any(job, spread, in);
        tell_outputs(job, spread, in, false, 0);
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
    const Receiver<F> receiver{job, tables, stage, in};
    typename Receiver<F>::Run run;
    typename Receiver<F>::Ahead ahead;
    receiver.start(from, run, ahead);
    if constexpr (F::kAny) (void)far.hear(view, op, in, F::kWarps - 1);
    const bool tells = tells_outputs<F>();
    if (tells && job.args.wait_stats != nullptr) {
        time_notices(view, far, in, op, job.args.wait_stats);
    }
    const bool looks = kHalf == Half::kBoth && warp == F::kWarps - 2;  // one warp for all
    const bool all_sent = !looks || all_claimed(view);
    const bool has_all = hear_at_once(job, tables, in, receiver, run, ahead, all_sent, ok);
    if (!ok) return false;
    if (!has_all || job.args.index_capacity >= 0) {
        if (!catch_up<Config, kHalf>(job, spread, far, in, has_all, all_sent)) return false;
        receiver.start(from, run, ahead);
    }
    if (min(in.first_bad, in.size_bad) != kNoObjection) {
        take_nothing<F>(job, spread, in);
        return true;
    }
    if (tells) {
        int64_t num_logged = 0;
        if constexpr (F::kAny) {
            ok = count_logged(stage, in, far.nodes().num_nodes, num_logged);
        }
        if (ok) tell_outputs(job, spread, in, true, num_logged);
    } else {
        ok = receiver.run(step, run, ahead);
        if constexpr (F::kAny) ok = ok && RailLogger<F>{job, tables, stage, in}.run(from, step);
    }
    if (!ok) {
        in.leaves = true;
        return false;
    }
    Readers readers;
    const bool counts = Readers::are_for<F>(view);
    if (counts) readers.count(view, in);
    fill_in<F>(job, spread, in, true);
    if (!counts) return true;
    if (readers.are_all(view)) end_half<kHalf>(view, tables.control(), job.begun, far, op, in);
    return false;
}

template <class Config, Half kHalf, class F>
__global__ void __launch_bounds__(F::kWarps * 32, 1)
    stage_dispatch_kernel(const __grid_constant__ DispatchJob job,
                          const __grid_constant__ StageSpread spread,
                          const __grid_constant__ F far) {
    __shared__ uint64_t loaded[F::kWarps][2];
    __shared__ Uninitialized<Entering> entering;
    __shared__ Uninitialized<Releases> releases;
    Entering& in = entering.get();
    const RankView& view = job.view;
    const StageTables tables{spread, view.shape};
    const int warp = threadIdx.x / 32;
    ptx::griddepcontrol_launch_dependents();
    prepare(job, tables);
    init_told(job.begin, in);
    if (ptx::lane_id() < 2) device::init_stage({nullptr, &loaded[warp][ptx::lane_id()]});
    if (warp == F::kWarps - 1) releases.get().look(view);
    __syncthreads();
    ptx::griddepcontrol_wait();
    bool ok = true;
    if (warp == F::kWarps - 2) claim_own<kHalf>(view, in);  // it loads nothing
    if constexpr (kHalf == Half::kReceive) {
        if (warp == 0) ok = resume_half(view, job.begin, far, job.begun, in);
        if (warp == 1) ok = !device::gave_up(view.watch);
        if (!__syncthreads_and(ok)) return;
    } else {
        if (!send<Config>(job, spread, tables, far, in, loaded[warp], releases.get(), ok)) return;
    }
    if constexpr (kHalf == Half::kSend) {
        if (!ok) in.leaves = true;
    } else {
        if (!receive<Config, kHalf>(job, spread, tables, far, in, ok)) return;
    }
    __syncthreads();
    if (in.leaves || warp != 0 || !last_block(view)) return;
    const Operation op{OpKind::kDispatch, in.seq};
    if constexpr (kHalf != Half::kSend) {
        if (const uint64_t lost = take_lost(view, in)) {
            forget_rows(job, spread, lost);
            if constexpr (F::kAny) {
                const StageView<F> stage{view, spread.record, tables.control(), op, in.slot, far};
                forget_logged(job, stage, in, lost);
            }
        }
    }
    if (min(in.first_bad, in.size_bad) == kNoObjection) {
        return end_half<kHalf>(view, tables.control(), job.begun, far, op, in);
    }
    explain_any(job, spread, in);
    if constexpr (F::kAny) {
        if (!far.leave(view, op, in)) return;
    }
    fail_call(view, job.begin, in, kHalf == Half::kBoth);
}

template <class F>
using StageDispatchKernel = void (*)(DispatchJob, StageSpread, F);

// Every kernel that exists, in one place.
template <Half kHalf, class F>
StageDispatchKernel<F> stage_dispatch_of(Quantize quantize, DType dtype) {
    if (quantize == Quantize::kNone) return stage_dispatch_kernel<Verbatim, kHalf, F>;
    switch (dtype) {
        case DType::kBF16:
            return stage_dispatch_kernel<Quantized<DType::kBF16>, kHalf, F>;
        case DType::kF16:
            return stage_dispatch_kernel<Quantized<DType::kF16>, kHalf, F>;
        default:
            return stage_dispatch_kernel<Quantized<DType::kF32>, kHalf, F>;
    }
}

template <class F>
StageDispatchKernel<F> stage_dispatch_for(const DispatchArgs& a, Half half) {
    switch (half) {
        case Half::kBoth:
            return stage_dispatch_of<Half::kBoth, F>(a.quantize, a.dtype);
        case Half::kSend:
            return stage_dispatch_of<Half::kSend, F>(a.quantize, a.dtype);
        default:
            return stage_dispatch_kernel<Verbatim, Half::kReceive, F>;
    }
}

template <class F>
int launch_staged_dispatch(const F& far, const DispatchJob& job, Half half, int num_blocks,
                           Stream stream) {
    const StageSpread spread(job.view.shape, job.args, num_blocks);
    return launch_dependent(stage_dispatch_for<F>(job.args, half),
                            {num_blocks, F::kWarps * 32, spread.end}, job.view.overlaps, stream,
                            job, spread, far);
}

template <class F>
int load_staged_dispatch(int smem_bytes) {
    for (const Half half : {Half::kBoth, Half::kSend, Half::kReceive}) {
        for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
            for (const Quantize quantize : {Quantize::kNone, Quantize::kFp8}) {
                DispatchArgs a;
                a.dtype = dtype, a.quantize = quantize;
                const auto kernel = reinterpret_cast<const void*>(stage_dispatch_for<F>(a, half));
                if (const int error = load_kernel(kernel, smem_bytes)) return error;
            }
        }
    }
    return 0;
}

}  // namespace ep::kernels
