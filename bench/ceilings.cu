// What two GPUs on NVLink give to plain kernels, without counts and without a protocol: the bounds that
// the kernels of csrc/kernels are measured against. One process, both GPUs at once, rows in order.
//
//     nvcc -std=c++20 -O3 -arch=sm_90 -Icsrc bench/ceilings.cu -o ceilings && ./ceilings push pull flags
//
// Prints one JSON line a measurement: microseconds for 4096 rows, the slower GPU, best of five.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "device/ptx.cuh"

namespace ptx = ep::ptx;

#define CHECK(call)                                                             \
    do {                                                                        \
        const cudaError_t error = (call);                                       \
        if (error != cudaSuccess) {                                             \
            std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error)); \
            std::exit(1);                                                       \
        }                                                                       \
    } while (false)

constexpr int kRows = 4096, kRounds = 8, kMaxStages = 32;

__device__ void await(uint64_t* barrier, uint32_t parity) {
    while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
    }
}

// ---- push: blocks that store remotely, blocks that store locally, or blocks that do both ----

struct Push {
    const std::byte* x;
    std::byte *remote, *local;
    int row_bytes, remote_blocks, local_blocks;  // local_blocks = 0: every block stores to both
};

__global__ void push_kernel(Push p) {
    extern __shared__ __align__(128) std::byte shared[];
    __shared__ uint64_t loaded[kMaxStages];
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    if (threadIdx.x % 32 != 0) return;
    std::byte* stage = shared + warp * ((p.row_bytes + 127) / 128 * 128);
    ptx::mbarrier_init(&loaded[warp], 1);
    ptx::fence_mbarrier_init_release_cluster();
    const bool both = p.local_blocks == 0, is_local = int(blockIdx.x) >= p.remote_blocks;
    const int block = is_local ? blockIdx.x - p.remote_blocks : blockIdx.x;
    const int blocks = is_local ? p.local_blocks : p.remote_blocks;
    const int first = block + warp * blocks, step = warps * blocks, total = kRows * kRounds;
    const auto load = [&](int i) {
        if (i >= total) return;
        ptx::mbarrier_arrive_expect_tx(&loaded[warp], p.row_bytes);
        ptx::bulk_load(stage, p.x + int64_t{i % kRows} * p.row_bytes, p.row_bytes, &loaded[warp]);
    };
    uint32_t parity = 0;
    load(first);
    for (int i = first; i < total; i += step) {
        await(&loaded[warp], parity);
        parity ^= 1;
        const int64_t at = int64_t{i % kRows} * p.row_bytes;
        if (both || !is_local) ptx::bulk_store(p.remote + at, stage, p.row_bytes);
        if (both || is_local) ptx::bulk_store(p.local + at, stage, p.row_bytes);
        ptx::bulk_commit_group();
        ptx::bulk_wait_group_read<0>();
        load(i + step);
    }
    ptx::bulk_wait_group<0>();
}

// ---- pull: a warp feeds a ring; either nothing else happens, or warps add a local row and store ----

struct Pull {
    const std::byte *remote, *local;
    std::byte* out;
    int row_bytes, piece_bytes, stages;
    bool sums;
};

constexpr int kSlice = 2048;

