// Combine across nodes: of what a token left on a node, the rank where it crossed adds up the rows and puts
// one sum on the rail back; the token's source adds the rows on its own node and one sum for each other
// node, in ascending order of ranks. One kernel, over any rail.
//
// As in pull.cu a group of warps has a ring of stages: one feeds it (rail_sums.cuh, rail_tokens.cuh), the others
// add. Some groups of a block work for other nodes first, the rest at once for the tokens of its channel;
// those wait for none of these.
//
// defines: HybridCombine, launch_hybrid_combine, load_hybrid_combine
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "contract/gpu.h"
#include "contract/rail.h"
#include "device/ptx.cuh"
#include "device/rail.cuh"
#include "kernels/contribution.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.cuh"
#include "kernels/leave.cuh"
#include "kernels/notices.cuh"
#include "kernels/outputs.cuh"
#include "kernels/rail_kernels.h"
#include "kernels/rail_notice.cuh"
#include "kernels/rail_sums.cuh"
#include "kernels/rail_tables.cuh"
#include "kernels/rail_tokens.cuh"
#include "kernels/stage_ring.cuh"
#include "kernels/visits.cuh"

namespace ep::kernels {

// Slices are wider than in pull.cu, so that rows of 14 KiB leave warps for a third group: who feeds takes longer
// for a piece than adders do.
constexpr int kWideSliceBytes = kMaxPieceBytes / 4;
static_assert(kWideSliceBytes % (16 * 32) == 0, "whole units of all lanes");

// How the shared memory and the warps of a block are divided.
struct HybridGroups {
    int count, pullers;  // groups; those that work for other nodes come first
    int adders, num_stages, piece_bytes;
    int sources, rings;  // where they begin in shared memory

    __host__ __device__ int num_warps() const { return count * (adders + 1); }
    __host__ __device__ int64_t ring_bytes() const { return int64_t{num_stages} * piece_bytes; }
};

// What a group has in shared memory beside its stages: in front of all that is dynamic, as kernels that are linked
// with a library all have the static memory of any.
struct GroupTables {
    uint64_t loaded[kMaxStages], used[kMaxStages];
    uint64_t met;  // where the adders meet, once a chunk is whole
    uint32_t met_parity[kMaxPieceBytes / kWideSliceBytes];  // of each adder
    StageRing ring;
    uint64_t seq;  // of the operation, for who feeds
    Uninitialized<Fed> fed;
    Piece pieces[kMaxStages];
    Uninitialized<Handover> handovers[kMaxStages];
};

template <device::Rail R>
struct HybridCombine {
    CombineJob job;
    RailView rails;
    RailSpread spread;
    RailChunks chunks;
    HybridGroups groups;
    R rail;
};

// The kernel's parameter, in static memory of a block, and the tables of groups. Functions out of line find them
// by themselves: through a reference they would not know that it is shared memory, and take more registers
// and twice the instructions to read it.
template <device::Rail R>
__device__ __forceinline__ Uninitialized<HybridCombine<R>>& parameter() {
    __shared__ Uninitialized<HybridCombine<R>> copy;
    return copy;
}
__device__ __forceinline__ GroupTables& tables_of(int group) {
    return reinterpret_cast<GroupTables*>(ptx::dynamic_shared())[group];
}

// ---- the warps that add ----

template <DType kDtype>
using Wide = Sums<kDtype, kWideSliceBytes>;

// What calls functions of a rail is out of line and has no object of an adder by reference, so that adders keep
// theirs in registers.

// One thread: another piece of chunk `count` of the ring from `node` is in shared memory. One adder of each
// group counts; the last of `pieces` frees the chunk's place.
template <device::Rail R>
__device__ __noinline__ void credit_piece(const HybridCombine<R>& h, int node, int pieces,
                                          uint64_t count) {
    const RailShape& shape = h.rails.shape;
    const int me = h.job.view.peers.rank;
    const RailTables tables(h.spread);
    uint32_t* read = tables.filled + node * shape.ring_chunks() + place_in_ring(shape, count);
    if (ptx::atom_acq_rel_cta_add(read, 1) + 1 != static_cast<uint32_t>(pieces)) return;
    *read = 0;
    h.rail.signal_add(
        shape.nodes.rank(node, shape.nodes.local(me)),
        {h.rails.layout.head_word(shape.nodes.node(me), static_cast<int>(blockIdx.x), count), 1});
}

// One warp: chunk `count` of the ring to `node` is whole.
template <device::Rail R>
__device__ __noinline__ void hand_over_sums(const HybridCombine<R>& h, int node, int channel,
                                            int bytes, uint64_t count) {
    const RailLayout& layout = h.rails.layout;
    const NodeShape& nodes = h.rails.shape.nodes;
    const int me = h.job.view.peers.rank, my_node = nodes.node(me);
    const RailTables tables(h.spread);
    device::rail_hand_over(h.rail, tables.mapped[node], nodes.rank(node, nodes.local(me)),
                           layout.recv_chunk(node, my_node, channel, count),
                           layout.send_chunk(my_node, node, channel, count), bytes,
                           {layout.tail_word(my_node, channel, count), 1});
}

template <DType kDtype, device::Rail R>
struct Adder {
    const HybridCombine<R>& h;
    const uint64_t& seq;  // in shared memory, as all that need not be in a register
    GroupTables& group;
    int first;  // byte of its slice in a piece
    Lap lap{};

