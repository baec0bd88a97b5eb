#include "cpu/simd_kernels.h"

namespace ep::cpu {

const Simd kSimdPortable = make_simd<4>("portable");

}  // namespace ep::cpu
