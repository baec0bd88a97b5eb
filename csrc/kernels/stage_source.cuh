// A small combine at a source: what owners have sent is added up.
//
// defines: PartReceiver
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "contract/stage.h"
#include "device/lines.cuh"
#include "device/ptx.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"
#include "kernels/stage.cuh"
#include "kernels/stage_masks.cuh"
#include "kernels/stage_sums.cuh"
#include "kernels/usual.cuh"

namespace ep::kernels {

// Where a row is added: inside a node to the sums of its token. Rows of another node come to a sum of their
// own, which is rounded and added in turn.
template <DType kDtype, class F>
struct NodeSums {
    LineSums<kDtype, kUnitsAdded>& sums;
    const StageView<F>& stage;

    __device__ __forceinline__ LineSums<kDtype, kUnitsAdded>& of(int) { return sums; }
    __device__ __forceinline__ void close() {}
};

template <DType kDtype, class F>
    requires F::kAny
struct NodeSums<kDtype, F> {
    LineSums<kDtype, kUnitsAdded>& sums;
    const StageView<F>& stage;
    LineSums<kDtype, kUnitsAdded> other{};
    int node = -1;  // that `other` is of

    // Of a row of rank p; ranks come in ascending order.
    __device__ __forceinline__ LineSums<kDtype, kUnitsAdded>& of(int p) {
        const int its_node = stage.is_far(p) ? stage.far.nodes().node(p) : -1;
        if (its_node != node) {
            close();
            node = its_node;
            other.clear();
        }
        return node < 0 ? sums : other;
    }
    __device__ __forceinline__ void close() {
        if (node < 0) return;
#pragma unroll
        for (int v = 0; v < kUnitsAdded; ++v) sums.unit[v].add(other.unit[v].rounded());
        node = -1;
    }
};

template <DType kDtype, class F>
struct PartReceiver {
    // Rows that are on their way together: sums of another node need registers, too.
    static constexpr int kAddedAtOnce = F::kAny ? 2 : 3;
    static constexpr int kPieceUnits = kUnitsAdded * kUnitsApart;
    static constexpr int kPieceBytes = kPieceUnits * kUnitBytes;   // of a row
    static constexpr int kPieceLines = kUnitsAdded * kLinesApart;  // bytes there
    using Sums = LineSums<kDtype, kUnitsAdded>;

    const CombineJob& job;
    const CombineSpread& spread;
    StageView<F> stage;
    Entering& in;
    // Where this lane finds its part of the first line of what came from ranks of our node: in our control block,
    // whose slots of rows end below 2^32 (stage_bytes_for).
    uint32_t near = 0;

    // Once the operation is known.
    __device__ __forceinline__ void enter(Operation op, int slot) {
        stage.op.seq = op.seq, stage.slot = slot;
        near = static_cast<uint32_t>(job.view.layout.stage(slot) + LineLane{}.offset(0));
    }

    // What is added up for a token, in order: lane n knows of the n-th row that has come, or will.
    struct Part {
        int count = 0;
        int owner = 0;
        uint32_t at = 0;  // its record, in bytes: a slot has fewer than 2^32
        float weight = 1.0f;
    };

    // What a lane is told of its slot.
    struct Slot {
        int64_t id = -1;
        int row = -1, owner = -1;
        float weight = 1.0f;
    };

