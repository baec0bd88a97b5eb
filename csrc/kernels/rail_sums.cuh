// Combine across nodes, the warps that feed rings of stages: one group of a block adds up, for other nodes,
// what their tokens left on ours (SumFeeder); another adds up our own tokens, of rows on our node and of
// what other nodes send back (TokenFeeder).
//
// defines: Handover, SumFeeder, TokenFeeder
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "contract/rail.h"
#include "device/ptx.cuh"
#include "device/rail.cuh"
#include "kernels/contribution.cuh"
#include "kernels/rail_tables.cuh"
#include "kernels/rail_walk.cuh"
#include "kernels/stage_ring.cuh"
#include "kernels/visits.cuh"

namespace ep::kernels {

// What adders do once a piece is there, or added: node -1 = nothing more.
struct Handover {
    int32_t node =
        -1;  // of a sum that came: its chunk is credited; of one that leaves: it is handed over
    int32_t channel = 0;
    int32_t amount = 0;  // pieces until the chunk has been read; bytes of the chunk
    uint64_t count = 0;  // of the chunk in its ring
};

// Where a sum for another node goes: SumFeeder says it as an address, as chunks lie in two segments.
__device__ __forceinline__ std::byte* address_of(const Piece& piece) {
    return reinterpret_cast<std::byte*>(piece.at);
}

// A float for each slot, in front of a sum.
__device__ __forceinline__ float* weights_of(std::byte* record) {
    return reinterpret_cast<float*>(record);
}

template <device::Rail R>
class SumFeeder {
public:
    __device__ SumFeeder(const Planner& planner, const RingWalk<R>& walk, const StageRing& ring,
                         Handover* handovers)
        : planner_(planner),
          walk_(walk),
          piece_bytes_(ring.piece_bytes),
          handovers_(handovers),
          ring_(planner.job.view, planner.op, ring) {}

    // False: leave; no load is under way then.
    __device__ __forceinline__ bool run() {
        bool ok = walk_.run(
            [this](const RingOfBlock& ring, uint64_t count) {
                return device::RailWord{layout().head_word(ring.node, ring.channel, count),
                                        credits_until(walk_.rails.shape, count)};
            },
            [this](int q) { return fill(q); });
        ok = ok && ring_.stop();
        if (!ok) ring_.drain();
        return ok;
    }

private:
    __device__ const RailLayout& layout() const { return walk_.rails.layout; }
    __device__ const CombineArgs& args() const { return planner_.job.args; }

    // A chunk of ring q, whose place is free.
    __device__ bool fill(int q) {
        const RailChunks& chunks = walk_.chunks;
        const RingOfBlock ring(q, walk_.spread);
        const int j = walk_.chunk_of(q), total = walk_.records_of(ring);
        const uint64_t count = walk_.count_of(q);
        const int records = chunks.in_chunk(j, total), piece = j % chunks.pieces;
        const int64_t first =
            walk_.tables().base[walk_.index_of(ring)] +
            (chunks.pieces == 1 ? int64_t{j} * chunks.records : j / chunks.pieces);
        const auto chunk = reinterpret_cast<int64_t>(device::rail_stage(
            walk_.rail, walk_.tables().mapped[ring.node],
            layout().recv_chunk(ring.node, walk_.my_node(), ring.channel, count),
            layout().send_chunk(walk_.my_node(), ring.node, ring.channel, count)));
        const int64_t begin = chunks.piece_begin(piece), end = chunks.piece_end(piece);
        const int64_t bytes =
            chunks.pieces == 1 ? records * chunks.record_bytes() : chunks.head_bytes + end - begin;
        const Handover whole{ring.node, ring.channel, static_cast<int32_t>(bytes), count};
#pragma unroll 1
        for (int r0 = 0; r0 < records; r0 += planner_.per_turn) {
            const int mine = r0 + planner_.token;
            const Plan plan = plan_logged(first + mine, mine < records, piece == 0,
                                          chunk + mine * chunks.record_bytes());
            if (!plan.ok) return false;
#pragma unroll 1
            for (int i = 0; i < planner_.per_turn && r0 + i < records; ++i) {
                const int64_t at =
                    chunk + (r0 + i) * chunks.record_bytes() + chunks.head_bytes - begin;
                if (!feed(at, begin, end, i, plan, r0 + i + 1 == records ? whole : Handover{})) {
                    return false;
                }
            }
        }
        walk_.step(q);
        return true;
    }

