// Sums in fp32 of rows that lie in shared memory: 16 bytes a lane, added one row after the other,
// rounded once.
//
// defines: Unit<DType>, load, add, store
#pragma once

#include <cstdint>

#include "contract/config.h"
#include "device/ptx.cuh"

namespace ep::device {

// 16 bytes of a row as the elements they are.
template <DType kDtype>
struct Unit {
    static constexpr int kElements = 16 / dtype_bytes(kDtype);
    float value[kElements];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (float& v : value) v = 0.0f;
    }

    __device__ __forceinline__ static float element(const uint4& bits, int i) {
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
        if constexpr (kDtype == DType::kF32) {
            return __uint_as_float(words[i]);
        } else if constexpr (kDtype == DType::kBF16) {
            return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
        } else {
            return ptx::cvt_f32_f16(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)));
        }
    }

    __device__ __forceinline__ void set(const uint4& bits) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) value[i] = element(bits, i);
    }

    __device__ __forceinline__ void add(const uint4& bits) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) value[i] = __fadd_rn(value[i], element(bits, i));
    }

    // The product is rounded before it is added, as on every backend.
    __device__ __forceinline__ void add(const uint4& bits, float weight) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
            value[i] = __fadd_rn(value[i], __fmul_rn(weight, element(bits, i)));
        }
    }

    __device__ __forceinline__ uint4 rounded() const {
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            if constexpr (kDtype == DType::kF32) {
                words[w] = __float_as_uint(value[w]);
            } else if constexpr (kDtype == DType::kBF16) {
                words[w] = ptx::cvt_rn_bf16x2(value[2 * w + 1], value[2 * w]);
            } else {
                words[w] = ptx::cvt_rn_f16x2(value[2 * w + 1], value[2 * w]);
            }
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }
};

}  // namespace ep::device