__global__ void pull_kernel(Pull p) {
    extern __shared__ __align__(128) std::byte shared[];
    __shared__ uint64_t loaded[kMaxStages], used[kMaxStages];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, adders = blockDim.x / 32 - 1;
    const int pieces = p.row_bytes / p.piece_bytes, total = kRows * kRounds * pieces;
    if (threadIdx.x == 0) {
        for (int s = 0; s < p.stages; ++s) {
            ptx::mbarrier_init(loaded + s, 1);
            ptx::mbarrier_init(used + s, adders);
        }
        ptx::fence_mbarrier_init_release_cluster();
    }
    __syncthreads();
    const auto at = [&](int i) {
        return int64_t{i / pieces % kRows} * p.row_bytes + int64_t{i % pieces} * p.piece_bytes;
    };
    const int per_row = p.sums ? 2 : 1;
    int stage = 0;
    uint32_t parity = 0;
    const auto next = [&] {
        if (++stage == p.stages) stage = 0, parity ^= 1;
    };
    if (warp == 0) {
        if (lane != 0) return;
        for (int i = blockIdx.x; i < total; i += gridDim.x) {
            for (int k = 0; k < per_row; ++k) {
                await(used + stage, parity ^ 1);
                ptx::fence_proxy_async_shared();
                ptx::mbarrier_arrive_expect_tx(loaded + stage, p.piece_bytes);
                ptx::bulk_load(shared + stage * p.piece_bytes,
                               (k == 0 ? p.remote : p.local) + at(i), p.piece_bytes,
                               loaded + stage);
                next();
            }
        }
        return;
    }
    const int first = (warp - 1) * kSlice + 16 * lane;
    for (int i = blockIdx.x; i < total; i += gridDim.x) {
        float sum[32];
        for (float& s : sum) s = 0;
        for (int k = 0; k < per_row; ++k) {
            await(loaded + stage, parity);
            if (p.sums) {
#pragma unroll
                for (int u = 0; u < 4; ++u) {
                    const int byte = first + 512 * u;
                    if (byte >= p.piece_bytes) continue;
                    const uint4 v = ptx::ld_shared_v4(shared + stage * p.piece_bytes + byte);
                    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        sum[8 * u + j] +=
                            __uint_as_float(j % 2 ? w[j / 2] & 0xffff0000u : w[j / 2] << 16);
                    }
                }
            }
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(used + stage);
            next();
        }
        if (!p.sums) continue;
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            const int byte = first + 512 * u;
            if (byte >= p.piece_bytes) continue;
            uint32_t w[4];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                w[j] = ptx::cvt_rn_bf16x2(sum[8 * u + 2 * j + 1], sum[8 * u + 2 * j]);
            *reinterpret_cast<uint4*>(p.out + at(i) + byte) = make_uint4(w[0], w[1], w[2], w[3]);
        }
    }
}

// Some blocks pull, others push, both ways at once: is the sum more than either?
struct Mixed {
    Pull pull;
    Push push;
    int pull_blocks, pull_rows;  // the first pull_rows rows are pulled, the others pushed
};

__global__ void mixed_kernel(Mixed m) {
    extern __shared__ __align__(128) std::byte shared[];
    __shared__ uint64_t loaded[kMaxStages];
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, bytes = m.push.row_bytes;
    if (threadIdx.x % 32 != 0) return;
    const bool pulls = int(blockIdx.x) < m.pull_blocks;
    std::byte* stage = shared + warp * ((bytes + 127) / 128 * 128);
    ptx::mbarrier_init(&loaded[warp], 1);
    ptx::fence_mbarrier_init_release_cluster();
    const int block = pulls ? blockIdx.x : blockIdx.x - m.pull_blocks;
    const int blocks = pulls ? m.pull_blocks : gridDim.x - m.pull_blocks;
    const int rows = pulls ? m.pull_rows : kRows - m.pull_rows, total = rows * kRounds;
    const int first = block + warp * blocks, step = warps * blocks, skip = pulls ? 0 : m.pull_rows;
    uint32_t parity = 0;
    for (int i = first; i < total; i += step) {
        const int64_t at = int64_t{skip + i % rows} * bytes;
        ptx::mbarrier_arrive_expect_tx(&loaded[warp], bytes);
        ptx::bulk_load(stage, (pulls ? m.pull.remote : m.push.x) + at, bytes, &loaded[warp]);
        await(&loaded[warp], parity);
        parity ^= 1;
        if (pulls) continue;
        ptx::bulk_store(m.push.remote + at, stage, bytes);
        ptx::bulk_commit_group();
        ptx::bulk_wait_group_read<0>();
    }
    ptx::bulk_wait_group<0>();
}

// ---- flags: nanoseconds one way, by ping-pong ----

enum class Way { kFlag, kGeneric, kPacked, kBulk };

struct Flags {
    Way way;
    std::byte *mine, *theirs;  // [1 << 20]: the flag, then payload
    int bytes, turns;
    bool first;
    long long* ns;
};

