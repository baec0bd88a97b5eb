// How many warps of a block move rows, and how many stages a ring of pull has, where fewer than fit are
// faster. Written by bench/tune.py from what it measured; nothing is searched at run time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ep::kernels {

// For stages of at least so many bytes; 0 = as many as fit.
struct Tuned {
    int64_t stage_bytes;
    int32_t count;
};

// torchrun --nproc-per-node 2 bench/tune.py
// 2 x NVIDIA H200, commit 4e11c47
inline constexpr Tuned kMovers[] = {{0, 0}, {7168, 0}, {14336, 0}};  // of dispatch
inline constexpr Tuned kQuantizers[] = {{0, 0}, {14592, 0}};         // of dispatch that quantizes
inline constexpr Tuned kPullStages[] = {{0, 0}, {14336, 0}};         // of combine

// The entry of the largest stage that is not above ours, at most `fits`.
template <size_t kEntries>
constexpr int tuned(const Tuned (&table)[kEntries], int64_t stage_bytes, int fits) {
    int count = fits;
    for (const Tuned& entry : table) {
        if (entry.stage_bytes <= stage_bytes) count = entry.count;
    }
    return count > 0 && count < fits ? count : fits;
}

}  // namespace ep::kernels
