#include "cpu/simd_kernels.h"

namespace ep::cpu {

const Simd kSimdAvx2 = make_simd<8>("avx2");

}  // namespace ep::cpu
