// Dispatch: every token goes straight to its final rows at the ranks that own its experts. One kernel.
//
// Each block counts its own tokens; one tells every rank what we bring and where it may write; all blocks
// hear everybody and work out their rows; then each warp moves its tokens, one at a time. A warp of the
// block that spoke waits for what comes. Nobody waits for a grid: numbers of other blocks are words that
// are polled, as those of other ranks are.
//
// By copy engine it is the same in three kernels: one decides, one packs rows for the copies, one ends it.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>

#include "contract/calls.h"
#include "contract/gpu.h"
#include "contract/pack.h"
#include "device/copy.cuh"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/arrive.cuh"
#include "kernels/copies.cuh"
#include "kernels/decide.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.cuh"
#include "kernels/leave.cuh"
#include "kernels/mover.cuh"
#include "kernels/notices.cuh"
#include "kernels/origins.cuh"
#include "kernels/pack.h"
#include "kernels/pad.cuh"
#include "kernels/place.cuh"
#include "kernels/tables.cuh"
#include "kernels/tuned.h"

namespace ep::kernels {
namespace {

// Every block counts all that comes before its tokens while these are so few that asking the other
// blocks takes longer.
constexpr int kFewTokens = 1024;

enum class Phase { kWhole, kPlan, kMove };

// ---- the kernel ----

// The warp beside those that move rows, in the block that speaks for the rank: it tells what was decided,
// then, while the others move, what callers read, and waits for the end of the operation.
template <Phase kPhase>
__device__ __forceinline__ void tell_verdict(const PackJob& pack, const Spread& spread,
                                             Entering& in, bool good) {
    const DispatchJob& job = pack.dispatch;
    if (!good) {
        explain_failure(job, spread, in);
    } else if (kPhase == Phase::kPlan) {
        tell_places(pack, spread);
    }
    tell_host(job, spread, in, good);
}

template <Phase kPhase>
__device__ __forceinline__ void conclude_call(const PackJob& pack, const Spread& spread,
                                              Entering& in, bool good) {
    const DispatchJob& job = pack.dispatch;
    const RankView& view = job.view;
    const Operation op{OpKind::kDispatch, in.seq};
    fill_outputs(job, spread, good);
    if (job.args.rank_ends != nullptr || job.out.source_range != nullptr) {
        tell_origins(job, in, good);
    }
    const bool waits = kPhase == Phase::kWhole && good;
    if (waits && !await_rows(view, op, in.slot, job.args.wait_stats)) return;
    if (!await_blocks(view, op)) return;
    if (!good) return fail_call(view, job.begin, in);
    if (kPhase == Phase::kPlan || !check_sent(job, op)) return;
    leave_slot(view, in.seq, in.slot);
}

// Those that move rows, once all are stored. `barrier` is theirs.
template <Phase kPhase, class Barrier>
__device__ __forceinline__ void finish_block(const DispatchJob& job, const Spread& spread,
                                             const Entering& in, bool good, Barrier barrier) {
    const Tables tables(spread);
    const int num_movers = spread.num_movers;
    const RankView& view = job.view;
    const int me = view.peers.rank;
    if (kPhase != Phase::kPlan && good) {
        note_sent(job, tables.pushed, threadIdx.x, 32 * num_movers);
        if (kPhase == Phase::kWhole) {
            announce(view, in.slot, threadIdx.x, 32 * num_movers,
                     [&](int p) { return tables.pushed[p]; });
        }
        if (job.args.cached) barrier();
    }
    if (kPhase == Phase::kMove) return;
    if (!good && job.args.logical_load != nullptr) {
        take_back_load(job, spread, in, 32 * num_movers);
        barrier();  // it reads our notice
    }
    if (threadIdx.x == 0) count_block(view);
    if (!job.args.is_static && job.args.layout == RecvLayout::kCompact) return;
    const Padder padder{job, blockIdx.x + int64_t{threadIdx.x / 32} * gridDim.x,
                        int64_t{num_movers} * gridDim.x};
    padder.run(good ? tables.total[me] : 0, tables.groups, tables.experts + view.state.first[me],
               !good);
}

template <class Config, Phase kPhase>
__global__ void __launch_bounds__((Config::kMaxMovers + 1) * 32, 1)
    dispatch_kernel(const __grid_constant__ PackJob pack, const __grid_constant__ Spread spread) {
    __shared__ uint64_t loaded[Config::kMaxMovers];
    __shared__ Uninitialized<Entering> entering;
    __shared__ bool failed;  // some warp has given up
    Entering& in = entering.get();
    const DispatchJob& job = pack.dispatch;
    const RankView& view = job.view;
    // Packing is queued before the host knows the verdict. The operation has ended when that was bad.
    if (kPhase == Phase::kMove && view.state.op->code != kOk) return;
    const Role role{kPhase != Phase::kMove, kPhase != Phase::kPlan,
                    kPhase != Phase::kMove && blockIdx.x == gridDim.x - 1};
    const int warp = threadIdx.x / 32, num_movers = spread.num_movers;
    const bool is_mover = warp < num_movers;
    const BlockSpan span = block_span(job, spread, role.tells ? 0 : pack.first_chunk);

    if (threadIdx.x < static_cast<uint32_t>(spread.state_lines)) {  // what everybody needs soon
        ptx::prefetch_global_l2(view.state.seq + threadIdx.x * 16);
    }
    init_told(job.begin, in);
    if (threadIdx.x == 0) init_entering(view, job.begin, in), failed = false;
    clear_tables(job, spread);
    const Tables tables(spread);
    std::byte* stages = ptx::dynamic_shared() + spread.end;
    Mover mover{job,
                in,
                spread,
                {stages + int64_t{warp} * spread.stage_bytes, &loaded[is_mover ? warp : 0]},
                tokens_of(span, spread, warp),
                span.own.begin,
                tables.of_warp(warp)};
    Choice first;
    if (kPhase != Phase::kPlan && is_mover) {  // the first rows come while they are placed
        if (ptx::lane_id() == 0) device::init_stage(mover.stage);
        __syncwarp();
        mover.load(mover.tokens.begin, 0);
        first = mover.choose(mover.tokens.begin);
    }
    bool ok = !__syncthreads_or(device::gave_up(view.watch));
    const Operation op{OpKind::kDispatch, in.seq};
    take_counts(job, tables);
    if (ok && role.publishes && !is_mover) ok = acquire_slot(view, NoFar{}, op, in.slot);
    if (counts_tokens(job.args)) ok = count(job, op, spread, span, role) && ok;
    ok = __syncthreads_and(ok);
    if (ok && role.publishes) publish(job, spread, in);
    if (ok && role.publishes && !is_mover && job.args.wait_stats != nullptr) {
        time_notices(view, NoFar{}, in, op, job.args.wait_stats);
    }
    const Experts experts = needs_groups(job.args) ? Experts::kAll
                            : role.publishes       ? Experts::kOwn
                                                   : Experts::kNone;
    ok = ok && await_notices(view, NoFar{}, job.begin, in,
                             CountsReader{job, spread, tables, in, experts});
    if (!ok) {
        if (is_mover) mover.abandon();
        return;
    }
    bool good = in.first_bad == kNoObjection;
    if (good) {
        judge_sizes(job, spread, in);
        good = in.size_bad == kNoObjection;
    }
    if (kPhase == Phase::kMove && good) pack_targets(pack, tables);
    if (role.publishes && !is_mover) tell_verdict<kPhase>(pack, spread, in, good);
    if (kPhase != Phase::kPlan && good) place_block(job, spread);
    if (!is_mover) {
        if (role.publishes) conclude_call<kPhase>(pack, spread, in, good);
        return;
    }
    if (kPhase != Phase::kPlan && good) {
        if (!move_rows<Config>(mover, first)) failed = true;
    }
    mover.abandon();
    const auto barrier = [num_movers] { ptx::barrier_sync_aligned(1, 32 * num_movers); };
    barrier();
    if (!failed) finish_block<kPhase>(job, spread, in, good, barrier);
}

// Behind the copies on their stream, the packing before them: all our rows are there. One warp.
__global__ void __launch_bounds__(32, 1) arrive_kernel(const __grid_constant__ DispatchJob job) {
    const RankView& view = job.view;
    const uint64_t seq = view.state.seq[0] + 1;
    const auto slot = static_cast<int>(view.state.seq[1]);
    if (__syncthreads_or(device::gave_up(view.watch) || view.state.op->code != kOk)) return;
    const Operation op{OpKind::kDispatch, seq};
    if (!check_sent(job, op)) return;
    announce(view, slot, ptx::lane_id(), 32, [&](int p) { return job.args.rank_counts[p]; });
    if (await_rows(view, op, slot, job.args.wait_stats)) leave_slot(view, seq, slot);
}

using DispatchKernel = void (*)(PackJob, Spread);

// Every kernel that exists, in one place.
DispatchKernel dispatch_kernel_for(Quantize quantize, DType dtype) {
    if (quantize == Quantize::kNone) return dispatch_kernel<Verbatim, Phase::kWhole>;
    switch (dtype) {
        case DType::kBF16:
            return dispatch_kernel<Quantized<DType::kBF16>, Phase::kWhole>;
        case DType::kF16:
            return dispatch_kernel<Quantized<DType::kF16>, Phase::kWhole>;
        default:
            return dispatch_kernel<Quantized<DType::kF32>, Phase::kWhole>;
    }
}
constexpr DispatchKernel kPlanKernel = dispatch_kernel<Verbatim, Phase::kPlan>;
constexpr DispatchKernel kMoveKernel = dispatch_kernel<Verbatim, Phase::kMove>;

// ---- how wide ----

// Of a batch that keeps the link busy for long.
constexpr int64_t kManyBytes = int64_t{16} << 20;
constexpr int kFixedBytes = 2048;     // shared memory that is not dynamic
constexpr int kReservedBytes = 1024;  // of these, what CUDA has for itself
static_assert(sizeof(uint64_t) * Verbatim::kMaxMovers + sizeof(Entering) + 64 + kReservedBytes <=
              kFixedBytes);

int64_t source_bytes(const DispatchArgs& a) { return a.hidden * dtype_bytes(a.dtype); }

int64_t shared_bytes(const Shape& shape, const DispatchArgs& args, int movers, int64_t stage) {
    return movers * stage + Spread(shape, args, movers).end;
}

Grid grid_of(const Spread& spread, int blocks) {
    return {blocks, 32 * (spread.num_movers + 1),
            spread.num_movers * spread.stage_bytes + spread.end};
}

}  // namespace

int link_sms(int num_ranks) {
    constexpr double kLinkGBps = 345, kSmGBps = 50;  // both directions at once; stores of one SM
    const int others = std::max(num_ranks - 1, 1);
    return static_cast<int>(std::ceil(kLinkGBps / kSmGBps * (others + 1) / others));
}

int default_sms(const DispatchArgs& args, int num_ranks) {
    constexpr int kSpread = 32;
    const bool many = args.num_tokens * source_bytes(args) > kManyBytes;
    return many ? link_sms(num_ranks) : kSpread;
}

bool fits_shared(const Shape& shape, int smem_bytes) {
    DispatchArgs widest;
    widest.layout = RecvLayout::kGrouped, widest.num_topk = 1;
    return shared_bytes(shape, widest, 1, 32 * 1024) + kFixedBytes <= smem_bytes;
}

LaunchPlan dispatch_plan(const DispatchJob& job, int num_blocks, int smem_bytes) {
    // Large rows go in pieces; quantized ones stay whole, their scales behind them.
    constexpr int64_t kPieceBytes = 32 * 1024;
    constexpr int kFewestMovers = 7;
    const DispatchArgs& a = job.args;
    const bool quantizes = a.quantize != Quantize::kNone;
    const int64_t source = source_bytes(a);
    int64_t stage = std::min(source, kPieceBytes);
    if (quantizes) stage = source + a.scale_bytes;
    LaunchPlan plan;
    plan.stage_bytes = static_cast<int>((stage + 127) / 128 * 128);
    plan.num_blocks = num_blocks;
    if (job.view.shape.num_ranks > 1 && a.num_tokens * source > kManyBytes) {
        plan.num_blocks = std::min(num_blocks, link_sms(job.view.shape.num_ranks));
    }
    const int64_t per_block = (a.num_tokens + plan.num_blocks - 1) / plan.num_blocks;
    const int most = quantizes ? Quantized<DType::kBF16>::kMaxMovers : Verbatim::kMaxMovers;
    auto movers = static_cast<int>(std::clamp<int64_t>(per_block, kFewestMovers, most));
    while (movers > 1 &&
           shared_bytes(job.view.shape, a, movers, plan.stage_bytes) + kFixedBytes > smem_bytes) {
        --movers;
    }
    plan.num_warps = quantizes ? tuned(kQuantizers, plan.stage_bytes, movers)
                               : tuned(kMovers, plan.stage_bytes, movers);
    return plan;
}

void divide_tokens(DispatchJob& job, int num_blocks) {
    const int64_t tokens = job.args.num_tokens;
    constexpr int kLess = 4;  // tokens of the last block, which has more to do
    const bool few = tokens <= kFewTokens;
    job.num_chunks = few ? 1 : std::min(num_blocks, kMaxChunks);
    job.tokens_per_chunk =
        static_cast<int>((tokens + (few ? 0 : kLess) + job.num_chunks - 1) / job.num_chunks);
}

int launch_dispatch(const DispatchJob& job, const LaunchPlan& plan, Stream stream) {
    const int share = job.num_chunks == 1 ? plan.num_blocks : 1;
    const Spread spread =
        spread_of(job, plan.num_warps, plan.stage_bytes, job.tokens_per_chunk, share);
    return launch(dispatch_kernel_for(job.args.quantize, job.args.dtype),
                  grid_of(spread, plan.num_blocks), stream, PackJob{job}, spread);
}

int launch_plan(const PackJob& job, Stream stream) {
    LaunchPlan plan;
    plan.num_warps = 15;
    const Spread spread =
        spread_of(job.dispatch, plan.num_warps, 0, job.dispatch.tokens_per_chunk, 1);
    return launch(kPlanKernel, grid_of(spread, job.dispatch.num_chunks), stream, job, spread);
}

int launch_pack(const PackJob& job, int num_blocks, int smem_bytes, Stream stream) {
    const int chunks = job.end_chunk - job.first_chunk, share = std::max(num_blocks / chunks, 1);
    const LaunchPlan plan = dispatch_plan(job.dispatch, share * chunks, smem_bytes);
    const Spread spread = spread_of(job.dispatch, plan.num_warps, plan.stage_bytes,
                                    job.dispatch.tokens_per_chunk, share);
    return launch(kMoveKernel, grid_of(spread, share * chunks), stream, job, spread);
}

int launch_arrive(const PackJob& job, Stream stream) {
    return launch(arrive_kernel, {1, 32, 0}, stream, job.dispatch);
}

int load_dispatch(int smem_bytes) {
    for (const DispatchKernel kernel :
         {dispatch_kernel_for(Quantize::kNone, DType::kBF16),
          dispatch_kernel_for(Quantize::kFp8, DType::kBF16),
          dispatch_kernel_for(Quantize::kFp8, DType::kF16),
          dispatch_kernel_for(Quantize::kFp8, DType::kF32), kPlanKernel, kMoveKernel}) {
        if (const int error = load_kernel(reinterpret_cast<const void*>(kernel), smem_bytes)) {
            return error;
        }
    }
    return load_kernel(reinterpret_cast<const void*>(&arrive_kernel), smem_bytes);
}

}  // namespace ep::kernels