    // Sum after sum, until the feeder says stop. While a sum is in registers nothing is called that comes back.
    // False: leave.
    __device__ __forceinline__ bool run() {
        Wide<kDtype> sums;
        sums.first = first + 16 * static_cast<int>(ptx::lane_id());
#pragma unroll 1
        while (true) {
            if (!await_sum()) return false;
            Piece piece = group.pieces[lap.stage];
            if (piece.flags & Piece::kStop) return true;
            const bool for_rail = (piece.flags & Piece::kForRail) != 0;
            if (for_rail) {
                sums.clear();
            } else {
                sums.start(h.job.args, piece);
            }
            Handover chunk;  // of a rail's last piece; of a token's n-th, which lane n keeps
#pragma unroll 1
            for (int n = 0;; ++n) {
                if (piece.flags & Piece::kRow) add(sums, piece);
                const bool is_last = (piece.flags & Piece::kLast) != 0;
                if (for_rail ? is_last : n == static_cast<int>(ptx::lane_id())) {
                    chunk = group.handovers[lap.stage].get();
                }
                // We have read: pairs with await_barrier in RingFeeder::put.
                ptx::mbarrier_arrive(group.used + lap.stage);
                lap.next(group.ring.num_stages);
                if (is_last) break;
                if (!await_more()) return false;
                piece.flags = group.pieces[lap.stage].flags;
                piece.weight = group.pieces[lap.stage].weight;
            }
            sums.finish(for_rail ? address_of(piece) : h.job.args.out + piece.at, piece.bytes);
            if (!for_rail) {
                credit(chunk);
            } else if (chunk.node >= 0 && !hand_over(chunk)) {
                return false;
            }
        }
    }

private:
    __device__ const RankView& view() const { return h.job.view; }
    __device__ int number() const { return first / kWideSliceBytes; }  // of the adders of the group
    __device__ Operation op() const { return {OpKind::kCombine, seq}; }

    // The first piece of a sum. It may be long in coming, and a token's others may depend on what our peers
    // have from us: what was put but held back goes out before. All lanes come to the same.
    __device__ __forceinline__ bool await_sum() const {
        uint64_t* loaded = group.loaded + lap.stage;
        const bool here = __all_sync(~0u, ptx::mbarrier_try_wait_parity(loaded, lap.parity));
        if (here && (group.pieces[lap.stage].flags & Piece::kForRail) != 0) return true;
        h.rail.flush();
        return here || __all_sync(~0u, await_barrier(view(), op(), loaded, lap.parity));
    }
    // Its others are under way, or will be once there are stages for them.
    __device__ __forceinline__ bool await_more() const {
        uint64_t* loaded = group.loaded + lap.stage;
        const uint32_t parity = lap.parity;
        return device::wait_own_together(view().watch, op(), view().peers.rank, [loaded, parity] {
            return ptx::mbarrier_try_wait_parity(loaded, parity);
        });
    }

