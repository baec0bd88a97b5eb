// Limits, enumerations and the one macro shared by host, device, CPU backend and Python.
//
// Numbers here are exported to Python by name (csrc/bind); nobody spells them twice.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define EP_HD __host__ __device__
#else
#define EP_HD
#endif

namespace ep {

inline constexpr int kMaxTopk = 32;  // slots of a token; a warp has one lane for each
inline constexpr int kMaxRanks = 1024;
inline constexpr int kMaxSlots = 16;
inline constexpr int kRowAlign = 16;       // a row of x is a multiple of this many bytes
inline constexpr int kExtentAlign = 4096;  // arena extents start on a page
inline constexpr uint32_t kProtocolVersion = 1;

enum class OpKind : int32_t { kNone = 0, kDispatch = 1, kCombine = 2 };

// How dispatch arranges what it received.
enum class RecvLayout : int32_t { kCompact = 0, kGrouped = 1, kSlab = 2 };

// Element types of payload rows. One-byte types travel verbatim, with or without scales.
enum class DType : int32_t {
    kBF16 = 0,
    kF16 = 1,
    kF32 = 2,
    kE4M3 = 3,
    kE5M2 = 4,
    kI8 = 5,
    kU8 = 6,
};

EP_HD constexpr int dtype_bytes(DType dtype) {
    return dtype == DType::kF32 ? 4 : (dtype == DType::kBF16 || dtype == DType::kF16) ? 2 : 1;
}

enum class Quantize : int32_t { kNone = 0, kFp8 = 1, kFp8Ue8m0 = 2 };

}  // namespace ep