// Words of 8 bytes that carry 4 bytes and the number of the turn.
__global__ void flags_kernel(Flags f) {
    extern __shared__ __align__(128) std::byte shared[];
    auto* flag = reinterpret_cast<uint64_t*>(f.mine);
    auto* peer_flag = reinterpret_cast<uint64_t*>(f.theirs);
    auto* data = reinterpret_cast<volatile unsigned long long*>(f.mine + 4096);
    auto* peer_data = reinterpret_cast<volatile unsigned long long*>(f.theirs + 4096);
    const int tid = threadIdx.x, words = f.bytes / (f.way == Way::kPacked ? 4 : 8);
    uint64_t begin = 0;
    for (int turn = 1; turn <= f.turns; ++turn) {
        if (turn == 9 && tid == 0) begin = ptx::globaltimer();
        for (int side = 0; side < 2; ++side) {
            const bool sends = (side == 0) == f.first;
            if (sends && f.way == Way::kPacked) {
                for (int i = tid; i < words; i += blockDim.x) {
                    peer_data[i] = uint64_t(turn) << 32 | uint32_t(i);
                }
            } else if (sends) {
                if (f.way == Way::kGeneric) {
                    for (int i = tid; i < words; i += blockDim.x) peer_data[i] = turn;
                }
                if (f.way == Way::kBulk && tid == 0) {
                    ptx::bulk_store(f.theirs + 4096, shared, f.bytes);
                    ptx::bulk_commit_group();
                    ptx::bulk_wait_group<0>();
                }
                __syncthreads();
                if (tid == 0) ptx::st_release_sys(peer_flag, turn);
            } else if (f.way == Way::kPacked) {
                for (int i = tid; i < words; i += blockDim.x) {
                    while (data[i] >> 32 != uint64_t(turn)) {
                    }
                }
                __syncthreads();
            } else {
                if (tid == 0) {
                    while (ptx::ld_acquire_sys(flag) < uint64_t(turn)) {
                    }
                }
                __syncthreads();
            }
        }
    }
    if (tid == 0) *f.ns = ptx::globaltimer() - begin;
}

__global__ void empty_kernel(int* p) {
    if (p != nullptr) *p = 1;
}

__global__ void dependent_kernel(int* p) {
    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();
    if (p != nullptr) *p = 1;
}

struct Gpu {
    cudaStream_t stream;
    cudaEvent_t start, end;
    std::byte *x, *in, *out, *flags;
    long long* ns;
};

Gpu gpus[2];

template <class Launch>
float both(Launch launch) {
    float best = 1e9f;
    for (int round = 0; round < 6; ++round) {
        for (int g = 0; g < 2; ++g) {
            CHECK(cudaSetDevice(g));
            CHECK(cudaEventRecord(gpus[g].start, gpus[g].stream));
            launch(g);
            CHECK(cudaGetLastError());
            CHECK(cudaEventRecord(gpus[g].end, gpus[g].stream));
        }
        float slower = 0;
        for (int g = 0; g < 2; ++g) {
            CHECK(cudaSetDevice(g));
            CHECK(cudaStreamSynchronize(gpus[g].stream));
            float ms = 0;
            CHECK(cudaEventElapsedTime(&ms, gpus[g].start, gpus[g].end));
            slower = std::max(slower, ms * 1e3f / kRounds);
        }
        if (round > 0) best = std::min(best, slower);
    }
    return best;
}

