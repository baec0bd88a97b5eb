// Combine of a small batch, bound by latency: owners put rows of outputs, or what their rows of a token
// come to, in front of the token's source; sources add up what has come (kernels/stage.cuh).
//
// Sums are those of pull.cu, bit for bit. Of a call with per_rank an owner adds its rows in the order of
// slots and rounds, and a source adds what owners send in ascending order.
//
// Of other nodes a source first adds up what each of them sends, and rounds, as when sums cross by rails: what
// comes out does not depend on the way.
//
// defines: launch_staged_combine, load_staged_combine
#pragma once

#include <cuda_runtime_api.h>

#include "contract/gpu.h"
#include "contract/rail.h"
#include "contract/stage.h"
#include "device/lines.cuh"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "device/rail.cuh"
#include "device/reduce.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.cuh"
#include "kernels/stage.cuh"
#include "kernels/stage_masks.cuh"

namespace ep::kernels {

using device::LineLane;
using device::Words;

constexpr int kAtOnce = 2;      // times four lines of a row that a warp works at
constexpr int kRowsAtOnce = 4;  // rows of a token that are on their way together
constexpr int kUnitsApart = LineLane::kAtOnce * kLineUnits;

// Of a warp: pieces of rows, one of `step` of the grid after the other; a piece of `item` after the other.
struct Pieces {
    int index, num_pieces;

    __device__ __forceinline__ int item() const { return index / num_pieces; }
    __device__ __forceinline__ int piece() const { return index - item() * num_pieces; }
    __device__ __forceinline__ void next(int step) { index += step; }
};

// Sums of a warp: what its lanes have of eight lines.
template <DType kDtype>
struct LineSums {
    device::Unit<kDtype> unit[kAtOnce];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (auto& u : unit) u.clear();
    }
    __device__ __forceinline__ void add(const Words (&w)[kAtOnce]) {
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) unit[v].add(device::unit_of(w[v]));
    }
    __device__ __forceinline__ void add(const Words (&w)[kAtOnce], float weight) {
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) unit[v].add(device::unit_of(w[v]), weight);
    }
};

// Units of a row in memory, from a lane's first one on.
__device__ __forceinline__ void load_units(const std::byte* row, int first, int units,
                                           Words (&w)[kAtOnce]) {
#pragma unroll
    for (int v = 0; v < kAtOnce; ++v) {
        const int i = first + v * kUnitsApart;
        w[v] = {};
        if (i < units) w[v] = device::words_of(reinterpret_cast<const uint4*>(row)[i]);
    }
}

// A lane's first unit, or none.
__device__ __forceinline__ int first_unit(int line, int units) {
    const LineLane at;
    return at.is_last() ? units : at.index(line);
}

// ---- the owner ----

template <DType kDtype, class F>
struct PartSender {
    const CombineJob& job;
    StageView<F> stage;
    uint64_t masked = 0;  // ranks that nothing is sent to

    // A token that came here: its rows are held by the lanes of their slots.
    struct Token {
        int src = -1, t = -1, row = -1;
    };
    __device__ __forceinline__ Token look(int64_t i) const {
        const CombineArgs& a = args();
        const int lane = ptx::lane_id();
        Token token;
        if (i >= a.num_recv) return token;
        const int2 from = *reinterpret_cast<const int2*>(a.recv_src + 2 * i);
        token.src = from.x, token.t = from.y;
        if (a.layout == RecvLayout::kCompact) {
            token.row = lane == 0 ? static_cast<int>(i) : -1;
        } else if (lane < a.num_topk) {
            token.row = a.recv_row[i * a.num_topk + lane];
        }
        return token;
    }

    // What will be read of a token comes nearer.
    __device__ __forceinline__ void fetch(const Token& token, int p) const {
        if (token.row < 0 || token.row >= args().num_rows) return;
        const std::byte* piece = piece_of(token.row, p);
        const int bytes = stage.piece_bytes(p, args().row_bytes());
#pragma unroll 1
        for (int at = 0; at < bytes; at += 128) ptx::prefetch_global_l2(piece + at);
    }

