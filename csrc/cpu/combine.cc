// Combine: every source reads the rows of its tokens from the ranks that hold them and adds them in
// fp32, in ascending (rank, slot) order or as the slots stand, rounding once. An owner returns only
// when every source has pulled.
//
// A y in the arena is read where it lies. Any other streams: while a rank adds the rows that have
// come, it stages those that others wait for. With per_rank sums stream, whatever y is.
#include <algorithm>
#include <cstring>

#include "contract/calls.h"
#include "cpu/operation.h"
#include "cpu/routing.h"
#include "cpu/simd.h"
#include "cpu/stage.h"

namespace ep::cpu {
namespace {

constexpr int64_t kTellEvery = 8;  // tokens between two looks whether owners want to hear of room

// One row to add: where it lies, and the slot it came through.
struct Contribution {
    int owner, slot;
    int64_t row;
};

class CombineOp : public Operation {
public:
    CombineOp(Rank& rank, uint64_t sequence, const CombineArgs& args, const WaitHooks& hooks)
        : Operation(rank, OpKind::kCombine, sequence, hooks, can_lack_ranks(args)),
          a(args),
          stage(*this, args),
          incoming(num_ranks),
          part(args.per_rank ? args.row_bytes() : 0) {}

    Outcome run() {
        if (!acquire_slot()) return failed(watch.outcome());
        publish();
        if (!await_entries(describe(a), a.wait_stats) || !check_peers()) return failed(outcome);
        if (!pull()) return failed(outcome);
        // A peer that failed meanwhile may have let its user change y under our reads.
        if (!watch.healthy(Site::kPulled)) return failed(watch.outcome());
        for (int p = 0; p < num_ranks; ++p) {
            // Our reads of y are done; pairs with the acquire in await_pulled.
            store_release(at<uint64_t>(p, layout.pulled_word(slot, me)), seq);
        }
        ring_all();
        if (!await_pulled()) return failed(watch.outcome());
        release_slot();
        return Outcome{};
    }

private:
    // Others, who may go on without us, read our rings to their end.
    Outcome failed(const Outcome& why) {
        if (rings && ends_communicator(why.incident.code)) abandon(rings);
        return fail(why);
    }