void measure_push() {
    for (const int row : {14336, 7392}) {
        const int fits = std::min(220 * 1024 / ((row + 127) / 128 * 128), 28);
        std::vector<int> widths =
            row == 14336 ? std::vector<int>{3, 6, 10, 15} : std::vector<int>{6, 12, 20, 28};
        const auto one = [&](int remote, int local, int warps) {
            warps = std::min(warps, fits);
            const int smem = warps * ((row + 127) / 128 * 128);
            const float us = both([&](int g) {
                Push p{gpus[g].x, gpus[1 - g].in, gpus[g].out, row, remote, local};
                push_kernel<<<remote + local, warps * 32, smem, gpus[g].stream>>>(p);
            });
            std::printf(
                "{\"op\": \"push\", \"row_bytes\": %d, \"remote_sms\": %d, \"local_sms\": %d, "
                "\"warps\": %d, \"us\": %.1f, \"link_gbps\": %.1f}\n",
                row, remote, local, warps, us, double(row) * kRows / us / 1e3);
        };
        for (const int sms : {8, 12, 14, 16, 20}) one(sms, 0, fits);
        for (const int remote : {7, 8, 9, 10, 11}) {
            for (const int warps : widths) {
                for (const int local : {7, 8}) one(remote, local, warps);
            }
        }
        for (const int local : {5, 6, 10}) one(8, local, fits);
        std::fflush(stdout);
    }
}

void measure_pull() {
    const int row = 14336;
    for (const bool sums : {false, true}) {
        for (const int piece : {14336, 7168, 3584}) {
            for (const int sms : {7, 8, 9, 10, 12, 16, 20}) {
                for (const int kb : {28, 56, 112, 196}) {
                    const int stages = std::min(kb * 1024 / piece, kMaxStages);
                    if (stages < (sums ? 2 : 1)) continue;
                    const int adders = sums ? (piece + kSlice - 1) / kSlice : 1;
                    const float us = both([&](int g) {
                        Pull p{gpus[1 - g].x, gpus[g].x, gpus[g].out, row, piece, stages, sums};
                        pull_kernel<<<sms, 32 * (adders + 1), stages * piece, gpus[g].stream>>>(p);
                    });
                    std::printf(
                        "{\"op\": \"pull\", \"sums\": %d, \"piece_bytes\": %d, \"sms\": %d, "
                        "\"stages\": %d, \"us\": %.1f, \"link_gbps\": %.1f}\n",
                        sums, piece, sms, stages, us, double(row) * kRows / us / 1e3);
                }
            }
            std::fflush(stdout);
        }
    }
    for (const int pull_sms : {4, 6, 8, 10}) {
        for (const int push_sms : {2, 4, 6, 8}) {
            for (const int percent : {50, 60, 70, 80}) {
                const int warps = 12, smem = warps * row;
                const float us = both([&](int g) {
                    Mixed m{{gpus[1 - g].x, nullptr, nullptr, row, row, 1, false},
                            {gpus[g].x, gpus[1 - g].in, nullptr, row, 0, 0},
                            pull_sms,
                            kRows * percent / 100};
                    mixed_kernel<<<pull_sms + push_sms, warps * 32, smem, gpus[g].stream>>>(m);
                });
                std::printf(
                    "{\"op\": \"mixed\", \"pull_sms\": %d, \"push_sms\": %d, \"pulled_percent\": "
                    "%d, \"us\": %.1f, \"link_gbps\": %.1f}\n",
                    pull_sms, push_sms, percent, us, double(row) * kRows / us / 1e3);
            }
        }
    }
    std::fflush(stdout);
}

void measure_flags() {
    const char* names[] = {"flag", "generic + flag", "packed 4+4", "bulk + flag"};
    for (const Way way : {Way::kFlag, Way::kGeneric, Way::kPacked, Way::kBulk}) {
        for (const int bytes : {512, 2048, 8192, 14336}) {
            constexpr int kTurns = 2008;
            for (int g = 0; g < 2; ++g) {
                CHECK(cudaSetDevice(g));
                CHECK(cudaMemset(gpus[g].flags, 0, 1 << 20));
                CHECK(cudaDeviceSynchronize());
            }
            for (int g = 0; g < 2; ++g) {
                CHECK(cudaSetDevice(g));
                Flags f{way, gpus[g].flags, gpus[1 - g].flags, bytes, kTurns, g == 0, gpus[g].ns};
                flags_kernel<<<1, 512, 16384, gpus[g].stream>>>(f);
                CHECK(cudaGetLastError());
            }
            long long ns = 0;
            for (int g = 1; g >= 0; --g) {
                CHECK(cudaSetDevice(g));
                CHECK(cudaStreamSynchronize(gpus[g].stream));
                CHECK(cudaMemcpy(&ns, gpus[g].ns, 8, cudaMemcpyDeviceToHost));
            }
            std::printf("{\"op\": \"%s\", \"bytes\": %d, \"one_way_ns\": %.0f}\n", names[int(way)],
                        way == Way::kFlag ? 8 : bytes, double(ns) / (kTurns - 8) / 2);
            if (way == Way::kFlag) break;
        }
    }
    std::fflush(stdout);
}

