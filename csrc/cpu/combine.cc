// Combine: every source reads the rows of its tokens from the ranks that hold them and adds them in
// fp32, in ascending (rank, slot) order or as the slots stand, rounding once. An owner returns only
// when every source has pulled.
#include <algorithm>
#include <cstring>

#include "contract/calls.h"
#include "cpu/operation.h"
#include "cpu/simd.h"

namespace ep::cpu {
namespace {

// One row to add: where it lies, and the slot it came through.
struct Contribution {
    int owner, slot;
    int64_t row;
};

class CombineOp : public Operation {
public:
    CombineOp(Rank& rank, uint64_t sequence, const CombineArgs& args, const WaitHooks& hooks)
        : Operation(rank, OpKind::kCombine, sequence, hooks), a(args) {}

    Outcome run() {
        if (!acquire_slot()) return fail(watch.outcome());
        publish();
        if (!await_entries(describe(a)) || !check_peers()) return fail(outcome);
        const bool pulled = pull();
        // A peer that failed meanwhile may have let its user change y under our reads.
        if (!watch.healthy(Site::kPulled)) return fail(watch.outcome());
        for (int p = 0; p < num_ranks; ++p) {
            // Our reads of y are done; pairs with the acquire in await_pulled.
            store_release(at<uint64_t>(p, layout.pulled_word(slot, me)), seq);
        }
        ring_all();
        if (!await_pulled()) return fail(watch.outcome());
        if (!pulled) return fail(outcome);
        release_slot();
        return Outcome{};
    }

private:
    // 1. y where peers can read it. Rows of remote sources of an ordinary tensor are copied; our
    // own are read in place.
    void publish() {
        EntryRecord entry{};
        entry.descriptor = describe(a);
        entry.num_tokens = a.num_tokens;
        entry.num_rows = a.num_rows;
        entry.y_offset = a.arena_offset;
        entry.weights_offset = -1;
        if (num_ranks > 1 && a.arena_offset < 0) {
            staged_y = grant(a.num_rows * a.row_bytes(), entry);
            if (staged_y) {
                stage_remote_rows(rank.arena_data() + staged_y->extent().offset);
                entry.y_offset = staged_y->extent().offset;
            }
        }
        if (num_ranks > 1 && a.with_weights) {
            const int64_t bytes = a.num_rows * weights_per_row() * int64_t{sizeof(float)};
            staged_weights = grant(bytes, entry);
            if (staged_weights) {
                std::byte* staged = rank.arena_data() + staged_weights->extent().offset;
                if (bytes > 0) std::memcpy(staged, a.y_weights, bytes);  // an empty tensor is null
                entry.weights_offset = staged_weights->extent().offset;
            }
        }
        for (int p = 0; p < num_ranks; ++p) enter(p, entry, nullptr);
        ring_all();
    }

    std::shared_ptr<ExtentHold> grant(int64_t bytes, EntryRecord& entry) {
        const auto extent = rank.arena()->grant(bytes);
        if (extent) return std::make_shared<ExtentHold>(rank.arena(), *extent);
        entry.code = kOutOfArena;
        entry.detail[0] = bytes;
        entry.detail[1] = rank.arena()->stats().largest_free;
        return nullptr;
    }

    void stage_remote_rows(std::byte* staged) const {
        const int64_t bytes = a.row_bytes();
        const auto stage = [&](int64_t row) {
            if (row >= 0 && row < a.num_rows) {
                simd().copy_stream(staged + row * bytes, a.x + row * bytes, bytes);
            }
        };
        int64_t i = 0;
        for (int src = 0; src < num_ranks; ++src) {
            const int64_t rows = a.rank_counts[num_ranks + src];
            for (int64_t j = 0; j < rows && i < a.num_recv; ++j, ++i) {
                if (src == me) continue;
                if (a.layout == RecvLayout::kCompact) {
                    stage(i);
                    continue;
                }
                for (int k = 0; k < a.num_topk; ++k) stage(a.recv_row[i * a.num_topk + k]);
            }
        }
        simd().drain();
    }

    // Offsets of peers are untrusted.
    bool check_peers() {
        const int64_t per_row = weights_per_row() * int64_t{sizeof(float)};
        for (int p = 0; p < num_ranks; ++p) {
            const EntryRecord& entry = entry_of(p);
            if (p == me) continue;
            const int64_t limit = rank.peers_arena_bytes(p);
            const auto fits = [&](int64_t offset, int64_t bytes) {
                return offset >= 0 && offset <= limit && offset % kRowAlign == 0 &&
                       entry.num_rows >= 0 &&
                       (bytes == 0 || entry.num_rows <= (limit - offset) / bytes);
            };
            if (fits(entry.y_offset, a.row_bytes()) &&
                (!a.with_weights || fits(entry.weights_offset, per_row))) {
                continue;
            }
            outcome = outcome_of(kBadCount, p, limit, entry.y_offset);
            return false;
        }
        return true;
    }

