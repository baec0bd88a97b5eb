// Expand: what a receiver makes of rows that came once a token: the further rows of grouped and slab,
// their scales, the row index, the source token of every row.
//
// A short step on all SMs behind dispatch, for calls that need it. It waits for nobody.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "contract/calls.h"
#include "contract/gpu.h"
#include "device/copy.cuh"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.cuh"

namespace ep::kernels {
namespace {

using device::Stage;

// Of a warp, one of `step` of the grid.
struct Expander {
    const DispatchJob& job;
    const OpState& state;
    int64_t first, step;

    __device__ const DispatchArgs& args() const { return job.args; }
    __device__ bool ok() const { return state.code == kOk; }
    __device__ int64_t num_recv() const { return ok() ? state.num_recv : 0; }
    __device__ bool compact() const { return args().layout == RecvLayout::kCompact; }
    // An extent of ours.
    __device__ std::byte* own(Grant::Extent extent) const {
        return job.view.peers.arena[job.view.peers.rank] +
               int64_t{job.begin.head.grant.page[extent]} * kExtentAlign;
    }

    // A slot's row of token i, if it is here; written by a peer, so it is looked at before it is used.
    __device__ int64_t row_of(int64_t i) const {
        const int lane = ptx::lane_id();
        if (lane >= args().num_topk) return -1;
        const int32_t row = job.out.recv_row[i * args().num_topk + lane];
        if (row >= -1 && row < job.out.max_rows) return row;
        const RankView& view = job.view;
        device::give_up(view.watch, {OpKind::kDispatch, state.seq}, kBadCount,
                        {Site::kRows, view.peers.rank, uint64_t(job.out.max_rows)}, uint64_t(row),
                        0);
        return -1;
    }

    // Of a token that came: its row once more for each further slot, then what belongs to each row.
    __device__ bool expand_token(int64_t i, Stage& stage, int stage_bytes) const {
        const int64_t row = row_of(i);
        const uint32_t here = __ballot_sync(~0u, row >= 0);
        if (here == 0) return true;
        const int64_t source = __shfl_sync(~0u, row, __ffs(here) - 1);
        const bool extra = row >= 0 && row != source;
        if (__any_sync(~0u, extra) && !copy_row(source, row, extra, stage, stage_bytes)) {
            return false;
        }
        if (job.out.row_token != nullptr && row >= 0) {
            job.out.row_token[row] = job.out.recv_src[2 * i + 1];
        }
        if (args().scale_bytes == 0) return true;
        const auto* scales =
            reinterpret_cast<const uint32_t*>(own(Grant::kScales) + i * args().scale_bytes);
        for (uint32_t left = here; left != 0; left &= left - 1) {
            put_scales(__shfl_sync(~0u, row, __ffs(left) - 1), scales);
        }
        return true;
    }

    // Rows nobody was given, of grouped and slab.
    __device__ void pad() const {
        const RankView& view = job.view;
        const int me = view.peers.rank, experts = view.state.first[me + 1] - view.state.first[me];
        const bool slab = args().layout == RecvLayout::kSlab;
        int64_t used = 0;
        for (int e = 0; ok() && e < experts; ++e) {
            const int64_t begin = slab ? e * args().capacity : job.out.offsets[e];
            used = slab ? begin + args().capacity : job.out.offsets[e + 1];
            for (int64_t row = begin + args().expert_counts[e] + first; row < used; row += step) {
                pad_row(row);
            }
        }
        for (int64_t row = used + first; args().is_static && row < job.out.max_rows; row += step) {
            pad_row(row);
        }
    }

    // Compact: rows are the tokens that came.
    __device__ void name_tokens() const {
        for (int64_t i = first * 32 + ptx::lane_id(); i < job.out.max_rows; i += step * 32) {
            if (i < num_recv()) {
                job.out.row_token[i] = job.out.recv_src[2 * i + 1];
            } else if (args().is_static) {
                job.out.row_token[i] = -1;
            }
        }
    }

private:
    __device__ void pad_row(int64_t row) const {
        if (job.out.row_token != nullptr && ptx::lane_id() == 0) job.out.row_token[row] = -1;
        if (args().scale_bytes > 0) put_scales(row, nullptr);
    }

    __device__ bool copy_row(int64_t source, int64_t row, bool extra, Stage& stage,
                             int stage_bytes) const {
        const int64_t row_bytes = args().row_bytes();
        const Operation op{OpKind::kDispatch, state.seq};
        std::byte* x = own(Grant::kX);
        for (int64_t offset = 0; offset < row_bytes; offset += stage_bytes) {
            const int bytes = static_cast<int>(min(int64_t{stage_bytes}, row_bytes - offset));
            if (ptx::lane_id() == 0) {
                device::load_stage(stage, x + source * row_bytes + offset, bytes);
            }
            __syncwarp();
            if (!device::await_stage(job.view.watch, op, stage, job.view.peers.rank)) return false;
            if (extra) device::store_stage(x + row * row_bytes + offset, stage.data, bytes);
            device::drain_reads();
            __syncwarp();
        }
        return true;
    }