    // In three steps, so that its loads are under way while other things are done.
    __device__ __forceinline__ Slot slot_of(int64_t t) const {
        const CombineArgs& a = args();
        const int lane = ptx::lane_id();
        const int64_t i = t * a.num_topk + lane;
        Slot slot;
        if (t >= a.num_tokens || lane >= a.num_topk) return slot;
        slot.id = a.topk_idx[i], slot.row = a.send_row[i];
        if (weighs()) slot.weight = a.topk_weights[i];
        return slot;
    }
    __device__ __forceinline__ void find_owner(Slot& slot) const {
        const bool here = slot.row >= 0 && slot.id >= 0 && slot.id < job.view.shape.num_experts;
        if (here) slot.owner = __ldg(job.view.state.owner + slot.id);
    }
    __device__ __forceinline__ Part part_of(int64_t t, const Slot& slot) const {
        const int lane = ptx::lane_id();
        int owner = slot.owner;
        // Owners that this block has given up on are left out like those that are masked.
        const uint64_t out = F::kIsUsual ? 0 : in.masked | in.unheard;
        if (out != 0 && owner >= 0 && device::has_rank(out, owner)) owner = -1;
        const uint32_t same = __match_any_sync(~0u, owner);
        const bool adds = owner >= 0 && (!per_rank() || (same & ptx::lanemask_lt()) == 0);
        const bool by_slot = args().topk_order && !per_rank();
        const uint32_t key = !adds ? ~0u : by_slot ? lane : owner * 32 + lane;
        Part part;
        int from = 0;  // the lane that holds it now
#pragma unroll 1
        for (uint32_t next = __reduce_min_sync(~0u, key); next != ~0u;
             next = __reduce_min_sync(~0u, key > next ? key : ~0u)) {
            if (lane == part.count++) from = static_cast<int>(next % 32);
        }
        part.owner = __shfl_sync(~0u, owner, from);
        part.weight = __shfl_sync(~0u, slot.weight, from);
        const int64_t place = per_rank() ? int64_t{part.owner} * job.view.shape.max_tokens + t
                                         : t * args().num_topk + from;
        part.at = static_cast<uint32_t>(place * stage.record.bytes());
        return part;
    }
    __device__ __forceinline__ Part part_of(int64_t t) const {
        Slot slot = slot_of(t);
        find_owner(slot);
        return part_of(t, slot);
    }

    // From the token with this part on, the first of this warp. read(): all lines have been loaded. False: leave.
    template <class Read>
    __device__ __forceinline__ bool run(Pieces at, int step, Part part, Read read) {
        const auto num_tokens = static_cast<int>(args().num_tokens);
        if (at.item >= num_tokens) read();
#pragma unroll 1
        while (at.item < num_tokens) {
            Pieces next = at;
            next.next(spread.added, step);
            const bool is_last = next.item >= num_tokens;
            int p = at.piece;
            if constexpr (F::kAny) {
                if (!await_nodes(at.item, part)) return false;
            }
#pragma unroll 1
            while (true) {
                const int units = spread.row_units - p * kPieceUnits;
                Sums sums;
#pragma unroll 1
                for (int turn = 0; !add(at.item, p, units, part, sums); ++turn) {
                    if (turn >= device::kLooks && !await_parts(at.item, p, units, part)) {
                        return false;
                    }
                }
                if (is_last && at.left == 1) read();
                finish(sums, at.item, p, units);
                if (--at.left == 0) break;
                ++p;
            }
            if (is_last) break;
            at = next;
            Slot slot = slot_of(at.item);
            find_owner(slot);
            part = part_of(at.item, slot);
        }
        return true;
    }

private:
    __device__ const CombineArgs& args() const { return job.args; }
    // Rows are weighted here, not by their owners.
    __device__ bool weighs() const {
        return F::kIsUsual ? args().weighted && !kernels::sums_rows<F>(args())
                           : args().source_weighs();
    }
    __device__ bool per_rank() const {
        return is_compact<F>(args().layout) || kernels::sums_rows<F>(args());
    }

    // What other nodes have put for these slots is there. False: leave.
    __device__ __forceinline__ bool await_nodes(int t, Part& part) {
        const auto owner = [&] {
            return static_cast<int>(ptx::lane_id()) < part.count ? part.owner : -1;
        };
#pragma unroll 1
        while (const uint32_t late = stage.await_far(owner())) {
            if (!leave_out(__shfl_sync(~0u, owner(), __ffs(late) - 1))) return false;
            part = part_of(t);
        }
        return true;
    }

    // Piece p of the n-th row.
    __device__ __forceinline__ const std::byte* from(const Part& part, int n, int p) const {
        int owner = 0;
        if constexpr (F::kAny) owner = __shfl_sync(~0u, part.owner, n);
        return stage.arrival_at(owner, __shfl_sync(~0u, part.at, n) + p * kPieceLines);
    }
    // What this lane takes part in of it.
    __device__ __forceinline__ const std::byte* part_from(const Part& part, int n, int p) const {
        if constexpr (F::kAny) return from(part, n, p) + LineLane{}.offset(0);
        const uint32_t at = near + __shfl_sync(~0u, part.at, n);
        return job.view.peers.own + (at + static_cast<uint32_t>(p * kPieceLines));
    }

    // Where this lane's first unit of piece p is, in rows of sums.
    __device__ __forceinline__ int64_t place_of(int t, int p) const {
        return int64_t{t} * spread.row_bytes + p * kPieceBytes + LineLane{}.index(0) * kUnitBytes;
    }

