// Combine across nodes, the warp that feeds a ring of stages with our own tokens: with their rows on our node,
// and with what other nodes send back.
//
// defines: own_visits, tail_of, await_chunk, bring_weights, TokenFeeder
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "contract/rail.h"
#include "device/ptx.cuh"
#include "device/rail.cuh"
#include "kernels/contribution.cuh"
#include "kernels/rail_sums.cuh"
#include "kernels/rail_tables.cuh"
#include "kernels/rail_walk.cuh"
#include "kernels/stage_ring.cuh"
#include "kernels/visits.cuh"

namespace ep::kernels {

// Of the block's tokens.
__device__ __forceinline__ Visits own_visits(const RailView& rails, const CombineArgs& a) {
    const auto block = static_cast<int>(blockIdx.x), num_tokens = static_cast<int>(a.num_tokens);
    const int begin = min(block * rails.tokens_per_block, num_tokens);
    return {rails, {begin, min(begin + rails.tokens_per_block, num_tokens)}, block};
}

// Chunk `count` of our ring from a node.
__device__ __forceinline__ device::RailWord tail_of(const RailView& rails, int node,
                                                    uint64_t count) {
    return {rails.layout.tail_word(node, static_cast<int>(blockIdx.x), count),
            chunks_until(rails.shape, count)};
}

// A warp waits for it. Out of line: seldom, and its registers are not those of a feeder. False: leave.
template <device::Rail R>
__device__ __noinline__ bool await_chunk(const R& rail, const RankView& view, const RailView& rails,
                                         const uint64_t& seq, int node, uint64_t count) {
    const NodeShape& nodes = rails.shape.nodes;
    return device::rail_wait(rail, view.watch, {OpKind::kCombine, seq}, Site::kRailChunk,
                             nodes.rank(node, nodes.local(view.peers.rank)),
                             tail_of(rails, node, count));
}

// The weights of token t, the i-th of those that a warp has planned, come back: with each row one for every
// slot or its own, with a sum those of its node, in front of it. Out of line: seldom.
__device__ __noinline__ inline void bring_weights(const CombineJob& job, const RailView& rails,
                                                  const uint64_t& seq, const Source* sources, int t,
                                                  int i, int place, int owner, int32_t row,
                                                  int node, const std::byte* record) {
    const CombineArgs& a = job.args;
    const Peers& peers = job.view.peers;
    const Planner planner(job, seq, sources);
    const bool ours = planner.token == i;
    const bool far = owner >= 0 && (owner < peers.near_begin || owner >= peers.near_end);
    const int home = far ? rails.shape.nodes.node(owner) : -1;
    float back = 0.0f;
    if (!a.sum_weights && ours && owner >= 0 && !far) {
        back = planner.weight_back(owner, row, planner.slot);
    }
    const int count = __popc(__ballot_sync(~0u, ours && place >= 0));
#pragma unroll 1
    for (int n = 0; n < count; ++n) {
        const int from = __ffs(__ballot_sync(~0u, ours && place == n)) - 1;
        const int its_node = __shfl_sync(~0u, node, from);
        const int its_owner = __shfl_sync(~0u, owner, from);
        const int32_t its_row = __shfl_sync(~0u, row, from);
        const auto* weights = reinterpret_cast<const float*>(
            __shfl_sync(~0u, reinterpret_cast<uint64_t>(record), from));
        if (ours && a.sum_weights) {
            back = __fadd_rn(back, its_node >= 0
                                       ? weights[planner.slot]
                                       : planner.weight_back(its_owner, its_row, planner.slot));
        } else if (ours && its_node >= 0 && its_node == home) {
            back = weights[planner.slot];
        }
    }
    if (ours) a.out_weights[int64_t{t} * a.num_topk + planner.slot] = back;
}

template <device::Rail R>
class TokenFeeder {
public:
    __device__ TokenFeeder(const Planner& planner, const RingWalk<R>& walk, const StageRing& ring,
                           const Fed& fed, Handover* handovers)
        : planner_(planner),
          walk_(walk),
          piece_bytes_(ring.piece_bytes),
          handovers_(handovers),
          ring_(planner.job.view, planner.seq, ring, fed) {}

    // Tokens of the block, which feeders take in turns, some at once: `next` in shared memory. It waits for what
    // comes next on a ring: for that its peer needs nothing but the room that tokens before this one have
    // left, and feeders with these wait for nothing else. False: leave; no load is under way then.
    __device__ __forceinline__ bool run(int* next) {
        int first = take(next);
        Ahead ahead = find(select(first));
        bool ok = true;
#pragma unroll 1
        while (ok && first < visits().tokens.end) {
            const Ahead slots = ahead;
            const int following = take(next);
            ahead = select(following);
            const Mixed mixed = plan(first, slots);
            ahead = find(ahead);
            ok = mixed.ok && feed(first, mixed);
            first = following;
        }
        ok = ok && ring_.stop();
        if (!ok) ring_.drain();
        return ok;
    }

private:
    // As a Plan, some of whose rows are sums of other nodes.
    struct Mixed {
        bool ok = true;
        int place = -1;
        float weight = 1.0f;
        int owner = -1;  // of this lane's slot
        int32_t row = -1;
        int node = -1;  // this lane adds the sum of that node
        int turn = 0;   // of the token among those of its channel that visit it
    };
    // Where that lies, or a piece of it; of a sum its chunk, which may not have come yet.
    struct Place {
        const std::byte* row = nullptr;  // the first byte, also of what comes before the piece
        uint64_t count = 0;
        int32_t loads = 0;  // of the chunk
        bool is_late = false;
    };

