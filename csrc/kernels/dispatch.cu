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
#include "kernels/count.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.cuh"
#include "kernels/mover.cuh"
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

// What a block does of a phase.
struct Role {
    bool tells;      // decides the call with the others
    bool moves;      // moves rows
    bool publishes;  // speaks for the rank
};

// ---- counting ----

__device__ __forceinline__ void clear_tables(const DispatchJob& job, const Spread& spread) {
    const int least = bad_column(job.view.shape) + 1, others = (spread.others - spread.counts) / 4;
    int32_t* at = Tables(spread).counts;
#pragma unroll 1
    for (int i = threadIdx.x; i < (spread.end - spread.counts) / 4; i += blockDim.x) {
        at[i] = i == least || i == others + least ? kNoBadId : 0;
    }
}

// What nobody tells us: a handle knows it.
__device__ __forceinline__ void take_counts(const DispatchJob& job, const Tables& tables) {
    const RankView& view = job.view;
    if (!job.args.cached) return;
    const int first = view.state.first[view.peers.rank];
    const int num_local = view.state.first[view.peers.rank + 1] - first;
#pragma unroll 1
    for (int e = threadIdx.x; e < num_local; e += blockDim.x) {
        tables.experts[first + e] = job.args.expert_counts[e];
    }
}

// What of a count is asked for.
struct Counting {
    bool asks;        // what comes before our block
    bool experts[2];  // selections of every expert: in our block, before it
    bool load;        // of logical experts
};

__device__ __forceinline__ Counting counting_of(const DispatchJob& job, const Role& role) {
    const bool fresh = !job.args.cached, selects = gives_selections(job.args);
    const bool alone = job.num_chunks == 1 && role.tells && role.moves;
    return {
        role.moves || role.publishes,
        {selects || (fresh && (role.publishes || !alone)), selects || (fresh && role.publishes)},
        role.tells && fresh && job.args.logical_load != nullptr};
}

// By votes: this block's tokens, then those before it in its chunk.
__device__ __forceinline__ void count_votes(const DispatchJob& job, const Spread& spread,
                                            const BlockSpan& span, const Counting& what) {
    const Tables tables(spread);
    const int num_ranks = job.view.shape.num_ranks, bad = bad_column(job.view.shape);
    const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32, lane = ptx::lane_id();
    const int num_votes = (span.own.end - span.own.begin + 31) / 32;
    int before = 0;  // for the rank of this lane
    // One loop for both, since its code is what takes long.
    const int num_before = what.asks ? (span.own.begin - span.chunk_begin + 31) / 32 : 0;
#pragma unroll 1
    for (int g = warp; g < num_votes + num_before; g += num_warps) {
        const bool ours = g < num_votes;
        int32_t* columns = ours ? tables.counts : tables.others;
        const Voter voter{job, columns + num_ranks, columns + bad, what.experts[ours ? 0 : 1],
                          ours && what.load};
        const int t0 = ours ? span.own.begin + 32 * g : span.chunk_begin + 32 * (g - num_votes);
        const uint32_t mine = voter.votes(t0, ours ? span.own.end : span.own.begin);
        if (ours && lane < num_ranks) tables.votes[g * num_ranks + lane] = mine;
        if (!ours) before += __popc(mine);
    }
    if (before != 0 && lane < num_ranks) atomicAdd(&tables.others[lane], before);
    __syncthreads();
    sum_votes(tables, num_ranks, num_votes);
    __syncthreads();
}

// By warps: each its own tokens, then all those before the block in its chunk.
__device__ __noinline__ void count_by_warps(const DispatchJob& job, const Spread& spread,
                                            BlockSpan span, Counting what) {
    const Tables tables(spread);
    const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
    const int ranks = job.view.shape.num_ranks, bad = bad_column(job.view.shape);
    Counter counter(job, spread);
    const Span own = span.of_warp(warp, spread.tokens_per_warp);
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
        const bool ours = pass == 0;
        int32_t* columns = ours ? tables.counts : tables.others;
        counter.tokens = ours ? tables.of_warp(warp) : columns;
        counter.selections =
            (ours && gives_selections(job.args) ? counter.tokens : columns) + ranks;
        counter.bad = columns + bad;
        counter.selects = what.experts[pass];
        counter.load = ours && what.load;
        const int step = ours ? counter.per_turn : num_warps * counter.per_turn;
        const int first = ours ? own.begin : span.chunk_begin + warp * counter.per_turn;
        const bool counts = ours ? warp < spread.num_movers : what.asks;
        counter.count(first, !counts ? first : ours ? own.end : span.own.begin, step);
    }
    __syncthreads();
    sum_warps(tables, spread.num_movers);
    __syncthreads();
}

