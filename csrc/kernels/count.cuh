// How many tokens go to every rank and how many selections every expert gets: of a warp's own tokens, of
// its block's, of the blocks before.
//
// defines: Span, BlockSpan, block_span, expert_of, Counter, Voter, sum_votes, sum_warps, add_chunks,
// tell_chunk
//
// What comes before a token is known from sums over runs of consecutive tokens, so rows follow their order
// and no atomic decides one.
//
// Loops stay loops: this runs once, out of cold caches, and waits for nothing as long as for its code.
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "kernels/enter.cuh"
#include "kernels/tables.cuh"

namespace ep::kernels {

// Tokens [begin, end).
struct Span {
    int begin, end;
};

// The tokens of a block, and the chunk they lie in.
struct BlockSpan {
    Span own;
    int chunk, chunk_begin;

    __device__ Span of_warp(int warp, int tokens_per_warp) const {
        const int begin = min(own.begin + warp * tokens_per_warp, own.end);
        return {begin, min(begin + tokens_per_warp, own.end)};
    }
};

__device__ inline BlockSpan block_span(const DispatchJob& job, const Spread& spread,
                                       int first_chunk) {
    const int in_launch = blockIdx.x / spread.blocks_of_chunk;
    const int chunk = first_chunk + in_launch, chunk_begin = chunk * job.tokens_per_chunk;
    const int chunk_end =
        min(chunk_begin + job.tokens_per_chunk, static_cast<int>(job.args.num_tokens));
    const int begin =
        chunk_begin + (blockIdx.x - in_launch * spread.blocks_of_chunk) * spread.tokens_per_block;
    return {{min(begin, chunk_end), min(begin + spread.tokens_per_block, chunk_end)},
            chunk,
            min(chunk_begin, chunk_end)};
}

// The physical expert of a selection of logical ones; ids that name none stay what they are.
__device__ __noinline__ inline int64_t replica_of(const DispatchJob& job, int token, int64_t id) {
    constexpr int64_t kNone = int64_t{1} << 40;  // an id that no expert has
    const Replicas& r = job.args.replicas;
    if (id < 0 || id >= r.num_logical) return id < 0 ? id : kNone;
    return choose_replica(r, id, spread_of(token, job.view.peers.rank));
}
__device__ __forceinline__ int64_t expert_of(const DispatchJob& job, int token, int64_t id) {
    return job.args.replicas.num_logical == 0 ? id : replica_of(job, token, id);
}

// Counts tokens, 32 / num_topk at a time: those of a warp one after the other, or every `step`-th.
struct Counter {
    const DispatchJob& job;
    int per_turn, token, slot;      // of this lane in a turn
    int32_t* tokens = nullptr;      // [num_ranks]
    int32_t* selections = nullptr;  // [num_experts] by position
    int32_t* bad = nullptr;         // [2] ids that name no expert, and the first of them
    bool selects = false;           // selections are counted, too
    bool load = false;              // and those of logical experts

    __device__ Counter(const DispatchJob& j, const Spread& spread) : job(j) {
        const int lane = ptx::lane_id();
        per_turn = 32 * spread.slot_magic >> 16;
        token = lane * spread.slot_magic >> 16;
        slot = lane - token * job.args.num_topk;
    }

    // Ids are loaded some turns ahead.
    __device__ void count(int begin, int end, int step) const {
        constexpr int kAhead = 4;
        int64_t ahead[kAhead];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) ahead[u] = id_at(begin + u * step, end);
#pragma unroll 1
        for (int t0 = begin; t0 < end; t0 += step) {
            const int64_t id = ahead[0];
#pragma unroll
            for (int u = 0; u + 1 < kAhead; ++u) ahead[u] = ahead[u + 1];
            ahead[kAhead - 1] = id_at(t0 + kAhead * step, end);
            turn(t0 + token, token < per_turn && t0 + token < end, id);
        }
    }

private:
    __device__ int64_t id_at(int t0, int end) const {
        const int t = t0 + token;
        const bool here = token < per_turn && t < end;
        return here ? job.args.topk_idx[int64_t{t} * job.args.num_topk + slot] : -1;
    }

    __device__ void turn(int t, bool here, int64_t logical) const {
        const RankView& view = job.view;
        const int64_t id = here ? expert_of(job, t, logical) : -1;
        const bool chosen =
            static_cast<uint64_t>(id) < static_cast<uint64_t>(view.shape.num_experts);
        if (here && !chosen && id != -1) {
            atomicAdd(&bad[0], 1);
            atomicMin(&bad[1], t * job.args.num_topk + slot);
        }
        const int dst = chosen ? __ldg(view.state.owner + id) : -1;
        // Lanes of one token with one rank; the lowest of them brings it there.
        const int key = chosen ? token * view.shape.num_ranks + dst : ~int(ptx::lane_id());
        const uint32_t same = __match_any_sync(~0u, key);
        if (!chosen) return;
        if ((same & ptx::lanemask_lt()) == 0) atomicAdd(&tokens[dst], 1);
        if (selects) atomicAdd(&selections[__ldg(view.state.position + id)], 1);
        if (load) {
            atomicAdd(reinterpret_cast<unsigned long long*>(job.args.logical_load + logical), 1ull);
        }
    }
};

