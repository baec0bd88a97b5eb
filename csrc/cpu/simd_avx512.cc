#include "cpu/simd_kernels.h"

namespace ep::cpu {

const Simd kSimdAvx512 = make_simd<16>("avx512");

}  // namespace ep::cpu
