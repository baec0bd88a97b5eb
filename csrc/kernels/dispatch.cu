// Dispatch: every token is loaded once and bulk-copied straight into its final row at each rank that
// owns one of its experts; the receiver then unpacks what came beside the rows.
//
// Rows were fixed by notify, so senders never negotiate and receivers copy nothing but duplicates. A
// stage is refilled when its stores have been read; rows are counted as arrived when all stores of
// the block are complete.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "contract/calls.h"
#include "contract/gpu.h"
#include "device/copy.cuh"
#include "device/ptx.cuh"
#include "device/quantize.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"
#include "kernels/launch.h"

namespace ep::kernels {
namespace {

using device::Stage;

// ---- push ----

// How rows leave: as they are, or quantized from kSource on the way.
struct Verbatim {
    static constexpr bool kQuantizes = false;
    static constexpr int kMaxWarps = 32;
};
template <DType kDtype>
struct Quantized {
    static constexpr bool kQuantizes = true;
    static constexpr int kMaxWarps = 16;  // arithmetic wants registers
    static constexpr DType kSource = kDtype;
};

// The slots of the token a warp holds, in shared memory, for its records.
struct Slots {
    int32_t owner[kMaxTopk], local[kMaxTopk], row[kMaxTopk];
    float weight[kMaxTopk];
};

// Regions of a record, in words.
struct RecordWords {
    int token, experts, weights, rows, scales, end;  // first word of each; -1 = not there

    __device__ explicit RecordWords(const MetaLayout& m) {
        const auto first = [](const Region& r) { return r.bytes > 0 ? int(r.offset / 4) : -1; };
        token = first(m.src_token);
        experts = first(m.experts);
        weights = first(m.weights);
        rows = first(m.rows);
        scales = first(m.scales);
        end = static_cast<int>(m.bytes / 4);
    }
};

// Where one slot of a token goes; held by the lane of that slot.
struct Route {
    int dst = -1;         // rank, -1 = none
    bool first = false;   // the slot that brings the token to that rank
    int64_t row = -1;     // final row of the slot
    int64_t record = -1;  // row of the token's record
};

// What a warp of push works with.
struct Mover {
    const DispatchJob& job;
    Operation op;
    Stage stage;
    Slots& slots;
    int32_t* pushed;  // [num_ranks] rows of this block, in shared memory
    MetaLayout meta;
    RecordWords words;
    int slot;

    __device__ const BaseRecord& base_of(int dst) const {
        const RankView& view = job.view;
        return *at<const BaseRecord>(view, view.peers.rank, view.layout.base(slot, dst));
    }

    // The row of this lane's slot, from what notify left; also what the handle keeps.
    __device__ Route route(int64_t t) const {
        const DispatchArgs& a = job.args;
        const State& state = job.view.state;
        const int lane = ptx::lane_id();
        const int64_t at = t * a.num_topk + lane;
        const int64_t id = lane < a.num_topk ? a.topk_idx[at] : -1;
        Route r;
        if (id >= 0 && id < job.view.shape.num_experts) {
            const int chunk = static_cast<int>(t) / job.tokens_per_chunk;
            r.dst = __ldg(state.owner + id);
            r.record = state.chunk_row[chunk * job.view.shape.num_ranks + r.dst] + state.turn[at];
            if (a.cached) {
                r.row = a.send_row[at];
            } else if (a.layout == RecvLayout::kCompact) {
                r.row = r.record;
            } else {
                const int position = __ldg(state.position + id);
                r.row = a.send_row[at] +
                        state.chunk_slot[chunk * job.view.shape.num_experts + position];
            }
            slots.local[lane] = __ldg(state.local + id);
            slots.weight[lane] = a.topk_weights != nullptr ? a.topk_weights[at] : 0.0f;
        }
        if (lane < a.num_topk && !a.cached) a.send_row[at] = static_cast<int32_t>(r.row);
        slots.owner[lane] = r.dst;
        slots.row[lane] = static_cast<int32_t>(r.row);
        const uint32_t same = __match_any_sync(~0u, r.dst);
        r.first = r.dst >= 0 && (same & ptx::lanemask_lt()) == 0;
        __syncwarp();
        return r;
    }

