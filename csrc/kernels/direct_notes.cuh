// Dispatch in direct mode, beside what it does inside a node: a block's records and notes go out, and what
// the own rail tells of its tokens becomes the log of the call, as if they had crossed there. Whoever goes by
// the handle later may so take the rails all the same.
//
// defines: tell_nodes, put_records, count_logged, RailLogger, forget_logged
#pragma once

#include <cstdint>

#include "contract/direct.h"
#include "contract/gpu.h"
#include "contract/rail.h"
#include "device/lines.cuh"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "device/rail.cuh"
#include "kernels/count.cuh"
#include "kernels/enter.cuh"
#include "kernels/rail_notice.cuh"
#include "kernels/stage.cuh"
#include "kernels/stage_masks.cuh"
#include "kernels/stage_tables.cuh"

namespace ep::kernels {

// Word i of what a note tells.
__device__ __forceinline__ uint64_t note_word(const std::byte* note, int i) {
    const int line = i / kLineWords;
    return *reinterpret_cast<const uint64_t*>(note + int64_t{kLineBytes} * line +
                                              8 * (i - line * kLineWords));
}
// A slot, as its lane reads it.
__device__ __forceinline__ uint64_t note_slot(const std::byte* note, int num_topk) {
    const int lane = ptx::lane_id();
    return lane < num_topk ? note_word(note, 1 + lane) : uint64_t{kNoStagedExpert};
}
__device__ __forceinline__ int note_rank(uint64_t slot) {
    const auto code = static_cast<uint32_t>(slot);
    return code == kNoStagedExpert ? -1 : staged_rank(code);
}

// Behind our notice: how many tokens visit each node, and what we put to each rank: a record for each token
// that goes there, to our rail a note of every token. All threads of the block that publishes.
template <class F>
__device__ __noinline__ void tell_nodes(const DispatchJob& job, const StageTables& tables,
                                        const F& far, const Entering& in) {
    const DispatchArgs& a = job.args;
    const RankView& view = job.view;
    const NodeShape& nodes = far.nodes();
    const int channels = far.shape().num_channels, me = view.peers.rank;
    const RailNoticeLayout notice(view.shape, nodes.num_nodes, channels);
#pragma unroll 1
    for (int n = threadIdx.x / 32; n < nodes.num_nodes; n += blockDim.x / 32) {
        int visits = 0;
#pragma unroll 1
        for (int t = ptx::lane_id(); t < a.num_tokens; t += 32) {
            bool visits_node = false;
#pragma unroll 4
            for (int k = 0; k < a.num_topk; ++k) {
                const int64_t id = expert_of(job, t, a.topk_idx[int64_t{t} * a.num_topk + k]);
                const Expert expert = tables.expert(id);
                visits_node |= expert.position >= 0 && nodes.node(staged_rank(expert.code)) == n;
            }
            visits += visits_node;
        }
        visits = __reduce_add_sync(~0u, visits);
#pragma unroll 1
        for (int c = ptx::lane_id(); c < channels; c += 32) {  // all in the first
            const auto records = static_cast<uint32_t>(c == 0 ? visits : 0);
            in.outbox[notice.record_word(n, c)] = device::pack(records, in.seq);
        }
    }
    const auto tokens = [&](int p) { return static_cast<uint64_t>(tables.all()[p]); };
    far.publish(view, in, tokens, [&](int p) {
        const bool is_on_rail = nodes.local(p) == nodes.local(me);
        return tokens(p) + static_cast<uint64_t>(is_on_rail ? a.num_tokens : 0);
    });
}

// The records of the block's tokens to their ranks on other nodes, its notes to the rail; nothing to those that
// are `skipped`. All threads, behind a barrier for what others composed.
template <class F>
__device__ __noinline__ void put_records(const DispatchJob& job, const StageView<F>& stage,
                                         Span own, uint64_t skipped) {
    const F& far = stage.far;
    const NodeShape& nodes = far.nodes();
    const RankView& view = job.view;
    const int warp = threadIdx.x / 32, me = view.peers.rank, slot = stage.slot;
    const int64_t bytes = stage.record.bytes(), base = int64_t{me} * view.shape.max_tokens;
    int turn = 0;  // warps take puts in turns
    const auto is_ours = [&turn, warp] { return turn++ % F::kWarps == warp; };
    const auto takes = [&](int p) {
        return p >= 0 && stage.is_far(p) && (skipped == 0 || !device::has_rank(skipped, p));
    };
    device::fence_stage();
#pragma unroll 1
    for (int t = own.begin; t < own.end; ++t) {
        const uint64_t told = note_slot(far.own_note(slot, t, stage.record), job.args.num_topk);
        const int dst = note_rank(told);
        const uint32_t same = __match_any_sync(~0u, dst);
        const bool first = takes(dst) && (same & ptx::lanemask_lt()) == 0;
#pragma unroll 1
        for (uint32_t left = __ballot_sync(~0u, first); left != 0; left &= left - 1) {
            const int leader = __ffs(left) - 1;
            const int number =
                number_of(__shfl_sync(~0u, static_cast<uint32_t>(told >> 32), leader));
            const int p = __shfl_sync(~0u, dst, leader);
            if (is_ours()) far.put(view, slot, p, t * bytes, (base + number) * bytes, bytes, 1);
        }
    }
    const int64_t each = F::note_bytes(stage.record), all = own.end - own.begin;
#pragma unroll 1
    for (int n = 0; all > 0 && n < nodes.num_nodes; ++n) {
        const int p = nodes.rank(n, nodes.local(me));
        if (!takes(p) || !is_ours()) continue;
        const RailLayout& layout = far.rails.layout;
        far.rail.put_signal(p, layout.notes_of(slot, nodes.node(me)) + own.begin * each,
                            layout.own_notes(slot) + own.begin * each, all * each,
                            {layout.came_word(slot, me), static_cast<uint64_t>(all)});
    }
    far.rail.flush();
}

// Tokens of our rail on other nodes below `end` that visit ours. One warp. False: leave.
template <class F>
__device__ __forceinline__ bool count_logged(const StageView<F>& stage, const Entering& in, int end,
                                             int64_t& count) {
    const RankView& view = stage.view;
    const RailView& rails = stage.far.rails;
    const NodeShape& nodes = rails.shape.nodes;
    const int me = view.peers.rank;
    bool ok = true;
    int sum = 0;
#pragma unroll 1
    for (int n = ptx::lane_id(); ok && n < end; n += 32) {
        if (n == nodes.node(me) || without(in, nodes.rank(n, nodes.local(me)))) continue;
        const uint64_t* word = rails.state.incoming + n * rails.shape.num_channels;
        ok = device::is_of(ptx::ld_relaxed_gpu(word), stage.op.seq) ||
             device::wait_packed_own(view.watch, stage.op, word);
        const uint32_t visits = device::bits_of(ptx::ld_relaxed_gpu(word));
        if (ok && visits > view.shape.max_tokens) {
            device::give_up(view.watch, stage.op, kBadCount,
                            {Site::kRailNotice, nodes.rank(n, nodes.local(me)),
                             uint64_t(view.shape.max_tokens)},
                            visits, 0);
            ok = false;
        }
        sum += static_cast<int>(visits);
    }
    count = __reduce_add_sync(~0u, sum);
    return __all_sync(~0u, ok);
}

// Of a warp, which takes 32 tokens of our rail at a time.
template <class F>
struct RailLogger {
    const DispatchJob& job;
    StageTables tables;
    const StageView<F>& stage;
    Entering& in;

