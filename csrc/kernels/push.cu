// Push: every token is loaded once and bulk-copied straight into its final row at each rank that owns
// one of its experts; beside it goes a metadata record.
//
// Rows were fixed by notify, so senders never negotiate. Of a block's warps most move rows, each one
// token at a time; the others write records, which are there long before the rows and are announced
// apart. A stage is refilled when its stores have been read; rows are counted as arrived when all
// stores of the block are complete.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>

#include "contract/calls.h"
#include "contract/gpu.h"
#include "device/copy.cuh"
#include "device/ptx.cuh"
#include "device/quantize.cuh"
#include "device/wait.cuh"
#include "kernels/count.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.cuh"
#include "kernels/record.cuh"
#include "kernels/route.cuh"

namespace ep::kernels {
namespace {

using device::Stage;

constexpr int kMaxMovers = 15, kRecordWarps = 8;  // of a block

// How rows leave: as they are, or quantized from kSource on the way.
struct Verbatim {
    static constexpr bool kQuantizes = false;
};
template <DType kDtype>
struct Quantized {
    static constexpr bool kQuantizes = true;
    static constexpr DType kSource = kDtype;
};

// ---- the warps that move rows ----

// One of them, and its tokens: first, first + step, ...
struct Mover {
    const Router& router;
    Stage stage;
    int stage_bytes;
    int32_t* pushed;  // [num_ranks] rows of this block, in shared memory
    int first, step;

    __device__ const DispatchArgs& args() const { return router.job.args; }
    __device__ int64_t source_bytes() const { return args().hidden * dtype_bytes(args().dtype); }

    // One thread. The piece of a token's row at `offset`.
    __device__ void load(int t, int64_t offset) {
        if (t >= args().num_tokens) return;
        const int64_t bytes = min(int64_t{stage_bytes}, source_bytes() - offset);
        device::load_stage(stage, args().x + int64_t{t} * args().x_stride + offset,
                           static_cast<int>(bytes));
    }

    __device__ bool await() {
        const RankView& view = router.job.view;
        return device::await_stage(view.watch, router.op, stage, view.peers.rank);
    }