    // A handle's rows are a tensor that anybody may have changed.
    __device__ bool in_bounds(const Route& r) const {
        const bool bad = r.dst >= 0 && (r.row < 0 || r.row >= base_of(r.dst).num_rows);
        if (bad) {
            device::give_up(job.view.watch, op, kMiscount,
                            {Site::kNone, r.dst, uint64_t(base_of(r.dst).num_rows)},
                            uint64_t(r.row), 0);
        }
        return !__any_sync(~0u, bad);
    }

    __device__ uint32_t record_word(int i, int64_t t, int dst, const uint32_t* scales) const {
        const int num_topk = job.args.num_topk;
        const auto slot_of = [&](int first) {
            return first >= 0 && i >= first && i < first + num_topk ? i - first : -1;
        };
        if (i == words.token) return static_cast<uint32_t>(t);
        int k = slot_of(words.experts);
        if (k >= 0) return slots.owner[k] == dst ? slots.local[k] : ~0u;
        k = slot_of(words.weights);
        if (k >= 0) return slots.owner[k] == dst ? __float_as_uint(slots.weight[k]) : 0;
        k = slot_of(words.rows);
        if (k >= 0) return slots.owner[k] == dst ? slots.row[k] : ~0u;
        const int64_t word = i - words.scales;
        return words.scales >= 0 && word >= 0 && 4 * word < meta.scales.bytes ? scales[word] : 0;
    }

    // The record of this token at every rank it goes to, 16 bytes a lane.
    __device__ void push_records(int64_t t, const Route& r, const uint32_t* scales) const {
        const int lane = ptx::lane_id();
        for (uint32_t left = __ballot_sync(~0u, r.first); left != 0; left &= left - 1) {
            const int leader = __ffs(left) - 1;
            const int dst = __shfl_sync(~0u, r.dst, leader);
            const int64_t row = __shfl_sync(~0u, r.record, leader);
            std::byte* out =
                job.view.peers.arena[dst] + base_of(dst).meta_offset + row * meta.bytes;
            for (int i = 4 * lane; i < words.end; i += 4 * 32) {
                uint4 unit;
                unit.x = record_word(i, t, dst, scales);
                unit.y = record_word(i + 1, t, dst, scales);
                unit.z = record_word(i + 2, t, dst, scales);
                unit.w = record_word(i + 3, t, dst, scales);
                *reinterpret_cast<uint4*>(out + 4 * i) = unit;
            }
        }
    }

