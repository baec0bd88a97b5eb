// The first half of a small dispatch: a block counts the tokens before its own, puts its tokens in front of their
// receivers and says what becomes of them; one tells every rank what we bring.
//
// defines: tokens_of_turn, send, send_rest
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "contract/stage.h"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/direct_notes.cuh"
#include "kernels/enter.cuh"
#include "kernels/mover.cuh"
#include "kernels/stage.cuh"
#include "kernels/stage_fill.cuh"
#include "kernels/stage_send.cuh"
#include "kernels/stage_tables.cuh"

namespace ep::kernels {

__device__ __forceinline__ Span tokens_of_turn(const DispatchJob& job, const StageSpread& spread,
                                               int turn) {
    const auto num_tokens = static_cast<int>(job.args.num_tokens);
    const int begin = min(turn * spread.tokens_per_block, num_tokens);
    return {begin, min(begin + spread.tokens_per_block, num_tokens)};
}

// What does not need the number of the operation comes before it is known, and what needs nothing that was done on the
// GPU before the kernels ahead have ended. All threads; false: leave. `ok` becomes false: this warp has given up since.
template <class Config, Half kHalf, class F>
__device__ __forceinline__ bool send(const DispatchJob& job, const StageSpread& spread,
                                     const StageTables& tables, const F& far, Entering& in,
                                     uint64_t* loaded, bool& ok) {
    const RankView& view = job.view;
    const int warp = threadIdx.x / 32, pieces = spread.record.num_pieces;
    const bool publishes = publishes_stage();
    const Span own = tokens_of_turn(job, spread, turn_of_block());
    Sender<F> sender = sender_of(job, spread, tables, far, in, loaded);
    // The first warp says what becomes of tokens, of several together with the last but one; others send them.
    const int middle = own.begin + (own.end - own.begin + 1) / 2;
    const bool is_other = warp == F::kWarps - 2;
    const Span described = is_other ? Span{middle, own.end} : Span{own.begin, middle};
    const bool describes = (warp == 0 || is_other) && described.begin < described.end;
    constexpr int kMovers = F::kWarps - 3;
    const int all = (own.end - own.begin) * pieces;
    int i = warp == 0 || warp >= F::kWarps - 2 ? all : warp - 1;
    int t, p;
    const auto find = [&](int index, int& token, int& piece) {
        const int row = spread.pieces_of_row.quotient(index);
        token = own.begin + row, piece = index - row * pieces;
    };
    find(i, t, p);
    if (warp == 0) t = own.begin;
    TokenCounter<F> counter(job, spread, own.begin, middle < own.end ? middle : 0, publishes, warp,
                            F::kWarps - 2);
    const Releases releases(view, warp == F::kWarps - 1);
    typename Sender<F>::First first;
    if (i < all) first = sender.announce(t, p);
    typename Sender<F>::Slot slot;
    int64_t next_id = -1;
    ok = true;
    ptx::griddepcontrol_wait();
#pragma unroll 1
    for (bool is_first = true; is_first || i < all; is_first = false) {
        if (is_first && warp == F::kWarps - 1) {
            ok = begin_half(view, job.begin, far, releases, in);
        } else if (is_first && is_other) {
            const Claim claim = claim_own<kHalf>(view);
            ok = !device::gave_up(view.watch);
            if (describes) slot = sender.slot_of(middle);
            if (ptx::lane_id() == 0) in.sends = claim.is_ours();
        } else {
            typename Sender<F>::Choice choice{next_id, 0.0f};  // who sends needs no weight
            if (is_first) {
                if (i < all) sender.load(first);
                counter.look();
                if (i < all || describes) choice = sender.choice_of(t);
            } else if (!sender.has_two()) {
                sender.load(t, p, sender.turn);
            }
            const int next = i + kMovers;
            int next_t, next_p;
            find(next, next_t, next_p);
            if (next < all && sender.has_two()) sender.load(next_t, next_p, sender.turn + 1);
            if (i < all || describes) slot = sender.slot_of(t, choice);
            if (is_first) counter.run();
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
                publish_counts<F>(job, tables, in);
                if constexpr (F::kAny) tell_nodes(job, tables, far, in);
            }
            if (!in.sends) {
                i = all;
            } else if (describes) {
                sender.describe(described, slot, is_other ? tables.middle() : tables.before());
            }
        }
        if (!ok || i >= all) break;
        sender.template send<Config>(t, p, slot);
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
                           tables.warp_memory(),
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
        TokenCounter<F> counter(job, spread, span.begin, 0, false, warp, F::kWarps);
        counter.look();
        counter.run();
        __syncthreads();
        if (warp == 0 && span.begin < span.end) {
            sender.describe(span, sender.slot_of(span.begin), tables.before());
        }
        const int all = (span.end - span.begin) * pieces;
        for (int i = warp - 1; warp > 0 && i < all; i += F::kWarps - 1) {
            const int t = span.begin + i / pieces, p = i % pieces;
            sender.template prepare_slowly<Config>(t, p);
            sender.template send<Config>(t, p, sender.slot_of(t));
        }
        __syncthreads();
        if constexpr (F::kAny) put_records(job, sender.stage, span, far.skipped());
        settle_rows<F>(job, tables, span.begin, span.end, in, true);
        __syncthreads();
    }
}

}  // namespace ep::kernels