    // From `token` on, the first of this warp. False: leave.
    __device__ __forceinline__ bool run(Pieces at, int step, Token token) const {
        bool ok = true;
#pragma unroll 1
        while (ok && at.item() < job.args.num_recv) {
            const int piece = at.piece();
            at.next(step);
            const Token ahead = look(at.item());
            ok = send(token, piece);
            token = ahead;
        }
        return ok;
    }

private:
    __device__ const CombineArgs& args() const { return job.args; }

    __device__ __forceinline__ bool send(const Token& token, int p) const {
        const CombineArgs& a = args();
        const RankView& view = job.view;
        const bool compact = a.layout == RecvLayout::kCompact;
        const int src = token.src, t = token.t, row = token.row;
        if (src < 0) return true;  // nobody's
        // Tensors of a handle, which anybody may have changed.
        const bool bad =
            src >= view.shape.num_ranks || t < 0 || t >= view.shape.max_tokens || row >= a.num_rows;
        if (__any_sync(~0u, bad)) {
            device::give_up(view.watch, stage.op, kMiscount,
                            {Site::kPulled, view.peers.rank, uint64_t(a.num_rows)}, uint64_t(row),
                            0);
            return false;
        }
        if (masked != 0 && device::has_rank(masked, src)) return true;
        const uint32_t rows = __ballot_sync(~0u, row >= 0);
        if (compact || !a.per_rank) return send_each(src, t, p, row, rows);
        return send_sum(src, t, p, row, rows);
    }

    __device__ const std::byte* piece_of(int row, int p) const {
        return args().x + row * args().row_bytes() + int64_t{p} * stage.record.piece_bytes;
    }

    __device__ __forceinline__ bool send_each(int src, int t, int p, int own, uint32_t rows) const {
        const CombineArgs& a = args();
        const RankView& view = job.view;
        const int units = stage.piece_bytes(p, a.row_bytes()) / kUnitBytes;
        const bool per_rank = a.layout == RecvLayout::kCompact;
        const auto place_of = [&](int slot) {
            return per_rank ? int64_t{view.peers.rank} * view.shape.max_tokens + t
                            : int64_t{t} * a.num_topk + slot;
        };
        const auto own_place_of = [&](int slot) { return place_out(src, t, per_rank ? 0 : slot); };
#pragma unroll 1
        for (int line = 0; line * kLineUnits < units; line += kAtOnce * LineLane::kAtOnce) {
            const int first = first_unit(line, units);
#pragma unroll 1
            for (uint32_t left = rows; left != 0;) {
                Words w[kRowsAtOnce][kAtOnce];
                load_rows(p, own, left, first, units, w);
#pragma unroll
                for (int r = 0; r < kRowsAtOnce && left != 0; ++r, left &= left - 1) {
                    const int slot = __ffs(left) - 1;
                    std::byte* to = target(src, place_of(slot), own_place_of(slot));
                    put(to + stage.piece_at(p), line, units, w[r]);
                }
            }
        }
        if constexpr (F::kAny) {
#pragma unroll 1
            for (uint32_t left = rows; left != 0; left &= left - 1) {
                const int slot = __ffs(left) - 1;
                // A token counts the same at its source, however many rows it has here.
                const bool is_last = (left & (left - 1)) == 0;
                const int others = per_rank ? 0 : a.num_topk - __popc(rows);
                send_off(src, place_of(slot), own_place_of(slot), p, units,
                         is_last ? 1 + others : 1);
            }
        }
        return true;
    }

    // Of the next rows of `left`, held by the lanes of their slots.
    __device__ __forceinline__ void load_rows(int p, int own, uint32_t left, int first, int units,
                                              Words (&w)[kRowsAtOnce][kAtOnce]) const {
#pragma unroll
        for (int r = 0; r < kRowsAtOnce && left != 0; ++r, left &= left - 1) {
            const int row = __shfl_sync(~0u, own, __ffs(left) - 1);
            load_units(piece_of(row, p), first, units, w[r]);
        }
    }