    // 1. y where peers can read it, or rings through which it will come.
    void publish() {
        EntryRecord entry{};
        entry.descriptor = describe(a);
        entry.num_tokens = a.num_tokens;
        entry.num_rows = a.num_rows;
        entry.y_offset = std::max<int64_t>(a.arena_offset, 0);
        entry.ring_rows = stage.ring_rows();
        entry.weights_offset = -1;
        if (!rows_follow(a.topk_idx, a.send_row, a.num_tokens, a.num_topk, a.layout, experts,
                         num_ranks, watch.has_masks())) {
            entry.code = kStaleHandle;
            std::strncpy(entry.reason, kDamagedHandle, kReasonBytes - 1);
        }
        if (stage.bytes() > 0) {
            rings = grant(stage.bytes(), entry);
            if (rings) {
                entry.y_offset = rings->extent().offset;
                stage.place(rank.arena_data() + entry.y_offset);
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
        for (int p = 0; p < num_ranks; ++p) {
            entry.streamed_rows = stage.streams() ? stage.rows_for(p) : -1;
            enter(p, entry, nullptr);
        }
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

    // Offsets and sizes of peers are untrusted.
    bool check_peers() {
        const int64_t per_row = weights_per_row() * int64_t{sizeof(float)};
        for (int p = 0; p < num_ranks; ++p) {
            const EntryRecord& entry = entry_of(p);
            if (p == me || without(p)) continue;
            const int64_t limit = rank.peers_arena_bytes(p);
            const auto fits = [&](int64_t offset, int64_t rows, int64_t bytes) {
                return offset >= 0 && offset <= limit && offset % kRowAlign == 0 && rows >= 0 &&
                       (bytes == 0 || rows <= (limit - offset) / bytes);
            };
            const bool streams = entry.streamed_rows >= 0;
            const bool y_fits =
                streams ? fits(entry.y_offset, entry.ring_rows, (num_ranks - 1) * a.row_bytes()) &&
                              (entry.streamed_rows == 0 || entry.ring_rows > 0)
                        : fits(entry.y_offset, entry.num_rows, a.row_bytes());
            if (!y_fits ||
                (a.with_weights && !fits(entry.weights_offset, entry.num_rows, per_row))) {
                outcome = outcome_of(kBadCount, p, limit, entry.y_offset);
                return false;
            }
            const int64_t ring = streams ? Stage::ring_of(p, me) * entry.ring_rows : 0;
            incoming[p] = {arena_of(p) + entry.y_offset + ring * a.row_bytes()};
        }
        incoming[me] = {a.x};
        return true;
    }

    int64_t weights_per_row() const { return a.layout == RecvLayout::kCompact ? a.num_topk : 1; }

    bool streams_from(int owner) const { return owner != me && entry_of(owner).streamed_rows >= 0; }

    const float* weights_of(int owner) const {
        if (owner == me) return a.y_weights;
        const int64_t offset = entry_of(owner).weights_offset;
        return offset < 0 ? nullptr : reinterpret_cast<const float*>(arena_of(owner) + offset);
    }

    // Contributions of a token, ascending rank, then slot; or one for all slots of a rank.
    int gather(int64_t t, Contribution* found) const {
        int count = 0;
        for (int k = 0; k < a.num_topk; ++k) {
            const int64_t expert = a.topk_idx[t * a.num_topk + k];
            const int64_t row = a.send_row[t * a.num_topk + k];
            if (expert < 0 || expert >= experts.num_experts() || row < 0) continue;
            if (without(experts.owner(expert))) continue;
            const Contribution next{experts.owner(expert), k, row};
            int at = count;
            while (!a.topk_order && at > 0 && found[at - 1].owner > next.owner) --at;
            if (a.one_per_rank() && at > 0 && found[at - 1].owner == next.owner) continue;
            for (int i = count; i > at; --i) found[i] = found[i - 1];
            found[at] = next;
            ++count;
        }
        return count;
    }

    // Adds what has come and stages what others wait for, until both are done.
    bool pull() {
        while (true) {
            const bool staged = stage.advance();
            const int64_t before = next_token;
            if (!add_tokens()) return false;
            const bool added = next_token == a.num_tokens;
            if (added && stage.over()) return took_everything();
            if (!added) publish_taken(awaited);
            if (staged || next_token > before) continue;
            const int peer = added ? stage.blocked_on() : awaited;
            const auto ready = [&] {
                return stage.can_advance() || (!added && staged_by(awaited) > awaited_row);
            };
            const auto progress = [&] {
                return stage.progress() + (added ? 0 : staged_by(awaited));
            };
            const auto start = WaitTimes::Clock::now();
            if (!watch.until(added ? Site::kPulled : Site::kRows, peer, ready, progress, 0,
                             WokenBy::kAnyone)) {
                if (goes_without(peer)) {
                    stage.drop(peer);
                    continue;
                }
                outcome = watch.outcome();
                return false;
            }
            if (!added && a.wait_stats != nullptr) {
                add_to_stats(a.wait_stats[peer], WaitTimes::ns(WaitTimes::Clock::now() - start));
            }
        }
    }

    // Tokens in their order, as far as their rows have come; then `awaited` has not sent the next.
    bool add_tokens() {
        const Simd& ops = simd();
        const int64_t bytes = a.row_bytes();
        Contribution found[kMaxTopk];
        const std::byte* rows[kMaxTopk];
        float weights[kMaxTopk];
        const bool weighs = a.source_weighs();
        for (; next_token < a.num_tokens; ++next_token) {
            const int64_t t = next_token;
            const int count = gather(t, found);
            int have = 0;
            for (; have < count; ++have) {
                if (!find_row(found[have], &rows[have])) break;
                if (weighs) weights[have] = a.topk_weights[t * a.num_topk + found[have].slot];
            }
            if (have < count) {
                for (int i = 0; i < have; ++i) --incoming[found[i].owner].next;
                return outcome.ok();
            }
            ops.sum(a.dtype, {a.out + t * bytes, rows, weighs ? weights : nullptr,
                              a.bias0 != nullptr ? a.bias0 + t * bytes : nullptr,
                              a.bias1 != nullptr ? a.bias1 + t * bytes : nullptr, a.hidden, count});
            if (t % kTellEvery == 0) publish_much_taken();
            if (a.out_weights == nullptr) continue;
            if (a.sum_weights) {
                sum_weights(t, found, count);
            } else {
                pull_weights(t);
            }
        }
        return true;
    }

    // Where a row lies. False: it has not come yet, or there is none.
    bool find_row(const Contribution& c, const std::byte** row) {
        if (a.per_rank && c.owner == me) return find_own_part(row);
        Incoming& in = incoming[c.owner];
        const EntryRecord& entry = entry_of(c.owner);
        const bool streams = streams_from(c.owner);
        const int64_t at = streams ? in.next : c.row;
        const int64_t limit = streams ? entry.streamed_rows : entry.num_rows;
        if (at >= limit) {
            outcome = outcome_of(kMiscount, c.owner, limit, at);
            return false;
        }
        if (streams && at >= in.come) {
            in.come = staged_by(c.owner);
            if (at >= in.come) {
                awaited = c.owner;
                awaited_row = at;
                return false;
            }
        }
        ++in.next;
        *row = in.rows + (streams ? at % entry.ring_rows : at) * a.row_bytes();
        return true;
    }

    // What our own rows of `next_token` come to, once for all looks at the token.
    bool find_own_part(const std::byte** row) {
        *row = part.data();
        ++incoming[me].next;
        if (part_of == next_token) return true;
        int32_t rows[kMaxTopk];
        int count = 0;
        for (int k = 0; k < a.num_topk; ++k) {
            const int64_t at = next_token * a.num_topk + k, expert = a.topk_idx[at];
            const bool ours = expert >= 0 && expert < experts.num_experts() &&
                              experts.owner(expert) == me && a.send_row[at] >= 0;
            if (!ours) continue;
            if (a.send_row[at] >= a.num_rows) {
                outcome = outcome_of(kMiscount, me, a.num_rows, a.send_row[at]);
                return false;
            }
            rows[count++] = a.send_row[at];
        }
        add_part(a, rows, count, part.data());
        part_of = next_token;
        return true;
    }

    int64_t staged_by(int owner) const {
        // pairs with the release in Stage::advance
        const uint64_t ever = load_acquire(at<uint64_t>(me, layout.staged_word(owner)));
        return static_cast<int64_t>(ever - flow(owner).taken);
    }

    // Tells an owner that the room of the rows we have read is its again.
    void publish_taken(int owner) {
        Incoming& in = incoming[owner];
        if (in.taken == in.next) return;
        in.taken = in.next;
        // Our reads are done; pairs with the acquire in Stage::taken.
        store_release(at<uint64_t>(owner, layout.taken_word(me)),
                      flow(owner).taken + static_cast<uint64_t>(in.taken));
        ring(rank.header(owner), me);
    }
    void publish_much_taken() {
        for (int p = 0; p < num_ranks; ++p) {
            const int64_t untold = incoming[p].next - incoming[p].taken;
            if (untold > 0 && streams_from(p) &&
                Stage::is_worth_telling(untold, entry_of(p).ring_rows)) {
                publish_taken(p);
            }
        }
    }

    // What was staged for us and what we asked for are the same, or somebody's handle is not.
    bool took_everything() {
        for (int p = 0; p < num_ranks; ++p) {
            if (p == me || without(p)) continue;
            flow(p).staged += static_cast<uint64_t>(stage.rows_for(p));
            if (!streams_from(p)) continue;
            publish_taken(p);
            if (incoming[p].next != entry_of(p).streamed_rows) {
                outcome = outcome_of(kMiscount, p, entry_of(p).streamed_rows, incoming[p].next);
                return false;
            }
            flow(p).taken += static_cast<uint64_t>(incoming[p].next);
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
            if (without(src)) continue;
            uint64_t& word = at<uint64_t>(me, layout.pulled_word(slot, src));
            const auto ready = [&] { return load_acquire(word) >= seq; };
            if (!watch.until(Site::kPulled, src, ready, [] { return int64_t{0}; }) &&
                !goes_without(src)) {
                return false;
            }
        }
        return true;
    }

    // What comes from an owner.
    struct Incoming {
        const std::byte* rows = nullptr;        // its y, or the ring for us
        int64_t next = 0, taken = 0, come = 0;  // rows: used, told the owner, in the ring so far
    };

    const CombineArgs& a;
    Stage stage;
    std::vector<Incoming> incoming;  // [num_ranks]
    std::vector<std::byte> part;     // [hidden] per_rank: what our rows of token `part_of` come to
    int64_t part_of = -1;
    int64_t next_token = 0;
    int awaited = 0;          // the owner whose row `next_token` lacks
    int64_t awaited_row = 0;  // which of the rows it streams
    std::shared_ptr<ExtentHold> rings, staged_weights;
};

}  // namespace

Outcome Rank::combine(uint64_t seq, const CombineArgs& args, const WaitHooks& hooks) {
    std::lock_guard lock(running_);
    if (!verdict_.ok()) return verdict_;
    CombineArgs mine = args;
    // Nobody has to know whether a rank that failed has let its user change y.
    if (can_mask_ && can_lack_ranks(args)) mine.arena_offset = -1;
    return CombineOp(*this, seq, mine, hooks).run();
}

}  // namespace ep::cpu