    // The rows of the token that left record `index` here, by the lanes of its slots; and the weights that
    // go back with it, to the address `record`.
    __device__ Plan plan_logged(int64_t index, bool wanted, bool with_weights,
                                int64_t record) const {
        const CombineArgs& a = args();
        const RankView& view = planner_.job.view;
        const RailLog log{a.num_topk, walk_.rails.log_has_weights};
        bool bad = wanted && index >= walk_.rails.num_logged;
        int owner = -1, row = -1;
        float weight = 1.0f;
        if (wanted && !bad && planner_.token < planner_.per_turn) {
            const int32_t* kept = walk_.rails.log + index * log.words();
            const int32_t expert = kept[log.expert(planner_.slot)];
            row = kept[log.row(planner_.slot)];
            if (a.source_weighs()) weight = __int_as_float(kept[log.weight(planner_.slot)]);
            if (expert >= 0) owner = walk_.nodes().rank(walk_.my_node(), rank_of_expert(expert));
            bad = owner >= view.peers.near_end || (owner >= 0 && row < 0);
        }
        if (bad) {  // a tensor of the handle was changed since
            device::give_up(view.watch, planner_.op, kMiscount,
                            {Site::kPulled, view.peers.rank, uint64_t(walk_.rails.num_logged)},
                            static_cast<uint64_t>(index), 0);
        }
        Plan plan;
        plan.ok = !__any_sync(~0u, bad);
        if (plan.ok) plan = planner_.arrange(owner, row, weight);
        if (plan.ok && a.with_weights && with_weights) {
            const float back = planner_.weights_back(plan, owner, row);
            if (wanted && planner_.token < planner_.per_turn) {
                weights_of(reinterpret_cast<std::byte*>(record))[planner_.slot] = back;
            }
        }
        return plan;
    }

    // Bytes [begin, end) of the sum for the i-th token that was planned, to the address `at` + its bytes.
    __device__ bool feed(int64_t at, int64_t begin, int64_t end, int i, const Plan& plan,
                         const Handover& last) {
        const int count = __shfl_sync(~0u, plan.count, i * args().num_topk);
        const auto put = [&](const Piece& piece, const std::byte* src, bool is_last) {
            return ring_.put(piece, src,
                             [&](int stage) { handovers_[stage] = is_last ? last : Handover{}; });
        };
#pragma unroll 1
        for (int64_t offset = begin; offset < end; offset += piece_bytes_) {
            const auto bytes = static_cast<int32_t>(min(int64_t{piece_bytes_}, end - offset));
            const bool ends = offset + bytes == end;
            if (count == 0 &&
                !put({at + offset, bytes, Piece::kFirst | Piece::kLast, 0.0f}, nullptr, ends)) {
                return false;
            }
#pragma unroll 1
            for (int place = 0; place < count; ++place) {
                const bool ours = plan.place == place && planner_.token == i;
                const int from = __ffs(__ballot_sync(~0u, ours)) - 1;
                const auto row = __shfl_sync(~0u, reinterpret_cast<uint64_t>(plan.row), from);
                const float weight = __shfl_sync(~0u, plan.weight, from);
                const bool is_last = place == count - 1;
                const int32_t flags =
                    Piece::kRow | (place == 0 ? Piece::kFirst : 0) | (is_last ? Piece::kLast : 0);
                const auto* src = reinterpret_cast<const std::byte*>(row) + offset;
                if (!put({at + offset, bytes, flags, weight}, src, ends && is_last)) return false;
            }
        }
        return true;
    }

    const Planner& planner_;
    const RingWalk<R>& walk_;
    const int piece_bytes_;
    Handover* handovers_;
    RingFeeder ring_;
};

template <device::Rail R>
class TokenFeeder {
public:
    __device__ TokenFeeder(const Planner& planner, const RingWalk<R>& walk, const Visits& visits,
                           const StageRing& ring, Handover* handovers)
        : planner_(planner),
          walk_(walk),
          visits_(visits),
          piece_bytes_(ring.piece_bytes),
          handovers_(handovers),
          ring_(planner.job.view, planner.op, ring) {}