// This block's tokens, and what comes before them. False: leave.
__device__ __forceinline__ bool count(const DispatchJob& job, Operation op, const Spread& spread,
                                      const BlockSpan& span, const Role& role) {
    const Counting what = counting_of(job, role);
    if (spread.votes_tokens) {
        count_votes(job, spread, span, what);
    } else {
        count_by_warps(job, spread, span, what);
    }
    if (job.num_chunks == 1 && role.tells && role.moves) return true;
    const Tables tables(spread);
    if (role.tells) tell_chunk(job, op, tables, span.chunk);
    if (!what.asks) return true;
    const int columns = role.publishes               ? columns_of(job.view.shape)
                        : gives_selections(job.args) ? bad_column(job.view.shape)
                                                     : job.view.shape.num_ranks;
    return add_chunks(job, op, tables, columns, 0, span.chunk);
}

// ---- telling ----

// What this rank brings: the block that publishes is the last, so all comes before it.
__device__ __forceinline__ int brings(const DispatchJob& job, const Tables& tables, int column) {
    if (!counts_tokens(job.args)) return static_cast<int>(job.args.rank_counts[column]);
    const int here = tables.counts[column], before = tables.others[column];
    return column == bad_column(job.view.shape) + 1 ? min(here, before) : here + before;
}

// What is wrong with what we bring.
__device__ __noinline__ void find_fault(const DispatchJob& job, const Spread& spread,
                                        Entering& in) {
    const Tables tables(spread);
    const DispatchArgs& a = job.args;
    const int bad = bad_column(job.view.shape);
    for (int p = threadIdx.x; a.cached && p < job.view.shape.num_ranks; p += blockDim.x) {
        // A tensor of the handle was changed since.
        if (a.rank_counts[p] != brings(job, tables, p)) in.code = kStaleHandle;
    }
    if (threadIdx.x == 0 && !a.cached && brings(job, tables, bad) > 0) {
        const int64_t at = brings(job, tables, bad + 1);
        in.code = kBadExpertId;
        in.detail[0] = brings(job, tables, bad);
        in.detail[1] = at / a.num_topk;
        in.detail[2] = at % a.num_topk;
        in.detail[3] = a.topk_idx[at];
    } else if (threadIdx.x == 0) {
        for (int i = 0; i < 4; ++i) in.detail[i] = job.begin.refusal.detail[i];
    }
    __syncthreads();
}

__device__ __forceinline__ void publish(const DispatchJob& job, const Spread& spread,
                                        Entering& in) {
    using L = NoticeLayout;
    const Tables tables(spread);
    const DispatchArgs& a = job.args;
    const Shape& shape = job.view.shape;
    const bool counted = counts_tokens(a), compares = a.cached && counted;
    const bool is_bad = counted && !a.cached && brings(job, tables, bad_column(shape)) > 0;
    if (is_bad || compares || in.code != kOk) find_fault(job, spread, in);
    publish_head(job.view, job.begin, in);
    const NoticeLayout layout(shape);
    publish_words(job.view, in, L::kRows, a.cached ? layout.selections : layout.end, [&](int i) {
        if (i >= layout.expected && i < layout.selections) {  // of a handle, see judge_handles
            return static_cast<uint32_t>(a.cached ? a.rank_counts[i - L::kRows] : 0);
        }
        const int c = i < layout.expected ? i - L::kRows : shape.num_ranks + i - layout.selections;
        const int number = brings(job, tables, c);
        if (c < shape.num_ranks && !a.cached) a.rank_counts[c] = number;
        return static_cast<uint32_t>(number);
    });
}

// ---- the verdict ----

