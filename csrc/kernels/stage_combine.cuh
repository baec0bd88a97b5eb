// Combine of a small batch, bound by latency: owners put rows of outputs, or what their rows of a token
// come to, in front of the token's source; sources add up what has come (kernels/stage.cuh).
//
// Sums are those of pull.cu, bit for bit. Of a call with per_rank an owner adds its rows in the order of
// slots and rounds, and a source adds what owners send in ascending order.
//
// Of other nodes a source first adds up what each of them sends, and rounds, as when sums cross by rails: what
// comes out does not depend on the way.
//
// defines: kCombineWarps, launch_staged_combine, load_staged_combine
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

constexpr int kCombineWarps = 12;  // of a block, which has registers for so many
constexpr int kAtOnce = 4;         // times four lines that a warp has in flight
constexpr int kAtOnceWords = LineLane::kAtOnce * kLineWords;

// Of a warp: pieces of rows, first, first + step, ...; a piece of `items` after the other.
struct Pieces {
    int item, piece;
    int items_apart, pieces_apart, num_pieces;

    __device__ __forceinline__ Pieces(int pieces, int first, int step)
        : item(first / pieces), num_pieces(pieces) {
        piece = first - item * pieces;
        items_apart = step / pieces;
        pieces_apart = step - items_apart * pieces;
    }
    __device__ __forceinline__ void next() {
        item += items_apart;
        piece += pieces_apart;
        if (piece >= num_pieces) piece -= num_pieces, ++item;
    }
};

__device__ __forceinline__ uint4 as_unit(const Words& w) {
    return make_uint4(static_cast<uint32_t>(w.a), static_cast<uint32_t>(w.a >> 32),
                      static_cast<uint32_t>(w.b), static_cast<uint32_t>(w.b >> 32));
}
__device__ __forceinline__ Words as_words(const uint4& u) {
    return {uint64_t{u.y} << 32 | u.x, uint64_t{u.w} << 32 | u.z};
}

// Sums of a warp: what its lanes have of sixteen lines.
template <DType kDtype>
struct LineSums {
    device::Unit<kDtype> unit[kAtOnce];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (auto& u : unit) u.clear();
    }
    __device__ __forceinline__ void add(const Words (&w)[kAtOnce]) {
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) unit[v].add(as_unit(w[v]));
    }
    __device__ __forceinline__ void add(const Words (&w)[kAtOnce], float weight) {
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) unit[v].add(as_unit(w[v]), weight);
    }
};