    // Each `step`-th of them, from `first` on. False: leave.
    __device__ __noinline__ bool run(int first, int step) const {
        const int me = job.view.peers.rank, my_node = nodes().node(me);
        const int groups = (static_cast<int>(job.view.shape.max_tokens) + 31) / 32;
        if (stage.far.rails.log == nullptr) return true;
#pragma unroll 1
        for (int i = first; i < (nodes().num_nodes - 1) * groups; i += step) {
            const int other = i / groups, node = other < my_node ? other : other + 1;
            const int src = nodes().rank(node, nodes().local(me));
            const int begin = 32 * (i - other * groups);
            if (without(in, src) || begin >= tables.heard()[src].num_tokens) continue;
            if (stage.await_far(ptx::lane_id() == 0 ? src : -1) != 0) {
                if (!lose(job.view, in, src)) return false;
                continue;
            }
            int64_t index;
            if (!count_logged(stage, in, node, index)) return false;
#pragma unroll 1
            for (int t = 0; t < begin; t += 32) index += __popc(visitors(node, src, t));
#pragma unroll 1
            for (uint32_t left = visitors(node, src, begin); left != 0; left &= left - 1) {
                keep(node, src, begin + __ffs(left) - 1, index++);
            }
        }
        return true;
    }

private:
    __device__ const NodeShape& nodes() const { return stage.far.nodes(); }
    __device__ const std::byte* note(int node, int t) const {
        return stage.far.note(stage.slot, node, t, stage.record);
    }

