// One row of shared memory to e4m3, in place, by one warp: one scale per block of 128 or 32 elements.
//
// A step takes kAtOnce vectors of 16 bytes a lane and writes behind what it has read, so source and
// result share their memory. The largest magnitudes are brought together so that every lane ends
// with one block: divisions are done once a block. The arithmetic is that of
// ep_comm/reference/fp8.py, bit for bit.
#pragma once

#include <cstdint>

#include "contract/config.h"
#include "device/ptx.cuh"

namespace ep::device {

// 16 bytes of a row that is quantized.
template <DType kSource>
struct Vector {
    static constexpr int kElements = 16 / dtype_bytes(kSource);
    uint32_t word[4] = {0, 0, 0, 0};

    __device__ __forceinline__ void load(const std::byte* src) {
        set(*reinterpret_cast<const uint4*>(src));
    }
    __device__ __forceinline__ void set(const uint4& v) {
        word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
    }

    __device__ __forceinline__ float element(int i) const {
        if constexpr (kSource == DType::kF32) {
            return __uint_as_float(word[i]);
        } else {
            const uint32_t bits = i % 2 == 0 ? word[i / 2] & 0xffffu : word[i / 2] >> 16;
            if constexpr (kSource == DType::kF16) return ptx::cvt_f32_f16(uint16_t(bits));
            return __uint_as_float(i % 2 == 0 ? bits << 16 : word[i / 2] & 0xffff0000u);
        }
    }

    // Bits of the largest magnitude, in the type of the source. As integers: their order is that of
    // the magnitudes, NaN is above everything.
    __device__ __forceinline__ uint32_t most() const {
        if constexpr (kSource == DType::kF32) {
            uint32_t most = 0;
#pragma unroll
            for (const uint32_t w : word) most = max(most, w & 0x7fffffffu);
            return most;
        } else {
            uint32_t pair = 0;
#pragma unroll
            for (const uint32_t w : word) pair = __vmaxu2(pair, w & 0x7fff7fffu);
            return max(pair & 0xffffu, pair >> 16);
        }
    }

    __device__ __forceinline__ static float magnitude(uint32_t most) {
        if constexpr (kSource == DType::kF32) return __uint_as_float(most);
        if constexpr (kSource == DType::kF16) return ptx::cvt_f32_f16(uint16_t(most));
        return __uint_as_float(most << 16);
    }

    __device__ __forceinline__ uint32_t quantized4(int first, float multiplier) const {
        const uint32_t low = ptx::cvt_rn_satfinite_e4m3x2(element(first + 1) * multiplier,
                                                          element(first) * multiplier);
        const uint32_t high = ptx::cvt_rn_satfinite_e4m3x2(element(first + 3) * multiplier,
                                                           element(first + 2) * multiplier);
        return high << 16 | low;
    }

    __device__ __forceinline__ uint2 quantized8(float multiplier) const {
        static_assert(kElements == 8);
        return make_uint2(quantized4(0, multiplier), quantized4(4, multiplier));
    }
    __device__ __forceinline__ void store(std::byte* out, float multiplier) const {
        if constexpr (kElements == 4) {
            *reinterpret_cast<uint32_t*>(out) = quantized4(0, multiplier);
        } else {
            *reinterpret_cast<uint2*>(out) = quantized8(multiplier);
        }
    }
};

// Biased exponent of the smallest power of two that is not below `scale`.
__device__ __forceinline__ uint32_t ceil_exponent(float scale) {
    const uint32_t u = __float_as_uint(scale), exponent = u >> 23 & 0xffu;
    return exponent == 255 ? 255 : exponent + ((u & 0x7fffffu) != 0 ? 1 : 0);
}

// What a block of this largest magnitude is multiplied with; writes its scale.
__device__ __forceinline__ float scale_block(float amax, bool ue8m0, std::byte* scales, int block,
                                             bool writes) {
    if (amax < 1e-4f) amax = 1e-4f;  // false for NaN, which stays
    const float scale = __fdiv_rn(amax, 448.0f);
    if (!ue8m0) {
        if (writes) reinterpret_cast<float*>(scales)[block] = scale;
        return __fdiv_rn(448.0f, amax);
    }
    const uint32_t exponent = ceil_exponent(scale);
    if (writes) scales[block] = static_cast<std::byte>(exponent);
    // Inf or NaN: all NaN.
    return __uint_as_float(exponent == 255 ? 0x7fc00000u : (254u - exponent) << 23);
}

// The scale and the multiplier of every magnitude that is BF16, without a division where it takes time: those of its
// mantissa, times a power of two, which rounds nothing.
struct Bf16Scales {
    static constexpr int kMantissas = 128, kSmall = kMantissas, kInfinite = kSmall + 1;
    static constexpr int kNan = kInfinite + 1, kCount = kNan + 1;
    struct Entry {
        float scale, multiplier;
    };
    Entry* entries;  // [kCount]