    // Null: zeros. Of slabs column-major, columns 16 bytes aligned, as masked grouped GEMMs read them.
    __device__ void put_scales(int64_t row, const uint32_t* scales) const {
        const int64_t words = args().scale_bytes / 4;
        auto* to = reinterpret_cast<uint32_t*>(job.out.scales);
        int64_t at = row * words, apart = 1;
        if (args().layout == RecvLayout::kSlab) {
            const int64_t capacity = args().capacity;
            apart = (capacity + 3) / 4 * 4;
            at = row / capacity * words * apart + row % capacity;
        }
        for (int64_t w = ptx::lane_id(); w < words; w += 32) {
            to[at + w * apart] = scales != nullptr ? scales[w] : 0;
        }
    }
};

__global__ void __launch_bounds__(1024, 1)
    expand_kernel(const __grid_constant__ DispatchJob job, int stage_bytes) {
    __shared__ uint64_t loaded[32];
    if (__syncthreads_or(device::gave_up(job.view.watch))) return;
    const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
    const Expander expander{job, *job.view.state.op, blockIdx.x + int64_t{warp} * gridDim.x,
                            int64_t{num_warps} * gridDim.x};
    if (expander.compact()) return expander.name_tokens();
    Stage stage{ptx::dynamic_shared() + int64_t{warp} * stage_bytes, &loaded[warp]};
    if (ptx::lane_id() == 0) device::init_stage(stage);
    __syncwarp();
    bool ok = true;
    for (int64_t i = expander.first; ok && i < expander.num_recv(); i += expander.step) {
        ok = expander.expand_token(i, stage, stage_bytes);
    }
    device::drain_stores();
    expander.pad();
}

// ---- the row index: which compact row every selection of an expert has ----

// One block per local expert; its warps take consecutive ranges of rows.
__global__ void __launch_bounds__(1024, 1)
    index_rows_kernel(const __grid_constant__ DispatchJob job) {
    __shared__ int32_t counts[33];
    const UnpackArgs& out = job.out;
    const int e = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const OpState& state = *job.view.state.op;
    if (__syncthreads_or(device::gave_up(job.view.watch))) return;
    const int64_t total = (state.code == kOk ? state.num_recv : 0) * job.args.num_topk;
    const int64_t share = ((total + 31) / 32 + 31) / 32 * 32;
    const int64_t begin = warp * share, end = min(begin + share, total);
    const auto chosen = [&](int64_t i) {
        if (i >= end) return false;
        return out.idx_is_int64 ? static_cast<const int64_t*>(out.topk_idx)[i] == e
                                : static_cast<const int32_t*>(out.topk_idx)[i] == e;
    };
    int count = 0;
    for (int64_t i = begin; i < end; i += 32) count += __popc(__ballot_sync(~0u, chosen(i + lane)));
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    int at = out.offsets[e];
    for (int w = 0; w < warp; ++w) at += counts[w];
    for (int64_t i = begin; i < end; i += 32) {
        const bool here = chosen(i + lane);
        const uint32_t found = __ballot_sync(~0u, here);
        if (here) {
            out.row_index[at + __popc(found & ptx::lanemask_lt())] =
                static_cast<int32_t>((i + lane) / job.args.num_topk);
        }
        at += __popc(found);
    }
    if (warp != 31) return;  // the last one stands behind the last selection
    const bool last = e + 1 == static_cast<int>(gridDim.x);
    const int64_t group_end = last && job.args.is_static ? out.max_index : out.offsets[e + 1];
    for (int64_t i = at + lane; i < group_end; i += 32) out.row_index[i] = -1;
}

}  // namespace

bool needs_expansion(const DispatchJob& job) {
    return job.args.layout != RecvLayout::kCompact || job.out.row_token != nullptr ||
           job.out.row_index != nullptr;
}

int launch_expand(const DispatchJob& job, int num_local, int num_blocks, int smem_bytes,
                  Stream stream) {
    const bool compact = job.args.layout == RecvLayout::kCompact;
    const int64_t stage =
        compact ? 128 : (std::min<int64_t>(job.args.row_bytes(), 32 * 1024) + 127) / 128 * 128;
    const auto warps = static_cast<int>(std::clamp<int64_t>((smem_bytes - 2048) / stage, 1, 32));
    if (!compact || job.out.row_token != nullptr) {
        const Grid grid{num_blocks, warps * 32, warps * static_cast<int>(stage)};
        const int error = launch(expand_kernel, grid, stream, job, static_cast<int>(stage));
        if (error != 0) return error;
    }
    return launch_row_index(job, num_local, stream);
}

int launch_row_index(const DispatchJob& job, int num_local, Stream stream) {
    if (job.out.row_index == nullptr || num_local == 0) return 0;
    return launch(index_rows_kernel, {num_local, 1024, 0}, stream, job);
}

int load_expand(int smem_bytes) {
    for (const void* kernel : {reinterpret_cast<const void*>(&expand_kernel),
                               reinterpret_cast<const void*>(&index_rows_kernel)}) {
        if (const int error = load_kernel(kernel, smem_bytes)) return error;
    }
    return 0;
}

}  // namespace ep::kernels