    __device__ __forceinline__ void add(Wide<kDtype>& sums, const Piece& piece) const {
        const std::byte* data = group.ring.data + lap.stage * group.ring.piece_bytes;
        const float weight = piece.weight;
        if (h.job.args.source_weighs()) {
            sums.add(data, piece.bytes, [weight](auto& u, const uint4& b) { u.add(b, weight); });
        } else {
            sums.add(data, piece.bytes, [](auto& u, const uint4& b) { u.add(b); });
        }
    }

    // Of the adders of a group one does what goes with a chunk. They take turns, as it waits for all stores
    // of the block, while the others go on as far as there are stages.
    __device__ bool is_turn(const Handover& chunk) const {
        return static_cast<uint32_t>(chunk.count) % static_cast<uint32_t>(h.groups.adders) ==
               static_cast<uint32_t>(number());
    }

    // Each lane the chunk it keeps. Nobody waits for credits of a sum that is not complete: the feeder puts
    // none of a token's pieces before all its chunks have come.
    __device__ __forceinline__ void credit(const Handover& chunk) const {
        if (chunk.node >= 0 && is_turn(chunk)) {
            credit_piece(h, chunk.node, chunk.amount, chunk.count);
        }
        __syncwarp();
    }

    // A chunk is whole once every adder has written its slices: then one of them hands it over.
    __device__ __forceinline__ bool hand_over(const Handover& chunk) {
        const uint32_t parity = group.met_parity[number()];
        __syncwarp();
        if (ptx::lane_id() == 0) {
            group.met_parity[number()] = parity ^ 1;
            ptx::mbarrier_arrive(&group.met);
        }
        if (!is_turn(chunk)) return true;
        if (!__all_sync(~0u, await_barrier(view(), op(), &group.met, parity))) return false;
        hand_over_sums(h, chunk.node, chunk.channel, chunk.amount, chunk.count);
        return true;
    }
};

// ---- the kernel ----

// The rank that holds the row of a slot of our handle; -1 = none.
__device__ __forceinline__ int holder_of_slot(const CombineJob& job, int t, int k) {
    const CombineArgs& a = job.args;
    const int64_t at = int64_t{t} * a.num_topk + k, id = a.topk_idx[at];
    const bool chosen = id >= 0 && id < job.view.shape.num_experts && a.send_row[at] >= 0;
    return chosen ? __ldg(job.view.state.owner + id) : -1;
}

// One warp of the block that speaks for the rank, once all its blocks are through.
template <device::Rail R>
__device__ __noinline__ void conclude_combine(const HybridCombine<R>& h, Entering& in,
                                              const Source* sources, bool good) {
    const RankView& view = h.job.view;
    const Operation op{OpKind::kCombine, in.seq};
    if (!await_blocks(view, op)) return;
    if (good && !await_pulled(view, op, in.slot)) return;
    if (!leave_far(h.rail, view, h.rails, NoFar{}, op, in)) return;
    if (!good) return fail_outputs(h.job, in, sources);
    leave_rails(
        h.rails, h.spread, h.chunks, h.rails.shape.nodes.node(view.peers.rank),
        h.job.args.num_tokens,
        {RailCounter::kSumsIn, RailCounter::kSumsOut, h.rails.state.taken, h.rails.state.sent});
    leave_slot(view, in.seq, in.slot);
}

// What roles use lies in shared memory, or is made anew by each in its own registers. An object of which a
// function out of line has the address lies in local memory and is read from L2: every ld.acquire.sys of the
// SM empties L1.
template <device::Rail R>
__device__ __forceinline__ StageRing ring_of(const HybridCombine<R>& h, GroupTables& t, int group) {
    const HybridGroups& g = h.groups;
    return {ptx::dynamic_shared() + g.rings + group * g.ring_bytes(),
            t.pieces,
            t.loaded,
            t.used,
            g.piece_bytes,
            g.num_stages};
}
template <device::Rail R>
__device__ __forceinline__ Source* sources_of(const HybridCombine<R>& h) {
    return reinterpret_cast<Source*>(ptx::dynamic_shared() + h.groups.sources);
}
template <device::Rail R>
__device__ __forceinline__ RingWalk<R> walk_of(const HybridCombine<R>& h, uint64_t seq, int group) {
    return {
        h.rail, h.job.view, h.rails, h.spread, h.chunks, {OpKind::kCombine, seq}, Site::kRailCredit,
        group,  1};
}

// The roles of a warp, out of line: with registers of their own.
template <device::Rail R>
__device__ __noinline__ bool feed_sums(int group) {
    const HybridCombine<R>& h = parameter<R>().get();
    GroupTables& tables = tables_of(group);
    const RingWalk<R> walk = walk_of(h, tables.seq, group);
    const Planner planner(h.job, tables.seq, sources_of(h));
    const StageRing ring = ring_of(h, tables, group);
    return SumFeeder<R>(planner, walk, ring, &tables.handovers[0].get()).run(tables.fed.get());
}

template <device::Rail R>
__device__ __noinline__ bool feed_tokens(int group, int* next) {
    const HybridCombine<R>& h = parameter<R>().get();
    GroupTables& tables = tables_of(group);
    const RingWalk<R> walk = walk_of(h, tables.seq, group);
    const Planner planner(h.job, tables.seq, sources_of(h));
    const StageRing ring = ring_of(h, tables, group);
    return TokenFeeder<R>(planner, walk, ring, tables.fed.get(), &tables.handovers[0].get())
        .run(next);
}

// What each warp does once the call is known to be good. False: leave.
template <DType kDtype, device::Rail R>
__device__ __forceinline__ bool work(const HybridCombine<R>& h, const uint64_t& seq,
                                     int* next_token) {
    const HybridGroups& groups = h.groups;
    const int warp = threadIdx.x / 32, group = warp / (groups.adders + 1);
    const int adder = warp % (groups.adders + 1) - 1;  // -1: feeds
    GroupTables& own = tables_of(group);
    if (adder >= 0) return Adder<kDtype, R>{h, seq, own, adder * kWideSliceBytes}.run();
    if (ptx::lane_id() == 0) own.seq = seq, own.fed.get() = {};
    __syncwarp();
    if (group < groups.pullers && !feed_sums<R>(group)) return false;
    return feed_tokens<R>(group, next_token);
}

template <DType kDtype, device::Rail R>
__global__ void __launch_bounds__(kMaxPullWarps * 32, 1)
    hybrid_combine_kernel(const __grid_constant__ HybridCombine<R> given) {
    __shared__ Uninitialized<Entering> entering;
    __shared__ int next_token;  // of the block's, for groups that add up tokens
    const HybridCombine<R>& h = in_shared(given, parameter<R>());
    Entering& in = entering.get();
    const CombineJob& job = h.job;
    const RankView& view = job.view;
    const HybridGroups& groups = h.groups;
    const int warp = threadIdx.x / 32;
    const bool publishes = blockIdx.x == 0;
    init_told(given.job.begin, in);
    if (threadIdx.x == 0) {
        init_entering(view, job.begin, in);
        next_token = 0;
        if (publishes) open_outbox(h.rail, h.rails, in);
    }
    if (warp < groups.count) {
        GroupTables& t = tables_of(warp);
        if (ptx::lane_id() == 0) {
            t.ring = ring_of(h, t, warp);
            ptx::mbarrier_init(&t.met, groups.adders);
            for (uint32_t& parity : t.met_parity) parity = 0;
        }
        init_stages(ring_of(h, t, warp), groups.adders);
    }
    bool ok = !__syncthreads_or(device::gave_up(view.watch));
    const Operation op{OpKind::kCombine, in.seq};
    if (ok && publishes && warp == 0) {
        ok = acquire_slot(view, NoFar{}, op, in.slot) &&
             acquire_far(h.rail, view, h.rails, NoFar{}, op, in);
    }
    count_visits(h.rails, own_visits(h.rails, job.args), blockIdx.x, job.args.num_topk, in.seq,
                 [&](int t, int k) { return holder_of_slot(job, t, k); });
    ok = __syncthreads_and(ok);
    if (ok && publishes) {
        publish_head(view, view.peers.control, job.begin, in);
        ok = exchange_notices(h.rail, view, h.rails, NoFar{}, in, op, true, job.args.wait_stats);
    }
    ok = ok && await_notices(view, NoFar{}, job.begin, in, OutputReader{job, sources_of(h), in});
    if (ok && in.first_bad == kNoObjection) {
        ok = hear_rings(h.rail, view, h.rails, h.spread, op, h.rails.state.sent,
                        h.rails.state.taken);
    }
    if (!ok) return;
    if (in.first_bad == kNoObjection) ok = work<kDtype>(h, in.seq, &next_token);
    h.rail.flush();
    if (!__syncthreads_and(ok) || warp != 0) return;
    if (ptx::lane_id() == 0) count_block(view);
    if (publishes) conclude_combine(h, in, sources_of(h), in.first_bad == kNoObjection);
}

template <device::Rail R>
using HybridCombineKernel = void (*)(HybridCombine<R>);

// Every kernel that exists, in one place.
template <device::Rail R>
HybridCombineKernel<R> hybrid_combine_for(DType dtype) {
    switch (dtype) {
        case DType::kBF16:
            return hybrid_combine_kernel<DType::kBF16, R>;
        case DType::kF16:
            return hybrid_combine_kernel<DType::kF16, R>;
        default:
            return hybrid_combine_kernel<DType::kF32, R>;
    }
}

// ---- how wide ----

// Rows in equal pieces; as many groups as there are warps for, half of them for other nodes.
inline HybridGroups divide_warps(const CombineArgs& a) {
    const int64_t row_bytes = std::max<int64_t>(a.row_bytes(), 16);
    const int64_t pieces = (row_bytes + kMaxPieceBytes - 1) / kMaxPieceBytes;
    const auto piece = static_cast<int>((row_bytes / 16 + pieces - 1) / pieces * 16);
    HybridGroups g{};
    g.adders = (piece + kWideSliceBytes - 1) / kWideSliceBytes;
    g.count = std::min(kMaxGroups, kMaxPullWarps / (g.adders + 1));
    g.pullers = g.count / 2;
    g.piece_bytes = (piece + 127) / 128 * 128;
    return g;
}

// `smem_bytes`: of a block, dynamic.
inline HybridGroups divide_groups(const CombineArgs& a, int num_ranks, int tables_end,
                                  int smem_bytes) {
    HybridGroups g = divide_warps(a);
    g.sources = tables_end;
    g.rings = (tables_end + static_cast<int>(sizeof(Source)) * num_ranks + 127) / 128 * 128;
    const int room = smem_bytes - g.rings;
    g.num_stages = std::clamp(room / (g.count * g.piece_bytes), 1, kMaxStages);
    return g;
}
static_assert(kMaxPullWarps / (kMaxPieceBytes / kWideSliceBytes + 1) >= 2,
              "a group for each purpose");

// plan: num_blocks; num_stages of a group at most, 0 = as many as there is room for.
template <device::Rail R>
int launch_hybrid_combine(const R& rail, const CombineJob& job, RailView rails,
                          const LaunchPlan& plan, int smem_bytes, Stream stream) {
    const CombineArgs& a = job.args;
    const int blocks = std::clamp(plan.num_blocks, 1, rails.shape.num_channels);
    rails.num_blocks = blocks;
    rails.tokens_per_block = static_cast<int>((a.num_tokens + blocks - 1) / blocks);
    // Tables of rails are sized for the pullers there may be at most.
    const int begin = static_cast<int>(sizeof(GroupTables)) * divide_warps(a).count;
    const RailSpread spread(rails.shape, begin, blocks, kMaxGroups / 2);
    HybridGroups groups = divide_groups(a, job.view.shape.num_ranks, spread.end, smem_bytes);
    if (plan.num_stages > 0) groups.num_stages = std::min(groups.num_stages, plan.num_stages);
    HybridCombine<R> h{job,
                       rails,
                       spread,
                       RailChunks(rails.shape.chunk_bytes,
                                  sum_head_bytes(a.num_topk, a.with_weights), a.row_bytes()),
                       groups,
                       rail};
    h.spread.num_walkers = groups.pullers;
    const int smem = groups.rings + static_cast<int>(groups.count * groups.ring_bytes());
    return launch(hybrid_combine_for<R>(a.dtype), {blocks, 32 * groups.num_warps(), smem}, stream,
                  h);
}

template <device::Rail R>
int load_hybrid_combine(int smem_bytes, RailRoom& room) {
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
        const auto kernel = reinterpret_cast<const void*>(hybrid_combine_for<R>(dtype));
        if (const int error = load_kernel(kernel, smem_bytes, &room.combine)) return error;
    }
    return 0;
}

}  // namespace ep::kernels
