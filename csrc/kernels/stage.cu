// The kernels of small batches, compiled for ranks that all reach each other's memory.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "contract/gpu.h"
#include "contract/stage.h"
#include "kernels/launch.h"
#include "kernels/stage.cuh"
#include "kernels/stage_combine.cuh"
#include "kernels/stage_dispatch.cuh"

namespace ep::kernels {

int stage_blocks(const DispatchJob& job) {
    const Shape& s = job.view.shape;
    const int64_t pieces = s.num_ranks * s.max_tokens * record_of(job.args).num_pieces;
    // Of a slab what nobody sent is filled in expert by expert, each by a warp.
    const bool is_slab = job.args.layout == RecvLayout::kSlab;
    const int64_t turns = std::max<int64_t>(pieces, is_slab ? s.max_local_experts : 0);
    // One that only says what comes, and each token a block.
    return static_cast<int>(std::max(job.args.num_tokens + 1, divide_up(turns, kStageWarps)));
}

int stage_blocks(const CombineJob& job) {
    const int64_t pieces = record_of(job.args).num_pieces;
    return static_cast<int>(std::max<int64_t>(
        divide_up(std::max(job.args.num_tokens, job.args.num_recv) * pieces, NoFar::kCombineWarps),
        1));
}

int launch_stage_dispatch(const DispatchJob& job, Half half, int num_blocks, Stream stream) {
    return launch_staged_dispatch(NoFar{}, job, half, num_blocks, stream);
}

int launch_stage_combine(const CombineJob& job, Half half, int num_blocks, Stream stream) {
    return launch_staged_combine(NoFar{}, job, half, num_blocks, stream);
}

int load_stage_dispatch(int smem_bytes) { return load_staged_dispatch<NoFar>(smem_bytes); }
int load_stage_combine(int smem_bytes) { return load_staged_combine<NoFar>(smem_bytes); }

}  // namespace ep::kernels