    int64_t weights_per_row() const { return a.layout == RecvLayout::kCompact ? a.num_topk : 1; }

    const std::byte* y_of(int owner) const {
        return owner == me ? a.x : arena_of(owner) + entry_of(owner).y_offset;
    }
    const float* weights_of(int owner) const {
        if (owner == me) return a.y_weights;
        const int64_t offset = entry_of(owner).weights_offset;
        return offset < 0 ? nullptr : reinterpret_cast<const float*>(arena_of(owner) + offset);
    }

    // Contributions of a token, ascending rank, then slot; compact holds one row for all slots of a
    // rank.
    int gather(int64_t t, Contribution* found) const {
        int count = 0;
        for (int k = 0; k < a.num_topk; ++k) {
            const int64_t expert = a.topk_idx[t * a.num_topk + k];
            const int64_t row = a.send_row[t * a.num_topk + k];
            if (expert < 0 || expert >= experts.num_experts() || row < 0) continue;
            const Contribution next{experts.owner(expert), k, row};
            int at = count;
            while (!a.topk_order && at > 0 && found[at - 1].owner > next.owner) --at;
            if (a.layout == RecvLayout::kCompact && at > 0 && found[at - 1].owner == next.owner) {
                continue;
            }
            for (int i = count; i > at; --i) found[i] = found[i - 1];
            found[at] = next;
            ++count;
        }
        return count;
    }

    bool pull() {
        const Simd& ops = simd();
        const int64_t bytes = a.row_bytes();
        Contribution found[kMaxTopk];
        const std::byte* rows[kMaxTopk];
        float weights[kMaxTopk];
        for (int64_t t = 0; t < a.num_tokens; ++t) {
            const int count = gather(t, found);
            for (int i = 0; i < count; ++i) {
                if (found[i].row >= entry_of(found[i].owner).num_rows) {
                    outcome = outcome_of(kMiscount, found[i].owner,
                                         entry_of(found[i].owner).num_rows, found[i].row);
                    return false;
                }
                rows[i] = y_of(found[i].owner) + found[i].row * bytes;
                if (a.weighted) weights[i] = a.topk_weights[t * a.num_topk + found[i].slot];
            }
            ops.sum(a.dtype, {a.out + t * bytes, rows, a.weighted ? weights : nullptr,
                              a.bias0 != nullptr ? a.bias0 + t * bytes : nullptr,
                              a.bias1 != nullptr ? a.bias1 + t * bytes : nullptr, a.hidden, count});
            if (a.out_weights == nullptr) continue;
            if (a.sum_weights) {
                sum_weights(t, found, count);
            } else {
                pull_weights(t);
            }
        }
        return true;
    }

    // Each slot gets back the value that the rank owning its expert holds for it.
    void pull_weights(int64_t t) const {
        for (int k = 0; k < a.num_topk; ++k) {
            const int64_t at = t * a.num_topk + k;
            const int64_t expert = a.topk_idx[at], row = a.send_row[at];
            float value = 0.0f;
            const bool here = expert >= 0 && expert < experts.num_experts();
            const int owner = here ? experts.owner(expert) : -1;
            if (here && row >= 0 && row < entry_of(owner).num_rows) {
                const float* held = weights_of(owner);
                const int64_t index = a.layout == RecvLayout::kCompact ? row * a.num_topk + k : row;
                if (held != nullptr) value = held[index];
            }
            a.out_weights[at] = value;
        }
    }

    // Compact: every rank of the token holds a value for every slot, also of experts elsewhere.
    void sum_weights(int64_t t, const Contribution* found, int count) const {
        float* out = a.out_weights + t * a.num_topk;
        std::fill_n(out, a.num_topk, 0.0f);
        for (int i = 0; i < count; ++i) {
            const float* held = weights_of(found[i].owner);
            if (held == nullptr) continue;
            for (int k = 0; k < a.num_topk; ++k) out[k] += held[found[i].row * a.num_topk + k];
        }
    }

    // 4. y may change once everybody has read it.
    bool await_pulled() {
        for (int src = 0; src < num_ranks; ++src) {
            uint64_t& word = at<uint64_t>(me, layout.pulled_word(slot, src));
            const auto ready = [&] { return load_acquire(word) >= seq; };
            if (!watch.until(Site::kPulled, src, ready, [] { return int64_t{0}; })) return false;
        }
        return true;
    }

    const CombineArgs& a;
    std::shared_ptr<ExtentHold> staged_y, staged_weights;
};

}  // namespace

Outcome Rank::combine(uint64_t seq, const CombineArgs& args, const WaitHooks& hooks) {
    std::lock_guard lock(running_);
    if (!verdict_.ok()) return verdict_;
    return CombineOp(*this, seq, args, hooks).run();
}

}  // namespace ep::cpu