    __device__ __forceinline__ bool send_sum(int src, int t, int p, int own, uint32_t rows) const {
        const CombineArgs& a = args();
        const RankView& view = job.view;
        const int units = stage.piece_bytes(p, a.row_bytes()) / kUnitBytes;
        float weight = 1.0f;
        if (a.weighted && own >= 0) weight = a.row_weights[own];
        const int64_t place = int64_t{view.peers.rank} * view.shape.max_tokens + t;
        const int64_t own_place = place_out(src, t, 0);
        std::byte* to = target(src, place, own_place) + stage.piece_at(p);
#pragma unroll 1
        for (int line = 0; line * kLineUnits < units; line += kAtOnce * LineLane::kAtOnce) {
            const int first = first_unit(line, units);
            LineSums<kDtype> sums;
            sums.clear();
#pragma unroll 1
            for (uint32_t left = rows; left != 0;) {
                Words w[kRowsAtOnce][kAtOnce];
                load_rows(p, own, left, first, units, w);
#pragma unroll
                for (int r = 0; r < kRowsAtOnce && left != 0; ++r, left &= left - 1) {
                    const float factor = __shfl_sync(~0u, weight, __ffs(left) - 1);
                    if (a.weighted) {
                        sums.add(w[r], factor);
                    } else {
                        sums.add(w[r]);
                    }
                }
            }
            Words out[kAtOnce];
#pragma unroll
            for (int v = 0; v < kAtOnce; ++v) out[v] = device::words_of(sums.unit[v].rounded());
            put(to, line, units, out);
        }
        send_off(src, place, own_place, p, units, 1);
        return true;
    }

    // ---- ranks of other nodes ----

    // Where a row for one of them stands in our outbox.
    __device__ __forceinline__ int64_t place_out(int src, int t, int slot) const {
        const RankView& view = job.view;
        const int ahead =
            src < view.peers.near_begin ? 0 : view.peers.near_end - view.peers.near_begin;
        const int each = args().one_per_rank() ? 1 : args().num_topk;
        return ((src - ahead) * view.shape.max_tokens + t) * each + slot;
    }
    // Where lines of a record go, by its place there and in our outbox.
    __device__ __forceinline__ std::byte* target(int src, int64_t place, int64_t own_place) const {
        if constexpr (F::kAny) {
            if (stage.is_far(src)) {
                return stage.far.outgoing(stage.slot, own_place * stage.record.bytes());
            }
        }
        return stage.place(src, place);
    }
    // A piece that is complete there.
    __device__ __forceinline__ void send_off(int src, int64_t place, int64_t own_place, int p,
                                             int units, int amount) const {
        if constexpr (F::kAny) {
            if (!stage.is_far(src)) return;
            const int64_t bytes = stage.record.bytes(), at = stage.piece_at(p);
            const int64_t lines = (units + kLineUnits - 1) / kLineUnits;
            device::fence_stage();
            stage.far.put(job.view, stage.slot, src, own_place * bytes + at, place * bytes + at,
                          kLineBytes * lines, static_cast<uint64_t>(amount));
        }
    }

    __device__ __forceinline__ void put(std::byte* to, int line, int units,
                                        Words (&w)[kAtOnce]) const {
        const LineLane at;
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
            const int l = line + v * LineLane::kAtOnce;
            if (at.is_last()) w[v].b = stage.op.seq;
            __syncwarp();
            if ((l + at.line) * kLineUnits < units) device::put_line(to + at.offset(l), w[v]);
        }
    }
};

// ---- the source ----

// Where a row is added: inside a node to the sums of its token. Rows of another node come to a sum of their
// own, which is rounded and added in turn.
template <DType kDtype, class F>
struct NodeSums {
    LineSums<kDtype>& sums;
    const StageView<F>& stage;

