// Every instruction set gives the same bits as the portable code for any input, NaN and Inf
// included.
#include "cpu/simd.h"

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"

namespace {

using ep::DType;
using Bytes = std::vector<std::byte>;

constexpr DType kTypes[] = {DType::kBF16, DType::kF16, DType::kF32};

Bytes random_bytes(size_t count, std::mt19937& random) {
    Bytes bytes(count);
    for (std::byte& b : bytes) b = static_cast<std::byte>(random());
    return bytes;
}

// Sign and payload of a NaN are not compared: where two meet, which one survives is the processor's
// choice.
Bytes sum(DType dtype, int64_t hidden, bool weighted) {
    std::mt19937 random(static_cast<unsigned>(hidden));
    const size_t bytes = hidden * ep::dtype_bytes(dtype);
    std::vector<Bytes> rows;
    std::vector<const std::byte*> pointers;
    for (int r = 0; r < 5; ++r) rows.push_back(random_bytes(bytes, random));
    for (const Bytes& row : rows) pointers.push_back(row.data());
    const std::vector<float> weights = {0.5f, -3.25f, 0.1f, 1e-20f, 7.0f};
    const Bytes bias = random_bytes(bytes, random);
    Bytes out(bytes);
    ep::cpu::simd().sum(dtype, {out.data(), pointers.data(), weighted ? weights.data() : nullptr,
                                bias.data(), nullptr, hidden, 5});
    for (int64_t i = 0; i < hidden; ++i) {
        std::byte* at = out.data() + i * ep::dtype_bytes(dtype);
        uint32_t bits = 0;
        std::memcpy(&bits, at, ep::dtype_bytes(dtype));
        const bool nan = dtype == DType::kF32    ? (bits & 0x7fffffffu) > 0x7f800000u
                         : dtype == DType::kBF16 ? (bits & 0x7fffu) > 0x7f80u
                                                 : (bits & 0x7fffu) > 0x7c00u;
        if (nan) std::memset(at, 0xff, ep::dtype_bytes(dtype));
    }
    return out;
}

Bytes quantized(DType dtype, int block, bool ue8m0) {
    const int64_t hidden = 16 * block;
    std::mt19937 random(static_cast<unsigned>(block));
    const Bytes row = random_bytes(hidden * ep::dtype_bytes(dtype), random);
    const int64_t scale_bytes = hidden / block * (ue8m0 ? 1 : 4);
    Bytes out(hidden + scale_bytes);
    ep::cpu::simd().quantize(dtype,
                             {out.data(), out.data() + hidden, row.data(), hidden, block, ue8m0});
    for (int64_t i = 0; i < hidden; ++i) {
        if (out[i] == std::byte{0xff}) out[i] = std::byte{0x7f};  // the sign of a NaN
    }
    return out;
}

Bytes copied(int64_t bytes, int64_t misaligned) {
    std::mt19937 random(3);
    const Bytes source = random_bytes(bytes + misaligned, random);
    alignas(64) static std::byte target[4096 + 64];
    std::memset(target, 0, sizeof(target));
    ep::cpu::simd().copy_stream(target + 16, source.data() + misaligned, bytes);
    ep::cpu::simd().drain();
    ep::expect(std::memcmp(target + 16, source.data() + misaligned, bytes) == 0, "copied bytes");
    return Bytes(target, target + sizeof(target));
}

// Whether the portable code and this instruction set agree on what `make` returns.
template <class Make>
void expect_same(const char* name, const char* what, Make make) {
    ep::cpu::force_simd("portable");
    const Bytes want = make();
    ep::cpu::force_simd(name);
    const bool same = make() == want;
    ep::cpu::force_simd(nullptr);
    ep::expect(same, what);
}

}  // namespace

int main() {
    for (const char* name : {"portable", "avx2", "avx512"}) {
        if (!ep::cpu::force_simd(name)) {
            std::cerr << "skip  " << name << ": this processor does not run it\n";
            continue;
        }
        ep::test(name, [&] {
            for (DType dtype : kTypes) {
                for (int64_t hidden : {8, 24, 40, 136, 7168}) {
                    expect_same(name, "sum", [&] { return sum(dtype, hidden, false); });
                    expect_same(name, "weighted sum", [&] { return sum(dtype, hidden, true); });
                }
                for (int block : {32, 128}) {
                    expect_same(name, "fp8", [&] { return quantized(dtype, block, false); });
                    expect_same(name, "fp8_ue8m0", [&] { return quantized(dtype, block, true); });
                }
            }
            for (int64_t bytes : {16, 48, 128, 1040, 4096 - 16}) {
                for (int64_t off : {0, 1, 8}) {
                    expect_same(name, "copy", [&] { return copied(bytes, off); });
                }
            }
        });
    }
    ep::test("an unknown instruction set is refused",
             [] { ep::expect(!ep::cpu::force_simd("mmx"), "mmx was accepted"); });
    return ep::finish();
}