    // Threads [0, kCount) of a block, each its entry; a barrier must follow.
    __device__ __forceinline__ void fill(int i) const {
        const float infinite = __uint_as_float(0x7f800000u);
        const float nan = __uint_as_float(0x7fffffffu);  // that of divisions
        if (i == kSmall) {
            entries[i] = {1e-4f / 448.0f, 448.0f / 1e-4f};
        } else if (i >= kMantissas) {  // to divide these takes 2000 cycles
            entries[i] = {i == kInfinite ? infinite : nan, i == kInfinite ? 0.0f : nan};
        } else {
            const float amax = __uint_as_float(0x3f800000u | static_cast<uint32_t>(i) << 16);
            entries[i] = {__fdiv_rn(amax, 448.0f), __fdiv_rn(448.0f, amax)};
        }
    }
    // See scale_block. `most`: bits of a magnitude.
    __device__ __forceinline__ float scale_block(uint32_t most, bool ue8m0, std::byte* scales,
                                                 int block, bool writes) const {
        const uint32_t mantissa = most & 0x7f, exponent = most >> 7;
        const bool is_small = __uint_as_float(most << 16) < 1e-4f, is_beyond = exponent == 255;
        const int beyond = mantissa == 0 ? kInfinite : kNan;
        const int at = is_small ? kSmall : is_beyond ? beyond : static_cast<int>(mantissa);
        const uint32_t shift = is_small || is_beyond ? 0 : (exponent - 127) << 23;
        const Entry entry = entries[at];
        const uint32_t scale = __float_as_uint(entry.scale) + shift;
        if (!ue8m0) {
            if (writes) reinterpret_cast<uint32_t*>(scales)[block] = scale;
            return __uint_as_float(__float_as_uint(entry.multiplier) - shift);
        }
        const uint32_t power = ceil_exponent(__uint_as_float(scale));
        if (writes) scales[block] = static_cast<std::byte>(power);
        return __uint_as_float(power == 255 ? 0x7fc00000u : (254u - power) << 23);
    }
};

// The kValues maxima of every group of kLanes lanes: halves are exchanged until each lane holds one,
// that of value owned_value(lane).
template <int kValues, int kLanes>
struct Gathered {
    // The lane of a group that ends with value v: the first step decides its highest bit.
    __device__ __forceinline__ static constexpr int owner(int v) {
        int lane = 0;
        for (int half = kValues / 2, bit = 1; half > 0; half /= 2, bit *= 2) {
            if (v & half) lane |= bit;
        }
        return lane;
    }
    __device__ __forceinline__ static int value_of(int lane) {
        int v = 0;
#pragma unroll
        for (int half = kValues / 2, bit = 1; half > 0; half /= 2, bit *= 2) {
            if (lane & bit) v |= half;
        }
        return v;
    }

    __device__ __forceinline__ static uint32_t run(uint32_t (&most)[kValues]) {
        const int lane = ptx::lane_id();
        int bit = 1;
#pragma unroll
        for (int half = kValues / 2; half > 0; half /= 2, bit *= 2) {
            const bool upper = (lane & bit) != 0;
#pragma unroll
            for (int i = 0; i < half; ++i) {
                const uint32_t sent = upper ? most[i] : most[i + half];
                const uint32_t kept = upper ? most[i + half] : most[i];
                most[i] = max(kept, __shfl_xor_sync(~0u, sent, bit));
            }
        }
#pragma unroll
        for (; bit < kLanes; bit *= 2) most[0] = max(most[0], __shfl_xor_sync(~0u, most[0], bit));
        return most[0];
    }
};

// A piece of a row, of up to kVectors vectors of a warp, as it comes from memory. In three steps, so that loads are on
// their way while other things are done, and where they go is known before.
template <DType kSource, int kVectors>
struct Loaded {
    using Source = Vector<kSource>;
    static constexpr int kWidth = 32 * Source::kElements;

    Source vector[kVectors];
    const std::byte* from = nullptr;  // this lane's first vector
    int left = 0;                     // elements from there on