// Counts tokens of compact rows, one a thread, when every rank has a lane of its own: a warp votes on each
// rank.
struct Voter {
    const DispatchJob& job;
    int32_t* selections;  // [num_experts] by position
    int32_t* bad;         // [2] ids that name no expert, and the first of them
    bool selects, load;   // selections are counted, too; and those of logical experts

    // The ranks token t goes to, as bits.
    __device__ uint32_t ranks_of(int t) const {
        const RankView& view = job.view;
        const int64_t* ids = job.args.topk_idx + int64_t{t} * job.args.num_topk;
        uint32_t ranks = 0;
#pragma unroll 4
        for (int k = 0; k < job.args.num_topk; ++k) {
            const int64_t logical = ids[k], id = expert_of(job, t, logical);
            if (static_cast<uint64_t>(id) < static_cast<uint64_t>(view.shape.num_experts)) {
                ranks |= 1u << __ldg(view.state.owner + id);
                if (selects) atomicAdd(&selections[__ldg(view.state.position + id)], 1);
                if (load) {
                    auto* sum = reinterpret_cast<unsigned long long*>(job.args.logical_load);
                    atomicAdd(sum + logical, 1ull);
                }
            } else if (id != -1) {
                atomicAdd(&bad[0], 1);
                atomicMin(&bad[1], t * job.args.num_topk + k);
            }
        }
        return ranks;
    }

    // Of 32 tokens from t0 on: a lane gets the votes for its rank.
    __device__ uint32_t votes(int t0, int end) const {
        const int lane = ptx::lane_id(), t = t0 + lane;
        const uint32_t ranks = t < end ? ranks_of(t) : 0;
        uint32_t mine = 0;
#pragma unroll 1
        for (int r = 0; r < job.view.shape.num_ranks; ++r) {
            const uint32_t all = __ballot_sync(~0u, (ranks >> r & 1) != 0);
            if (lane == r) mine = all;
        }
        return mine;
    }
};

// Votes become what comes before each of them, and the block's sum. All threads.
__device__ inline void sum_votes(const Tables& tables, int num_ranks, int num_votes) {
#pragma unroll 1
    for (int r = threadIdx.x; r < num_ranks; r += blockDim.x) {
        int sum = 0;
#pragma unroll 4
        for (int g = 0; g < num_votes; ++g) {
            tables.before[g * num_ranks + r] = sum;
            sum += __popc(tables.votes[g * num_ranks + r]);
        }
        tables.counts[r] = sum;
    }
}

// What warps counted becomes what comes before each of them, and the block's sum. All threads.
__device__ inline void sum_warps(const Tables& tables, int num_warps) {
    constexpr int kAtOnce = 8;
#pragma unroll 1
    for (int c = threadIdx.x; c < tables.width; c += blockDim.x) {
        int sum = 0;
#pragma unroll 1
        for (int w0 = 0; w0 < num_warps; w0 += kAtOnce) {
            int count[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                count[i] = w0 + i < num_warps ? tables.of_warp(w0 + i)[c] : 0;
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                if (w0 + i < num_warps) tables.of_warp(w0 + i)[c] = sum;
                sum += count[i];
            }
        }
        tables.counts[c] = sum;
    }
}

// Adds up what other blocks found in chunks [first, end): a warp takes a chunk, its lanes the columns.
// False: leave.
__device__ inline bool add_chunks(const DispatchJob& job, Operation op, const Tables& tables,
                                  int columns, int first, int end) {
    constexpr int kAtOnce = 3;
    const int stride = columns_of(job.view.shape), least = bad_column(job.view.shape) + 1;
    bool ok = true;
#pragma unroll 1
    for (int r = first + threadIdx.x / 32; ok && r < end; r += blockDim.x / 32) {
        const uint64_t* words = job.view.state.chunks + int64_t{r} * stride;
#pragma unroll 1
        for (int c0 = ptx::lane_id(); ok && c0 < columns; c0 += 32 * kAtOnce) {
            uint64_t word[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int c = c0 + 32 * i;
                word[i] = c < columns ? ptx::ld_relaxed_gpu(words + c) : 0;
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int c = c0 + 32 * i;
                if (c >= columns) continue;
                if (!device::is_of(word[i], op.seq)) {
                    ok = ok && device::wait_packed_own(job.view.watch, op, words + c);
                    word[i] = ptx::ld_relaxed_gpu(words + c);
                }
                const auto bits = static_cast<int32_t>(device::bits_of(word[i]));
                if (c == least) {
                    atomicMin(&tables.others[c], bits);
                } else {
                    atomicAdd(&tables.others[c], bits);
                }
            }
        }
    }
    return ok;
}

// Leaves what this block found in its chunk for the others.
__device__ inline void tell_chunk(const DispatchJob& job, Operation op, const Tables& tables,
                                  int chunk) {
    const int columns = columns_of(job.view.shape);
    uint64_t* words = job.view.state.chunks + int64_t{chunk} * columns;
#pragma unroll 1
    for (int c = threadIdx.x; c < columns; c += blockDim.x) {
        ptx::st_relaxed_gpu(words + c, device::pack(tables.counts[c], op.seq));
    }
}

}  // namespace ep::kernels
