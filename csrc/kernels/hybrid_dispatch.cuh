// Dispatch across nodes: every token crosses once per node, to the rank with its source's local index, which
// forwards it to final rows over NVLink. One kernel, over any rail.
//
// Blocks count, hear everybody and place their rows as on one node (dispatch.cu); notices reach other nodes
// over the rails. Then the warps of a block divide: movers take its tokens to rows on the own node and into
// the rings of its channel, forwarders empty the rings of the other nodes; one concludes.
//
// defines: HybridDispatch, spread_dispatch, grid_of, launch_hybrid_dispatch, load_hybrid_dispatch
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "contract/calls.h"
#include "contract/gpu.h"
#include "contract/rail.h"
#include "device/copy.cuh"
#include "device/ptx.cuh"
#include "device/rail.cuh"
#include "kernels/arrive.cuh"
#include "kernels/cross.cuh"
#include "kernels/decide.cuh"
#include "kernels/enter.cuh"
#include "kernels/forward.cuh"
#include "kernels/launch.cuh"
#include "kernels/leave.cuh"
#include "kernels/mover.cuh"
#include "kernels/notices.cuh"
#include "kernels/origins.cuh"
#include "kernels/pad.cuh"
#include "kernels/rail_kernels.h"
#include "kernels/rail_notice.cuh"
#include "kernels/rail_out.cuh"
#include "kernels/rail_tables.cuh"
#include "kernels/tables.cuh"
#include "kernels/visits.cuh"

namespace ep::kernels {

constexpr int kMaxHybridWarps = 16;  // of a block

template <device::Rail R>
struct HybridDispatch {
    DispatchJob job;
    Spread spread;
    RailView rails;
    RailSpread rail_spread;
    Parcel parcel;
    R rail;

