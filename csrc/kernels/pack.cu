// Dispatch by copy engine: rows are packed by destination in a short step on all SMs, and no SM is
// held while they travel.
//
// A source's compact rows at a destination lie together, in the order of its tokens. So packed rows
// need one copy for each destination and piece, straight to their final place; notify has said where
// that is. Arrivals are counted behind the copies, on their stream.
#include <cuda_runtime_api.h>

#include "contract/calls.h"
#include "contract/pack.h"
#include "device/ptx.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.cuh"
#include "kernels/pack.h"
#include "kernels/record.cuh"
#include "kernels/route.cuh"

namespace ep::kernels {
namespace {

constexpr int kPackWarps = 32;

__device__ const BaseRecord& base_of(const RankView& view, int slot, int dst) {
    return *at<const BaseRecord>(view, view.peers.rank, view.layout.base(slot, dst));
}

// How many rows the tokens before `t` have at a rank, of a handle; nobody counted them. Rows follow the
// tokens, so the next token that goes there knows. One warp.
__device__ int rows_before(const Router& router, int t, int dst, int64_t base_row, int num_rows) {
    const DispatchArgs& a = router.job.args;
    const int lane = ptx::lane_id();
    for (int t0 = t; t0 < a.num_tokens; t0 += 32) {
        int row = -1;
        for (int k = 0; t0 + lane < a.num_tokens && row < 0 && k < a.num_topk; ++k) {
            const int64_t at = int64_t{t0 + lane} * a.num_topk + k, id = a.topk_idx[at];
            const bool there = id >= 0 && id < router.job.view.shape.num_experts &&
                               __ldg(router.job.view.state.owner + id) == dst;
            if (there) row = max(0, static_cast<int>(a.send_row[at] - base_row));
        }
        const uint32_t found = __ballot_sync(~0u, row >= 0);
        if (found != 0) return min(__shfl_sync(~0u, row, __ffs(found) - 1), num_rows);
    }
    return num_rows;
}

// Tells the host where rows go, and the verdict with it. One block.
__global__ void places_kernel(const __grid_constant__ PackJob pack) {
    const DispatchJob& job = pack.dispatch;
    const RankView& view = job.view;
    const OpState& state = *view.state.op;
    if (__syncthreads_or(device::gave_up(view.watch) || state.code != kOk)) return;
    const int num_ranks = view.shape.num_ranks, num_warps = blockDim.x / 32;
    const Router router{job, {OpKind::kDispatch, state.seq}, state.slot, nullptr};
    for (int i = threadIdx.x / 32; job.args.cached && i < num_ranks * (job.num_chunks - 1);
         i += num_warps) {
        const int p = i % num_ranks, chunk = i / num_ranks;
        const int until = rows_before(router, (chunk + 1) * job.tokens_per_chunk, p,
                                      base_of(view, state.slot, p).row,
                                      static_cast<int>(job.args.rank_counts[p]));
        if (ptx::lane_id() == 0) pack.places[p].until[chunk] = until;
    }
    for (int p = threadIdx.x; p < num_ranks; p += blockDim.x) {
        const BaseRecord& base = base_of(view, state.slot, p);
        Place& place = pack.places[p];
        place.x_offset = base.x_offset;
        place.meta_offset = base.meta_offset;
        place.row = base.row;
        place.num_rows = job.args.rank_counts[p];
        for (int c = 0; !job.args.cached && c + 1 < job.num_chunks; ++c) {
            const int next = (c + 1) * num_ranks + p;
            place.until[c] = static_cast<int>(view.state.chunk_row[next] - base.row);
        }
        place.until[job.num_chunks - 1] = static_cast<int>(place.num_rows);
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    int next = 0;
    for (int p = 0; p < num_ranks; ++p) {
        pack.start[p] = next;
        if (p != view.peers.rank) next += static_cast<int>(job.args.rank_counts[p]);
    }
    report(view, job.begin, state.seq, nullptr, state);  // releases the places
}

// Where row `base.row` of ours would lie: packed, or in place when the rank is our own.
__device__ Target packed_target(const PackJob& pack, const Router& router, int slot, int dst) {
    const RankView& view = pack.dispatch.view;
    if (dst == view.peers.rank) return router.target(dst);
    const BaseRecord& base = base_of(view, slot, dst);
    const int64_t row = pack.start[dst] - base.row;
    const DispatchArgs& a = pack.dispatch.args;
    return {pack.rows + row * a.row_bytes(), pack.records + row * meta_layout(a).bytes,
            base.row + a.rank_counts[dst]};
}

// A handle's rows must not come before ours, either.
__device__ bool in_bounds(const PackJob& pack, const Router& router, const Route& r, int slot) {
    if (!router.in_bounds(r)) return false;
    const RankView& view = pack.dispatch.view;
    const bool bad = r.dst >= 0 && r.row < base_of(view, slot, r.dst).row;
    if (bad) {
        device::give_up(view.watch, router.op, kMiscount, {Site::kNone, r.dst, 0}, uint64_t(r.row),
                        0);
    }
    return !__any_sync(~0u, bad);
}

// One warp, one token: its row is loaded once and stored for each rank that wants it. Dynamic shared
// memory: a target for each rank.
__global__ void __launch_bounds__(kPackWarps * 32, 1)
    pack_kernel(const __grid_constant__ PackJob pack) {
    extern __shared__ __align__(16) std::byte shared[];
    __shared__ Slots slots[kPackWarps];
    __shared__ uint4* rows[kPackWarps][kMaxTopk];
    const DispatchJob& job = pack.dispatch;
    const DispatchArgs& a = job.args;
    const RankView& view = job.view;
    const OpState& state = *view.state.op;
    if (__syncthreads_or(device::gave_up(view.watch) || state.code != kOk)) return;
    auto* targets = reinterpret_cast<Target*>(shared);
    const Router router{job, {OpKind::kDispatch, state.seq}, state.slot, targets};
    for (int p = threadIdx.x; p < view.shape.num_ranks; p += blockDim.x) {
        targets[p] = packed_target(pack, router, state.slot, p);
    }
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = ptx::lane_id();
    const RecordWriter writer(router, slots[warp]);
    const int end =
        static_cast<int>(min(int64_t{pack.end_chunk} * job.tokens_per_chunk, a.num_tokens));
    for (int t = pack.first_chunk * job.tokens_per_chunk + blockIdx.x + warp * gridDim.x; t < end;
         t += kPackWarps * gridDim.x) {
        const Choice choice = router.choose(t);
        const Route r = router.route(t, choice);
        if (!in_bounds(pack, router, r, state.slot)) return;
        if (lane < a.num_topk && !a.cached) a.send_row[int64_t{t} * a.num_topk + lane] = r.row;
        writer.write(t, choice, r);
        const uint32_t leaders = __ballot_sync(~0u, r.first);
        if (r.first) {
            rows[warp][__popc(leaders & ptx::lanemask_lt())] =
                reinterpret_cast<uint4*>(router.row_of(r));
        }
        __syncwarp();
        const int count = __popc(leaders);
        const auto* from = reinterpret_cast<const uint4*>(a.x + int64_t{t} * a.x_stride);
#pragma unroll 4
        for (int64_t u = lane; u < a.row_bytes() / 16; u += 32) {
            const uint4 unit = from[u];
            for (int i = 0; i < count; ++i) rows[warp][i][u] = unit;
        }
        __syncwarp();
    }
}

// Releases all rows and records of ours: the copies came before on this stream, the packing before
// them. Pairs with the acquires of unpack.
__global__ void arrive_kernel(const __grid_constant__ PackJob pack) {
    const DispatchJob& job = pack.dispatch;
    const RankView& view = job.view;
    const OpState& state = *view.state.op;
    if (__syncthreads_or(device::gave_up(view.watch) || state.code != kOk)) return;
    for (int p = threadIdx.x; p < view.shape.num_ranks; p += blockDim.x) {
        const auto rows = static_cast<uint64_t>(job.args.rank_counts[p]);
        if (rows == 0) continue;
        for (const int64_t word : {view.layout.described_word(state.slot, view.peers.rank),
                                   view.layout.arrived_word(state.slot, view.peers.rank)}) {
            ptx::red_release_sys_add(at<uint64_t>(view, p, word), rows);
        }
    }
}

}  // namespace

int launch_places(const PackJob& job, Stream stream) {
    places_kernel<<<1, 128, 0, stream>>>(job);
    return cudaGetLastError();
}

int launch_pack(const PackJob& job, int num_blocks, Stream stream) {
    const int smem = job.dispatch.view.shape.num_ranks * static_cast<int>(sizeof(Target));
    pack_kernel<<<num_blocks, kPackWarps * 32, smem, stream>>>(job);
    return cudaGetLastError();
}

int launch_arrive(const PackJob& job, Stream stream) {
    arrive_kernel<<<1, 128, 0, stream>>>(job);
    return cudaGetLastError();
}

int load_pack(int smem_bytes) {
    for (const void* kernel : {reinterpret_cast<const void*>(&places_kernel),
                               reinterpret_cast<const void*>(&pack_kernel),
                               reinterpret_cast<const void*>(&arrive_kernel)}) {
        if (const int error = load_kernel(kernel, smem_bytes)) return error;
    }
    return 0;
}

}  // namespace ep::kernels