    // Tokens first, first + step, ... of the block's, in order. It waits for what comes next on a ring: for
    // that its peer needs nothing but the room that tokens before this one have left. False: leave; no load
    // is under way then. `step` in shared memory, so that it needs no register.
    __device__ __forceinline__ bool run(int first, const int& step) {
        const int end = visits_.tokens.end;
        Selection ahead = select(first, step);
        bool ok = true;
#pragma unroll 1
        for (; ok && first < end; first += planner_.per_turn * step) {
            const Selection slots = ahead;
            ahead = select(first + planner_.per_turn * step, step);
            const Mixed mixed = plan(first, step, slots);
            ok = mixed.ok;
#pragma unroll 1
            for (int i = 0; ok && i < planner_.per_turn && first + i * step < end; ++i) {
                ok = feed(first + i * step, i, mixed);
            }
        }
        ok = ok && ring_.stop();
        if (!ok) ring_.drain();
        return ok;
    }

private:
    // As a Plan, some of whose rows are sums of other nodes.
    struct Mixed {
        bool ok = true;
        int count = 0, place = -1;
        float weight = 1.0f;
        int owner = -1;  // of this lane's slot
        int32_t row = -1;
        int node = -1;  // this lane adds the sum of that node
        int turn = 0;   // of the token among those of its channel that visit it
    };

    __device__ const CombineArgs& args() const { return planner_.job.args; }
    __device__ bool is_near(int rank) const {
        const Peers& peers = planner_.job.view.peers;
        return rank >= peers.near_begin && rank < peers.near_end;
    }

    __device__ int token_at(int first, int step) const { return first + planner_.token * step; }

    __device__ Selection select(int first, int step) const {
        const CombineArgs& a = args();
        const int t = token_at(first, step);
        Selection s;
        if (planner_.token < planner_.per_turn && t < visits_.tokens.end) {
            s.id = a.topk_idx[int64_t{t} * a.num_topk + planner_.slot];
            s.row = a.send_row[int64_t{t} * a.num_topk + planner_.slot];
        }
        return s;
    }

    // Rows of our node by themselves, another node's as one, in ascending order of ranks.
    __device__ Mixed plan(int first, int step, const Selection& choice) const {
        const CombineArgs& a = args();
        const RankView& view = planner_.job.view;
        const int t = token_at(first, step);
        const bool chosen = choice.id >= 0 && choice.id < view.shape.num_experts && choice.row >= 0;
        Mixed m;
        if (chosen) m.owner = __ldg(view.state.owner + choice.id), m.row = choice.row;
        const bool near = is_near(m.owner), far = chosen && !near;
        const int node = far ? walk_.nodes().node(m.owner) : -1;
        const uint32_t earlier = planner_.mates & ptx::lanemask_lt();
        const bool again_near = (__match_any_sync(~0u, m.owner) & earlier) != 0;
        const bool again_far = (__match_any_sync(~0u, node) & earlier) != 0;
        const bool adds = far ? !again_far : near && !(a.one_per_rank() && again_near);
        m.ok = planner_.in_bounds(adds && near, max(m.owner, 0), m.row);
        if (!m.ok) return m;
        m.count = __popc(__ballot_sync(~0u, adds) & planner_.mates);
        const int place = planner_.place_of(adds, m.owner);
        if (!adds) return m;
        m.place = place;
        if (far) {
            m.node = node;
            m.turn = visits_.turn(t, node);
        } else if (a.source_weighs()) {
            m.weight = a.topk_weights[int64_t{t} * a.num_topk + planner_.slot];
        }
        return m;
    }

    // A sum in its ring: the chunk, and where it lies.
    struct Came {
        Handover chunk;
        const std::byte* record;
    };
    // Waits for it. False: leave.
    __device__ bool await(int node, int turn, int piece, Came& came) {
        const RailChunks& chunks = walk_.chunks;
        const RailView& rails = walk_.rails;
        const int j = chunks.pieces == 1 ? turn / chunks.records : turn * chunks.pieces + piece;
        const int channel = blockIdx.x;
        const uint64_t count = walk_.tables().ours[node] + static_cast<uint64_t>(j);
        const int64_t bytes = chunks.piece_end(piece) - chunks.piece_begin(piece);
        const auto loads = static_cast<int>((bytes + piece_bytes_ - 1) / piece_bytes_);
        came.chunk = {node, channel, loads * chunks.in_chunk(j, walk_.tables().total[node]), count};
        came.record =
            walk_.rail.own(rails.layout.recv_chunk(walk_.my_node(), node, channel, count)) +
            (chunks.pieces == 1 ? turn % chunks.records * chunks.record_bytes() : 0);
        // Of a node the last chunk is known; sums of one chunk come one after the other.
        const int keeper = node % 32;
        if (__shfl_sync(~0u, known_.node == node && known_.count == static_cast<uint32_t>(count),
                        keeper))
            return true;
        const bool ok = device::rail_wait(
            walk_.rail, planner_.job.view.watch, planner_.op, Site::kRailChunk, walk_.peer_on(node),
            {rails.layout.tail_word(node, channel, count), chunks_until(rails.shape, count)});
        ptx::fence_proxy_async_global();  // what the peer put, before our bulk loads
        __syncwarp();
        if (static_cast<int>(ptx::lane_id()) == keeper)
            known_ = {node, static_cast<uint32_t>(count)};
        return ok;
    }