    __device__ __forceinline__ LineSums<kDtype>& of(int) { return sums; }
    __device__ __forceinline__ void close() {}
};

template <DType kDtype, class F>
    requires F::kAny
struct NodeSums<kDtype, F> {
    LineSums<kDtype>& sums;
    const StageView<F>& stage;
    LineSums<kDtype> other{};
    int node = -1;  // that `other` is of

    // Of a row of rank p; ranks come in ascending order.
    __device__ __forceinline__ LineSums<kDtype>& of(int p) {
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
        for (int v = 0; v < kAtOnce; ++v) sums.unit[v].add(other.unit[v].rounded());
        node = -1;
    }
};

template <DType kDtype, class F>
struct PartReceiver {
    const CombineJob& job;
    StageView<F> stage;
    Entering& in;
    uint64_t masked;  // owners whose rows are left out

    // What a lane knows of the slot that is its: in which order its row is added, if it is.
    struct Part {
        uint32_t key = ~0u;
        float weight = 1.0f;
    };

    __device__ __forceinline__ Part part_of(int64_t t) const {
        const CombineArgs& a = args();
        const int lane = ptx::lane_id();
        const int64_t i = t * a.num_topk + lane;
        int owner = -1;
        Part part;
        if (t < a.num_tokens && lane < a.num_topk) {
            const int64_t id = a.topk_idx[i];
            const bool here = a.send_row[i] >= 0 && id >= 0 && id < job.view.shape.num_experts;
            if (here) owner = __ldg(job.view.state.owner + id);
            if (a.weighted && !a.per_rank) part.weight = a.topk_weights[i];
        }
        if (masked != 0 && owner >= 0 && device::has_rank(masked, owner)) owner = -1;
        const uint32_t same = __match_any_sync(~0u, owner);
        const bool adds = owner >= 0 && (!per_rank() || (same & ptx::lanemask_lt()) == 0);
        if (adds) part.key = a.topk_order && !per_rank() ? lane : owner * 32 + lane;
        return part;
    }

    // From the token with this part on, the first of this warp. False: leave.
    __device__ __forceinline__ bool run(Pieces at, int step, Part part) {
        bool ok = true;
#pragma unroll 1
        while (ok && at.item() < job.args.num_tokens) {
            ok = receive(at.item(), at.piece(), part);
            at.next(step);
            part = part_of(at.item());
        }
        return ok;
    }

private:
    __device__ const CombineArgs& args() const { return job.args; }
    __device__ bool per_rank() const {
        return args().layout == RecvLayout::kCompact || args().per_rank;
    }

    __device__ __forceinline__ bool receive(int t, int p, Part part) {
        const int units = stage.piece_bytes(p, args().row_bytes()) / kUnitBytes;
        if (!stage.await_far(part.key == ~0u ? -1 : static_cast<int>(part.key / 32))) return false;
#pragma unroll 1
        for (int line = 0; line * kLineUnits < units; line += kAtOnce * LineLane::kAtOnce) {
            LineSums<kDtype> sums;
#pragma unroll 1
            for (int turn = 0; !add(t, p, line, units, part, sums); ++turn) {
                if (turn >= device::kLooks && !await_parts(t, p, line, units, part)) return false;
            }
            finish(sums, t, p, first_unit(line, units), units);
        }
        return true;
    }

