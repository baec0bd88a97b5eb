// Whether the rows a handle names can be those of its dispatch.
#pragma once

#include <cstdint>

#include "contract/config.h"
#include "contract/shape.h"
#include "cpu/rank.h"

namespace ep::cpu {

// Why a rank refuses a call with such a handle, as its peers read it.
inline constexpr char kDamagedHandle[] =
    "has a damaged handle: its rows are not those of a dispatch";

// A handle is a tuple of tensors that anybody may have touched since. Rows follow one another as
// tokens do: at each rank (compact), or at each expert (grouped, slab). So whatever was changed is
// found, but for all rows of one rank or expert shifted alike. `some_masked`: ranks may have been left
// out, and have none.
bool rows_follow(const int64_t* topk_idx, const int32_t* send_row, int64_t num_tokens, int num_topk,
                 RecvLayout layout, const ExpertMap& experts, int num_ranks, bool some_masked);

}  // namespace ep::cpu