    __device__ std::byte* row_of(const Route& r) const {
        return job.view.peers.arena[r.dst] + base_of(r.dst).x_offset + r.row * job.args.row_bytes();
    }
};

// One token, its row in as many pieces as the stage asks for. False: leave.
__device__ bool push_verbatim(Mover& m, int64_t t, int stage_bytes) {
    const DispatchArgs& a = m.job.args;
    const int64_t row_bytes = a.row_bytes();
    const int lane = ptx::lane_id(), me = m.job.view.peers.rank;
    const std::byte* src = a.x + t * a.x_stride;
    const auto piece_at = [&](int64_t offset) {
        return static_cast<int>(min(int64_t{stage_bytes}, row_bytes - offset));
    };
    if (lane == 0) device::load_stage(m.stage, src, piece_at(0));
    const Route r = m.route(t);
    const bool fine = m.in_bounds(r);
    if (fine && m.meta.bytes > 0) {
        const auto* scales = reinterpret_cast<const uint32_t*>(a.scales + t * a.scale_bytes);
        m.push_records(t, r, scales);
    }
    for (int64_t offset = 0; offset < row_bytes; offset += stage_bytes) {
        const int bytes = piece_at(offset);
        if (!device::await_stage(m.job.view.watch, m.op, m.stage, me)) return false;
        if (!fine) return false;
        if (r.first) device::store_stage(m.row_of(r) + offset, m.stage.data, bytes);
        device::drain_reads();
        __syncwarp();
        if (lane == 0 && offset + bytes < row_bytes) {
            device::load_stage(m.stage, src + offset + bytes, piece_at(offset + bytes));
        }
    }
    if (r.first) atomicAdd(&m.pushed[r.dst], 1);
    return true;
}

// One token, quantized in place in its stage; the scales stand behind it. False: leave.
template <DType kSource>
__device__ bool push_quantized(Mover& m, int64_t t, int stage_bytes) {
    const DispatchArgs& a = m.job.args;
    const int hidden = static_cast<int>(a.hidden), lane = ptx::lane_id();
    const int source_bytes = hidden * dtype_bytes(kSource);
    if (lane == 0) device::load_stage(m.stage, a.x + t * a.x_stride, source_bytes);
    const Route r = m.route(t);
    const bool fine = m.in_bounds(r);
    if (!device::await_stage(m.job.view.watch, m.op, m.stage, m.job.view.peers.rank)) return false;
    if (!fine) return false;
    std::byte* scales = m.stage.data + source_bytes;
    device::quantize_row<kSource>(m.stage.data, scales, hidden, a.scale_block,
                                  a.quantize == Quantize::kFp8Ue8m0);
    ptx::fence_proxy_async_shared();  // what we wrote, before the stores that read it
    __syncwarp();
    if (r.first) device::store_stage(m.row_of(r), m.stage.data, hidden);
    m.push_records(t, r, reinterpret_cast<const uint32_t*>(scales));
    device::drain_reads();
    ptx::fence_proxy_async_shared();  // what we read, before the load that overwrites it
    __syncwarp();
    if (r.first) atomicAdd(&m.pushed[r.dst], 1);
    return true;
}

template <class Config>
__global__ void __launch_bounds__(Config::kMaxWarps * 32, 1)
    push_kernel(const __grid_constant__ DispatchJob job, int stage_bytes) {
    extern __shared__ __align__(128) std::byte shared[];
    __shared__ uint64_t loaded[Config::kMaxWarps];
    __shared__ Slots slots[Config::kMaxWarps];
    const RankView& view = job.view;
    const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
    const OpState& state = *view.state.op;
    if (__syncthreads_or(device::gave_up(view.watch) || state.code != kOk)) return;

    auto* pushed = reinterpret_cast<int32_t*>(shared + int64_t{num_warps} * stage_bytes);
    for (int p = threadIdx.x; p < view.shape.num_ranks; p += blockDim.x) pushed[p] = 0;
    const MetaLayout meta = meta_layout(job.args);
    Mover mover{job,
                {OpKind::kDispatch, state.seq},
                {shared + int64_t{warp} * stage_bytes, &loaded[warp]},
                slots[warp],
                pushed,
                meta,
                RecordWords(meta),
                state.slot};
    if (threadIdx.x % 32 == 0) device::init_stage(mover.stage);
    __syncthreads();

    bool ok = true;
    for (int64_t t = blockIdx.x + int64_t{warp} * gridDim.x; ok && t < job.args.num_tokens;
         t += int64_t{num_warps} * gridDim.x) {
        if constexpr (Config::kQuantizes) {
            ok = push_quantized<Config::kSource>(mover, t, stage_bytes);
        } else {
            ok = push_verbatim(mover, t, stage_bytes);
        }
    }
    device::drain_stores();
    if (!__syncthreads_and(ok)) return;
    for (int p = threadIdx.x; p < view.shape.num_ranks; p += blockDim.x) {
        if (pushed[p] == 0) continue;
        // Releases the rows and records of this block; pairs with the acquire in await_rows.
        ptx::red_release_sys_add(
            at<uint64_t>(view, p, view.layout.arrived_word(state.slot, view.peers.rank)),
            uint64_t(pushed[p]));
    }
}

// ---- unpack ----

// Everything announced to us has arrived.
__device__ bool await_rows(const RankView& view) {
    const OpState& state = *view.state.op;
    const int num_ranks = view.shape.num_ranks, slot = state.slot;
    const Operation op{OpKind::kDispatch, state.seq};
    bool ok = true;
    for (int src = threadIdx.x; src < num_ranks; src += blockDim.x) {
        const uint64_t want = view.state.expected[slot * num_ranks + src];
        const auto* word = at<uint64_t>(view, view.peers.rank, view.layout.arrived_word(slot, src));
        ok = ok && device::wait_word(view.watch, op, {Site::kRows, src, want}, word);
    }
    return __syncthreads_and(ok);
}

struct Unpacker {
    const DispatchJob& job;
    const UnpackArgs& out;
    MetaLayout meta;
    int num_local;
    int64_t num_recv, row_bytes;