    // `units`: of a row from piece p on. False: some lines are not there yet, and the sums are none.
    __device__ __forceinline__ bool add(int t, int p, int units, const Part& part,
                                        Sums& sums) const {
        const CombineArgs& a = args();
        NodeSums<kDtype, F> of_node{sums, stage};
        start(sums, t, p, units);
        const int left = units_from_line(units);
        const bool is_last = LineLane{}.is_last();
        bool late = false;
#pragma unroll 1
        for (int first = 0; first < part.count; first += kAddedAtOnce) {
            Words w[kAddedAtOnce][kUnitsAdded];
#pragma unroll
            for (int r = 0; r < kAddedAtOnce; ++r) {
                if (first + r >= part.count) break;
                get(part_from(part, first + r, p), left, w[r]);
            }
#pragma unroll
            for (int r = 0; r < kAddedAtOnce; ++r) {
                if (first + r >= part.count) break;
                late |= is_last & is_late(left, w[r]);
                int owner = 0;
                if constexpr (F::kAny) owner = __shfl_sync(~0u, part.owner, first + r);
                // In the order of slots all rows are added alike, wherever they come from.
                Sums& to = F::kAny && a.topk_order ? sums : of_node.of(owner);
                if (weighs()) {
                    to.add(w[r], __shfl_sync(~0u, part.weight, first + r));
                } else {
                    to.add(w[r]);
                }
            }
        }
        of_node.close();
        return !__any_sync(~0u, late);
    }

    // Until all of them are there. False: leave.
    __device__ __forceinline__ bool await_parts(int t, int p, int units, Part& part) {
        const int lines = (min(units, kPieceUnits) + kLineUnits - 1) / kLineUnits;
        part = part_of(t);  // in a node nobody else asks for owners
#pragma unroll 1
        for (int n = 0; n < part.count; ++n) {
            const int owner = __shfl_sync(~0u, part.owner, n);
            if (device::await_lines(watch_of(job.view, stage.far), stage.op, owner,
                                    from(part, n, p), 0, lines)) {
                continue;
            }
            if (!leave_out(owner)) return false;
            part = part_of(t), n = -1;
        }
        return true;
    }

    // The last block adds up everything again without this owner.
    __device__ __forceinline__ bool leave_out(int owner) {
        const bool ok = lose(job.view, in, owner);
        __syncwarp();
        return ok;
    }
    __device__ __forceinline__ static void get(const std::byte* from, int left,
                                               Words (&w)[kUnitsAdded]) {
#pragma unroll
        for (int v = 0; v < kUnitsAdded; ++v) {
            if (left > v * kUnitsApart) w[v] = device::get_line(from + v * kLinesApart);
        }
    }
    // Of the last lane of a line: it is of another operation.
    __device__ __forceinline__ bool is_late(int left, const Words (&w)[kUnitsAdded]) const {
        bool late = false;
#pragma unroll
        for (int v = 0; v < kUnitsAdded; ++v) {
            late |= (left > v * kUnitsApart) & (w[v].b != stage.op.seq);
        }
        return late;
    }

    __device__ __forceinline__ void start(Sums& sums, int t, int p, int units) const {
        const CombineArgs& a = args();
        sums.clear();
        if (F::kIsUsual || !spread.has_bias) return;
        const int left = units_from_lane(units);
        const int64_t place = place_of(t, p);
        Words w[kUnitsAdded] = {};
        load_units((a.bias0 != nullptr ? a.bias0 : a.bias1) + place, left, w);
#pragma unroll
        for (int v = 0; v < kUnitsAdded; ++v) sums.unit[v].set(device::unit_of(w[v]));
        if (a.bias0 == nullptr || a.bias1 == nullptr) return;
        load_units(a.bias1 + place, left, w);
        sums.add(w);
    }

    __device__ __forceinline__ void finish(const Sums& sums, int t, int p, int units) const {
        const int left = units_from_lane(units);
        std::byte* to = args().out + place_of(t, p);
#pragma unroll
        for (int v = 0; v < kUnitsAdded; ++v) {
            const uint4 unit = sums.unit[v].rounded();
            if (left <= v * kUnitsApart) continue;
            *reinterpret_cast<uint4*>(to + v * kUnitsApart * kUnitBytes) = unit;
        }
    }
};

}  // namespace ep::kernels
