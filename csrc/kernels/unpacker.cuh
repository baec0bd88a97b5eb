// What arrived beside the rows, as tensors: words of records go where a caller reads them.
//
// defines: Unpacker
#pragma once

#include <cstdint>

#include "contract/calls.h"
#include "contract/gpu.h"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"

namespace ep::kernels {

struct Unpacker {
    const DispatchJob& job;
    const UnpackArgs& out;
    MetaLayout meta;
    int num_local;
    int64_t num_recv, row_bytes;
    const std::byte* records;  // [num_recv]
    const int32_t* first_row;  // [num_ranks + 1], in shared memory where ranks are few

    __device__ void put_idx(int64_t at, int32_t local) const {
        if (out.topk_idx == nullptr) return;
        if (out.idx_is_int64) {
            static_cast<int64_t*>(out.topk_idx)[at] = local;
        } else {
            static_cast<int32_t*>(out.topk_idx)[at] = local;
        }
    }

    // Numbers written by peers are checked before they become addresses.
    __device__ int32_t checked(int32_t value, int64_t limit) const {
        if (value >= -1 && value < limit) return value;
        const RankView& view = job.view;
        device::give_up(view.watch, {OpKind::kDispatch, view.state.op->seq}, kBadCount,
                        {Site::kRows, view.peers.rank, uint64_t(limit)}, uint64_t(value), 0);
        return -1;
    }

    __device__ std::byte* x() const {
        return job.view.peers.arena[job.view.peers.rank] + job.grant.x_offset;
    }

    __device__ int source_of(int64_t i) const {
        const int lane = ptx::lane_id(), num_ranks = job.view.shape.num_ranks;
        int src = 0;
        for (int p0 = 0; p0 < num_ranks; p0 += 32) {
            const int p = p0 + lane;
            const bool below = p < num_ranks && job.view.state.first_row[p + 1] <= i;
            src += __popc(__ballot_sync(~0u, below));
        }
        return src;
    }

    __device__ void put_scales(int64_t row, const uint32_t* scales) const {
        const int64_t words = meta.scales.bytes / 4;
        auto* to = reinterpret_cast<uint32_t*>(out.scales);
        int64_t first = row * words, step = 1;
        if (job.args.layout == RecvLayout::kSlab) {
            // Column-major per expert, columns 16 bytes aligned, as masked grouped GEMMs read them.
            const int64_t capacity = job.args.capacity;
            step = (capacity + 3) / 4 * 4;
            first = row / capacity * words * step + row % capacity;
        }
        for (int64_t w = ptx::lane_id(); w < words; w += 32) {
            to[first + w * step] = scales != nullptr ? scales[w] : 0;
        }
    }

    __device__ const std::byte* record(int64_t i) const { return records + i * meta.bytes; }

    __device__ int32_t word(int64_t i, const Region& region, int k) const {
        return reinterpret_cast<const int32_t*>(record(i) + region.offset)[k];
    }

    // Compact: one warp, `n` records from `first` on, of which `records` is a copy or the original.
    __device__ void flat_records(int64_t first, int n, const std::byte* records) const {
        const int lane = ptx::lane_id(), num_topk = job.args.num_topk, slots = n * num_topk;
        const auto word_at = [&](int i, const Region& region) {
            const std::byte* record = records + i / num_topk * meta.bytes + region.offset;
            return reinterpret_cast<const int32_t*>(record)[i % num_topk];
        };
#pragma unroll 4
        for (int i = lane; i < slots && !job.args.cached; i += 32) {
            put_idx(first * num_topk + i, checked(word_at(i, meta.experts), num_local));
        }
#pragma unroll 4
        for (int i = lane; i < slots && job.args.with_weights; i += 32) {
            out.topk_weights[first * num_topk + i] = __int_as_float(word_at(i, meta.weights));
        }
        for (int i = lane; i < n && !job.args.cached; i += 32) {
            int src = 0;
            while (first_row[src + 1] <= first + i) ++src;
            const std::byte* token = records + i * meta.bytes + meta.src_token.offset;
            reinterpret_cast<int2*>(out.recv_src)[first + i] =
                make_int2(src, *reinterpret_cast<const int32_t*>(token));
        }
        const bool units =
            meta.scales.bytes % 16 == 0 && reinterpret_cast<uintptr_t>(out.scales) % 16 == 0;
        if (units) {
            copy_scales<uint4>(first, n, records);
        } else {
            copy_scales<int32_t>(first, n, records);
        }
    }

    template <class Unit>
    __device__ void copy_scales(int64_t first, int n, const std::byte* records) const {
        const int per_row = static_cast<int>(meta.scales.bytes / sizeof(Unit));
        auto* to = reinterpret_cast<Unit*>(out.scales) + first * per_row;
#pragma unroll 4
        for (int i = ptx::lane_id(); i < n * per_row; i += 32) {
            const std::byte* scales = records + i / per_row * meta.bytes + meta.scales.offset;
            to[i] = reinterpret_cast<const Unit*>(scales)[i % per_row];
        }
    }

    // Grouped and slab: one warp, one received token.
    __device__ void token(int64_t i) const {
        const DispatchArgs& a = job.args;
        const int lane = ptx::lane_id(), num_topk = a.num_topk;
        const bool mine = lane < num_topk, fresh = mine && !a.cached;
        const int32_t local = fresh ? checked(word(i, meta.experts, lane), num_local) : -1;
        const float weight =
            mine && a.with_weights ? __int_as_float(word(i, meta.weights, lane)) : 0.0f;
        if (!a.cached) {
            const int src = source_of(i);
            if (lane < 2) out.recv_src[2 * i + lane] = lane == 0 ? src : word(i, meta.src_token, 0);
        }
        int32_t row = -1;
        if (mine && a.cached) row = out.recv_row[i * num_topk + lane];
        if (fresh) out.recv_row[i * num_topk + lane] = row = word(i, meta.rows, lane);
        row = checked(row, job.grant.max_rows);
        if (row >= 0 && fresh) put_idx(row, local);
        if (row >= 0 && a.with_weights) out.topk_weights[row] = weight;
        if (meta.scales.bytes == 0) return;
        for (uint32_t left = __ballot_sync(~0u, row >= 0); left != 0; left &= left - 1) {
            put_scales(__shfl_sync(~0u, row, __ffs(left) - 1),
                       reinterpret_cast<const uint32_t*>(record(i) + meta.scales.offset));
        }
    }

    // Ids of padding are -1 and its weights 0; padding between groups reads as zero. One warp, one row.
    __device__ void pad(int64_t row, int64_t per_row, bool zero_x) const {
        const int lane = ptx::lane_id();
        if (lane < per_row) {
            put_idx(row * per_row + lane, -1);
            if (out.topk_weights != nullptr) out.topk_weights[row * per_row + lane] = 0.0f;
        }
        if (meta.scales.bytes > 0 && out.scales != nullptr) put_scales(row, nullptr);
        if (!zero_x) return;
        auto* to = reinterpret_cast<uint4*>(x() + row * row_bytes);
        for (int64_t u = lane; u < row_bytes / 16; u += 32) to[u] = make_uint4(0, 0, 0, 0);
    }
};

}  // namespace ep::kernels
