// One row of shared memory to e4m3, in place, by one warp: one scale per block of 128 or 32 elements.
//
// A step takes 128 elements, four a lane, and writes behind what it has read, so source and result
// share their memory. The arithmetic is that of ep_comm/reference/fp8.py, bit for bit.
#pragma once

#include <cstdint>

#include "contract/config.h"
#include "device/ptx.cuh"

namespace ep::device {

template <DType kSource>
__device__ __forceinline__ void load4(const std::byte* src, float (&value)[4]) {
    if constexpr (kSource == DType::kF32) {
        const float4 v = *reinterpret_cast<const float4*>(src);
        value[0] = v.x, value[1] = v.y, value[2] = v.z, value[3] = v.w;
    } else {
        const uint2 v = *reinterpret_cast<const uint2*>(src);
        const uint32_t words[2] = {v.x, v.y};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t bits = words[i / 2] >> (i % 2 * 16) & 0xffffu;
            value[i] = kSource == DType::kBF16 ? __uint_as_float(bits << 16)
                                               : ptx::cvt_f32_f16(static_cast<uint16_t>(bits));
        }
    }
}

// Biased exponent of the smallest power of two that is not below `scale`.
__device__ __forceinline__ uint32_t ceil_exponent(float scale) {
    const uint32_t u = __float_as_uint(scale), exponent = u >> 23 & 0xffu;
    return exponent == 255 ? 255 : exponent + ((u & 0x7fffffu) != 0 ? 1 : 0);
}

// `row` holds `hidden` elements, afterwards as many bytes; `scales` one word, or one byte, a block.
template <DType kSource>
__device__ void quantize_row(std::byte* row, std::byte* scales, int hidden, int block, bool ue8m0) {
    const int lane = ptx::lane_id();
    const int lanes_per_block = block / 4;
    for (int column = 0; column < hidden; column += 128) {
        const int mine = column + 4 * lane;
        const bool here = mine < hidden;
        float value[4] = {};
        if (here) load4<kSource>(row + mine * dtype_bytes(kSource), value);
        // As integers: order of magnitude bits is order of magnitudes, and NaN is above everything.
        uint32_t most = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) most = max(most, __float_as_uint(value[i]) & 0x7fffffffu);
        for (int step = lanes_per_block / 2; step > 0; step /= 2) {
            most = max(most, __shfl_xor_sync(~0u, most, step));
        }
        float amax = __uint_as_float(most);
        if (amax < 1e-4f) amax = 1e-4f;  // false for NaN, which stays
        const float scale = __fdiv_rn(amax, 448.0f);
        float multiplier = __fdiv_rn(448.0f, amax);
        const int b = mine / block;
        const bool writes_scale = here && lane % lanes_per_block == 0;
        if (ue8m0) {
            const uint32_t exponent = ceil_exponent(scale);
            multiplier = __uint_as_float(exponent == 255 ? 0x7fc00000u  // Inf or NaN: all NaN
                                                         : (254u - exponent) << 23);
            if (writes_scale) scales[b] = static_cast<std::byte>(exponent);
        } else if (writes_scale) {
            reinterpret_cast<float*>(scales)[b] = scale;
        }
        const uint32_t low =
            ptx::cvt_rn_satfinite_e4m3x2(value[1] * multiplier, value[0] * multiplier);
        const uint32_t high =
            ptx::cvt_rn_satfinite_e4m3x2(value[3] * multiplier, value[2] * multiplier);
        __syncwarp();  // everybody has read this step
        if (here) *reinterpret_cast<uint32_t*>(row + mine) = high << 16 | low;
    }
    __syncwarp();
}

}  // namespace ep::device
