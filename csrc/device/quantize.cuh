// One row of shared memory to e4m3, in place, by one warp: one scale per block of 128 or 32 elements.
//
// A step takes 512 elements, four times four a lane, and writes behind what it has read, so source
// and result share their memory. The arithmetic is that of ep_comm/reference/fp8.py, bit for bit.
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

// Four elements of a lane on their way, and the largest magnitude of their block, as bits.
struct Quad {
    float value[4];
    uint32_t most;
};

// `row` holds `hidden` elements, afterwards as many bytes; `scales` one word, or one byte, a block.
template <DType kSource, int kBlock>
__device__ __forceinline__ void quantize_blocks(std::byte* row, std::byte* scales, int hidden,
                                                bool ue8m0) {
    constexpr int kAtOnce = 4, kLanes = kBlock / 4;
    const int lane = ptx::lane_id();
    for (int column = 0; column < hidden; column += kAtOnce * 128) {
        Quad quad[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            const int mine = column + 128 * u + 4 * lane;
            for (float& v : quad[u].value) v = 0.0f;
            if (mine < hidden) load4<kSource>(row + mine * dtype_bytes(kSource), quad[u].value);
            // As integers: order of magnitude bits is order of magnitudes, NaN is above everything.
            quad[u].most = 0;
            for (const float v : quad[u].value) {
                quad[u].most = max(quad[u].most, __float_as_uint(v) & 0x7fffffffu);
            }
        }
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) {
#pragma unroll
            for (Quad& q : quad) q.most = max(q.most, __shfl_xor_sync(~0u, q.most, step));
        }
        __syncwarp();  // everybody has read this step
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            const int mine = column + 128 * u + 4 * lane;
            float amax = __uint_as_float(quad[u].most);
            if (amax < 1e-4f) amax = 1e-4f;  // false for NaN, which stays
            const float scale = __fdiv_rn(amax, 448.0f);
            const uint32_t exponent = ceil_exponent(scale);
            const float multiplier =
                ue8m0 ? __uint_as_float(exponent == 255 ? 0x7fc00000u  // Inf or NaN: all NaN
                                                        : (254u - exponent) << 23)
                      : __fdiv_rn(448.0f, amax);
            if (mine >= hidden) continue;
            const float* v = quad[u].value;
            const uint32_t low = ptx::cvt_rn_satfinite_e4m3x2(v[1] * multiplier, v[0] * multiplier);
            const uint32_t high =
                ptx::cvt_rn_satfinite_e4m3x2(v[3] * multiplier, v[2] * multiplier);
            *reinterpret_cast<uint32_t*>(row + mine) = high << 16 | low;
            if (lane % kLanes != 0) continue;
            if (ue8m0) {
                scales[mine / kBlock] = static_cast<std::byte>(exponent);
            } else {
                reinterpret_cast<float*>(scales)[mine / kBlock] = scale;
            }
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
