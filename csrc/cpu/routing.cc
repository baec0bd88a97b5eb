#include "cpu/routing.h"

#include <vector>

namespace ep::cpu {

bool rows_follow(const int64_t* topk_idx, const int32_t* send_row, int64_t num_tokens, int num_topk,
                 RecvLayout layout, const ExpertMap& experts, int num_ranks, bool some_masked) {
    const bool compact = layout == RecvLayout::kCompact;
    std::vector<int64_t> next(compact ? num_ranks : experts.num_experts(), -1);
    std::vector<int64_t> last_token(compact ? num_ranks : 0, -1);
    int64_t placed = 0, unplaced = 0;
    for (int64_t t = 0; t < num_tokens; ++t) {
        for (int k = 0; k < num_topk; ++k) {
            const int64_t expert = topk_idx[t * num_topk + k], row = send_row[t * num_topk + k];
            if (expert == -1) {
                if (row != -1) return false;
                continue;
            }
            if (row < -1) return false;
            ++(row < 0 ? unplaced : placed);
            if (row < 0) continue;  // also of an id for which a static dispatch has failed
            if (expert < 0 || expert >= experts.num_experts()) return false;
            const int group = compact ? experts.owner(expert) : experts.position(expert);
            const bool again = compact && last_token[group] == t;  // one row for all its slots
            const int64_t want = again ? next[group] - 1 : next[group];
            if (next[group] >= 0 && row != want) return false;
            next[group] = row + 1;
            if (compact) last_token[group] = t;
        }
    }
    // Of a static dispatch that failed, no row was placed; of masked ranks, none there.
    return some_masked || placed == 0 || unplaced == 0;
}

}  // namespace ep::cpu