    __device__ void put_idx(int64_t at, int32_t local) const {
        if (out.topk_idx == nullptr) return;
        if (out.idx_is_int64) {
            static_cast<int64_t*>(out.topk_idx)[at] = local;
        } else {
            static_cast<int32_t*>(out.topk_idx)[at] = local;
        }
    }

    // Numbers written by peers are checked before they become addresses.
    __device__ int32_t checked(int32_t value, int64_t limit) const {
        if (value >= -1 && value < limit) return value;
        const RankView& view = job.view;
        device::give_up(view.watch, {OpKind::kDispatch, view.state.op->seq}, kBadCount,
                        {Site::kRows, view.peers.rank, uint64_t(limit)}, uint64_t(value), 0);
        return -1;
    }

    __device__ std::byte* x() const {
        return job.view.peers.arena[job.view.peers.rank] + job.grant.x_offset;
    }

    __device__ int source_of(int64_t i) const {
        const int lane = ptx::lane_id(), num_ranks = job.view.shape.num_ranks;
        int src = 0;
        for (int p0 = 0; p0 < num_ranks; p0 += 32) {
            const int p = p0 + lane;
            const bool below = p < num_ranks && job.view.state.first_row[p + 1] <= i;
            src += __popc(__ballot_sync(~0u, below));
        }
        return src;
    }

    __device__ void put_scales(int64_t row, const uint32_t* scales) const {
        const int64_t words = meta.scales.bytes / 4;
        auto* to = reinterpret_cast<uint32_t*>(out.scales);
        int64_t first = row * words, step = 1;
        if (job.args.layout == RecvLayout::kSlab) {
            // Column-major per expert, columns 16 bytes aligned, as masked grouped GEMMs read them.
            const int64_t capacity = job.args.capacity;
            step = (capacity + 3) / 4 * 4;
            first = row / capacity * words * step + row % capacity;
        }
        for (int64_t w = ptx::lane_id(); w < words; w += 32) {
            to[first + w * step] = scales != nullptr ? scales[w] : 0;
        }
    }

    __device__ int32_t word(int64_t token, const Region& region, int k) const {
        const std::byte* records =
            job.view.peers.arena[job.view.peers.rank] + job.grant.meta_offset;
        return reinterpret_cast<const int32_t*>(records + token * meta.bytes + region.offset)[k];
    }

    // Compact: nothing depends on anything, so every thread takes words of its own.
    __device__ void flat_words(int64_t first, int64_t step) const {
        const uint32_t num_topk = job.args.num_topk;
        const int64_t selections = num_recv * num_topk;
        const int64_t fresh = job.args.cached ? 0 : selections;
        const int64_t weights = job.args.with_weights ? selections : 0;
#pragma unroll 4
        for (int64_t at = first; at < fresh; at += step) {
            const uint32_t i = uint32_t(at) / num_topk, k = uint32_t(at) % num_topk;
            put_idx(at, checked(word(i, meta.experts, k), num_local));
        }
#pragma unroll 4
        for (int64_t at = first; at < weights; at += step) {
            const uint32_t i = uint32_t(at) / num_topk, k = uint32_t(at) % num_topk;
            out.topk_weights[at] = __int_as_float(word(i, meta.weights, k));
        }
        for (int64_t i = first; i < num_recv && !job.args.cached; i += step) {
            int src = 0;
            while (job.view.state.first_row[src + 1] <= i) ++src;
            out.recv_src[2 * i] = src;
            out.recv_src[2 * i + 1] = word(i, meta.src_token, 0);
        }
        const auto words = static_cast<uint32_t>(meta.scales.bytes / 4);
#pragma unroll 4
        for (int64_t at = first; at < num_recv * words; at += step) {
            const uint32_t i = uint32_t(at) / words, w = uint32_t(at) % words;
            reinterpret_cast<int32_t*>(out.scales)[at] = word(i, meta.scales, w);
        }
    }