    // `elements`: of the piece.
    __device__ __forceinline__ void announce(const std::byte* piece, int elements) {
        const int first = Source::kElements * ptx::lane_id();
        from = piece + first * dtype_bytes(kSource), left = elements - first;
        ptx::pin(from), ptx::pin(left);
    }
    __device__ __forceinline__ void load() {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            if (left <= v * kWidth) continue;
            vector[v].set(ptx::ld_global_v4(from + v * kWidth * dtype_bytes(kSource)));
        }
    }
    // To shared memory, as quantize_blocks leaves it there. scale(most, block, writes): the multiplier of a block.
    template <int kBlock, class Scale>
    __device__ __forceinline__ void quantize(std::byte* row, Scale scale) const {
        constexpr int kLanes = kBlock / Source::kElements;  // of a block
        constexpr int kGroups = 32 / kLanes, kValues = kVectors <= 4 ? 4 : 8;
        static_assert(kVectors <= kValues && kValues <= kLanes);
        const int lane = ptx::lane_id(), group = lane / kLanes;
        uint32_t most[kValues] = {};
#pragma unroll
        for (int v = 0; v < kVectors; ++v) most[v] = vector[v].most();
        using Maxima = Gathered<kValues, kLanes>;
        const uint32_t own = Maxima::run(most);
        const int block = Maxima::value_of(lane % kLanes) * kGroups + group;
        const int behind =
            block * kBlock - Source::kElements * lane;  // its begin, from our first vector on
        const bool writes = lane % kLanes < kValues && behind < left;
        const float multiplier = scale(own, block, writes);
        float theirs[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            theirs[v] = __shfl_sync(~0u, multiplier, group * kLanes + Maxima::owner(v));
        }
        uint2 bits[kVectors];  // of what is not there, too: that takes no branch
#pragma unroll
        for (int v = 0; v < kVectors; ++v) bits[v] = vector[v].quantized8(theirs[v]);
        row += Source::kElements * lane;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            if (left > v * kWidth) *reinterpret_cast<uint2*>(row + v * kWidth) = bits[v];
        }
        __syncwarp();
    }
};

// Elements of a vector of a warp.
template <DType kSource>
constexpr int kVectorWidth = 32 * Vector<kSource>::kElements;

// The blocks from `column` on that kAtOnce vectors of the warp hold. See quantize_blocks.
template <DType kSource, int kBlock, int kAtOnce>
__device__ __forceinline__ void quantize_step(std::byte* row, std::byte* scales, int column,
                                              int hidden, bool ue8m0) {
    using Source = Vector<kSource>;
    constexpr int kLanes = kBlock / Source::kElements;  // of a block
    constexpr int kGroups = 32 / kLanes, kWidth = kVectorWidth<kSource>;
    const int lane = ptx::lane_id(), group = lane / kLanes;
    Source source[kAtOnce];
    uint32_t most[kAtOnce];
#pragma unroll
    for (int v = 0; v < kAtOnce; ++v) {
        const int mine = column + v * kWidth + Source::kElements * lane;
        if (mine < hidden) source[v].load(row + mine * dtype_bytes(kSource));
        most[v] = source[v].most();
    }
    using Maxima = Gathered<kAtOnce, kLanes>;
    const uint32_t own = Maxima::run(most);
    const int value = Maxima::value_of(lane % kLanes);
    const int block = column / kBlock + value * kGroups + group;
    const bool writes = lane % kLanes < kAtOnce && block * kBlock < hidden;
    const float multiplier = scale_block(Source::magnitude(own), ue8m0, scales, block, writes);
    __syncwarp();  // everybody has read this step
#pragma unroll
    for (int v = 0; v < kAtOnce; ++v) {
        const int mine = column + v * kWidth + Source::kElements * lane;
        const float theirs = __shfl_sync(~0u, multiplier, group * kLanes + Maxima::owner(v));
        if (mine < hidden) source[v].store(row + mine, theirs);
    }
}

// kMost: vectors of a lane in a step; kEndsSmall: a last step of one vector is one of its own. `row` holds `hidden`
// elements, afterwards as many bytes; `scales` one word, or one byte, a block.
template <DType kSource, int kBlock, int kMost = 8, bool kEndsSmall = false>
__device__ __forceinline__ void quantize_blocks(std::byte* row, std::byte* scales, int hidden,
                                                bool ue8m0) {
    constexpr int kLanes = kBlock / Vector<kSource>::kElements;
    constexpr int kAtOnce = kLanes < kMost ? kLanes : kMost, kWidth = kVectorWidth<kSource>;
#pragma unroll 1
    for (int column = 0; column < hidden; column += kAtOnce * kWidth) {
        if (kEndsSmall && hidden - column <= kWidth) {
            quantize_step<kSource, kBlock, 1>(row, scales, column, hidden, ue8m0);
        } else {
            quantize_step<kSource, kBlock, kAtOnce>(row, scales, column, hidden, ue8m0);
        }
    }
    __syncwarp();
}

template <DType kSource>
__device__ void quantize_row(std::byte* row, std::byte* scales, int hidden, int block, bool ue8m0) {
    if (block == 128) {
        quantize_blocks<kSource, 128>(row, scales, hidden, ue8m0);
    } else {
        quantize_blocks<kSource, 32>(row, scales, hidden, ue8m0);
    }
}

}  // namespace ep::device
