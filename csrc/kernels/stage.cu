// The kernels of small batches, compiled for ranks that all reach each other's memory.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "contract/gpu.h"
#include "contract/stage.h"
#include "kernels/launch.h"
#include "kernels/stage.cuh"
#include "kernels/stage_combine.cuh"
#include "kernels/stage_dispatch.cuh"
#include "kernels/usual.cuh"

namespace ep::kernels {

StageBlocks stage_blocks(const DispatchJob& job) {
    const Shape& s = job.view.shape;
    // Of a slab what nobody sent is filled in expert by expert, each by a warp.
    const bool is_slab = job.args.layout == RecvLayout::kSlab;
    const auto blocks_of = [&](int64_t tokens) {
        const int64_t pieces = s.num_ranks * tokens * record_of(job.args).num_pieces;
        const int64_t turns = std::max<int64_t>(pieces, is_slab ? s.max_local_experts : 0);
        // One that only says what comes, and each token a block.
        return static_cast<int>(std::max(job.args.num_tokens + 1, divide_up(turns, kStageWarps)));
    };
    return {blocks_of(job.args.num_tokens), blocks_of(s.max_tokens)};
}

StageBlocks stage_blocks(const CombineJob& job) {
    const CombineArgs& a = job.args;
    const auto blocks_of = [&](int64_t rows) {
        const int64_t pieces = std::max(a.num_tokens, rows) * record_of(a).num_pieces;
        return static_cast<int>(std::max<int64_t>(divide_up(pieces, NoFar::kCombineWarps), 1));
    };
    const int64_t as_many = a.num_tokens * job.view.shape.num_ranks;
    return {blocks_of(std::min(as_many, a.num_recv)), blocks_of(a.num_recv)};
}

using UsualCompact = Usual<RecvLayout::kCompact>;
using UsualSlab = Usual<RecvLayout::kSlab>;
using UsualRows = Usual<RecvLayout::kSlab, false>;  // of a combine that owners add nothing up for

int launch_stage_dispatch(const DispatchJob& job, Half half, int num_blocks, Stream stream) {
    const auto launched = [&](const auto& far) {
        return launch_staged_dispatch(far, job, half, num_blocks, stream);
    };
    const RecvLayout layout = job.args.layout;
    const bool usual = is_usual(job, half, num_blocks);
    if (usual && layout == RecvLayout::kSlab) return launched(UsualSlab{});
    if (usual && layout == RecvLayout::kCompact) return launched(UsualCompact{});
    return launched(NoFar{});
}

int launch_stage_combine(const CombineJob& job, Half half, int num_blocks, Stream stream) {
    const auto launched = [&](const auto& far) {
        return launch_staged_combine(far, job, half, num_blocks, stream);
    };
    const CombineArgs& a = job.args;
    if (!is_usual(job, half)) return launched(NoFar{});
    if (a.layout == RecvLayout::kCompact) return launched(UsualCompact{});
    return a.per_rank ? launched(UsualSlab{}) : launched(UsualRows{});
}

int load_stage_dispatch(int smem_bytes) {
    for (const auto load : {load_staged_dispatch<NoFar>, load_staged_dispatch<UsualCompact>,
                            load_staged_dispatch<UsualSlab>}) {
        if (const int error = load(smem_bytes)) return error;
    }
    return 0;
}
int load_stage_combine(int smem_bytes) {
    for (const auto load : {load_staged_combine<NoFar>, load_staged_combine<UsualCompact>,
                            load_staged_combine<UsualSlab>, load_staged_combine<UsualRows>}) {
        if (const int error = load(smem_bytes)) return error;
    }
    return 0;
}

}  // namespace ep::kernels