    __device__ const CombineArgs& args() const { return planner_.job.args; }
    __device__ Visits visits() const { return own_visits(walk_.rails, args()); }
    __device__ bool is_near(int rank) const {
        const Peers& peers = planner_.job.view.peers;
        return rank >= peers.near_begin && rank < peers.near_end;
    }

    __device__ int take(int* next) const {
        int number = 0;
        if (ptx::lane_id() == 0) number = atomicAdd(next, planner_.per_turn);
        return visits().tokens.begin + __shfl_sync(~0u, number, 0);
    }
    __device__ int token_at(int first) const { return first + planner_.token; }
    __device__ bool exists(int first) const {
        return planner_.token < planner_.per_turn && token_at(first) < visits().tokens.end;
    }

    // What a lane knows of its slot of a token, read ahead: what it was given while the tokens before it are
    // planned, its owner while they are fed.
    struct Ahead {
        int owner = -1;  // its expert, until it is found; -1 = none
        int32_t row = -1;
    };
    __device__ Ahead select(int first) const {
        const CombineArgs& a = args();
        Ahead s;
        if (exists(first)) {
            const int64_t at = int64_t{token_at(first)} * a.num_topk + planner_.slot;
            const int64_t id = a.topk_idx[at];
            s.row = a.send_row[at];
            if (id >= 0 && id < planner_.job.view.shape.num_experts) s.owner = static_cast<int>(id);
        }
        return s;
    }

    __device__ Ahead find(Ahead s) const {
        if (s.row < 0) s.owner = -1;
        if (s.owner >= 0) s.owner = __ldg(planner_.job.view.state.owner + s.owner);
        return s;
    }

    // Rows of our node by themselves, another node's as one, in ascending order of ranks.
    __device__ Mixed plan(int first, const Ahead& choice) const {
        const CombineArgs& a = args();
        const int t = token_at(first);
        Mixed m;
        m.owner = choice.owner, m.row = choice.row;
        const bool near = is_near(m.owner), far = m.owner >= 0 && !near;
        const int node = far ? walk_.nodes().node(m.owner) : -1;
        const uint32_t earlier = planner_.mates() & ptx::lanemask_lt();
        const bool again_near = (__match_any_sync(~0u, m.owner) & earlier) != 0;
        const bool again_far = (__match_any_sync(~0u, node) & earlier) != 0;
        const bool adds = far ? !again_far : near && !(a.one_per_rank() && again_near);
        m.ok = planner_.in_bounds(adds && near, max(m.owner, 0), m.row);
        if (!m.ok) return m;
        const bool crosses = adds && far;
        if (crosses) m.turn = visits().turn(t, node);  // on its way while lanes find their places
        const int place = planner_.place_of(adds, m.owner);
        if (!adds) return m;
        m.place = place;
        if (crosses) {
            m.node = node;
        } else if (a.source_weighs()) {
            m.weight = a.topk_weights[int64_t{t} * a.num_topk + planner_.slot];
        }
        return m;
    }

    // Where lanes that want it find piece `piece` of what they add. All of them at once, as a warp that does
    // it row by row takes longer than rows do.
    __device__ __forceinline__ Place locate(const Mixed& m, int piece, bool wanted) {
        const RailChunks& chunks = walk_.chunks;
        Place p;
        if (wanted && m.place >= 0 && m.node < 0) {
            p.row = planner_.sources[m.owner].y + int64_t{m.row} * args().row_bytes();
        }
        if (wanted && m.node >= 0) {
            const auto begin = static_cast<int>(chunks.piece_begin(piece));
            const int bytes = static_cast<int>(chunks.piece_end(piece)) - begin;
            const int per_row = (bytes + piece_bytes_ - 1) / piece_bytes_;
            const int j =
                chunks.pieces == 1 ? m.turn / chunks.records : m.turn * chunks.pieces + piece;
            p.count = walk_.tables().ours[m.node] + static_cast<uint64_t>(j);
            p.loads = per_row * chunks.in_chunk(j, walk_.tables().total[m.node]);
            const int64_t at = walk_.rails.layout.recv_chunk(walk_.my_node(), m.node,
                                                             static_cast<int>(blockIdx.x), p.count);
            const int record = chunks.pieces == 1 ? m.turn - j * chunks.records : 0;
            p.row = walk_.rail.own(at) + record * chunks.record_bytes() + chunks.head_bytes - begin;
        }
        look(m, p, wanted);
        return p;
    }

