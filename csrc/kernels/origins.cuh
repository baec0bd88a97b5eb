// Who sent what: the rows of every source at every rank, and in our groups.
//
// defines: tell_origins
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "device/ptx.cuh"
#include "kernels/enter.cuh"
#include "kernels/notices.cuh"

namespace ep::kernels {

// For calls that ask, from notices that all have come. One warp.
__device__ __noinline__ inline void tell_origins(const DispatchJob& job, const Entering& in,
                                                 bool ok) {
    const RankView& view = job.view;
    const NoticeLayout layout(view.shape);
    const int lane = ptx::lane_id(), num_ranks = view.shape.num_ranks, me = view.peers.rank;
    int32_t* ends = job.args.rank_ends;
#pragma unroll 1
    for (int dst = lane; ends != nullptr && dst < num_ranks; dst += 32) {
        uint32_t end = 0;
#pragma unroll 1
        for (int src = 0; src < num_ranks; ++src) {
            if (ok) end += NoticeWords(view, in.slot, src).get(layout.kRows + dst);
            ends[src * num_ranks + dst] = static_cast<int32_t>(end);
        }
    }
    int64_t* ranges = job.out.source_range;
    const int begin = view.state.first[me], num_local = view.state.first[me + 1] - begin;
#pragma unroll 1
    for (int e = lane; ranges != nullptr && e < num_local; e += 32) {
        uint32_t first = 0;
#pragma unroll 1
        for (int src = 0; src < num_ranks; ++src) {
            const NoticeWords words(view, in.slot, src);
            const uint32_t n = ok ? words.get(layout.selections + begin + e) : 0;
            ranges[int64_t{e} * num_ranks + src] =
                n == 0 ? 0 : static_cast<int64_t>(uint64_t{first} << 32 | n);
            first += n;
        }
    }
}

}  // namespace ep::kernels
