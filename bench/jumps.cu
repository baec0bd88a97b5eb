// What a warp pays for code that it jumps over: 32 times 8 dependent instructions, with others behind each that a
// branch passes by. Kernels follow each other in a graph, each dependent on the one before, as a decoder's do; of
// `kinds` 2 two that differ take turns, so that what one has in its caches of instructions is not what the next needs.
//
//     nvcc -std=c++20 -O3 -arch=sm_90 bench/jumps.cu -o jumps && ./jumps
//
// Prints one JSON line a case: cycles that a jump costs, by the first pass of a kernel through its code and by a later
// one, the median of all blocks.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call)                                                             \
    do {                                                                        \
        const cudaError_t error = (call);                                       \
        if (error != cudaSuccess) {                                             \
            std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error)); \
            std::exit(1);                                                       \
        }                                                                       \
    } while (false)

constexpr int kJumps = 32, kPasses = 3, kLaunches = 20;

__device__ __forceinline__ unsigned cycles() {
    unsigned now;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
    return now;
}

template <int kCount>
__device__ __forceinline__ void work(float& x, float y, float z) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(x) : "f"(y), "f"(z));
    }
}

// `never`: 0, which the compiler does not know. kKind makes another kernel of it.
template <int kOver, int kKind>
__global__ void jumps_kernel(float* data, unsigned* taken, int never) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    float x = data[0] + kKind;
    const float y = data[1], z = data[2];
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
        const unsigned begin = cycles();
#pragma unroll
        for (int i = 0; i < kJumps; ++i) {
            work<8>(x, y, z);
            if (never == i + 1) work<kOver>(x, y, z);
        }
        const unsigned end = cycles();
        if (threadIdx.x == 0) taken[blockIdx.x * kPasses + pass] = end - begin;
    }
    if (x == -1.0f) data[3] = x;
}

using Kernel = void (*)(float*, unsigned*, int);

// Cycles of each pass, the median of all blocks.
std::vector<int> measure(Kernel a, Kernel b, int blocks) {
    float* data;
    unsigned* taken;
    CHECK(cudaMalloc(&data, 4 * sizeof(float)));
    CHECK(cudaMemset(data, 0, 4 * sizeof(float)));
    CHECK(cudaMalloc(&taken, kLaunches * blocks * kPasses * sizeof(unsigned)));
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (int n = 0; n < kLaunches; ++n) {
        cudaLaunchAttribute early{};
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = blocks;
        config.blockDim = 32;
        config.stream = stream;
        config.attrs = &early;
        config.numAttrs = 1;
        unsigned* out = taken + n * blocks * kPasses;
        CHECK(cudaLaunchKernelEx(&config, n % 2 == 0 ? a : b, data, out, 0));
    }
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&ready, graph, 0));
    for (int round = 0; round < 9; ++round) CHECK(cudaGraphLaunch(ready, stream));
    CHECK(cudaStreamSynchronize(stream));
    std::vector<unsigned> all(kLaunches * blocks * kPasses);
    CHECK(cudaMemcpy(all.data(), taken, all.size() * sizeof(unsigned), cudaMemcpyDeviceToHost));
    std::vector<int> medians;
    for (int pass = 0; pass < kPasses; ++pass) {
        std::vector<unsigned> of_pass;
        for (size_t i = pass; i < all.size(); i += kPasses) of_pass.push_back(all[i]);
        std::sort(of_pass.begin(), of_pass.end());
        medians.push_back(static_cast<int>(of_pass[of_pass.size() / 2]));
    }
    CHECK(cudaGraphExecDestroy(ready));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaStreamDestroy(stream));
    CHECK(cudaFree(taken));
    CHECK(cudaFree(data));
    return medians;
}

template <int kOver>
void compare(const char* gpu) {
    for (const int blocks : {1, 16, 64}) {
        for (const int kinds : {1, 2}) {
            const auto cost = [&](int pass) {
                const Kernel other = kinds == 1 ? jumps_kernel<kOver, 0> : jumps_kernel<kOver, 1>;
                const Kernel none = kinds == 1 ? jumps_kernel<0, 0> : jumps_kernel<0, 1>;
                const int with = measure(jumps_kernel<kOver, 0>, other, blocks)[pass];
                return double(with - measure(jumps_kernel<0, 0>, none, blocks)[pass]) / kJumps;
            };
            std::printf(
                "{\"over\": %d, \"kinds\": %d, \"blocks\": %d, \"first_cycles\": %.1f, "
                "\"later_cycles\": %.1f, \"gpu\": \"%s\"}\n",
                kOver, kinds, blocks, cost(0), cost(kPasses - 1), gpu);
        }
    }
}

int main() {
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    compare<16>(properties.name);
    compare<32>(properties.name);
    compare<64>(properties.name);
    compare<128>(properties.name);
    compare<256>(properties.name);
    return 0;
}