// What the host, and kernels behind this one, need to know: before rows move, since a fence of an SM waits
// for all that it stores. One warp of the block that publishes.
__device__ __noinline__ void tell_host(const DispatchJob& job, const Spread& spread,
                                       const Entering& in, bool ok) {
    const Tables tables(spread);
    const RankView& view = job.view;
    const int me = view.peers.rank, num_local = view.state.first[me + 1] - view.state.first[me];
    const bool compact = job.args.layout == RecvLayout::kCompact;
    const bool indexed = job.out.offsets != nullptr;
    if (ok && compact && indexed) (void)place_groups(job, tables, me);
    if (ptx::lane_id() != 0) return;
    OpState& state = *view.state.op;
    state = {in.seq, ok ? int{kOk} : int{in.outcome.incident.code}, in.slot, 0, 0, 0};
    if (ok) {
        const int64_t groups = compact && !indexed ? 0 : tables.groups[num_local];
        state.num_recv = tables.total[me];
        state.num_rows = compact ? state.num_recv : groups;
        state.index_rows = groups;
        report(view, job.begin, in.seq, nullptr, state);
    }
    if (job.status != nullptr) *job.status = state.code;
    if (job.num_recv != nullptr) *job.num_recv = static_cast<int32_t>(state.num_recv);
}

// What callers read. One warp of the block that publishes.
__device__ __noinline__ void fill_outputs(const DispatchJob& job, const Spread& spread, bool ok) {
    const Tables tables(spread);
    const RankView& view = job.view;
    const DispatchArgs& a = job.args;
    const int lane = ptx::lane_id(), num_ranks = view.shape.num_ranks, me = view.peers.rank;
    const int first = view.state.first[me], num_local = view.state.first[me + 1] - first;
#pragma unroll 1
    for (int e = lane; !a.cached && e < num_local; e += 32) {
        a.expert_counts[e] = ok ? tables.experts[first + e] : 0;
        if (ok && a.recv_stats != nullptr) a.recv_stats[e] += tables.experts[first + e];
    }
#pragma unroll 1
    for (int e = lane; job.out.offsets != nullptr && e <= num_local; e += 32) {
        job.out.offsets[e] = ok ? tables.groups[e] : 0;
    }
#pragma unroll 1
    for (int p = lane; !a.cached && p < num_ranks; p += 32) {
        a.rank_counts[num_ranks + p] = ok ? tables.arriving[p] : 0;
        if (!ok) a.rank_counts[p] = 0;
    }
}

// This block's first rows: behind those of lower ranks and of the blocks before it.
__device__ __forceinline__ void place_block(const DispatchJob& job, const Spread& spread) {
    const Tables tables(spread);
    const int num_ranks = job.view.shape.num_ranks;
    const bool bounded = job.args.cached && job.args.layout == RecvLayout::kCompact;
#pragma unroll 1
    for (int c = threadIdx.x; c < tables.width; c += blockDim.x) {
        if (c < num_ranks) {
            Target& target = tables.targets[c];
            target.min_row = bounded ? tables.base[c] : 0;
            if (bounded)
                target.max_rows = target.min_row + static_cast<int>(job.args.rank_counts[c]);
        }
        (c < num_ranks ? tables.base[c] : tables.first_row[c - num_ranks]) += tables.others[c];
    }
    __syncthreads();
}

// ---- the kernel ----