    // Token t, the i-th of those that were planned together.
    __device__ bool feed(int t, int i, const Mixed& m) {
        const RailChunks& chunks = walk_.chunks;
        float back = 0.0f;  // for the slot of this lane
#pragma unroll 1
        for (int piece = 0; piece < chunks.pieces; ++piece) {
            const int64_t end = chunks.piece_end(piece);
#pragma unroll 1
            for (int64_t at = chunks.piece_begin(piece); at < end; at += piece_bytes_) {
                const auto bytes = static_cast<int32_t>(min(int64_t{piece_bytes_}, end - at));
                if (!feed_piece(t, i, m, piece, at, bytes, back)) return false;
            }
        }
        if (args().out_weights != nullptr && planner_.token == i) {
            args().out_weights[int64_t{t} * args().num_topk + planner_.slot] = back;
        }
        return true;
    }

    __device__ bool feed_piece(int t, int i, const Mixed& m, int piece, int64_t offset,
                               int32_t bytes, float& back) {
        const RailChunks& chunks = walk_.chunks;
        const int count = __shfl_sync(~0u, m.count, i * args().num_topk);
        const int64_t at = int64_t{t} * args().row_bytes() + offset;
        if (count == 0) {
            return put({at, bytes, Piece::kFirst | Piece::kLast, 0.0f}, nullptr, Handover{});
        }
#pragma unroll 1
        for (int place = 0; place < count; ++place) {
            const bool ours = m.place == place && planner_.token == i;
            const int from = __ffs(__ballot_sync(~0u, ours)) - 1;
            const int node = __shfl_sync(~0u, m.node, from);
            const int turn = __shfl_sync(~0u, m.turn, from);
            const float weight = __shfl_sync(~0u, m.weight, from);
            const int owner = max(__shfl_sync(~0u, m.owner, from), 0);
            const int32_t row = __shfl_sync(~0u, m.row, from);
            const std::byte* src =
                planner_.sources[owner].y + int64_t{row} * args().row_bytes() + offset;
            Came came{{}, nullptr};
            if (node >= 0) {
                if (!await(node, turn, piece, came)) return false;
                src = came.record + chunks.head_bytes + offset - chunks.piece_begin(piece);
            }
            if (offset == 0 && args().out_weights != nullptr) {
                bring_weight(m, i, from, node, came.record, back);
            }
            const int32_t flags = Piece::kRow | (place == 0 ? Piece::kFirst : 0) |
                                  (place == count - 1 ? Piece::kLast : 0);
            if (!put({at, bytes, flags, weight}, src, came.chunk)) return false;
        }
        return true;
    }

    // The weight that comes back with a row, or with a sum, for the slot of this lane.
    __device__ void bring_weight(const Mixed& m, int i, int from, int node, const std::byte* record,
                                 float& back) const {
        const bool mine = planner_.token == i;
        const int owner = __shfl_sync(~0u, m.owner, from);
        const int32_t row = __shfl_sync(~0u, m.row, from);
        if (args().sum_weights) {
            if (!mine) return;
            back = __fadd_rn(back, node >= 0 ? reinterpret_cast<const float*>(record)[planner_.slot]
                                             : planner_.weight_back(owner, row, planner_.slot));
        } else if (mine && m.owner >= 0) {
            const bool far = !is_near(m.owner);
            if (node >= 0 && far && walk_.nodes().node(m.owner) == node) {
                back = reinterpret_cast<const float*>(record)[planner_.slot];
            } else if (node < 0 && m.owner == owner) {
                back = planner_.weight_back(m.owner, m.row, planner_.slot);
            }
        }
    }

    __device__ bool put(const Piece& piece, const std::byte* src, const Handover& chunk) {
        return ring_.put(piece, src, [&](int stage) { handovers_[stage] = chunk; });
    }

    const Planner& planner_;
    const RingWalk<R>& walk_;
    const Visits& visits_;
    const int piece_bytes_;
    Handover* handovers_;
    RingFeeder ring_;
    // A lane keeps it for every 32nd node.
    struct {
        int node = -1;
        uint32_t count = 0;  // lower half
    } known_;
};

}  // namespace ep::kernels