    // The piece has been read by our stores: the next one may come.
    __device__ void refill(int t, int64_t offset) {
        device::drain_reads();
        __syncwarp();
        if (ptx::lane_id() == 0) load(t, offset);
    }
};

// One token, its row in as many pieces as the stage asks for. False: leave.
__device__ bool move_verbatim(Mover& m, int t, const Route& r, bool fine) {
    const int64_t row_bytes = m.args().row_bytes();
    for (int64_t offset = 0; offset < row_bytes; offset += m.stage_bytes) {
        const int bytes = static_cast<int>(min(int64_t{m.stage_bytes}, row_bytes - offset));
        if (!m.await() || !fine) return false;
        if (r.first) device::store_stage(m.router.row_of(r) + offset, m.stage.data, bytes);
        const bool more = offset + bytes < row_bytes;
        m.refill(more ? t : t + m.step, more ? offset + bytes : 0);
    }
    return true;
}

// One token, quantized in place in its stage; its scales stand behind it and go into the records.
template <DType kSource>
__device__ bool move_quantized(Mover& m, int t, const Route& r, bool fine) {
    const DispatchArgs& a = m.args();
    if (!m.await() || !fine) return false;
    std::byte* scales = m.stage.data + m.source_bytes();
    device::quantize_row<kSource>(m.stage.data, scales, static_cast<int>(a.hidden), a.scale_block,
                                  a.quantize == Quantize::kFp8Ue8m0);
    ptx::fence_proxy_async_shared();  // what we wrote, before the stores that read it
    __syncwarp();
    if (r.first) {
        device::store_stage(m.router.row_of(r), m.stage.data, static_cast<int>(a.hidden));
        const MetaLayout meta = meta_layout(a);
        device::store_stage(m.router.record_of(r) + meta.scales.offset, scales,
                            static_cast<int>(meta.bytes - meta.scales.offset));
    }
    m.refill(t + m.step, 0);
    return true;
}

// False: leave; nothing of ours is under way then.
template <class Config>
__device__ bool move_rows(Mover& m) {
    bool ok = true;
    Choice ahead = m.router.choose(m.first);
    for (int t = m.first; ok && t < m.args().num_tokens; t += m.step) {
        const Route r = m.router.route(t, ahead);
        ahead = m.router.choose(t + m.step);
        const bool fine = m.router.in_bounds(r);
        if constexpr (Config::kQuantizes) {
            ok = move_quantized<Config::kSource>(m, t, r, fine);
        } else {
            ok = move_verbatim(m, t, r, fine);
        }
        if (ok && r.first) atomicAdd(&m.pushed[r.dst], 1);
    }
    device::drain_stores();
    return ok;
}

// ---- the warps that write records ----

// Every rank's share of what these warps of the block have done becomes visible there.
__device__ void announce_records(const Router& router, const int32_t* described) {
    const RankView& view = router.job.view;
    ptx::barrier_sync_aligned(1, 32 * kRecordWarps);
    if (threadIdx.x / 32 != blockDim.x / 32 - 1) return;
    for (int p = ptx::lane_id(); p < view.shape.num_ranks; p += 32) {
        if (described[p] == 0) continue;
        // Releases the records of this block; pairs with the acquire in await_records.
        ptx::red_release_sys_add(
            at<uint64_t>(view, p, view.layout.described_word(router.slot, view.peers.rank)),
            uint64_t(described[p]));
    }
}

// A handle tells rows and counts. Should they not be the same, a receiver would wait for what never
// comes: the last block compares. The last warp of each block.
__device__ void check_handle(const Router& router, const int32_t* described) {
    const RankView& view = router.job.view;
    const int num_ranks = view.shape.num_ranks;
    int32_t* sent = view.state.sent;
    auto* ticket = reinterpret_cast<uint32_t*>(sent + num_ranks);
    if (!router.job.args.cached || threadIdx.x / 32 != blockDim.x / 32 - 1) return;
    for (int p = ptx::lane_id(); p < num_ranks; p += 32) atomicAdd(&sent[p], described[p]);
    __syncwarp();
    uint32_t turn = 0;
    if (ptx::lane_id() == 0) turn = ptx::atom_acq_rel_gpu_inc(ticket, gridDim.x - 1);
    if (__shfl_sync(~0u, turn, 0) != gridDim.x - 1) return;
    for (int p = ptx::lane_id(); p < num_ranks; p += 32) {
        const int64_t want = router.job.args.rank_counts[p], have = atomicExch(&sent[p], 0);
        if (want == have) continue;
        device::give_up(view.watch, router.op, kMiscount, {Site::kNone, p, uint64_t(want)},
                        uint64_t(have), 0);
    }
}

__device__ void write_records(const Router& router, const RecordWriter& writer,
                              int32_t* described) {
    const DispatchArgs& a = router.job.args;
    const int lane = ptx::lane_id();
    const int warp = threadIdx.x / 32 - (blockDim.x / 32 - kRecordWarps);
    const int first = blockIdx.x + warp * gridDim.x, step = kRecordWarps * gridDim.x;
    Choice ahead = router.choose(first);
    for (int t = first; t < a.num_tokens; t += step) {
        const Choice choice = ahead;
        ahead = router.choose(t + step);
        const Route r = router.route(t, choice);
        if (lane < a.num_topk && !a.cached) {
            a.send_row[int64_t{t} * a.num_topk + lane] = r.row;
        }
        writer.write(t, choice, r);
        if (r.first) atomicAdd(&described[r.dst], 1);
    }
    announce_records(router, described);
    check_handle(router, described);
}

// Dynamic shared memory: stages, then the tables.
template <class Config>
__global__ void __launch_bounds__((kMaxMovers + kRecordWarps) * 32, 1)
    push_kernel(const __grid_constant__ DispatchJob job, int stage_bytes) {
    extern __shared__ __align__(128) std::byte shared[];
    __shared__ uint64_t loaded[kMaxMovers];
    __shared__ Slots slots[kRecordWarps];
    const RankView& view = job.view;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_ranks = view.shape.num_ranks;
    const int num_movers = blockDim.x / 32 - kRecordWarps;
    const bool moves = warp < num_movers;
    auto* targets = reinterpret_cast<Target*>(shared + int64_t{num_movers} * stage_bytes);
    auto* pushed = reinterpret_cast<int32_t*>(targets + num_ranks);
    auto* described = pushed + num_ranks;

    Router router{job, {OpKind::kDispatch, 0}, 0, targets};
    Mover mover{router,
                {shared + int64_t{warp} * stage_bytes, &loaded[moves ? warp : 0]},
                stage_bytes,
                pushed,
                static_cast<int>(blockIdx.x + warp * gridDim.x),
                static_cast<int>(num_movers * gridDim.x)};
    // x is there before notify is through, so the first rows are loaded meanwhile.
    if (moves && lane == 0) {
        device::init_stage(mover.stage);
        mover.load(mover.first, 0);
    }
    __syncwarp();
    ptx::griddepcontrol_wait();
    ptx::griddepcontrol_launch_dependents();
    const OpState& state = *view.state.op;
    router.op.seq = state.seq;
    router.slot = state.slot;
    const bool leaves = device::gave_up(view.watch) || state.code != kOk;
    for (int p = threadIdx.x; p < num_ranks; p += blockDim.x) {
        targets[p] = router.target(p);
        pushed[p] = described[p] = 0;
    }
    if (__syncthreads_or(leaves)) {
        if (moves && mover.first < job.args.num_tokens) (void)mover.await();
        return;
    }

    bool ok = true;
    if (moves) {
        ok = move_rows<Config>(mover);
    } else {
        if (blockIdx.x == 0 && warp == num_movers && lane == 0) {
            report(view, job.begin, state.seq, nullptr, state);
        }
        write_records(router, RecordWriter(router, slots[warp - num_movers]), described);
    }
    if (!__syncthreads_and(ok)) return;
    for (int p = threadIdx.x; p < num_ranks; p += blockDim.x) {
        if (pushed[p] == 0) continue;
        // Releases the rows of this block; pairs with the acquire in await_rows.
        ptx::red_release_sys_add(
            at<uint64_t>(view, p, view.layout.arrived_word(state.slot, view.peers.rank)),
            uint64_t(pushed[p]));
    }
}

using PushKernel = void (*)(DispatchJob, int);

// Every kernel that exists, in one place.
PushKernel push_kernel_for(Quantize quantize, DType dtype) {
    if (quantize == Quantize::kNone) return push_kernel<Verbatim>;
    switch (dtype) {
        case DType::kBF16:
            return push_kernel<Quantized<DType::kBF16>>;
        case DType::kF16:
            return push_kernel<Quantized<DType::kF16>>;
        default:
            return push_kernel<Quantized<DType::kF32>>;
    }
}

// Of a batch that keeps the link busy for long.
constexpr int64_t kManyBytes = int64_t{16} << 20;

int tables_bytes(int num_ranks) { return num_ranks * static_cast<int>(sizeof(Target) + 8); }

}  // namespace

int link_sms(int num_ranks) {
    constexpr double kLinkGBps = 345, kSmGBps = 50;  // both directions at once; stores of one SM
    const int others = std::max(num_ranks - 1, 1);
    return static_cast<int>(std::ceil(kLinkGBps / kSmGBps * (others + 1) / others));
}

LaunchPlan push_plan(const DispatchArgs& args, int num_ranks, int num_blocks, int smem_bytes) {
    // Large rows go in pieces; quantized ones stay whole, their scales behind them.
    constexpr int64_t kPieceBytes = 32 * 1024;
    const bool quantizes = args.quantize != Quantize::kNone;
    const int64_t source = args.hidden * dtype_bytes(args.dtype);
    int64_t stage = quantizes ? source + args.scale_bytes : std::min(source, kPieceBytes);
    stage = (stage + 127) / 128 * 128;
    const int64_t fixed =
        int64_t{sizeof(Slots)} * kRecordWarps + 8 * kMaxMovers + tables_bytes(num_ranks);
    const int64_t movers = std::clamp<int64_t>((smem_bytes - fixed - 1024) / stage, 0, kMaxMovers);
    int blocks = num_blocks - unpack_share(args, num_blocks);
    if (num_ranks > 1 && args.num_tokens * source > kManyBytes) {
        blocks = std::min(blocks, link_sms(num_ranks));
    }
    return {blocks, static_cast<int>(movers), static_cast<int>(stage)};
}

int launch_push(const DispatchJob& job, const LaunchPlan& plan, Stream stream) {
    const int smem = plan.num_warps * plan.stage_bytes + tables_bytes(job.view.shape.num_ranks);
    const Grid grid{plan.num_blocks, (plan.num_warps + kRecordWarps) * 32, smem};
    return launch_dependent(push_kernel_for(job.args.quantize, job.args.dtype), grid, true, stream,
                            job, plan.stage_bytes);
}

int load_push(int smem_bytes) {
    for (const PushKernel kernel : {push_kernel_for(Quantize::kNone, DType::kBF16),
                                    push_kernel_for(Quantize::kFp8, DType::kBF16),
                                    push_kernel_for(Quantize::kFp8, DType::kF16),
                                    push_kernel_for(Quantize::kFp8, DType::kF32)}) {
        if (const int error = load_kernel(reinterpret_cast<const void*>(kernel), smem_bytes)) {
            return error;
        }
    }
    return 0;
}

}  // namespace ep::kernels