    // False: some lines are not there yet, and the sums are none.
    __device__ __forceinline__ bool add(int t, int p, int line, int units, const Part& part,
                                        LineSums<kDtype>& sums) const {
        const CombineArgs& a = args();
        NodeSums<kDtype, F> of_node{sums, stage};
        start(sums, t, p, first_unit(line, units), units);
        bool all = true;
        uint32_t ahead = __reduce_min_sync(~0u, part.key);
#pragma unroll 1
        while (ahead != ~0u) {
            uint32_t now[kRowsAtOnce];
            Words w[kRowsAtOnce][kAtOnce];
#pragma unroll
            for (int r = 0; r < kRowsAtOnce; ++r) {
                now[r] = ahead;
                if (ahead == ~0u) continue;
                get(from(t, p, ahead), line, units, w[r]);
                ahead = __reduce_min_sync(~0u, part.key > ahead ? part.key : ~0u);
            }
#pragma unroll
            for (int r = 0; r < kRowsAtOnce; ++r) {
                if (now[r] == ~0u) break;
                all = all && there(line, units, w[r]);
                LineSums<kDtype>& to = of_node.of(static_cast<int>(now[r] / 32));
                if (a.weighted && !a.per_rank) {
                    to.add(w[r], __shfl_sync(~0u, part.weight, now[r] % 32));
                } else {
                    to.add(w[r]);
                }
            }
        }
        of_node.close();
        return all;
    }

    // Until all of them are there. False: leave.
    __device__ __forceinline__ bool await_parts(int t, int p, int line, int units, Part& part) {
        const int end =
            min(line + kAtOnce * LineLane::kAtOnce, (units + kLineUnits - 1) / kLineUnits);
#pragma unroll 1
        for (uint32_t now = __reduce_min_sync(~0u, part.key); now != ~0u;
             now = __reduce_min_sync(~0u, part.key > now ? part.key : ~0u)) {
            const int owner = owner_of(t, now);
            const std::byte* piece = from(t, p, now);
            if (device::await_lines(job.view.watch, stage.op, owner, piece, line, end)) continue;
            if (!leave_out(owner)) return false;
            part = part_of(t);
        }
        return true;
    }

    // The last block adds up everything again without this owner.
    __device__ __forceinline__ bool leave_out(int owner) {
        masked |= uint64_t{1} << owner;
        return lose(job.view, in, owner);
    }
    __device__ __forceinline__ int owner_of(int t, uint32_t key) const {
        const int64_t slot = int64_t{t} * args().num_topk + key % 32;
        return __ldg(job.view.state.owner + args().topk_idx[slot]);
    }
    __device__ __forceinline__ const std::byte* from(int t, int p, uint32_t key) const {
        const RankView& view = job.view;
        const int64_t place = per_rank() ? int64_t{key / 32} * view.shape.max_tokens + t
                                         : int64_t{t} * args().num_topk + key % 32;
        return stage.arrival(static_cast<int>(key / 32), place) + stage.piece_at(p);
    }

    __device__ __forceinline__ void get(const std::byte* piece, int line, int units,
                                        Words (&w)[kAtOnce]) const {
        const LineLane at;
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
            const int l = line + v * LineLane::kAtOnce;
            if ((l + at.line) * kLineUnits < units) w[v] = device::get_line(piece + at.offset(l));
        }
    }
    __device__ __forceinline__ bool there(int line, int units, const Words (&w)[kAtOnce]) const {
        const LineLane at;
        bool all = true;
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
            const int l = line + v * LineLane::kAtOnce + at.line;
            all = all && (l * kLineUnits >= units || !at.is_last() || w[v].b == stage.op.seq);
        }
        return __all_sync(~0u, all);
    }

    __device__ __forceinline__ void start(LineSums<kDtype>& sums, int t, int p, int first,
                                          int units) const {
        const CombineArgs& a = args();
        sums.clear();
        if (a.bias0 == nullptr && a.bias1 == nullptr) return;
        const int64_t at = t * a.row_bytes() + int64_t{p} * stage.record.piece_bytes;
        Words w[kAtOnce];
        load_units((a.bias0 != nullptr ? a.bias0 : a.bias1) + at, first, units, w);
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) sums.unit[v].set(device::unit_of(w[v]));
        if (a.bias0 == nullptr || a.bias1 == nullptr) return;
        load_units(a.bias1 + at, first, units, w);
        sums.add(w);
    }

    __device__ __forceinline__ void finish(const LineSums<kDtype>& sums, int t, int p, int first,
                                           int units) const {
        auto* out = reinterpret_cast<uint4*>(args().out + t * args().row_bytes() +
                                             int64_t{p} * stage.record.piece_bytes);
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
            const int i = first + v * kUnitsApart;
            if (i < units) out[i] = sums.unit[v].rounded();
        }
    }
};

