// The metadata record of a token, written to every rank the token goes to.
//
// defines: Slots, RecordWriter
#pragma once

#include <cstdint>

#include "contract/calls.h"
#include "contract/gpu.h"
#include "kernels/route.cuh"

namespace ep::kernels {

// The slots of the token a warp holds, in shared memory.
struct Slots {
    int32_t owner[kMaxTopk], local[kMaxTopk], row[kMaxTopk];
    float weight[kMaxTopk];
};

// Of one warp. A lane writes 16 bytes at a time.
class RecordWriter {
public:
    __device__ RecordWriter(const Router& router, Slots& slots) : router_(router), slots_(slots) {
        const DispatchArgs& a = router.job.args;
        const MetaLayout meta = meta_layout(a);
        const auto word = [](const Region& r) { return r.bytes > 0 ? int(r.offset / 4) : -1; };
        token_ = word(meta.src_token);
        experts_ = word(meta.experts);
        weights_ = word(meta.weights);
        rows_ = word(meta.rows);
        scales_ = word(meta.scales);
        record_words_ = int(meta.bytes / 4);
        // Scales that are made on the way are written by the warp that moves the row.
        end_ = a.quantize == Quantize::kNone ? record_words_ : scales_;
        whole_units_ = a.scale_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(a.scales) % 16 == 0;
    }

    // The record of token t at every rank it goes to. In bounds, or the rows are not moved either.
    __device__ void write(int t, const Choice& choice, const Route& r) const {
        if (record_words_ == 0) return;
        const DispatchJob& job = router_.job;
        const DispatchArgs& a = job.args;
        const int lane = ptx::lane_id();
        if (!router_.in_bounds(r)) return;
        slots_.owner[lane] = r.dst;
        slots_.row[lane] = r.row;
        if (r.dst >= 0) {
            slots_.local[lane] = __ldg(job.view.state.local + choice.id);
            slots_.weight[lane] =
                a.topk_weights != nullptr ? a.topk_weights[int64_t{t} * a.num_topk + lane] : 0.0f;
        }
        __syncwarp();
        const std::byte* scales = a.scales + int64_t{t} * a.scale_bytes;
        for (uint32_t left = __ballot_sync(~0u, r.first); left != 0; left &= left - 1) {
            const int leader = __ffs(left) - 1, dst = slots_.owner[leader];
            const int32_t record = __shfl_sync(~0u, r.record, leader);
            std::byte* out = router_.targets[dst].records + int64_t{record} * 4 * record_words_;
            for (int i = 4 * lane; i < end_; i += 4 * 32) {
                const bool copied = whole_units_ && scales_ >= 0 && i >= scales_;
                *reinterpret_cast<uint4*>(out + 4 * i) =
                    copied ? *reinterpret_cast<const uint4*>(scales + 4 * (i - scales_))
                           : made(i, t, dst, scales);
            }
        }
        __syncwarp();
    }

private:
    __device__ uint4 made(int i, int t, int dst, const std::byte* scales) const {
        return {word(i, t, dst, scales), word(i + 1, t, dst, scales), word(i + 2, t, dst, scales),
                word(i + 3, t, dst, scales)};
    }

    __device__ uint32_t word(int i, int t, int dst, const std::byte* scales) const {
        const int num_topk = router_.job.args.num_topk;
        const auto slot_of = [&](int first) {
            return first >= 0 && i >= first && i < first + num_topk ? i - first : -1;
        };
        if (i == token_) return static_cast<uint32_t>(t);
        int k = slot_of(experts_);
        if (k >= 0) return slots_.owner[k] == dst ? slots_.local[k] : ~0u;
        k = slot_of(weights_);
        if (k >= 0) return slots_.owner[k] == dst ? __float_as_uint(slots_.weight[k]) : 0;
        k = slot_of(rows_);
        if (k >= 0) return slots_.owner[k] == dst ? slots_.row[k] : ~0u;
        const int at = i - scales_;
        const bool scale = scales_ >= 0 && at >= 0 && 4 * at < router_.job.args.scale_bytes;
        return scale ? reinterpret_cast<const uint32_t*>(scales)[at] : 0;
    }

    const Router& router_;
    Slots& slots_;
    int token_, experts_, weights_, rows_, scales_;  // first word of each; -1 = not there
    int record_words_, end_;                         // of a record, of what we write of it
    bool whole_units_;                               // given scales are copied 16 bytes at a time
};

}  // namespace ep::kernels
