// Arithmetic on rows: copies, ordered fp32 sums, fp8 quantization. One source, compiled for each
// instruction set.
//
// All builds give the same bits: no fused multiply-add, one rounding where the documentation says
// one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "contract/config.h"

namespace ep::cpu {

// out[i] = round(((bias0[i] + bias1[i]) + weight[0] * row[0][i]) + weight[1] * row[1][i] ...), in
// fp32, in this order.
struct SumArgs {
    std::byte* out;                // [hidden] of dtype
    const std::byte* const* rows;  // [num_rows] rows of dtype
    const float* weights;          // [num_rows] or null
    const std::byte* bias0;        // or null
    const std::byte* bias1;        // or null
    int64_t hidden;
    int num_rows;
};

struct QuantizeArgs {
    std::byte* out;        // [hidden] e4m3
    std::byte* scales;     // fp32 [hidden / block], or int32 [hidden / (4 * block)]
    const std::byte* row;  // [hidden] of dtype
    int64_t hidden;
    int block;
    bool ue8m0;
};

struct Simd {
    const char* name;
    void (*copy)(std::byte* dst, const std::byte* src, int64_t bytes);  // through the cache
    void (*copy_stream)(std::byte* dst, const std::byte* src,
                        int64_t bytes);  // past it; needs drain()
    void (*drain)();                     // earlier streamed bytes are visible before later releases
    void (*sum)(DType dtype, const SumArgs& args);
    void (*quantize)(DType dtype, const QuantizeArgs& args);
};

// The widest set this processor runs; `force` picks one by name (tests), null returns to the
// widest.
const Simd& simd();
bool force_simd(const char* name);

extern const Simd kSimdPortable;
#if defined(__x86_64__)
extern const Simd kSimdAvx2;
extern const Simd kSimdAvx512;
#endif

}  // namespace ep::cpu