// Nobody has more to say than that it is there.
struct HearNothing {
    __device__ __forceinline__ bool operator()(int, const NoticeWords&, const Head&) const {
        return true;
    }
};
__device__ __noinline__ inline bool hear_again(const RankView& view, const Begin& begin,
                                               Entering& in) {
    return await_notices<true>(view, begin, in, HearNothing{});
}

// An owner was lost when some of its rows had been added: now by one warp, without it.
template <DType kDtype, class F>
__device__ __noinline__ void add_again(const CombineJob& job, const Record& record,
                                       std::byte* const* control, const F& far, Entering& in,
                                       uint64_t lost) {
    const StageView<F> stage{job.view, record, control, {OpKind::kCombine, in.seq}, in.slot, far};
    PartReceiver<kDtype, F> receiver{job, stage, in, in.masked | lost};
    // Nothing of the others is missing.
    (void)receiver.run({0, record.num_pieces}, 1, receiver.part_of(0));
}

// ---- the kernel ----

// All threads of the block that publishes: what we put to each rank, as many as tokens of it came here.
template <class F>
__device__ __forceinline__ void tell_rows(const CombineJob& job, const Record& record, const F& far,
                                          const Entering& in) {
    const CombineArgs& a = job.args;
    const RankView& view = job.view;
    const int num_nodes = far.nodes().num_nodes, channels = far.shape().num_channels;
    const RailNoticeLayout notice(view.shape, num_nodes, channels);
    const auto each =
        static_cast<uint64_t>(record.num_pieces * (a.one_per_rank() ? 1 : a.num_topk));
#pragma unroll 1
    for (int i = threadIdx.x; i < num_nodes * channels; i += blockDim.x) {  // nothing by rings
        in.outbox[notice.records + i] = device::pack(0, in.seq);
    }
    const auto tokens = [&](int p) {
        return static_cast<uint64_t>(a.rank_counts[view.shape.num_ranks + p]);
    };
    far.publish(view, in, tokens, [&](int p) { return tokens(p) * each; });
}