    // Which of 32 tokens visit our node.
    __device__ __forceinline__ uint32_t visitors(int node, int src, int begin) const {
        const int t = begin + static_cast<int>(ptx::lane_id());
        bool here = false;
#pragma unroll 1
        for (int k = 0; t < tables.heard()[src].num_tokens && k < job.args.num_topk; ++k) {
            const int p = note_rank(note_word(note(node, t), 1 + k));
            here |= p >= 0 && !stage.is_far(p);
        }
        return __ballot_sync(~0u, here);
    }

    // Record `index` of the log, a slot a lane.
    __device__ __forceinline__ void keep(int node, int src, int t, int64_t index) const {
        const DispatchArgs& a = job.args;
        const RailView& rails = stage.far.rails;
        const int lane = ptx::lane_id();
        const uint64_t told = note_slot(note(node, t), a.num_topk);
        if (lane >= a.num_topk || index >= rails.num_logged) return;
        const int p = note_rank(told), local = staged_local(static_cast<uint32_t>(told));
        const bool is_here = p >= 0 && !stage.is_far(p) && !without(in, p);
        const int row = is_here ? row_of(src, p, local, told) : -1;
        const RailLog log{a.num_topk, rails.log_has_weights};
        int32_t* kept = rails.log + index * log.words();
        kept[log.expert(lane)] = row >= 0 ? expert_at(nodes().local(p), local) : -1;
        kept[log.row(lane)] = row;
        if (!log.with_weights) return;
        const uint64_t pair = note_word(note(node, t), 1 + a.num_topk + lane / 2);
        kept[log.weight(lane)] = static_cast<int32_t>(lane % 2 != 0 ? pair >> 32 : pair);
    }

    // The row at rank p of our node; -1 = what cannot be.
    __device__ __forceinline__ int row_of(int src, int p, int local, uint64_t told) const {
        const auto turns = static_cast<uint32_t>(told >> 32);
        if (job.args.layout == RecvLayout::kCompact) return tables.rows(src, p) + number_of(turns);
        const int32_t* first = job.view.state.first;
        if (local >= first[p + 1] - first[p]) return -1;
        const int row = tables.selections(src, first[p] + local) + turn_of(turns);
        return row < job.args.capacity ? static_cast<int>(local * job.args.capacity) + row : -1;
    }
};

// What was counted on of sources of our rail that were lost: it names no rows. One warp of the last block.
template <class F>
__device__ __noinline__ void forget_logged(const DispatchJob& job, const StageView<F>& stage,
                                           const Entering& in, uint64_t lost) {
    const RailView& rails = stage.far.rails;
    const NodeShape& nodes = rails.shape.nodes;
    const int64_t words = RailLog{job.args.num_topk, rails.log_has_weights}.words();
#pragma unroll 1
    for (int n = 0; rails.log != nullptr && n < nodes.num_nodes; ++n) {
        const int src = nodes.rank(n, nodes.local(stage.view.peers.rank));
        if (!stage.is_far(src) || !device::has_rank(lost, src)) continue;
        int64_t begin, end;
        if (!count_logged(stage, in, n, begin) || !count_logged(stage, in, n + 1, end)) return;
        end = min(end, rails.num_logged);
#pragma unroll 1
        for (int64_t i = begin * words + ptx::lane_id(); i < end * words; i += 32)
            rails.log[i] = -1;
    }
}

}  // namespace ep::kernels
