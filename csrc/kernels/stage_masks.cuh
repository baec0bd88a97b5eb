// Small operations go on without ranks that are masked (docs/protocol.md, "Masks"). Blocks of a rank may
// find out at different times; here they come to one verdict on whom the operation goes without.
//
// A source counts once its notice has been heard whole, by any block: then all can hear it. The first block
// that knows of all sources decides for the rank. Whose rows stop coming after that is lost: what has
// come of it is taken back by the last block, which is alone.
//
// defines: agree_on, settle_masked, lose, take_lost, forget_rows
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"
#include "kernels/stage_tables.cuh"
#include "kernels/usual.cuh"

namespace ep::kernels {

// One warp. What the first block that comes here has found, for all blocks. words(): [2] packed.
template <class Words>
__device__ __forceinline__ uint64_t agree_on(const Entering& in, uint64_t found, int lane,
                                             Words words) {
    const int half = lane & 1;
    uint32_t agreed = 0;
    if (lane < 2) {
        const uint64_t mine = device::pack(static_cast<uint32_t>(found >> 32 * half), in.seq);
        uint64_t* word = words() + half;
        uint64_t old = ptx::ld_relaxed_gpu(word);
        // What the block that decides has heard comes before what those that follow it hear.
        uint64_t seen = device::is_of(old, in.seq) ? old : mine;
        const uint64_t before = ptx::atom_acq_rel_gpu_cas(word, old, seen);
        agreed = device::bits_of(before == old ? seen : before);
    }
    const uint64_t high = __shfl_sync(~0u, agreed, 1), low = __shfl_sync(~0u, agreed, 0);
    __syncwarp();
    return high << 32 | low;
}

// One warp. in.masked becomes what all blocks of this rank go without; true: what this block found, too.
__device__ __noinline__ inline bool decide_masked(const RankView& view, Entering& in) {
    const uint64_t found = in.masked | in.unheard;
    const int lane = ptx::lane_id();
    const uint64_t agreed = agree_on(in, found, lane, [&] { return view.state.without; });
    if (lane == 0) in.masked = agreed, in.unheard = 0;
    return agreed == found;
}

// After this block has heard all whom it goes on with. All threads; false: it has to hear once more, whom its
// rank goes on with.
template <class F>
__device__ __forceinline__ bool settle_masked(const RankView& view, Entering& in) {
    if (!masks<F>(view)) return true;
    const bool same = threadIdx.x >= 32 || decide_masked(view, in);
    if (__syncthreads_and(same)) return true;
    if (threadIdx.x == 0) in.first_bad = kNoObjection;
    __syncthreads();
    return false;
}

// A row of this rank has not come and will not: this block goes without it. One warp. False: leave.
__device__ __noinline__ inline bool lose(const RankView& view, Entering& in, int rank) {
    if (ptx::lane_id() == 0) atomicOr(&in.unheard, 1ull << rank);
    if (!__all_sync(~0u, device::goes_on(view.watch))) return false;
    if (ptx::lane_id() == 0) ptx::red_relaxed_sys_or(view.state.lost, uint64_t{1} << rank);
    return true;
}

// Ranks lost by any block. One warp of the last one.
__device__ __forceinline__ uint64_t take_lost(const RankView& view, const Entering& in) {
    if (!view.watch.can_mask) return 0;
    const uint64_t lost = ptx::ld_relaxed_gpu(view.state.lost);
    __syncwarp();
    if (lost != 0 && ptx::lane_id() == 0) ptx::st_relaxed_gpu(view.state.lost, 0);
    if (ptx::lane_id() == 0) device::tell_masked(view.watch, in.masked | lost);
    return lost;
}

// Of a dispatch: the rows of sources that were lost stay counted, zero, and of nobody. One warp of the last
// block.
struct RowsOfLost {
    const DispatchJob& job;
    StageTables tables;

    __device__ __forceinline__ void forget(int src) const {
        const DispatchArgs& a = job.args;
        const int me = job.view.peers.rank, lane = ptx::lane_id();
        const int first = tables.rows(src, me), end = tables.rows(src + 1, me);
        const bool slab = a.layout == RecvLayout::kSlab;
#pragma unroll 1
        for (int i = first; i < end; ++i) {
            if (lane < 2) job.out.recv_src[2 * i + lane] = -1;
            if (slab && lane < a.num_topk) job.out.recv_row[int64_t{i} * a.num_topk + lane] = -1;
            if (!slab) clear_compact(i);
        }
        const int first_expert = job.view.state.first[me];
        const int num_local = slab ? job.view.state.first[me + 1] - first_expert : 0;
#pragma unroll 1
        for (int e = 0; e < num_local; ++e) {
            const int until = tables.selections(src + 1, first_expert + e);
#pragma unroll 1
            for (int i = tables.selections(src, first_expert + e); i < until; ++i) {
                clear_slab(e, i);
            }
        }
    }

private:
    __device__ __forceinline__ void clear_x(int64_t row) const {
        const RankView& view = job.view;
        const int64_t bytes = job.args.row_bytes();
        auto* x = reinterpret_cast<uint4*>(
            view.peers.arena[view.peers.rank] +
            int64_t{job.begin.head.grant.page[Grant::kX]} * kExtentAlign + row * bytes);
        for (int64_t i = ptx::lane_id(); i < bytes / 16; i += 32) x[i] = make_uint4(0, 0, 0, 0);
        if (job.out.row_token != nullptr && ptx::lane_id() == 0) job.out.row_token[row] = -1;
    }

    __device__ __forceinline__ void clear_scales(int64_t at, int64_t apart) const {
        auto* scales = reinterpret_cast<uint32_t*>(job.out.scales) + at;
        for (int64_t s = ptx::lane_id(); s < job.args.scale_bytes / 4; s += 32) {
            scales[s * apart] = 0;
        }
    }

    __device__ __forceinline__ void clear_compact(int64_t row) const {
        const DispatchArgs& a = job.args;
        clear_x(row);
        clear_scales(row * (a.scale_bytes / 4), 1);
        const int lane = ptx::lane_id();
        if (lane >= a.num_topk) return;
        const int64_t at = row * a.num_topk + lane;
        if (a.with_weights) job.out.topk_weights[at] = 0.0f;
        put_none(at);
    }

    __device__ __forceinline__ void clear_slab(int expert, int i) const {
        const DispatchArgs& a = job.args;
        const int64_t row = expert * a.capacity + i, apart = (a.capacity + 3) / 4 * 4;
        clear_x(row);
        clear_scales(expert * (a.scale_bytes / 4) * apart + i, apart);
        if (ptx::lane_id() == 0) put_none(row);
        if (a.with_weights && ptx::lane_id() == 0) job.out.topk_weights[row] = 0.0f;
    }

    __device__ __forceinline__ void put_none(int64_t at) const {
        if (job.out.idx_is_int64) {
            static_cast<int64_t*>(job.out.topk_idx)[at] = -1;
        } else {
            static_cast<int32_t*>(job.out.topk_idx)[at] = -1;
        }
    }
};

__device__ __noinline__ inline void forget_rows(const DispatchJob& job, const StageSpread& spread,
                                                uint64_t lost) {
    const RowsOfLost rows{job, StageTables{spread, job.view.shape}};
#pragma unroll 1
    for (; lost != 0; lost &= lost - 1) rows.forget(__ffsll(static_cast<long long>(lost)) - 1);
}

}  // namespace ep::kernels
