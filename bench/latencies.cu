// What instructions of a latency-bound kernel take: chains of 16 that each need what the one before gave, of one warp;
// barriers of a block; parameters of a kernel, of which all warps of a block name a word in each of so many times 64
// bytes; and a word from the store of one block until another one, which polls for it, has it.
//
//     nvcc -std=c++20 -O3 -arch=sm_90 bench/latencies.cu -o latencies && ./latencies
//
// Prints one JSON line an instruction: cycles.
#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int kLength = 16, kHops = 1000;

// In the order of `chains`.
constexpr std::array kNames = {"imad",       "vote",      "match, 2 values", "match, 9 values",
                               "reduce min", "division",  "load, shared",    "atomic, shared",
                               "load, L2",   "atomic, L2"};

void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
    std::exit(1);
}

__device__ __forceinline__ uint32_t cycles() {
    uint32_t now;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
    return now;
}

// The second pass: code is there by then. `sink`: for what has no meaning.
template <class Step>
__device__ __forceinline__ uint32_t time_chain(Step step, uint32_t value, uint32_t* sink) {
    uint32_t taken = 0;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
        const uint32_t begin = cycles();
#pragma unroll
        for (int i = 0; i < kLength; ++i) value = step(value);
        if (__any_sync(~0u, value == 0x13572468u)) *sink = value;
        taken = cycles() - begin;
    }
    return taken;
}

// `memory`, `zero`: zeros, which the compiler does not know.
__global__ void chains(uint32_t* taken, uint32_t* memory, uint32_t zero) {
    __shared__ uint32_t shared[1024];
    const int lane = threadIdx.x;
    for (int i = lane; i < 1024; i += 32) shared[i] = zero;
    __syncwarp();
    int n = 0;
    const auto time = [&](auto step) {
        const uint32_t cycles_taken = time_chain(step, zero, memory);
        if (lane == 0) taken[n] = cycles_taken;
        ++n;
    };
    time([](uint32_t v) { return v * 3 + 1; });
    time([=](uint32_t v) { return __ballot_sync(~0u, v == lane); });
    time([=](uint32_t v) { return __match_any_sync(~0u, (v & 1) + (lane < 8 ? 0 : ~0u)) & 1; });
    time([=](uint32_t v) { return __match_any_sync(~0u, (v & 1) + (lane < 8 ? lane : 77)) & 1; });
    time([](uint32_t v) { return __reduce_min_sync(~0u, v); });
    time([](uint32_t v) {
        return __float_as_uint(__fdiv_rn(448.0f, __uint_as_float(v | 0x3f800000u)));
    });
    time([&](uint32_t v) { return shared[v & 1023]; });
    time([&](uint32_t v) { return atomicAdd(&shared[v & 15], 0u); });
    time([=](uint32_t v) { return __ldcg(memory + (v & 1023) * 64 + lane); });
    time([=](uint32_t v) { return atomicOr(memory + (v & 15) * 64, 0u); });
}

template <bool kVotes>
__global__ void barriers(uint32_t* taken, int vote) {
    __syncthreads();
    const uint32_t begin = cycles();
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
        if constexpr (kVotes) {
            vote = __syncthreads_and(vote + i);
        } else {
            __syncthreads();
        }
    }
    if (threadIdx.x == 0) *taken = cycles() - begin + (vote == 7);
}

struct Parameters {
    uint32_t word[16 * 20];
};

// The slowest warp's. kUniform: by instructions for what is the same in all lanes, each of which waits for its own;
// else they are loaded ahead.
template <int kLines, bool kUniform>
__global__ void parameters(const __grid_constant__ Parameters given, uint32_t* taken,
                           uint32_t value) {
    const uint32_t begin = cycles();
#pragma unroll
    for (int i = 0; i < kLines; ++i) value = value * 3 + given.word[16 * i + 1];
    if (!kUniform && __any_sync(~0u, value == 0x13572468u)) *taken = value;
    const uint32_t end = cycles() + (kUniform && value == 0x13572468u);
    if (threadIdx.x % 32 == 0) atomicMax(taken, end - begin);
}

// Two blocks in turn wait for a word of their own, and then store one for the other.
__global__ void hops(uint32_t* taken, uint64_t* words) {
    const uint64_t me = blockIdx.x;
    uint64_t* own = words + 64 * me;
    uint64_t* other = words + 64 * (1 - me);
    const uint32_t begin = cycles();
#pragma unroll 1
    for (uint64_t hop = 1; hop <= kHops; ++hop) {
        if (hop % 2 != me) continue;
        uint64_t seen;
        do {
            asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(seen) : "l"(own) : "memory");
        } while (seen != hop);
        asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(other), "l"(hop + 1) : "memory");
    }
    if (me == 0) *taken = cycles() - begin;
}

void print(const char* name, int threads, double taken, const char* gpu) {
    std::printf(
        "{\"instruction\": \"%s\", \"threads\": %d, \"cycles\": %.1f, \"gpu\": \"%s\", "
        "\"command\": \"latencies\"}\n",
        name, threads, taken, gpu);
}

}  // namespace

int main() {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, 0));
    const char* gpu = properties.name;
    uint32_t *taken, *memory;
    constexpr size_t kMemory = 1024 * 64 * sizeof(uint32_t) + 128;
    check(cudaMallocManaged(&taken, kNames.size() * sizeof(uint32_t)));
    check(cudaMalloc(&memory, kMemory));
    check(cudaMemset(memory, 0, kMemory));
    chains<<<1, 32>>>(taken, memory, 0);
    check(cudaDeviceSynchronize());
    for (size_t i = 0; i < kNames.size(); ++i) {
        print(kNames[i], 32, double(taken[i]) / kLength, gpu);
    }
    for (const int threads : {64, 256, 512}) {
        barriers<false><<<1, threads>>>(taken, 1);
        check(cudaDeviceSynchronize());
        print("barrier", threads, double(*taken) / kLength, gpu);
        barriers<true><<<1, threads>>>(taken, 1);
        check(cudaDeviceSynchronize());
        print("barrier with a vote", threads, double(*taken) / kLength, gpu);
    }
    const auto time_parameters = [&](auto kernel) {
        for (int n = 0; n < 3; ++n) {  // each kernel has its own; what counts is the last one's
            *taken = 0;
            kernel<<<1, 512>>>(Parameters{}, taken, n);
            check(cudaDeviceSynchronize());
        }
        return double(*taken);
    };
    const double ahead = time_parameters(parameters<20, false>);
    print("parameters, 64 bytes, loaded ahead", 512,
          (ahead - time_parameters(parameters<4, false>)) / 16, gpu);
    const double uniform = time_parameters(parameters<20, true>);
    print("parameters, 64 bytes, uniform", 512,
          (uniform - time_parameters(parameters<4, true>)) / 16, gpu);
    // Hop 1 is for block 1, and stored here.
    const uint64_t first = 1;
    check(cudaMemcpy(memory + 128, &first, sizeof(first), cudaMemcpyHostToDevice));
    hops<<<2, 1>>>(taken, reinterpret_cast<uint64_t*>(memory));
    check(cudaDeviceSynchronize());
    print("store until another block has it", 1, double(*taken) / kHops, gpu);
}