// Words of a row in memory, from word `first` of a lane on. The second word of the last lane of a line is no
// word of the row.
__device__ __forceinline__ void load_words(const std::byte* row, int first, int words,
                                           Words (&w)[kAtOnce]) {
    const auto* from = reinterpret_cast<const uint64_t*>(row);
    const bool last = LineLane().is_last();
#pragma unroll
    for (int v = 0; v < kAtOnce; ++v) {
        const int i = first + v * kAtOnceWords;
        w[v] = {};
        if (i < words) w[v].a = from[i];
        if (i + 1 < words && !last) w[v].b = from[i + 1];
    }
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

    // From `token` on, the first of this warp. False: leave.
    __device__ __forceinline__ bool run(Pieces at, Token token) const {
        bool ok = true;
#pragma unroll 1
        while (ok && at.item < job.args.num_recv) {
            ok = send(token, at.piece);
            at.next();
            token = look(at.item);
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
        const int words = stage.piece_bytes(p, a.row_bytes()) / 8;
        const bool per_rank = a.layout == RecvLayout::kCompact;
#pragma unroll 1
        for (uint32_t left = rows; left != 0; left &= left - 1) {
            const int slot = __ffs(left) - 1, row = __shfl_sync(~0u, own, slot);
            const int64_t place = per_rank ? int64_t{view.peers.rank} * view.shape.max_tokens + t
                                           : int64_t{t} * a.num_topk + slot;
            const int64_t own_place = place_out(src, t, per_rank ? 0 : slot);
            std::byte* to = target(src, place, own_place) + stage.piece_at(p);
#pragma unroll 1
            for (int line = 0; line * kLineWords < words; line += kAtOnce * LineLane::kAtOnce) {
                Words w[kAtOnce];
                load_words(piece_of(row, p), LineLane().word(line), words, w);
                put(to, line, words, w);
            }
            // A token counts the same at its source, however many rows it has here.
            const bool is_last = (left & (left - 1)) == 0;
            const int others = per_rank ? 0 : a.num_topk - __popc(rows);
            send_off(src, place, own_place, p, words, is_last ? 1 + others : 1);
        }
        return true;
    }

    __device__ __forceinline__ bool send_sum(int src, int t, int p, int own, uint32_t rows) const {
        const CombineArgs& a = args();
        const RankView& view = job.view;
        const int words = stage.piece_bytes(p, a.row_bytes()) / 8;
        float weight = 1.0f;
        if (a.weighted && own >= 0) weight = a.row_weights[own];
        const int64_t place = int64_t{view.peers.rank} * view.shape.max_tokens + t;
        const int64_t own_place = place_out(src, t, 0);
        std::byte* to = target(src, place, own_place) + stage.piece_at(p);
#pragma unroll 1
        for (int line = 0; line * kLineWords < words; line += kAtOnce * LineLane::kAtOnce) {
            const int first = LineLane().word(line);
            LineSums<kDtype> sums;
            sums.clear();
            Words next[kAtOnce];
            load_words(piece_of(__shfl_sync(~0u, own, __ffs(rows) - 1), p), first, words, next);
#pragma unroll 1
            for (uint32_t left = rows; left != 0;) {
                const float factor = __shfl_sync(~0u, weight, __ffs(left) - 1);
                Words w[kAtOnce];
#pragma unroll
                for (int v = 0; v < kAtOnce; ++v) w[v] = next[v];
                left &= left - 1;
                if (left != 0) {
                    const int row = __shfl_sync(~0u, own, __ffs(left) - 1);
                    load_words(piece_of(row, p), first, words, next);
                }
                if (a.weighted) {
                    sums.add(w, factor);
                } else {
                    sums.add(w);
                }
            }
            Words out[kAtOnce];
#pragma unroll
            for (int v = 0; v < kAtOnce; ++v) out[v] = as_words(sums.unit[v].rounded());
            put(to, line, words, out);
        }
        send_off(src, place, own_place, p, words, 1);
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
                                             int words, int amount) const {
        if constexpr (F::kAny) {
            if (!stage.is_far(src)) return;
            const int64_t bytes = stage.record.bytes(), at = stage.piece_at(p);
            const int64_t lines = (words + kLineWords - 1) / kLineWords;
            device::fence_stage();
            stage.far.put(job.view, stage.slot, src, own_place * bytes + at, place * bytes + at,
                          kLineBytes * lines, static_cast<uint64_t>(amount));
        }
    }

    __device__ __forceinline__ void put(std::byte* to, int line, int words,
                                        Words (&w)[kAtOnce]) const {
        const LineLane at;
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
            const int l = line + v * LineLane::kAtOnce;
            if (at.is_last()) w[v].b = stage.op.seq;
            __syncwarp();
            if ((l + at.line) * kLineWords < words) device::put_line(to + at.offset(l), w[v]);
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
    __device__ __forceinline__ bool run(Pieces at, Part part) {
        bool ok = true;
#pragma unroll 1
        while (ok && at.item < job.args.num_tokens) {
            ok = receive(at.item, at.piece, part);
            at.next();
            part = part_of(at.item);
        }
        return ok;
    }

private:
    __device__ const CombineArgs& args() const { return job.args; }
    __device__ bool per_rank() const {
        return args().layout == RecvLayout::kCompact || args().per_rank;
    }

    __device__ __forceinline__ bool receive(int t, int p, const Part& part) {
        const CombineArgs& a = args();
        const int words = stage.piece_bytes(p, a.row_bytes()) / 8;
        if (!stage.await_far(part.key == ~0u ? -1 : static_cast<int>(part.key / 32))) return false;
#pragma unroll 1
        for (int line = 0; line * kLineWords < words; line += kAtOnce * LineLane::kAtOnce) {
            LineSums<kDtype> sums;
            NodeSums<kDtype, F> of_node{sums, stage};
            start(sums, t, p, LineLane().word(line), words);
            // One row is added while the next one comes.
            Words next[kAtOnce];
            uint32_t now = __reduce_min_sync(~0u, part.key);
            if (now != ~0u) get(from(t, p, now), line, words, next);
#pragma unroll 1
            while (now != ~0u) {
                const uint32_t then = __reduce_min_sync(~0u, part.key > now ? part.key : ~0u);
                if (!there(line, words, next)) {
                    const bool came = await(t, p, now, line, words);
                    if (!came && !leave_out(owner_of(t, now))) return false;
                    if (!came) now = then;
                    if (now != ~0u) get(from(t, p, now), line, words, next);
                    continue;
                }
                Words w[kAtOnce];
#pragma unroll
                for (int v = 0; v < kAtOnce; ++v) w[v] = next[v];
                if (then != ~0u) get(from(t, p, then), line, words, next);
                LineSums<kDtype>& to = of_node.of(static_cast<int>(now / 32));
                if (a.weighted && !a.per_rank) {
                    to.add(w, __shfl_sync(~0u, part.weight, now % 32));
                } else {
                    to.add(w);
                }
                now = then;
            }
            of_node.close();
            finish(sums, t, p, LineLane().word(line), words);
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
    __device__ __forceinline__ bool await(int t, int p, uint32_t key, int line, int words) const {
        const int owner = owner_of(t, key);
        const int end = (words + kLineWords - 1) / kLineWords;
        return device::await_lines(job.view.watch, stage.op, owner, from(t, p, key), line,
                                   min(line + kAtOnce * LineLane::kAtOnce, end));
    }
    __device__ __forceinline__ const std::byte* from(int t, int p, uint32_t key) const {
        const RankView& view = job.view;
        const int64_t place = per_rank() ? int64_t{key / 32} * view.shape.max_tokens + t
                                         : int64_t{t} * args().num_topk + key % 32;
        return stage.arrival(static_cast<int>(key / 32), place) + stage.piece_at(p);
    }

    __device__ __forceinline__ void get(const std::byte* piece, int line, int words,
                                        Words (&w)[kAtOnce]) const {
        const LineLane at;
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
            const int l = line + v * LineLane::kAtOnce;
            if ((l + at.line) * kLineWords < words) w[v] = device::get_line(piece + at.offset(l));
        }
    }
    __device__ __forceinline__ bool there(int line, int words, const Words (&w)[kAtOnce]) const {
        const LineLane at;
        bool all = true;
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
            const int l = line + v * LineLane::kAtOnce + at.line;
            all = all && (l * kLineWords >= words || !at.is_last() || w[v].b == stage.op.seq);
        }
        return __all_sync(~0u, all);
    }

    __device__ __forceinline__ void start(LineSums<kDtype>& sums, int t, int p, int first,
                                          int words) const {
        const CombineArgs& a = args();
        sums.clear();
        if (a.bias0 == nullptr && a.bias1 == nullptr) return;
        const int64_t at = t * a.row_bytes() + int64_t{p} * stage.record.piece_bytes;
        Words w[kAtOnce];
        load_words((a.bias0 != nullptr ? a.bias0 : a.bias1) + at, first, words, w);
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) sums.unit[v].set(as_unit(w[v]));
        if (a.bias0 == nullptr || a.bias1 == nullptr) return;
        load_words(a.bias1 + at, first, words, w);
        sums.add(w);
    }

    __device__ __forceinline__ void finish(const LineSums<kDtype>& sums, int t, int p, int first,
                                           int words) const {
        auto* out = reinterpret_cast<uint64_t*>(args().out + t * args().row_bytes() +
                                                int64_t{p} * stage.record.piece_bytes);
        const bool last = LineLane().is_last();
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
            const int i = first + v * kAtOnceWords;
            const Words w = as_words(sums.unit[v].rounded());
            if (i < words) out[i] = w.a;
            if (i + 1 < words && !last) out[i + 1] = w.b;
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
    (void)receiver.run(Pieces(record.num_pieces, 0, 1), receiver.part_of(0));
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
__global__ void __launch_bounds__(kCombineWarps * 32, 1)
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
    const Pieces pieces(record.num_pieces, warp * gridDim.x + blockIdx.x,
                        kCombineWarps * gridDim.x);
    PartSender<kDtype, F> sender{job, {view, record, control, {OpKind::kCombine, 0}, 0, far}};
    ptx::griddepcontrol_wait();
    typename PartSender<kDtype, F>::Token token;
    if constexpr (kHalf != Half::kReceive) token = sender.look(pieces.item);
    bool ok = true;
    if (warp == kCombineWarps - 1) ok = begin_half<kHalf>(view, job.begin, job.begun, far, in);
    if (warp == kCombineWarps - 2) ok = !device::gave_up(view.watch);
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
        ok = sender.run(pieces, token);
        if constexpr (F::kAny) far.rail.flush();
    }
    bool good = true;
    if constexpr (kHalf != Half::kSend) {
        PartReceiver<kDtype, F> receiver{job, sender.stage, in, in.masked};
        auto part = receiver.part_of(pieces.item);
        if constexpr (F::kAny) (void)far.hear(view, op, in.slot, kCombineWarps - 1);
        if (blockIdx.x == 0 && warp == kCombineWarps - 1 && job.args.wait_stats != nullptr) {
            time_notices(view, in, op, job.args.wait_stats);
        }
        if (!await_notices<true>(view, job.begin, in, HearNothing{})) return;
        if (!settle_masked(view, in) && !hear_again(view, job.begin, in)) return;
        if (receiver.masked != in.masked) {
            receiver.masked = in.masked;
            part = receiver.part_of(pieces.item);
        }
        good = in.first_bad == kNoObjection;
        if (ok && good) ok = receiver.run(pieces, part);
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
                            {num_blocks, kCombineWarps * 32, control_bytes}, true, stream, job,
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