void measure_launches() {
    CHECK(cudaSetDevice(0));
    cudaStream_t s = gpus[0].stream;
    const auto chain = [&](bool dependent, int n) {
        for (int i = 0; i < n; ++i) {
            cudaLaunchAttribute attribute;
            attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attribute.val.programmaticStreamSerializationAllowed = 1;
            cudaLaunchConfig_t config{};
            config.gridDim = 16, config.blockDim = 512, config.dynamicSmemBytes = 200 * 1024;
            config.stream = s, config.attrs = &attribute, config.numAttrs = dependent ? 1 : 0;
            CHECK(cudaLaunchKernelEx(&config, dependent ? dependent_kernel : empty_kernel,
                                     (int*)nullptr));
        }
    };
    for (const bool dependent : {false, true}) {
        for (const bool graphed : {false, true}) {
            for (const int n : {1, 2, 20}) {
                cudaGraph_t graph;
                cudaGraphExec_t exec;
                CHECK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
                chain(dependent, n);
                CHECK(cudaStreamEndCapture(s, &graph));
                CHECK(cudaGraphInstantiate(&exec, graph, 0));
                float best = 1e9f;
                for (int round = 0; round < 12; ++round) {
                    CHECK(cudaStreamSynchronize(s));
                    CHECK(cudaMemsetAsync(gpus[0].out, round, 64 << 20, s));
                    CHECK(cudaMemsetAsync(gpus[0].out, round, 256 << 20, s));
                    CHECK(cudaEventRecord(gpus[0].start, s));
                    if (graphed) {
                        CHECK(cudaGraphLaunch(exec, s));
                    } else {
                        chain(dependent, n);
                    }
                    CHECK(cudaEventRecord(gpus[0].end, s));
                    CHECK(cudaStreamSynchronize(s));
                    float ms = 0;
                    CHECK(cudaEventElapsedTime(&ms, gpus[0].start, gpus[0].end));
                    if (round > 1) best = std::min(best, ms * 1e3f);
                }
                std::printf(
                    "{\"op\": \"%d kernels\", \"dependent\": %d, \"graph\": %d, \"us\": %.2f}\n", n,
                    dependent, graphed, best);
            }
        }
    }
}

int main(int argc, char** argv) {
    for (int g = 0; g < 2; ++g) {
        CHECK(cudaSetDevice(g));
        CHECK(cudaDeviceEnablePeerAccess(1 - g, 0));
        CHECK(cudaStreamCreate(&gpus[g].stream));
        CHECK(cudaEventCreate(&gpus[g].start));
        CHECK(cudaEventCreate(&gpus[g].end));
        constexpr size_t kBytes = size_t{256} << 20;
        for (std::byte** p : {&gpus[g].x, &gpus[g].in, &gpus[g].out}) CHECK(cudaMalloc(p, kBytes));
        CHECK(cudaMalloc(&gpus[g].flags, 1 << 20));
        CHECK(cudaMalloc(&gpus[g].ns, 8));
        CHECK(cudaMemset(gpus[g].x, 17 + g, kBytes));
        constexpr int kSmem = 225 * 1024;
        for (const void* k :
             {(const void*)push_kernel, (const void*)pull_kernel, (const void*)mixed_kernel,
              (const void*)empty_kernel, (const void*)dependent_kernel}) {
            CHECK(cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmem));
        }
        CHECK(cudaDeviceSynchronize());
    }
    for (int i = 1; i < argc; ++i) {
        const std::string what = argv[i];
        if (what == "push") measure_push();
        if (what == "pull") measure_pull();
        if (what == "flags") measure_flags();
        if (what == "launches") measure_launches();
    }
    return 0;
}