    // Warps of a block: movers, forwarders, and one that concludes.
    __host__ __device__ int num_movers() const { return spread.num_movers; }
    __host__ __device__ int num_forwarders() const { return rail_spread.num_walkers; }
    __host__ __device__ int num_warps() const { return num_movers() + num_forwarders() + 1; }
};

// The rank that a slot of ours goes to, in a call or in its handle; -1 = none.
__device__ __forceinline__ int owner_of_slot(const DispatchJob& job, int t, int k) {
    const DispatchArgs& a = job.args;
    const int64_t at = int64_t{t} * a.num_topk + k;
    if (a.cached && a.send_row[at] < 0) return -1;
    const int64_t id = a.cached ? a.topk_idx[at] : expert_of(job, t, a.topk_idx[at]);
    const bool chosen =
        static_cast<uint64_t>(id) < static_cast<uint64_t>(job.view.shape.num_experts);
    return chosen ? __ldg(job.view.state.owner + id) : -1;
}

// The warp that concludes, in the block that speaks for the rank.
template <device::Rail R>
__device__ __forceinline__ void conclude_dispatch(const HybridDispatch<R>& h, Entering& in,
                                                  bool good) {
    const DispatchJob& job = h.job;
    const RankView& view = job.view;
    const Operation op{OpKind::kDispatch, in.seq};
    fill_outputs(job, h.spread, good);
    if (job.args.rank_ends != nullptr || job.out.source_range != nullptr) {
        tell_origins(job, in, good);
    }
    if (good && !await_rows(view, op, in.slot, job.args.wait_stats)) return;
    if (!await_blocks(view, op, 2)) return;  // movers and forwarders of each
    if (!leave_far(h.rail, view, h.rails, NoFar{}, op, in)) return;
    if (!good) return fail_call(view, job.begin, in);
    if (!check_sent(job, op)) return;
    leave_rails(h.rails, h.rail_spread, h.parcel.chunks, h.rails.shape.nodes.node(view.peers.rank),
                job.args.num_tokens,
                {RailCounter::kRecordsOut, RailCounter::kRecordsIn, h.rails.state.sent,
                 h.rails.state.taken});
    leave_slot(view, in.seq, in.slot);
}

// Movers, once all that they have stored is there. `barrier` is theirs.
template <device::Rail R, class Barrier>
__device__ __forceinline__ void finish_moving(const HybridDispatch<R>& h, const Entering& in,
                                              bool good, Barrier barrier) {
    const DispatchJob& job = h.job;
    const RankView& view = job.view;
    const Tables tables(h.spread);
    const int threads = 32 * h.num_movers(), me = view.peers.rank;
    if (good) {
        note_sent(job, tables.pushed, threadIdx.x, threads);
        announce(view, in.slot, threadIdx.x, threads, [&](int p) { return tables.pushed[p]; });
        if (job.args.cached) barrier();
    }
    if (!good && job.args.logical_load != nullptr) {
        take_back_load(job, h.spread, in, threads);
        barrier();  // it reads our notice
    }
    if (threadIdx.x == 0) count_block(view);
    if (!job.args.is_static && job.args.layout == RecvLayout::kCompact) return;
    const Padder padder{job, blockIdx.x + int64_t{threadIdx.x / 32} * gridDim.x,
                        int64_t{h.num_movers()} * gridDim.x};
    padder.run(good ? tables.total[me] : 0, tables.groups, tables.experts + view.state.first[me],
               !good);
}

// A warp of those that move the rank's own tokens.
template <class Config, device::Rail R>
__device__ __forceinline__ void move_tokens(const HybridDispatch<R>& h, const Entering& in,
                                            Mover& mover, Choice first, bool good, bool& failed) {
    const auto barrier = [&h] { ptx::barrier_sync_aligned(1, 32 * h.num_movers()); };
    const Operation op{OpKind::kDispatch, in.seq};
    if (good) {
        const RailOut<R> out{
            h.rail,
            h.job.view,
            h.rails,
            h.parcel,
            h.rail_spread,
            {h.rails, {mover.block_begin, mover.tokens.end}, static_cast<int>(blockIdx.x)},
            op,
            static_cast<int>(blockIdx.x)};
        if (!move_rows_across<Config>(mover, out, first)) failed = true;
    }
    mover.abandon();
    barrier();
    if (!failed) finish_moving(h, in, good, barrier);
}

// A warp of those that forward what comes from other nodes.
template <device::Rail R>
__device__ __forceinline__ void forward_chunks(const HybridDispatch<R>& h, const Entering& in,
                                               const device::Stage& stage, int number, bool good,
                                               bool& failed) {
    const RailTables tables(h.rail_spread);
    const int threads = 32 * h.num_forwarders();
    const int thread = static_cast<int>(threadIdx.x) - 32 * h.num_movers();
    if (good) {
        const RingWalk<R> walk{h.rail,           h.job.view,      h.rails,
                               h.rail_spread,    h.parcel.chunks, {OpKind::kDispatch, in.seq},
                               Site::kRailChunk, number,          h.parcel.chunks.records};
        Forwarder<R> forwarder{h.job, h.parcel, Tables(h.spread),
                               walk,  stage,    h.spread.stage_bytes};
        if (!forwarder.run()) failed = true;
    }
    ptx::barrier_sync_aligned(2, threads);
    if (failed) return;
    if (good) announce_forwarded(h.job.view, h.rails, tables, in.slot, thread, threads);
    if (thread == 0) count_block(h.job.view);
}

template <class Config, device::Rail R>
__global__ void __launch_bounds__(kMaxHybridWarps * 32, 1)
    hybrid_dispatch_kernel(const __grid_constant__ HybridDispatch<R> h) {
    __shared__ uint64_t loaded[kMaxHybridWarps];
    __shared__ Uninitialized<Entering> entering;
    __shared__ bool failed[2];  // some mover, some forwarder has given up
    Entering& in = entering.get();
    const DispatchJob& job = h.job;
    const RankView& view = job.view;
    const Spread& spread = h.spread;
    const Role role{true, true, blockIdx.x == gridDim.x - 1};
    const int warp = threadIdx.x / 32, num_movers = h.num_movers();
    const int num_stages = num_movers + h.num_forwarders();
    const bool is_mover = warp < num_movers, concludes = warp == num_stages;
    const BlockSpan span = block_span(job, spread, 0);
    const Visits visits{h.rails, span.own, static_cast<int>(blockIdx.x)};

    init_told(job.begin, in);
    if (threadIdx.x == 0) {
        init_entering(view, job.begin, in);
        if (role.publishes) open_outbox(h.rail, h.rails, in);
        failed[0] = failed[1] = false;
    }
    clear_tables(job, spread);
    const Tables tables(spread);
    std::byte* stages = ptx::dynamic_shared() + h.rail_spread.end;
    const device::Stage stage{stages + int64_t{warp} * spread.stage_bytes,
                              &loaded[concludes ? 0 : warp]};
    Mover mover{job,
                in,
                spread,
                stage,
                tokens_of(span, spread, warp),
                span.own.begin,
                tables.of_warp(warp)};
    Choice first;
    if (!concludes && ptx::lane_id() == 0) device::init_stage(stage);
    __syncwarp();
    if (is_mover) {  // the first rows come while they are placed
        mover.load(mover.tokens.begin, 0);
        first = mover.choose(mover.tokens.begin);
    }
    bool ok = !__syncthreads_or(device::gave_up(view.watch));
    const Operation op{OpKind::kDispatch, in.seq};
    take_counts(job, tables);
    if (ok && role.publishes && concludes) {
        ok = acquire_slot(view, NoFar{}, op, in.slot) &&
             acquire_far(h.rail, view, h.rails, NoFar{}, op, in);
    }
    if (counts_tokens(job.args)) ok = count(job, op, spread, span, role) && ok;
    count_visits(h.rails, visits, blockIdx.x, job.args.num_topk, in.seq,
                 [&](int t, int k) { return owner_of_slot(job, t, k); });
    ok = __syncthreads_and(ok);
    if (ok && role.publishes) {
        publish(job, spread, in);
        ok = exchange_notices(h.rail, view, h.rails, NoFar{}, in, op, true, job.args.wait_stats);
    }
    const Experts experts = needs_groups(job.args) ? Experts::kAll
                            : role.publishes       ? Experts::kOwn
                                                   : Experts::kNone;
    ok = ok && await_notices(view, NoFar{}, job.begin, in,
                             CountsReader{job, spread, tables, in, experts});
    bool good = ok && in.first_bad == kNoObjection;
    if (good) {
        judge_sizes(job, spread, in);
        good = in.size_bad == kNoObjection;
    }
    if (good)
        ok = good = hear_rings(h.rail, view, h.rails, h.rail_spread, op, h.rails.state.taken,
                               h.rails.state.sent);
    if (!ok) {
        if (is_mover) mover.abandon();
        return;
    }
    if (role.publishes && concludes) {
        if (!good) explain_failure(job, spread, in);
        tell_host(job, spread, in, good,
                  good ? num_incoming(h.rails, RailTables(h.rail_spread)) : 0);
    }
    if (good) place_block(job, spread);
    if (concludes) {
        if (role.publishes) conclude_dispatch(h, in, good);
    } else if (is_mover) {
        move_tokens<Config>(h, in, mover, first, good, failed[0]);
    } else {
        forward_chunks(h, in, stage, warp - num_movers, good, failed[1]);
    }
}

template <device::Rail R>
using HybridDispatchKernel = void (*)(HybridDispatch<R>);

// Every kernel that exists, in one place.
template <device::Rail R>
HybridDispatchKernel<R> hybrid_dispatch_for(Quantize quantize, DType dtype) {
    if (quantize == Quantize::kNone) return hybrid_dispatch_kernel<Verbatim, R>;
    switch (dtype) {
        case DType::kBF16:
            return hybrid_dispatch_kernel<Quantized<DType::kBF16>, R>;
        case DType::kF16:
            return hybrid_dispatch_kernel<Quantized<DType::kF16>, R>;
        default:
            return hybrid_dispatch_kernel<Quantized<DType::kF32>, R>;
    }
}

// ---- how wide ----

inline Parcel parcel_of(const DispatchArgs& a, const RailShape& s) {
    const RailHeadLayout head(a.num_topk, a.with_weights, a.layout != RecvLayout::kCompact,
                              a.scale_bytes);
    return {head, RailChunks(s.chunk_bytes, head.bytes, a.row_bytes())};
}

// Shared memory of a warp for a row in flight; quantized ones stay whole, their scales behind them.
inline int stage_of(const DispatchArgs& a) {
    constexpr int64_t kPieceBytes = 32 * 1024;
    const int64_t source = a.hidden * dtype_bytes(a.dtype);
    int64_t stage = std::min(source, kPieceBytes);
    if (a.quantize != Quantize::kNone || source <= kPieceBytes) stage = source + a.scale_bytes;
    return static_cast<int>((stage + 127) / 128 * 128);
}

// `num_warps`: at most, 0 = as many as there is room for. `smem_bytes`: of a block, dynamic.
template <device::Rail R>
HybridDispatch<R> spread_dispatch(const R& rail, const DispatchJob& job, const RailView& rails,
                                  int num_warps, int smem_bytes) {
    const int stage = stage_of(job.args);
    // Movers have the longer way: two stores, a head, a credit.
    const auto divided = [&](int warps) {
        const int forwarders = std::max(warps * 2 / 5, 1), movers = std::max(warps - forwarders, 1);
        const Spread spread = spread_of(job, movers, stage, job.tokens_per_chunk, 1);
        const RailSpread own(rails.shape, spread.end, rails.num_blocks, forwarders);
        return HybridDispatch<R>{job, spread, rails, own, parcel_of(job.args, rails.shape), rail};
    };
    int warps = num_warps > 0 ? std::min(num_warps, kMaxHybridWarps) - 1 : kMaxHybridWarps - 1;
    while (warps > 2 && divided(warps).rail_spread.end + int64_t{warps} * stage > smem_bytes) {
        --warps;
    }
    return divided(warps);
}

template <device::Rail R>
Grid grid_of(const HybridDispatch<R>& h) {
    const int stages = h.num_movers() + h.num_forwarders();
    return {h.rails.num_blocks, 32 * h.num_warps(),
            h.rail_spread.end + stages * h.spread.stage_bytes};
}

template <device::Rail R>
int launch_hybrid_dispatch(const R& rail, DispatchJob job, RailView rails, const LaunchPlan& plan,
                           int smem_bytes, Stream stream) {
    constexpr int kLess = 4;  // tokens of the last block, which has more to do
    const int blocks = std::clamp(plan.num_blocks, 1, rails.shape.num_channels);
    job.num_chunks = rails.num_blocks = blocks;
    job.tokens_per_chunk = rails.tokens_per_block =
        static_cast<int>((job.args.num_tokens + kLess + blocks - 1) / blocks);
    const HybridDispatch<R> h = spread_dispatch(rail, job, rails, plan.num_warps, smem_bytes);
    return launch(hybrid_dispatch_for<R>(job.args.quantize, job.args.dtype), grid_of(h), stream, h);
}

template <device::Rail R>
int load_hybrid_dispatch(int smem_bytes, RailRoom& room) {
    for (const HybridDispatchKernel<R> kernel :
         {hybrid_dispatch_for<R>(Quantize::kNone, DType::kBF16),
          hybrid_dispatch_for<R>(Quantize::kFp8, DType::kBF16),
          hybrid_dispatch_for<R>(Quantize::kFp8, DType::kF16),
          hybrid_dispatch_for<R>(Quantize::kFp8, DType::kF32)}) {
        const auto address = reinterpret_cast<const void*>(kernel);
        if (const int error = load_kernel(address, smem_bytes, &room.dispatch)) return error;
    }
    return 0;
}

}  // namespace ep::kernels
