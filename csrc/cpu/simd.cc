#include "cpu/simd.h"

#include <atomic>
#include <cstring>

namespace ep::cpu {
namespace {

bool runs(const Simd& simd) {
#if defined(__x86_64__)
    if (&simd == &kSimdAvx2) return __builtin_cpu_supports("avx2") != 0;
    if (&simd == &kSimdAvx512) {
        return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
               __builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512dq") != 0;
    }
#endif
    return &simd == &kSimdPortable;
}

constexpr const Simd* kWidestFirst[] = {
#if defined(__x86_64__)
    &kSimdAvx512,
    &kSimdAvx2,
#endif
    &kSimdPortable,
};

const Simd* widest() {
    for (const Simd* simd : kWidestFirst) {
        if (runs(*simd)) return simd;
    }
    return &kSimdPortable;
}

std::atomic<const Simd*> chosen{nullptr};

}  // namespace

const Simd& simd() {
    const Simd* current = chosen.load(std::memory_order_acquire);
    if (current == nullptr) {
        current = widest();
        chosen.store(current, std::memory_order_release);
    }
    return *current;
}

bool force_simd(const char* name) {
    if (name == nullptr) {
        chosen.store(widest(), std::memory_order_release);
        return true;
    }
    for (const Simd* simd : kWidestFirst) {
        if (std::strcmp(simd->name, name) == 0 && runs(*simd)) {
            chosen.store(simd, std::memory_order_release);
            return true;
        }
    }
    return false;
}

}  // namespace ep::cpu