    // Grouped and slab: one warp, one received token.
    __device__ void token(int64_t i) const {
        const DispatchArgs& a = job.args;
        const int lane = ptx::lane_id(), num_topk = a.num_topk;
        const bool mine = lane < num_topk, fresh = mine && !a.cached;
        const int32_t local = fresh ? checked(word(i, meta.experts, lane), num_local) : -1;
        const float weight =
            mine && a.with_weights ? __int_as_float(word(i, meta.weights, lane)) : 0.0f;
        if (!a.cached) {
            const int src = source_of(i);
            if (lane < 2) out.recv_src[2 * i + lane] = lane == 0 ? src : word(i, meta.src_token, 0);
        }
        int32_t row = -1;
        if (mine && a.cached) row = out.recv_row[i * num_topk + lane];
        if (fresh) out.recv_row[i * num_topk + lane] = row = word(i, meta.rows, lane);
        row = checked(row, job.grant.max_rows);
        if (row >= 0 && fresh) put_idx(row, local);
        if (row >= 0 && a.with_weights) out.topk_weights[row] = weight;
        if (meta.scales.bytes == 0) return;
        const std::byte* record =
            job.view.peers.arena[job.view.peers.rank] + job.grant.meta_offset + i * meta.bytes;
        for (uint32_t left = __ballot_sync(~0u, row >= 0); left != 0; left &= left - 1) {
            put_scales(__shfl_sync(~0u, row, __ffs(left) - 1),
                       reinterpret_cast<const uint32_t*>(record + meta.scales.offset));
        }
    }

