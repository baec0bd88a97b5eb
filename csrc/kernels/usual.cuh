// Most calls of small batches are alike. Kernels for these alone know so when they are compiled: of what other calls
// need they have no code. Code that is not there is not jumped over. A jump costs a warp 14 to 38 cycles; over 32
// instructions or more, while two kernels take turns in the caches, 50 to 76 (bench/results/jumps.jsonl). What one
// token ran through, in all roles of warps, lay in sixty stretches.
//
// defines: kUsualRanks, Usual, kAlwaysSums, masks, is_compact, sums_rows
#pragma once

#include "contract/gpu.h"
#include "kernels/enter.cuh"

namespace ep::kernels {

inline constexpr int kUsualRanks =
    8;  // at most: what a thread hears of all of them is in its registers

// Calls of a buffer inside a node, which masks nobody. A dispatch of at most so many ranks and of this layout, whole,
// with at most a token for each block and a piece of it for each warp that sends; what it quantizes is BF16, in blocks
// of 128. It has code of its own: kernels/usual_send.cuh, kernels/usual_hear.cuh, kernels/usual_receive.cuh. Of a
// combine owners send rows (kPerRank: sums, see kernels/usual_owner.cuh) of BF16 tensors, and nothing is added to them.
template <RecvLayout kIts, bool kPerRank = true>
struct Usual : NoFar {
    static constexpr bool kIsUsual = true;
    static constexpr RecvLayout kLayout = kIts;
    static constexpr bool kSumsRows = kIts == RecvLayout::kSlab && kPerRank;
};

// Of a combine: owners add up their rows of a token, in all calls of a kernel.
template <class F>
constexpr bool kAlwaysSums = [] {
    if constexpr (F::kIsUsual) return F::kSumsRows;
    return false;
}();

// Whether ranks may be masked.
template <class F>
__device__ __forceinline__ bool masks(const RankView& view) {
    return !F::kIsUsual && view.watch.can_mask;
}
template <class F>
__device__ __forceinline__ bool is_compact(RecvLayout layout) {
    if constexpr (F::kIsUsual) {
        return F::kLayout == RecvLayout::kCompact;
    } else {
        return layout == RecvLayout::kCompact;
    }
}

// Of a combine: owners add up their rows of a token.
template <class F>
__device__ __forceinline__ bool sums_rows(const CombineArgs& a) {
    if constexpr (F::kIsUsual) {
        return F::kSumsRows;
    } else {
        return a.layout != RecvLayout::kCompact && a.per_rank;
    }
}

}  // namespace ep::kernels