    // Which sums have come: those of a chunk that was there, and who finds its own.
    __device__ __forceinline__ void look(const Mixed& m, Place& p, bool wanted) {
        const int keeper = max(m.node, 0) % 32;
        const int node = __shfl_sync(~0u, known_.node, keeper);
        const uint32_t count = __shfl_sync(~0u, known_.count, keeper);
        p.is_late =
            wanted && m.node >= 0 && (node != m.node || count != static_cast<uint32_t>(p.count));
        if (!__any_sync(~0u, p.is_late)) return;
        bool came = false;
        if (p.is_late) {
            const device::RailWord word = tail_of(walk_.rails, m.node, p.count);
            const auto* own = reinterpret_cast<const uint64_t*>(walk_.rail.own(word.at));
            came = ptx::ld_acquire_sys(own) >= word.amount;
            if (came) walk_.rail.acquired(word);
            p.is_late = !came;
        }
#pragma unroll 1
        for (uint32_t left = __ballot_sync(~0u, came); left != 0; left &= left - 1) {
            const int from = __ffs(left) - 1;
            remember(__shfl_sync(~0u, m.node, from), __shfl_sync(~0u, p.count, from));
        }
        accept();
    }

    // Waits for the chunks of the i-th token. False: leave.
    __device__ __forceinline__ bool await(int i, const Mixed& m, Place& p) {
#pragma unroll 1
        while (true) {
            const uint32_t late = __ballot_sync(~0u, planner_.token == i && p.is_late);
            if (late == 0) return true;
            const int from = __ffs(late) - 1, node = __shfl_sync(~0u, m.node, from);
            const uint64_t count = __shfl_sync(~0u, p.count, from);
            if (!await_chunk(walk_.rail, walk_.view, walk_.rails, planner_.seq, node, count)) {
                return false;
            }
            if (m.node == node && p.count == count) p.is_late = false;
            remember(node, count);
            accept();
        }
    }

    // Of a node the last chunk is known; sums of one chunk come one after the other.
    __device__ __forceinline__ void remember(int node, uint64_t count) {
        if (static_cast<int>(ptx::lane_id()) == node % 32) {
            known_ = {node, static_cast<uint32_t>(count)};
        }
    }
    // What some lane has acquired, before bulk loads of all.
    __device__ __forceinline__ static void accept() {
        __syncwarp();
        ptx::fence_proxy_async_global();
    }

    // Tokens from `first` on, which were planned together.
    __device__ __forceinline__ bool feed(int first, const Mixed& m) {
        const RailChunks& chunks = walk_.chunks;
        const bool is_whole = chunks.pieces == 1;
        const int tokens = __popc(__ballot_sync(~0u, planner_.slot == 0 && exists(first)));
        Place place;
        if (is_whole) place = locate(m, 0, true);
#pragma unroll 1
        for (int i = 0; i < tokens; ++i) {
            const int t = first + i;
#pragma unroll 1
            for (int piece = 0; piece < chunks.pieces; ++piece) {
                if (!is_whole) place = locate(m, piece, planner_.token == i);
                if (!await(i, m, place)) return false;
                if (piece == 0 && args().out_weights != nullptr) {
                    bring_weights(planner_.job, walk_.rails, planner_.seq, planner_.sources, t, i,
                                  m.place, m.owner, m.row, m.node, place.row - chunks.head_bytes);
                }
                if (!feed_piece(t, i, m, piece, place)) return false;
            }
        }
        return true;
    }

    // Of token t, the i-th of those, piece `piece`. Each lane puts what it adds.
    __device__ __forceinline__ bool feed_piece(int t, int i, const Mixed& m, int piece,
                                               const Place& place) {
        const auto end = static_cast<int>(walk_.chunks.piece_end(piece));
        const int64_t at = int64_t{t} * args().row_bytes();
        const bool mine = planner_.token == i;
        const int count = __popc(__ballot_sync(~0u, mine && m.place >= 0)), rows = max(count, 1);
        // Of no rows the lane of the first slot puts nothing.
        const int ours = !mine ? -1 : count > 0 ? m.place : planner_.slot;
#pragma unroll 1
        for (auto offset = static_cast<int>(walk_.chunks.piece_begin(piece)); offset < end;
             offset += piece_bytes_) {
            const int bytes = min(piece_bytes_, end - offset);
            const std::byte* src = count > 0 ? place.row + offset : nullptr;
#pragma unroll 1
            for (int n = 0; n < rows; ++n) {
                const bool has = ours == n;
                const int32_t flags = (count > 0 ? Piece::kRow : 0) | (n == 0 ? Piece::kFirst : 0) |
                                      (n == rows - 1 ? Piece::kLast : 0);
                if (!ring_.put(has, {at + offset, bytes, flags, m.weight}, src, [&](int stage) {
                        handovers_[stage] = {m.node, static_cast<int>(blockIdx.x), place.loads,
                                             place.count};
                    })) {
                    return false;
                }
            }
        }
        return true;
    }

    const Planner& planner_;
    const RingWalk<R>& walk_;
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
