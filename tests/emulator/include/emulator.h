// CUDA's words for a C++ compiler: the kernels of csrc/kernels run on a CPU, thread by thread.
//
// Included before everything else of a kernel file. A block is a thread of the system, its threads are
// fibers of it; warps meet where their instructions say so, blocks and ranks in real memory. Bulk copies
// happen late and in any order (device/ptx.cuh beside this). What it cannot show: the memory model of
// a GPU, and time.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace emulator {

struct Coordinates {
    unsigned thread, block, block_dim, grid_dim;
};
// Of the fiber that runs.
Coordinates& here();
// Lets others run: whoever polls calls it.
void yield();
// All threads of the block; returns the sum of what each brings.
int64_t meet_block(int64_t value);
// Some threads of the block, at a barrier of theirs.
void meet_some(int barrier, int threads);
// All lanes of the warp: what each brought, by lane. `what` tells calls apart.
const std::array<uint64_t, 32>& meet_warp(uint64_t value, int what);
int lane();
std::byte* dynamic_shared();

[[noreturn]] void die(const char* why);

template <class T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
}
template <class T>
T from_bits(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace emulator

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static thread_local
#define __noinline__

namespace emulator {

template <unsigned Coordinates::* kField>
struct Axis {
    operator unsigned() const { return here().*kField; }
};
template <unsigned Coordinates::* kField>
struct Place {
    Axis<kField> x;
};

}  // namespace emulator

inline constexpr emulator::Place<&emulator::Coordinates::thread> threadIdx;
inline constexpr emulator::Place<&emulator::Coordinates::block> blockIdx;
inline constexpr emulator::Place<&emulator::Coordinates::block_dim> blockDim;
inline constexpr emulator::Place<&emulator::Coordinates::grid_dim> gridDim;

struct uint2 {
    unsigned x, y;
};
struct int2 {
    int x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class A, class B>
constexpr auto min(A a, B b) {
    using T = std::common_type_t<A, B>;
    return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
constexpr auto max(A a, B b) {
    using T = std::common_type_t<A, B>;
    return T(a) < T(b) ? T(b) : T(a);
}

template <class T>
T __ldg(const T* p) {
    return *p;
}
inline int __popc(unsigned v) { return std::popcount(v); }
inline int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }
inline int __ffs(unsigned v) { return v == 0 ? 0 : std::countr_zero(v) + 1; }
inline int __ffsll(long long v) {
    return v == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(v)) + 1;
}
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline unsigned __vmaxu2(unsigned a, unsigned b) {
    return max(a & 0xffffu, b & 0xffffu) | max(a >> 16, b >> 16) << 16;
}

// ---- blocks and warps ----

inline void __syncthreads() { emulator::meet_block(0); }
inline int __syncthreads_or(int v) { return emulator::meet_block(v != 0) != 0; }
inline int __syncthreads_and(int v) { return emulator::meet_block(v == 0) == 0; }

inline void __syncwarp() { emulator::meet_warp(0, 0); }
inline unsigned __ballot_sync(unsigned, int v) {
    const auto& all = emulator::meet_warp(v != 0, 1);
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= unsigned(all[i] != 0) << i;
    return bits;
}
inline int __any_sync(unsigned m, int v) { return __ballot_sync(m, v) != 0; }
inline int __all_sync(unsigned m, int v) { return __ballot_sync(m, v) == ~0u; }
template <class T>
T __shfl_sync(unsigned, T v, int from) {
    return emulator::from_bits<T>(emulator::meet_warp(emulator::to_bits(v), 2)[from & 31]);
}
template <class T>
T __shfl_up_sync(unsigned, T v, int by) {
    const auto& all = emulator::meet_warp(emulator::to_bits(v), 3);
    const int from = emulator::lane() - by;
    return from < 0 ? v : emulator::from_bits<T>(all[from]);
}
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) {
    const auto& all = emulator::meet_warp(emulator::to_bits(v), 4);
    return emulator::from_bits<T>(all[(emulator::lane() ^ mask) & 31]);
}
template <class T>
unsigned __match_any_sync(unsigned, T v) {
    const auto& all = emulator::meet_warp(emulator::to_bits(v), 5);
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= unsigned(all[i] == emulator::to_bits(v)) << i;
    return bits;
}
inline int __reduce_max_sync(unsigned, int v) {
    const auto& all = emulator::meet_warp(emulator::to_bits(v), 6);
    int most = emulator::from_bits<int>(all[0]);
    for (const uint64_t bits : all) most = max(most, emulator::from_bits<int>(bits));
    return most;
}
inline unsigned __reduce_min_sync(unsigned, unsigned v) {
    const auto& all = emulator::meet_warp(v, 8);
    unsigned least = v;
    for (const uint64_t bits : all) least = std::min(least, static_cast<unsigned>(bits));
    return least;
}
inline unsigned __reduce_or_sync(unsigned, unsigned v) {
    const auto& all = emulator::meet_warp(v, 9);
    unsigned any = 0;
    for (const uint64_t bits : all) any |= static_cast<unsigned>(bits);
    return any;
}
inline int __reduce_add_sync(unsigned, int v) {
    const auto& all = emulator::meet_warp(emulator::to_bits(v), 7);
    int sum = 0;
    for (const uint64_t bits : all) sum += emulator::from_bits<int>(bits);
    return sum;
}

// ---- atomics ----

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
    return std::atomic_ref(*p).fetch_add(v);
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v) {
    return std::atomic_ref(*p).exchange(v);
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> v) {
    return std::atomic_ref(*p).fetch_or(v);
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v) {
    std::atomic_ref word(*p);
    T old = word.load();
    while (v < old && !word.compare_exchange_weak(old, v)) {
    }
    return old;
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
    std::atomic_ref word(*p);
    T old = word.load();
    while (v > old && !word.compare_exchange_weak(old, v)) {
    }
    return old;
}