template <DType kDtype, Half kHalf, class F>
__global__ void __launch_bounds__(F::kCombineWarps * 32, 1)
    stage_combine_kernel(const __grid_constant__ CombineJob job,
                         const __grid_constant__ Record record, const __grid_constant__ F far) {
    auto** control = reinterpret_cast<std::byte**>(ptx::dynamic_shared());  // [num_ranks] blocks
    __shared__ Uninitialized<Entering> entering;
    Entering& in = entering.get();
    const RankView& view = job.view;
    const int warp = threadIdx.x / 32;
    ptx::griddepcontrol_launch_dependents();
    for (int p = threadIdx.x; p < view.shape.num_ranks; p += blockDim.x) {
        control[p] = view.peers.control[p];
    }
    const Pieces pieces{static_cast<int>(warp * gridDim.x + blockIdx.x), record.num_pieces};
    const auto step = static_cast<int>(F::kCombineWarps * gridDim.x);
    PartSender<kDtype, F> sender{job, {view, record, control, {OpKind::kCombine, 0}, 0, far}};
    ptx::griddepcontrol_wait();
    typename PartSender<kDtype, F>::Token token;
    if constexpr (kHalf != Half::kReceive) {
        token = sender.look(pieces.item());
        sender.fetch(token, pieces.piece());
    }
    bool ok = true;
    if (warp == F::kCombineWarps - 1) ok = begin_half<kHalf>(view, job.begin, job.begun, far, in);
    if (warp == F::kCombineWarps - 2) ok = !device::gave_up(view.watch);
    if (!__syncthreads_and(ok)) return;
    sender.stage.op.seq = in.seq;
    sender.stage.slot = in.slot;
    sender.masked = in.masked;
    const Operation op = sender.stage.op;
    if constexpr (kHalf != Half::kReceive) {
        if (blockIdx.x == gridDim.x - 1) {
            publish_head(view, job.begin, in);
            if constexpr (F::kAny) tell_rows(job, record, far, in);
        }
        ok = sender.run(pieces, step, token);
        if constexpr (F::kAny) far.rail.flush();
    }
    bool good = true;
    if constexpr (kHalf != Half::kSend) {
        PartReceiver<kDtype, F> receiver{job, sender.stage, in, in.masked};
        auto part = receiver.part_of(pieces.item());
        if constexpr (F::kAny) (void)far.hear(view, op, in.slot, F::kCombineWarps - 1);
        if (blockIdx.x == 0 && warp == F::kCombineWarps - 1 && job.args.wait_stats != nullptr) {
            time_notices(view, in, op, job.args.wait_stats);
        }
        if (!await_notices<true>(view, job.begin, in, HearNothing{})) return;
        if (!settle_masked(view, in) && !hear_again(view, job.begin, in)) return;
        if (receiver.masked != in.masked) {
            receiver.masked = in.masked;
            part = receiver.part_of(pieces.item());
        }
        good = in.first_bad == kNoObjection;
        if (ok && good) ok = receiver.run(pieces, step, part);
    }
    if (!__syncthreads_and(ok) || threadIdx.x >= 32 || !last_block(view)) return;
    if constexpr (kHalf != Half::kSend) {
        if (const uint64_t lost = take_lost(view, in)) {
            add_again<kDtype>(job, record, control, far, in, lost);
        }
    }
    if (good) return end_half<kHalf>(view, job.begun, far, op, in);
    if (ptx::lane_id() == 0) explain(view, job.begin, in);
    __syncwarp();
    if constexpr (F::kAny) {
        if (!far.leave(view, op, in)) return;
    }
    fail_call(view, job.begin, in, kHalf == Half::kBoth);
}

template <class F>
using StageCombineKernel = void (*)(CombineJob, Record, F);

// Every kernel that exists, in one place.
template <Half kHalf, class F>
StageCombineKernel<F> stage_combine_of(DType dtype) {
    switch (dtype) {
        case DType::kBF16:
            return stage_combine_kernel<DType::kBF16, kHalf, F>;
        case DType::kF16:
            return stage_combine_kernel<DType::kF16, kHalf, F>;
        default:
            return stage_combine_kernel<DType::kF32, kHalf, F>;
    }
}

template <class F>
StageCombineKernel<F> stage_combine_for(DType dtype, Half half) {
    switch (half) {
        case Half::kBoth:
            return stage_combine_of<Half::kBoth, F>(dtype);
        case Half::kSend:
            return stage_combine_of<Half::kSend, F>(dtype);
        default:
            return stage_combine_of<Half::kReceive, F>(dtype);
    }
}

template <class F>
int launch_staged_combine(const F& far, const CombineJob& job, Half half, int num_blocks,
                          Stream stream) {
    const int control_bytes = 8 * job.view.shape.num_ranks;
    return launch_dependent(stage_combine_for<F>(job.args.dtype, half),
                            {num_blocks, F::kCombineWarps * 32, control_bytes}, true, stream, job,
                            record_of(job.args), far);
}

template <class F>
int load_staged_combine(int smem_bytes) {
    for (const Half half : {Half::kBoth, Half::kSend, Half::kReceive}) {
        for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
            const auto kernel = reinterpret_cast<const void*>(stage_combine_for<F>(dtype, half));
            if (const int error = load_kernel(kernel, smem_bytes)) return error;
        }
    }
    return 0;
}

}  // namespace ep::kernels
