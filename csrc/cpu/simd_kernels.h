// The row kernels, written once over the compiler's vector types; each simd_*.cc instantiates them
// for its width.
//
// The anonymous namespace is deliberate: every including file compiles its own copy with its own
// instruction set.
#pragma once

#include <bit>
#include <cstring>

#include "cpu/simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ep::cpu {
namespace {

#define EP_INLINE inline __attribute__((always_inline))

template <int W>
struct Vec {
    typedef float F32 __attribute__((vector_size(4 * W)));
    typedef uint32_t U32 __attribute__((vector_size(4 * W)));
    typedef int32_t I32 __attribute__((vector_size(4 * W)));
    typedef uint16_t U16 __attribute__((vector_size(2 * W)));
    typedef uint8_t U8 __attribute__((vector_size(W)));
};

template <class T>
EP_INLINE T load_as(const std::byte* src) {
    T value;
    std::memcpy(&value, src, sizeof(T));
    return value;
}

template <class T>
EP_INLINE void store_as(std::byte* dst, const T& value) {
    std::memcpy(dst, &value, sizeof(T));
}

template <class To, class From>
EP_INLINE To bits(const From& value) {
    static_assert(sizeof(To) == sizeof(From));
    To out;
    std::memcpy(&out, &value, sizeof(To));
    return out;
}

// Where mask is all ones take a, elsewhere b.
template <class U, class M>
EP_INLINE U pick(const M& mask, const U& a, const U& b) {
    const U m = bits<U>(mask);
    return (a & m) | (b & ~m);
}

// ---- element types to and from fp32; NaN stays NaN, everything else is exact or rounds to nearest
// even ----

template <int W, DType D>
struct Element;

template <int W>
struct Element<W, DType::kF32> {
    using V = Vec<W>;
    static EP_INLINE typename V::F32 load(const std::byte* src) {
        return load_as<typename V::F32>(src);
    }
    static EP_INLINE void store(std::byte* dst, typename V::F32 value) { store_as(dst, value); }
};

template <int W>
struct Element<W, DType::kBF16> {
    using V = Vec<W>;
    using U32 = typename V::U32;
    static EP_INLINE typename V::F32 load(const std::byte* src) {
        const auto half = load_as<typename V::U16>(src);
        return bits<typename V::F32>(__builtin_convertvector(half, U32) << 16);
    }
    static EP_INLINE void store(std::byte* dst, typename V::F32 value) {
        const U32 u = bits<U32>(value);
        const U32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        const U32 nan = U32{} + 0x7fc0u;
        const U32 out = pick<U32>((u & 0x7fffffffu) > 0x7f800000u, nan, rounded);
        store_as(dst, __builtin_convertvector(out, typename V::U16));
    }
};

template <int W>
struct Element<W, DType::kF16> {
    using V = Vec<W>;
    using U32 = typename V::U32;
    using F32 = typename V::F32;
    static EP_INLINE F32 load(const std::byte* src) {
        const U32 h = __builtin_convertvector(load_as<typename V::U16>(src), U32);
        const U32 sign = (h & 0x8000u) << 16;
        const U32 magnitude = (h & 0x7fffu) << 13;
        // Times 2^112 moves the exponent bias from 15 to 127 and makes denormals normal, exactly.
        const F32 scaled = bits<F32>(magnitude) * 0x1p112f;
        const U32 special = magnitude | 0x7f800000u;  // Inf, NaN
        return bits<F32>(pick<U32>((h & 0x7c00u) == 0x7c00u, special, bits<U32>(scaled)) | sign);
    }
    static EP_INLINE void store(std::byte* dst, F32 value) {
        const U32 u = bits<U32>(value);
        const U32 sign = (u >> 16) & 0x8000u;
        const U32 magnitude = u & 0x7fffffffu;
        const U32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        // Adding 0.5 leaves a denormal's bits, rounded to nearest even, in the low mantissa.
        const U32 half = U32{} + 0x3f000000u;
        const U32 denormal = bits<U32>(bits<F32>(magnitude) + bits<F32>(half)) - half;
        U32 out = pick<U32>(magnitude < (113u << 23), denormal, normal);
        out = pick<U32>(magnitude >= 0x477ff000u, U32{} + 0x7c00u, out);  // rounds to Inf
        out = pick<U32>(magnitude > 0x7f800000u, U32{} + 0x7e00u, out);
        store_as(dst, __builtin_convertvector(out | sign, typename V::U16));
    }
};

// fp32 to e4m3fn, nearest even; beyond the largest finite value it is NaN, as torch's conversion.
template <int W>
EP_INLINE typename Vec<W>::U8 to_e4m3(typename Vec<W>::F32 value) {
    using U32 = typename Vec<W>::U32;
    using F32 = typename Vec<W>::F32;
    const U32 u = bits<U32>(value);
    const U32 sign = (u >> 24) & 0x80u;
    const U32 magnitude = u & 0x7fffffffu;
    const U32 normal = (magnitude - (120u << 23) + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
    const U32 magic = U32{} + (141u << 23);
    const U32 denormal = bits<U32>(bits<F32>(magnitude) + bits<F32>(magic)) - magic;
    U32 out = pick<U32>(magnitude < (121u << 23), denormal, normal);
    out = pick<U32>(magnitude >= (1087u << 20), U32{} + 0x7fu, out);
    // A product's NaN has whatever sign the instruction gives it: ours has none.
    out = pick<U32>(magnitude > 0x7f800000u, U32{} + 0x7fu, out | sign);
    return __builtin_convertvector(out, typename Vec<W>::U8);
}

// ---- ordered sums ----

// 2 * W consecutive elements as two vectors. Which element sits where is the type's own affair:
// sums are element by element.
template <int W, DType D>
struct Block {
    using F32 = typename Vec<W>::F32;
    static constexpr int64_t kHalf = int64_t{W} * dtype_bytes(D);

    static EP_INLINE void set(F32 (&acc)[2], const std::byte* src) {
        acc[0] = Element<W, D>::load(src);
        acc[1] = Element<W, D>::load(src + kHalf);
    }
    static EP_INLINE void add(F32 (&acc)[2], const std::byte* src) {
        acc[0] += Element<W, D>::load(src);
        acc[1] += Element<W, D>::load(src + kHalf);
    }
    static EP_INLINE void add(F32 (&acc)[2], const std::byte* src, F32 weight) {
        acc[0] += weight * Element<W, D>::load(src);
        acc[1] += weight * Element<W, D>::load(src + kHalf);
    }
    static EP_INLINE void store(std::byte* dst, const F32 (&acc)[2]) {
        Element<W, D>::store(dst, acc[0]);
        Element<W, D>::store(dst + kHalf, acc[1]);
    }
};

// A 32-bit word holds two bfloat16, each the upper half of a float: even and odd elements part
// without a shuffle.
template <int W>
struct Block<W, DType::kBF16> {
    using F32 = typename Vec<W>::F32;
    using U32 = typename Vec<W>::U32;

    static EP_INLINE F32 even(U32 words) { return bits<F32>(words << 16); }
    static EP_INLINE F32 odd(U32 words) { return bits<F32>(words & 0xffff0000u); }

    static EP_INLINE void set(F32 (&acc)[2], const std::byte* src) {
        const U32 words = load_as<U32>(src);
        acc[0] = even(words);
        acc[1] = odd(words);
    }
    static EP_INLINE void add(F32 (&acc)[2], const std::byte* src) {
        const U32 words = load_as<U32>(src);
        acc[0] += even(words);
        acc[1] += odd(words);
    }
    static EP_INLINE void add(F32 (&acc)[2], const std::byte* src, F32 weight) {
        const U32 words = load_as<U32>(src);
        acc[0] += weight * even(words);
        acc[1] += weight * odd(words);
    }
    // Rounded to nearest even in the upper half of each word.
    static EP_INLINE U32 round(F32 value) {
        const U32 u = bits<U32>(value);
        const U32 rounded = u + 0x7fffu + ((u >> 16) & 1u);
        return pick<U32>((u & 0x7fffffffu) > 0x7f800000u, U32{} + 0x7fc00000u, rounded);
    }
    static EP_INLINE void store(std::byte* dst, const F32 (&acc)[2]) {
        store_as(dst, (round(acc[0]) >> 16) | (round(acc[1]) & 0xffff0000u));
    }
};

template <int W, DType D, int kUnroll>
EP_INLINE void sum_columns(const SumArgs& a, int64_t column) {
    using B = Block<W, D>;
    using F32 = typename Vec<W>::F32;
    constexpr int64_t kBytes = int64_t{2 * W} * dtype_bytes(D);
    const int64_t at = column * dtype_bytes(D);
    F32 acc[kUnroll][2] = {};
    // The first bias replaces the zero, so that a bias of -0.0 stays what it is.
    const std::byte* first = a.bias0 != nullptr ? a.bias0 : a.bias1;
    if (first != nullptr) {
        for (int u = 0; u < kUnroll; ++u) B::set(acc[u], first + at + u * kBytes);
    }
    if (a.bias0 != nullptr && a.bias1 != nullptr) {
        for (int u = 0; u < kUnroll; ++u) B::add(acc[u], a.bias1 + at + u * kBytes);
    }
    for (int r = 0; r < a.num_rows; ++r) {
        const std::byte* row = a.rows[r] + at;
        if (a.weights == nullptr) {
            for (int u = 0; u < kUnroll; ++u) B::add(acc[u], row + u * kBytes);
        } else {
            const F32 weight = F32{} + a.weights[r];
            for (int u = 0; u < kUnroll; ++u) B::add(acc[u], row + u * kBytes, weight);
        }
    }
    for (int u = 0; u < kUnroll; ++u) B::store(a.out + at + u * kBytes, acc[u]);
}

template <int W, DType D>
void sum_rows(const SumArgs& a) {
    constexpr int kUnroll = 2, kBlock = 2 * W;
    int64_t column = 0;
    for (; column + kUnroll * kBlock <= a.hidden; column += kUnroll * kBlock) {
        sum_columns<W, D, kUnroll>(a, column);
    }
    for (; column + kBlock <= a.hidden; column += kBlock) sum_columns<W, D, 1>(a, column);
    // A row is a multiple of 16 bytes: the rest is whole groups of four elements.
    for (; column < a.hidden; column += 4) sum_columns<2, D, 1>(a, column);
}

template <int W>
void sum_any(DType dtype, const SumArgs& args) {
    switch (dtype) {
        case DType::kBF16:
            return sum_rows<W, DType::kBF16>(args);
        case DType::kF16:
            return sum_rows<W, DType::kF16>(args);
        default:
            return sum_rows<W, DType::kF32>(args);
    }
}

// ---- quantization: one scale per block of `block` elements ----

// max|x| as bits: integer order is magnitude order, and NaN is larger than everything.
template <int W, DType D>
EP_INLINE uint32_t block_amax_bits(const std::byte* row, int block) {
    using U32 = typename Vec<W>::U32;
    U32 most = {};
    for (int i = 0; i < block; i += W) {
        const U32 u =
            bits<U32>(Element<W, D>::load(row + int64_t{i} * dtype_bytes(D))) & 0x7fffffffu;
        most = pick<U32>(u > most, u, most);
    }
    uint32_t result = 0;
    for (int i = 0; i < W; ++i) result = most[i] > result ? most[i] : result;
    return result;
}

// Biased exponent of the smallest power of two that is not below `scale`.
EP_INLINE uint32_t ceil_exponent(float scale) {
    const uint32_t u = std::bit_cast<uint32_t>(scale);
    const uint32_t exponent = (u >> 23) & 0xffu;
    return exponent == 255 ? 255 : exponent + ((u & 0x7fffffu) != 0 ? 1 : 0);
}

template <int W, DType D>
void quantize_row(const QuantizeArgs& a) {
    using F32 = typename Vec<W>::F32;
    const int64_t num_blocks = a.hidden / a.block;
    for (int64_t b = 0; b < num_blocks; ++b) {
        const std::byte* row = a.row + b * a.block * dtype_bytes(D);
        float amax = std::bit_cast<float>(block_amax_bits<W, D>(row, a.block));
        if (amax < 1e-4f) amax = 1e-4f;  // false for NaN, which stays
        const float scale = amax / 448.0f;
        float multiplier = 448.0f / amax;
        if (a.ue8m0) {
            const uint32_t exponent = ceil_exponent(scale);
            multiplier = std::bit_cast<float>(exponent == 255 ? 0x7fc00000u  // Inf or NaN: all NaN
                                                              : (254u - exponent) << 23);
            a.scales[b] =
                static_cast<std::byte>(exponent);  // little endian: byte b % 4 of word b / 4
        } else {
            store_as(a.scales + 4 * b, scale);
        }
        for (int i = 0; i < a.block; i += W) {
            const F32 value = Element<W, D>::load(row + int64_t{i} * dtype_bytes(D)) * multiplier;
            store_as(a.out + b * a.block + i, to_e4m3<W>(value));
        }
    }
}

template <int W>
void quantize_any(DType dtype, const QuantizeArgs& args) {
    switch (dtype) {
        case DType::kBF16:
            return quantize_row<W, DType::kBF16>(args);
        case DType::kF16:
            return quantize_row<W, DType::kF16>(args);
        default:
            return quantize_row<W, DType::kF32>(args);
    }
}

// ---- copies ----

inline void copy_cached(std::byte* dst, const std::byte* src, int64_t bytes) {
    std::memcpy(dst, src, bytes);
}

// dst and bytes are multiples of 16, as rows are; src may lie anywhere.
inline void copy_streamed(std::byte* dst, const std::byte* src, int64_t bytes) {
#if defined(__AVX2__)
    int64_t at = 0;
    if ((reinterpret_cast<uintptr_t>(dst) & 16) != 0 && bytes >= 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(dst), load_as<__m128i>(src));
        at = 16;
    }
    for (; at + 128 <= bytes; at += 128) {
        const __m256i a = load_as<__m256i>(src + at), b = load_as<__m256i>(src + at + 32);
        const __m256i c = load_as<__m256i>(src + at + 64), d = load_as<__m256i>(src + at + 96);
        _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + at), a);
        _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + at + 32), b);
        _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + at + 64), c);
        _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + at + 96), d);
    }
    for (; at < bytes; at += 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(dst + at), load_as<__m128i>(src + at));
    }
#elif defined(__x86_64__)
    for (int64_t at = 0; at < bytes; at += 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(dst + at), load_as<__m128i>(src + at));
    }
#else
    std::memcpy(dst, src, bytes);
#endif
}

inline void drain_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

template <int W>
constexpr Simd make_simd(const char* name) {
    return {name, copy_cached, copy_streamed, drain_streams, sum_any<W>, quantize_any<W>};
}

}  // namespace
}  // namespace ep::cpu
