// Combine across nodes, the warp that feeds a ring of stages with what is added up for other nodes: of what
// their tokens left on ours. Then it helps with our own tokens (rail_tokens.cuh).
//
// defines: Handover, address_of, weights_of, SumFeeder
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
          num_topk_(planner.job.args.num_topk),
          handovers_(handovers),
          ring_(planner.job.view, planner.seq, ring) {}

    // False: leave; no load is under way then. `fed` becomes how far the ring was fed.
    __device__ __forceinline__ bool run(Fed& fed) {
        const bool ok = walk_.run(
            [this](const RingOfBlock& ring, uint64_t count) {
                return device::RailWord{layout().head_word(ring.node, ring.channel, count),
                                        credits_until(walk_.rails.shape, count)};
            },
            [this](int q) { return fill(q); });
        if (!ok) ring_.drain();
        if (ptx::lane_id() == 0) fed = ring_.fed();
        __syncwarp();
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
        const int base = walk_.tables().base[walk_.index_of(ring)], first = base + record_of(j);
        const auto chunk = reinterpret_cast<int64_t>(device::rail_stage(
            walk_.rail, walk_.tables().mapped[ring.node],
            layout().recv_chunk(ring.node, walk_.my_node(), ring.channel, count),
            layout().send_chunk(walk_.my_node(), ring.node, ring.channel, count)));
        const auto begin = static_cast<int>(chunks.piece_begin(piece));
        const auto end = static_cast<int>(chunks.piece_end(piece));
        const int64_t bytes =
            chunks.pieces == 1 ? records * chunks.record_bytes() : chunks.head_bytes + end - begin;
        const Handover whole{ring.node, ring.channel, static_cast<int32_t>(bytes), count};
#pragma unroll 1
        for (int r0 = 0; r0 < records; r0 += planner_.per_turn) {
            const int mine = r0 + planner_.token;
            const Logged slots = ahead_from_ == first + r0 ? ahead_ : read_log(first + r0);
            ahead_from_ = r0 + planner_.per_turn < records
                              ? first + r0 + planner_.per_turn
                              : base + record_of(j + walk_.spread.num_walkers);
            ahead_ = read_log(ahead_from_);
            const Plan plan = plan_logged(slots, first + mine, mine < records, piece == 0,
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

    // What a lane knows of its slot of a logged record, read ahead: while rows before it are fed, most likely
    // those of the same ring.
    struct Logged {
        int32_t expert = -1, row = -1;
        float weight = 1.0f;
    };
    // Of records from `first` on.
    __device__ Logged read_log(int first) const {
        const RailView& rails = walk_.rails;
        const RailLog log{num_topk_, rails.log_has_weights};
        const int64_t index = int64_t{first} + planner_.token;
        Logged s;
        if (planner_.token < planner_.per_turn && index < rails.num_logged) {
            const int32_t* kept = rails.log + index * log.words();
            s.expert = kept[log.expert(planner_.slot)];
            s.row = kept[log.row(planner_.slot)];
            if (args().source_weighs()) s.weight = __int_as_float(kept[log.weight(planner_.slot)]);
        }
        return s;
    }
    // Where chunk j of a ring begins among its records.
    __device__ int record_of(int j) const {
        const RailChunks& chunks = walk_.chunks;
        return chunks.pieces == 1 ? j * chunks.records : j / chunks.pieces;
    }

    // The rows of the token that left record `index` here, by the lanes of its slots; and the weights that
    // go back with it, to the address `record`.
    __device__ Plan plan_logged(const Logged& slot, int64_t index, bool wanted, bool with_weights,
                                int64_t record) const {
        const CombineArgs& a = args();
        const RankView& view = planner_.job.view;
        bool bad = wanted && index >= walk_.rails.num_logged;
        int owner = -1, row = -1;
        float weight = 1.0f;
        if (wanted && !bad && planner_.token < planner_.per_turn) {
            row = slot.row;
            weight = slot.weight;
            if (slot.expert >= 0) {
                owner = walk_.nodes().rank(walk_.my_node(), rank_of_expert(slot.expert));
            }
            bad = owner >= view.peers.near_end || (owner >= 0 && row < 0);
        }
        if (bad) {  // a tensor of the handle was changed since
            device::give_up(view.watch, planner_.op(), kMiscount,
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
    // Each lane puts its own row, with all that it has to know in its registers.
    __device__ __forceinline__ bool feed(int64_t at, int begin, int end, int i, const Plan& plan,
                                         const Handover& last) {
        const int count = __shfl_sync(~0u, plan.count, i * num_topk_), rows = max(count, 1);
        // Of no rows the lane of the first slot puts nothing.
        const int ours = planner_.token != i ? -1 : count > 0 ? plan.place : planner_.slot;
#pragma unroll 1
        for (int offset = begin; offset < end; offset += piece_bytes_) {
            const int bytes = min(piece_bytes_, end - offset);
            const bool ends = offset + bytes == end;
            const std::byte* src = count > 0 ? plan.row + offset : nullptr;
#pragma unroll 1
            for (int place = 0; place < rows; ++place) {
                const bool is_last = place == rows - 1;
                const int32_t flags = Piece::kForRail | (count > 0 ? Piece::kRow : 0) |
                                      (place == 0 ? Piece::kFirst : 0) |
                                      (is_last ? Piece::kLast : 0);
                const bool ok = ring_.put(
                    ours == place, {at + offset, bytes, flags, plan.weight}, src,
                    [&](int stage) { handovers_[stage] = ends && is_last ? last : Handover{}; });
                if (!ok) return false;
            }
        }
        return true;
    }

    const Planner& planner_;
    const RingWalk<R>& walk_;
    const int piece_bytes_, num_topk_;
    Handover* handovers_;
    RingFeeder ring_;
    Logged ahead_;
    int ahead_from_ = -1;  // the first record of these
};

}  // namespace ep::kernels