    // Ids of padding are -1 and its weights 0; padding between groups reads as zero. One warp, one row.
    __device__ void pad(int64_t row, int64_t per_row, bool zero_x) const {
        const int lane = ptx::lane_id();
        if (lane < per_row) {
            put_idx(row * per_row + lane, -1);
            if (out.topk_weights != nullptr) out.topk_weights[row * per_row + lane] = 0.0f;
        }
        if (meta.scales.bytes > 0 && out.scales != nullptr) put_scales(row, nullptr);
        if (!zero_x) return;
        auto* to = reinterpret_cast<uint4*>(x() + row * row_bytes);
        for (int64_t u = lane; u < row_bytes / 16; u += 32) to[u] = make_uint4(0, 0, 0, 0);
    }
};

// Warps of the whole grid, as one team.
struct Team {
    int64_t first, step;
};

__device__ void unpack_tokens(const Unpacker& u, Team team) {
    if (u.job.args.layout == RecvLayout::kCompact) {
        const int64_t threads = int64_t{blockDim.x} * gridDim.x;
        return u.flat_words(int64_t{blockIdx.x} * blockDim.x + threadIdx.x, threads);
    }
    for (int64_t i = team.first; i < u.num_recv; i += team.step) u.token(i);
}

// Rows nobody was given: behind the last one of compact, behind every group of grouped and slab.
__device__ void pad_rows(const Unpacker& u, Team team) {
    const DispatchArgs& a = u.job.args;
    const State& state = u.job.view.state;
    const bool failed = state.op->code != kOk;
    if (a.layout == RecvLayout::kCompact) {
        for (int64_t row = u.num_recv + team.first; row < u.out.max_rows; row += team.step) {
            u.pad(row, a.num_topk, false);
        }
        return;
    }
    const bool grouped = a.layout == RecvLayout::kGrouped;
    for (int e = 0; e < u.num_local && !failed; ++e) {
        const int64_t end = state.group_start[e + 1];
        for (int64_t row = state.group_start[e] + state.counts[e] + team.first; row < end;
             row += team.step) {
            u.pad(row, 1, grouped);
        }
    }
    const int64_t total = grouped ? u.out.max_rows : u.out.max_rows * u.num_local;
    const int64_t used = failed ? 0 : state.group_start[u.num_local];
    for (int64_t row = used + team.first; row < total; row += team.step) u.pad(row, 1, false);
}

// What else a static call returns: shapes that did not follow from what arrived are filled up.
__device__ void pad_handle(const Unpacker& u, Team team) {
    if (u.job.args.cached) return;
    const int lane = ptx::lane_id(), num_topk = u.job.args.num_topk;
    for (int64_t i = u.num_recv + team.first; i < u.out.max_recv; i += team.step) {
        if (lane < 2) u.out.recv_src[2 * i + lane] = -1;
        if (u.out.recv_row != nullptr && lane < num_topk) u.out.recv_row[i * num_topk + lane] = -1;
    }
    const OpState& state = *u.job.view.state.op;
    if (state.code == kOk) return;
    const int64_t selections = u.job.args.num_tokens * num_topk;
    for (int64_t i = team.first * 32 + lane; i < selections; i += team.step * 32) {
        u.job.args.send_row[i] = -1;
    }
}

// One thread.
__device__ void put_numbers(const Unpacker& u) {
    const OpState& state = *u.job.view.state.op;
    if (u.job.status != nullptr) *u.job.status = state.code;
    if (u.job.num_recv != nullptr) *u.job.num_recv = static_cast<int32_t>(u.num_recv);
    if (u.out.offsets == nullptr) return;
    const int align = u.job.args.alignment;
    int32_t at = 0;
    for (int e = 0; e < u.num_local; ++e) {
        u.out.offsets[e] = at;
        if (state.code == kOk) at += (u.job.view.state.counts[e] + align - 1) / align * align;
    }
    u.out.offsets[u.num_local] = at;
}

constexpr int kUnpackThreads = 768;

__global__ void __launch_bounds__(kUnpackThreads, 1)
    unpack_kernel(const __grid_constant__ UnpackJob unpack) {
    const DispatchJob& job = unpack.dispatch;
    const RankView& view = job.view;
    const OpState& state = *view.state.op;
    if (__syncthreads_or(device::gave_up(view.watch))) return;
    const bool ok = state.code == kOk;
    if (ok && !await_rows(view)) return;
    const int me = view.peers.rank;
    const Unpacker u{job,
                     unpack.out,
                     meta_layout(job.args),
                     view.state.first[me + 1] - view.state.first[me],
                     ok ? state.num_recv : 0,
                     job.args.row_bytes()};
    const int warps = blockDim.x / 32;
    const Team team{blockIdx.x + int64_t{threadIdx.x / 32} * gridDim.x, int64_t{warps} * gridDim.x};
    unpack_tokens(u, team);
    pad_rows(u, team);
    pad_handle(u, team);
    if (blockIdx.x == 0 && threadIdx.x == 0) put_numbers(u);
    __syncthreads();
    if (threadIdx.x != 0) return;
    const uint32_t last = gridDim.x - 1;
    if (ptx::atom_acq_rel_gpu_inc(&view.state.op->finished, last) != last) return;
    if (ok) release_slot(view, state.seq);  // a failed call was left by notify
}

// ---- duplicates: grouped and slab have a row for every slot, but only the first one was sent ----

// One warp, one token: its row is loaded once and stored to all its other slots.
__global__ void __launch_bounds__(1024, 1)
    duplicate_kernel(const __grid_constant__ UnpackJob unpack, int stage_bytes) {
    extern __shared__ __align__(128) std::byte shared[];
    __shared__ uint64_t loaded[32];
    const DispatchJob& job = unpack.dispatch;
    const OpState& state = *job.view.state.op;
    if (__syncthreads_or(device::gave_up(job.view.watch) || state.code != kOk)) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
    const int num_topk = job.args.num_topk, me = job.view.peers.rank;
    const int64_t row_bytes = job.args.row_bytes();
    std::byte* x = job.view.peers.arena[me] + job.grant.x_offset;
    Stage stage{shared + int64_t{warp} * stage_bytes, &loaded[warp]};
    if (lane == 0) {
        device::init_stage(stage);
        ptx::fence_proxy_async();  // what unpack acquired, before we bulk-load it
    }
    __syncthreads();
    for (int64_t i = blockIdx.x + int64_t{warp} * gridDim.x; i < state.num_recv;
         i += int64_t{num_warps} * gridDim.x) {
        const int64_t row = lane < num_topk ? unpack.out.recv_row[i * num_topk + lane] : -1;
        const uint32_t here = __ballot_sync(~0u, row >= 0 && row < job.grant.max_rows);
        const int64_t source = __shfl_sync(~0u, row, max(__ffs(here) - 1, 0));
        const bool extra = (here >> lane & 1) != 0 && row != source;
        if (!__any_sync(~0u, extra)) continue;
        for (int64_t offset = 0; offset < row_bytes; offset += stage_bytes) {
            const int bytes = static_cast<int>(min(int64_t{stage_bytes}, row_bytes - offset));
            if (lane == 0) device::load_stage(stage, x + source * row_bytes + offset, bytes);
            const Operation op{OpKind::kDispatch, state.seq};
            if (!device::await_stage(job.view.watch, op, stage, me)) return;
            if (extra) device::store_stage(x + row * row_bytes + offset, stage.data, bytes);
            device::drain_reads();
            __syncwarp();
        }
    }
    device::drain_stores();
}

// ---- the row index: which compact row every selection of an expert has ----

// One block per local expert; its warps take consecutive ranges of rows.
__global__ void __launch_bounds__(1024, 1)
    index_rows_kernel(const __grid_constant__ UnpackJob unpack) {
    __shared__ int32_t counts[33];
    const UnpackArgs& out = unpack.out;
    const int e = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const OpState& state = *unpack.dispatch.view.state.op;
    if (__syncthreads_or(device::gave_up(unpack.dispatch.view.watch))) return;
    const int64_t total = (state.code == kOk ? state.num_recv : 0) * unpack.dispatch.args.num_topk;
    const int64_t share = ((total + 31) / 32 + 31) / 32 * 32;
    const int64_t begin = warp * share, end = min(begin + share, total);
    const auto chosen = [&](int64_t i) {
        if (i >= end) return false;
        return out.idx_is_int64 ? static_cast<const int64_t*>(out.topk_idx)[i] == e
                                : static_cast<const int32_t*>(out.topk_idx)[i] == e;
    };
    int count = 0;
    for (int64_t i = begin; i < end; i += 32) count += __popc(__ballot_sync(~0u, chosen(i + lane)));
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    int at = out.offsets[e];
    for (int w = 0; w < warp; ++w) at += counts[w];
    for (int64_t i = begin; i < end; i += 32) {
        const bool here = chosen(i + lane);
        const uint32_t found = __ballot_sync(~0u, here);
        if (here) {
            out.row_index[at + __popc(found & ptx::lanemask_lt())] =
                static_cast<int32_t>((i + lane) / unpack.dispatch.args.num_topk);
        }
        at += __popc(found);
    }
    if (warp != 31) return;  // the last one stands behind the last selection
    const int64_t group_end = e + 1 < gridDim.x ? out.offsets[e + 1] : out.max_index;
    for (int64_t i = at + lane; i < group_end; i += 32) out.row_index[i] = -1;
}

using PushKernel = void (*)(DispatchJob, int);

// Every kernel that exists, in one place.
PushKernel push_kernel_for(Quantize quantize, DType dtype) {
    if (quantize == Quantize::kNone) return push_kernel<Verbatim>;
    switch (dtype) {
        case DType::kBF16:
            return push_kernel<Quantized<DType::kBF16>>;
        case DType::kF16:
            return push_kernel<Quantized<DType::kF16>>;
        default:
            return push_kernel<Quantized<DType::kF32>>;
    }
}

}  // namespace

LaunchPlan unpack_plan(const DispatchArgs& args, int num_blocks, int all_blocks, int smem_bytes) {
    // Padding and duplicates of grouped and slab are a short step on all SMs.
    if (args.layout != RecvLayout::kCompact) num_blocks = all_blocks;
    const int64_t stage = (std::min<int64_t>(args.row_bytes(), 32 * 1024) + 127) / 128 * 128;
    const int64_t warps =
        std::clamp<int64_t>((smem_bytes - 2048) / std::max<int64_t>(stage, 1), 1, 32);
    return {num_blocks, static_cast<int>(warps), static_cast<int>(stage), all_blocks};
}

LaunchPlan push_plan(const DispatchArgs& args, int num_ranks, int num_blocks, int smem_bytes) {
    // Large rows go in pieces; quantized ones stay whole, their scales behind them.
    constexpr int64_t kPieceBytes = 32 * 1024;
    const bool quantizes = args.quantize != Quantize::kNone;
    const int64_t source = args.hidden * dtype_bytes(args.dtype);
    int64_t stage = quantizes ? source + args.scale_bytes : std::min(source, kPieceBytes);
    stage = (stage + 127) / 128 * 128;
    const int64_t most = quantizes ? Quantized<DType::kBF16>::kMaxWarps : Verbatim::kMaxWarps;
    const int64_t room = smem_bytes - int64_t{sizeof(Slots) + 8} * most - 4 * num_ranks - 1024;
    const int64_t warps = std::clamp<int64_t>(room / stage, 0, most);
    return {num_blocks, static_cast<int>(warps), static_cast<int>(stage)};
}

int launch_push(const DispatchJob& job, const LaunchPlan& plan, Stream stream) {
    const PushKernel kernel = push_kernel_for(job.args.quantize, job.args.dtype);
    const int smem = plan.num_warps * plan.stage_bytes + 4 * job.view.shape.num_ranks;
    kernel<<<plan.num_blocks, plan.num_warps * 32, smem, stream>>>(job, plan.stage_bytes);
    return cudaGetLastError();
}

int launch_unpack(const UnpackJob& job, const LaunchPlan& plan, Stream stream) {
    unpack_kernel<<<plan.num_blocks, kUnpackThreads, 0, stream>>>(job);
    if (const int error = cudaGetLastError()) return error;
    if (job.out.recv_row != nullptr && job.dispatch.args.layout != RecvLayout::kCompact) {
        duplicate_kernel<<<plan.all_blocks, plan.num_warps * 32, plan.num_warps * plan.stage_bytes,
                           stream>>>(job, plan.stage_bytes);
        if (const int error = cudaGetLastError()) return error;
    }
    if (job.out.row_index == nullptr || job.num_local == 0) return 0;
    index_rows_kernel<<<job.num_local, 1024, 0, stream>>>(job);
    return cudaGetLastError();
}

int load_dispatch(int smem_bytes) {
    cudaFuncAttributes attributes;
    for (const void* kernel : {reinterpret_cast<const void*>(&unpack_kernel),
                               reinterpret_cast<const void*>(&index_rows_kernel)}) {
        if (const int error = cudaFuncGetAttributes(&attributes, kernel)) return error;
    }
    if (const int error = cudaFuncGetAttributes(&attributes, duplicate_kernel)) return error;
    if (const int error =
            cudaFuncSetAttribute(duplicate_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 smem_bytes - static_cast<int>(attributes.sharedSizeBytes))) {
        return error;
    }
    for (const PushKernel kernel : {push_kernel_for(Quantize::kNone, DType::kBF16),
                                    push_kernel_for(Quantize::kFp8, DType::kBF16),
                                    push_kernel_for(Quantize::kFp8, DType::kF16),
                                    push_kernel_for(Quantize::kFp8, DType::kF32)}) {
        if (const int error = cudaFuncGetAttributes(&attributes, kernel)) return error;
        const int dynamic = smem_bytes - static_cast<int>(attributes.sharedSizeBytes);
        if (const int error = cudaFuncSetAttribute(
                kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic)) {
            return error;
        }
    }
    return 0;
}

}  // namespace ep::kernels