// The warp beside those that move rows, in the block that speaks for the rank: it tells what was decided,
// then, while the others move, what callers read, and waits for the end of the operation.
template <Phase kPhase>
__device__ __forceinline__ void tell_verdict(const PackJob& pack, const Spread& spread,
                                             Entering& in, bool good) {
    const DispatchJob& job = pack.dispatch;
    if (!good) {
        if (ptx::lane_id() == 0 && in.first_bad < objection(kNumberObjection, 0)) {
            explain(job.view, job.begin, in);
        } else if (ptx::lane_id() == 0) {
            explain_numbers(job, spread, in);
        }
        __syncwarp();
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

// A call with an id that names no expert counts no load. Of tokens that were counted by this block.
__device__ __noinline__ void take_back_load(const DispatchJob& job, const Spread& spread,
                                            const Entering& in) {
    const NoticeWords ours(job.view, in.slot, job.view.peers.rank);
    if (job.args.cached || code_of(ours.get(NoticeLayout::kWhat)) != kBadExpertId) return;
    const DispatchArgs& a = job.args;
    const Span own = block_span(job, spread, 0).own;
    const int64_t end = int64_t{own.end} * a.num_topk;
    for (int64_t i = int64_t{own.begin} * a.num_topk + threadIdx.x; i < end; i += blockDim.x - 32) {
        const int64_t id = a.topk_idx[i];
        if (id < 0 || id >= a.replicas.num_logical) continue;
        atomicAdd(reinterpret_cast<unsigned long long*>(a.logical_load + id), ~0ull);
    }
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
        take_back_load(job, spread, in);
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
    const Role role{kPhase != Phase::kMove, kPhase != Phase::kPlan,
                    kPhase != Phase::kMove && blockIdx.x == gridDim.x - 1};
    const int warp = threadIdx.x / 32, num_movers = spread.num_movers;
    const bool is_mover = warp < num_movers;
    const BlockSpan span = block_span(job, spread, role.tells ? 0 : pack.first_chunk);

    if (threadIdx.x < static_cast<uint32_t>(spread.state_lines)) {  // what everybody needs soon
        ptx::prefetch_global_l2(view.state.seq + threadIdx.x * 16);
    }
    if (threadIdx.x == 0) init_entering(view, job.begin, in), failed = false;
    clear_tables(job, spread);
    const Tables tables(spread);
    std::byte* stages = ptx::dynamic_shared() + spread.end;
    Mover mover{job,
                in,
                tables,
                {stages + int64_t{warp} * spread.stage_bytes, &loaded[is_mover ? warp : 0]},
                spread.stage_bytes,
                tokens_of(span, spread, warp),
                span.own.begin,
                spread.votes_tokens,
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
    if (ok && role.publishes && !is_mover) ok = acquire_slot(view, op, in.slot);
    if (counts_tokens(job.args)) ok = count(job, op, spread, span, role) && ok;
    ok = __syncthreads_and(ok);
    if (ok && role.publishes) publish(job, spread, in);
    if (ok && role.publishes && !is_mover && job.args.wait_stats != nullptr) {
        time_notices(view, in, op, job.args.wait_stats);
    }
    const Experts experts = needs_groups(job.args) ? Experts::kAll
                            : role.publishes       ? Experts::kOwn
                                                   : Experts::kNone;
    ok = ok && await_notices(view, job.begin, in, CountsReader{job, spread, tables, in, experts});
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
constexpr int kFixedBytes = 2048;  // shared memory that is not dynamic

int64_t source_bytes(const DispatchArgs& a) { return a.hidden * dtype_bytes(a.dtype); }

int64_t shared_bytes(const Shape& shape, const DispatchArgs& args, int movers, int64_t stage) {
    return movers * stage + Spread(shape, args, movers).end;
}

Grid grid_of(const Spread& spread, int blocks) {
    return {blocks, 32 * (spread.num_movers + 1),
            spread.num_movers * spread.stage_bytes + spread.end};
}

Spread spread_of(const DispatchJob& job, const LaunchPlan& plan, int64_t tokens, int share) {
    Spread spread(job.view.shape, job.args, plan.num_warps);
    spread.over(tokens, share, plan.stage_bytes);
    if (!spread.fits()) {
        spread = Spread(job.view.shape, job.args, plan.num_warps, false);
        spread.over(tokens, share, plan.stage_bytes);
    }
    spread.state_lines = static_cast<int32_t>(StateLayout(job.view.shape).tables_end / 128);
    return spread;
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
    if (quantizes || source <= kPieceBytes) stage = source + a.scale_bytes;
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
    const Spread spread = spread_of(job, plan, job.tokens_per_chunk, share);
    return launch(dispatch_kernel_for(job.args.quantize, job.args.dtype),
                  grid_of(spread, plan.num_blocks), stream, PackJob{job}, spread);
}

int launch_plan(const PackJob& job, Stream stream) {
    LaunchPlan plan;
    plan.num_warps = 15;
    const Spread spread = spread_of(job.dispatch, plan, job.dispatch.tokens_per_chunk, 1);
    return launch(kPlanKernel, grid_of(spread, job.dispatch.num_chunks), stream, job, spread);
}

int launch_pack(const PackJob& job, int num_blocks, int smem_bytes, Stream stream) {
    const int chunks = job.end_chunk - job.first_chunk, share = std::max(num_blocks / chunks, 1);
    const LaunchPlan plan = dispatch_plan(job.dispatch, share * chunks, smem_bytes);
    const Spread spread = spread_of(job.dispatch, plan, job.dispatch.tokens_per_chunk, share);
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
