// Dispatch: every token is copied once, by its source, straight into its final row at each rank
// that owns one of its experts.
//
// Rows follow from prefix sums over everybody's counts, so nobody negotiates and nothing is copied
// again, but for the extra rows of grouped and slab, which the receiver makes itself.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "contract/calls.h"
#include "contract/replicas.h"
#include "cpu/operation.h"
#include "cpu/push.h"
#include "cpu/routing.h"
#include "cpu/seal.h"

namespace ep::cpu {
namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// What one scan of the ids finds: rows for each rank, selections of each expert (by position), ids
// that are none; with replicas, selections of each logical expert, too.
struct Counts {
    std::vector<int64_t> rows;
    std::vector<int32_t> selections;
    std::vector<int64_t> logical;
    int64_t bad[4] = {0, 0, 0, 0};  // how many, then token, slot and id of the first
};

// With replicas, the same scan chooses one for every selection.
Counts count(const DispatchArgs& a, const ExpertMap& experts, int rank, int num_ranks) {
    const bool routes = a.replicas.num_logical > 0;
    const int64_t limit = routes ? a.replicas.num_logical : experts.num_experts();
    Counts counts{std::vector<int64_t>(num_ranks, 0),
                  std::vector<int32_t>(experts.num_experts(), 0),
                  std::vector<int64_t>(a.replicas.num_logical, 0),
                  {0, 0, 0, 0}};
    std::vector<int64_t> last_token(num_ranks, -1);
    for (int64_t t = 0; t < a.num_tokens; ++t) {
        const uint32_t spread = spread_of(t, rank);
        for (int k = 0; k < a.num_topk; ++k) {
            const int64_t id = a.topk_idx[t * a.num_topk + k];
            const bool valid = id >= 0 && id < limit;
            if (routes && !valid) a.routed_idx[t * a.num_topk + k] = -1;
            if (id == -1) continue;
            if (!valid) {
                if (counts.bad[0]++ == 0) {
                    counts.bad[1] = t;
                    counts.bad[2] = k;
                    counts.bad[3] = id;
                }
                continue;
            }
            int64_t expert = id;
            if (routes) {
                ++counts.logical[id];
                expert = choose_replica(a.replicas, id, spread);
                a.routed_idx[t * a.num_topk + k] = expert;
            }
            ++counts.selections[experts.position(expert)];
            const int owner = experts.owner(expert);
            if (last_token[owner] != t) {
                last_token[owner] = t;
                ++counts.rows[owner];
            }
        }
    }
    return counts;
}

class DispatchOp : public Operation {
public:
    DispatchOp(Rank& rank, uint64_t sequence, const DispatchArgs& args, const WaitHooks& hooks)
        : Operation(rank, OpKind::kDispatch, sequence, hooks, can_lack_ranks(args)),
          a(args),
          meta(meta_layout(args)) {}

    Dispatched run() {
        result.seq = seq;
        if (!acquire_slot()) return failed(watch.outcome());
        announce();
        if (!await_entries(describe(a), a.wait_stats) || !check_counts()) return failed(outcome);
        if (placed.ok()) place();
        publish_bases();
        if (!await_bases()) return failed(outcome);
        if (a.rank_ends != nullptr) read_rank_ends();
        if (!push()) return failed(outcome);
        if (!await_rows()) return failed(watch.outcome());
        forget_lost();
        if (a.paranoid && !verify()) return failed(outcome);
        for (int e = 0; a.recv_stats != nullptr && e < experts.num_local(me); ++e) {
            add_to_stats(a.recv_stats[e], a.expert_counts[e]);
        }
        release_slot();
        return std::move(result);
    }

private:
    Dispatched failed(const Outcome& why) {
        result.outcome = fail(why);
        // A late peer may still push after a failed communicator: its rows must not be granted
        // again.
        if (ends_communicator(result.outcome.incident.code)) {
            abandon(std::move(result.x));
            abandon(std::move(result.meta));
        }
        result.x.reset();
        result.meta.reset();
        return std::move(result);
    }

    // 1. Tell every rank how many rows come, and for which of its experts.
    void announce() {
        if (a.replicas.num_logical == 0 && a.routed_idx != nullptr) keep_ids();
        const Counts counts = count(a, experts, me, num_ranks);
        if (a.replicas.num_logical > 0) {
            if (counts.bad[0] == 0) add_load(counts.logical);
            a.topk_idx = a.routed_idx;  // from here on ids name physical experts
        }
        const bool stale = a.cached && !matches_handle(counts);
        for (int p = 0; p < num_ranks; ++p) {
            EntryRecord entry{};
            entry.descriptor = describe(a);
            entry.num_tokens = a.num_tokens;
            entry.num_rows = counts.rows[p];
            if (stale) {
                entry.code = kStaleHandle;
                std::strncpy(entry.reason, kDamagedHandle, kReasonBytes - 1);
            }
            if (counts.bad[0] > 0) {
                entry.code = kBadExpertId;
                std::memcpy(entry.detail, counts.bad, sizeof(entry.detail));
            }
            enter(p, entry, a.cached ? nullptr : counts.selections.data() + experts.first(p));
        }
        ring_all();
        if (!a.cached) std::copy(counts.rows.begin(), counts.rows.end(), a.rank_counts);
    }

    // The handle's ids are what was counted and sent, whatever the caller writes to its own later.
    void keep_ids() {
        std::copy_n(a.topk_idx, a.num_tokens * a.num_topk, a.routed_idx);
        a.topk_idx = a.routed_idx;
    }

    void add_load(const std::vector<int64_t>& logical) const {
        for (size_t e = 0; e < logical.size(); ++e) add_to_stats(a.logical_load[e], logical[e]);
    }

    // A handle is a tuple of tensors that anybody may have touched since.
    bool matches_handle(const Counts& counts) const {
        const int num_local = experts.num_local(me);
        return std::equal(counts.rows.begin(), counts.rows.end(), a.rank_counts) &&
               std::all_of(a.expert_counts, a.expert_counts + num_local,
                           [](int32_t n) { return n >= 0; }) &&
               rows_follow(a.topk_idx, a.send_row, a.num_tokens, a.num_topk, a.layout, experts,
                           num_ranks, false);
    }

    const int32_t* counts_from(int src) const {
        return counts.data() + int64_t{src} * experts.num_local(me);
    }

    // Counts of peers are untrusted: nothing is computed from a number that cannot be, or that may
    // still change.
    bool check_counts() {
        for (int src = 0; !a.cached && src < num_ranks; ++src) {
            const int32_t* row = &at<int32_t>(me, layout.count_row(slot, src));
            counts.insert(counts.end(), row, row + experts.num_local(me));
            if (without(src))
                std::fill_n(counts.end() - experts.num_local(me), experts.num_local(me), 0);
        }
        for (int src = 0; src < num_ranks; ++src) {
            const EntryRecord& entry = entry_of(src);
            const int64_t limit = std::min(entry.num_tokens, rank.shape().max_tokens);
            if (entry.num_rows < 0 || entry.num_rows > limit) {
                outcome = outcome_of(kBadCount, src, limit, entry.num_rows);
                return false;
            }
            if (a.cached && entry.num_rows != a.rank_counts[num_ranks + src]) {
                // Our own handle is not the one the peers use: refuse, as a receiver.
                placed = outcome_of(kStaleHandle, me);
            }
            for (int e = 0; !a.cached && e < experts.num_local(me); ++e) {
                const int64_t selections = counts_from(src)[e];
                if (selections < 0 || selections > limit * a.num_topk) {
                    outcome = outcome_of(kBadCount, src, limit * a.num_topk, selections);
                    return false;
                }
            }
        }
        return true;
    }

    // 2. Prefix sums over sources (and local experts) give every source its rows; the arena gives
    // the place.
    void place() {
        const int num_local = experts.num_local(me);
        first_row.assign(num_ranks, 0);
        for (int src = 0; src < num_ranks; ++src) {
            first_row[src] = result.num_recv;
            result.num_recv += entry_of(src).num_rows;
            if (!a.cached) a.rank_counts[num_ranks + src] = entry_of(src).num_rows;
        }
        if (!a.cached) {
            for (int e = 0; e < num_local; ++e) {
                int64_t total = 0;
                for (int src = 0; src < num_ranks; ++src) total += counts_from(src)[e];
                a.expert_counts[e] = static_cast<int32_t>(std::min<int64_t>(total, INT32_MAX));
                if (total > INT32_MAX) placed = outcome_of(kOverCapacity, me, INT32_MAX, total);
            }
            if (!placed.ok()) return;
        }
        if (a.layout == RecvLayout::kSlab && a.capacity < 0) {
            placed = outcome_of(kOverCapacity, me, a.capacity, result.num_recv);
            return;
        }
        std::vector<int64_t> start(num_local + 1, 0);
        for (int e = 0; e < num_local; ++e) {
            start[e + 1] = start[e] + (a.layout == RecvLayout::kSlab
                                           ? a.capacity
                                           : round_up(a.expert_counts[e], a.alignment));
        }
        // Rows are int32 everywhere: in the protocol, in handles, on GPUs.
        if (start[num_local] > INT32_MAX) {
            placed = outcome_of(kOverCapacity, me, INT32_MAX, start[num_local]);
            return;
        }
        result.group_start.assign(start.begin(), start.end());
        size_rows();
        if (placed.ok()) grant();
    }

    void size_rows() {
        const int num_local = experts.num_local(me);
        int64_t arriving = result.num_recv;  // rows compared with the capacity
        if (a.layout == RecvLayout::kGrouped) arriving = result.group_start[num_local];
        if (a.layout == RecvLayout::kSlab) {
            arriving =
                num_local > 0 ? *std::max_element(a.expert_counts, a.expert_counts + num_local) : 0;
        }
        result.num_rows = a.is_static || a.layout == RecvLayout::kSlab ? a.capacity : arriving;
        if (a.capacity >= 0 && arriving > a.capacity) {
            placed = outcome_of(kOverCapacity, me, a.capacity, arriving);
        }
        // Compact rows do not depend on the groups, but a static row index has room for so many.
        const int64_t grouped = result.group_start[num_local];
        if (a.index_capacity >= 0 && grouped > a.index_capacity) {
            placed = outcome_of(kOverCapacity, me, a.index_capacity, grouped);
        }
    }

    void grant() {
        const int64_t x_bytes = result.num_rows * slabs() * a.row_bytes();
        const int64_t meta_bytes = result.num_recv * meta.bytes;
        const auto hold = [this](int64_t bytes) -> std::shared_ptr<ExtentHold> {
            const auto extent = rank.arena()->grant(bytes);
            if (!extent) {
                placed = outcome_of(kOutOfArena, me, bytes, rank.arena()->stats().largest_free);
                return nullptr;
            }
            return std::make_shared<ExtentHold>(rank.arena(), *extent);
        };
        result.x_offset = a.x_offset;
        if (a.x_offset < 0) {
            result.x = hold(x_bytes);
            if (result.x) result.x_offset = result.x->extent().offset;
        }
        if (placed.ok() && meta_bytes > 0) result.meta = hold(meta_bytes);
        if (placed.ok() && a.paranoid) {  // NaN and -1 where no row comes
            std::memset(rank.arena_data() + result.x_offset, 0xff, x_bytes);
        }
    }

    int64_t slabs() const { return a.layout == RecvLayout::kSlab ? experts.num_local(me) : 1; }

    void publish_bases() {
        std::vector<int32_t> next(result.group_start.begin(), result.group_start.end());
        for (int src = 0; src < num_ranks; ++src) {
            if (without(src)) continue;
            if (!a.cached && placed.ok()) {
                for (int e = 0; e < experts.num_local(me); ++e) {
                    at<int32_t>(src, layout.expert_row(slot, experts.first(me) + e)) = next[e];
                    next[e] += counts_from(src)[e];
                }
            }
            BaseRecord& base = at<BaseRecord>(src, layout.base(slot, me));
            base.code = placed.incident.code;
            base.x_offset = result.x_offset;
            base.meta_offset = result.meta ? result.meta->extent().offset : -1;
            base.row = placed.ok() ? first_row[src] : 0;
            base.num_rows = result.num_rows * slabs();
            base.detail[0] = placed.incident.have;
            base.detail[1] = placed.incident.want;
            store_release(base.seq, seq);  // pairs with the acquire in await_bases
        }
        ring_all();
    }

    // 3. All bases, not only those of ranks we send to: so all ranks learn of a refusal, before any
    // row moves.
    bool await_bases() {
        for (int p = 0; p < num_ranks; ++p) {
            if (without(p)) continue;
            uint64_t& word = at<BaseRecord>(me, layout.base(slot, p)).seq;
            const auto ready = [&] { return load_acquire(word) >= seq; };
            if (!watch.until(Site::kBase, p, ready, [] { return int64_t{0}; })) {
                if (goes_without(p)) continue;
                outcome = watch.outcome();
                return false;
            }
            read_base(p);
        }
        for (int p = 0; p < num_ranks; ++p) {
            const BaseRecord& base = base_of(p);
            if (without(p)) {
                a.rank_counts[p] = 0;
                continue;
            }
            if (base.code == kOk) {
                if (check_base(p)) continue;
                return false;
            }
            if (!may_poison_base(base.code)) {
                outcome = outcome_of(kBadCount, p, kOk, base.code);
                return false;
            }
            outcome = outcome_of(base.code, p, base.detail[1], base.detail[0]);
            return false;
        }
        return true;
    }

    // What everybody sends to everybody. A peer that published its base has all its entries, and
    // none of them changes before we release the slot.
    void read_rank_ends() const {
        for (int dst = 0; dst < num_ranks; ++dst) {
            uint32_t end = 0;  // of numbers nobody checked for us, so it may wrap
            for (int src = 0; src < num_ranks; ++src) {
                const auto& entry = at<EntryRecord>(dst, layout.entry(slot, src));
                end += static_cast<uint32_t>(entry.num_rows);
                a.rank_ends[src * num_ranks + dst] = static_cast<int32_t>(end);
            }
        }
    }

    // A peer's base becomes an address only after it was found to lie in that peer's arena.
    bool check_base(int p) {
        const BaseRecord& base = base_of(p);
        const int64_t limit = rank.peers_arena_bytes(p), rows = a.rank_counts[p];
        const auto fits = [limit](int64_t offset, int64_t count, int64_t bytes) {
            return offset >= 0 && offset <= limit && offset % kRowAlign == 0 && count >= 0 &&
                   (bytes == 0 || count <= (limit - offset) / bytes);
        };
        const bool row_ok = base.row >= 0 && base.row <= limit;
        const bool x_ok = fits(base.x_offset, base.num_rows, a.row_bytes());
        const bool meta_ok = rows == 0 || meta.bytes == 0 || !row_ok ||
                             fits(base.meta_offset, base.row + rows, meta.bytes);
        if (row_ok && x_ok && meta_ok) return true;
        outcome = outcome_of(kBadCount, p, limit, base.x_offset);
        return false;
    }

    // 4., 5. Rows and records to their final places, then one release per destination.
    bool push() {
        Push rows(*this, a, meta);
        for (int64_t t = 0; t < a.num_tokens; ++t) {
            if (!rows.token(t)) {
                outcome = rows.refusal();
                return false;
            }
        }
        rows.arrive();
        return true;
    }

    // 6. Everything announced to us has arrived.
    bool await_rows() {
        for (int src = 0; src < num_ranks; ++src) {
            expected(src) += static_cast<uint64_t>(entry_of(src).num_rows);
        }
        // pairs with the release in Push::arrive
        const auto have = [&](int src) {
            return load_acquire(at<uint64_t>(me, layout.arrived_word(slot, src)));
        };
        const auto there = [&](int src) { return have(src) >= expected(src); };
        WaitTimes times(a.wait_stats, num_ranks);
        for (int src = 0; src < num_ranks; ++src) {
            if (without(src)) continue;
            const auto ready = [&] {
                times.look(there);
                return there(src);
            };
            const auto progress = [&] { return static_cast<int64_t>(have(src)); };
            if (!watch.until(Site::kRows, src, ready, progress, static_cast<int64_t>(expected(src)),
                             times.woken_by()) &&
                !goes_without(src)) {
                return false;
            }
        }
        return true;
    }

    // Rows that were counted on and did not all come: they are zero, and nobody's.
    void forget_lost() {
        const int num_local = experts.num_local(me);
        for (int src = 0; src < num_ranks; ++src) {
            if (!without(src) || entry_of(src).num_rows == 0) continue;
            abandon(result.x);  // it may live and go on writing
            abandon(result.meta);
            if (!result.meta) continue;
            std::byte* records = rank.arena_data() + result.meta->extent().offset;
            for (int64_t j = 0; j < entry_of(src).num_rows; ++j) {
                std::byte* record = records + (first_row[src] + j) * meta.bytes;
                std::memset(record, 0, meta.bytes);
                for (const Region& none : {meta.src_token, meta.experts, meta.rows}) {
                    std::memset(record + none.offset, 0xff, none.bytes);
                }
            }
            for (int e = 0; e < num_local; ++e) {
                int64_t row = result.group_start[e];
                for (int s = 0; s < src; ++s) row += counts_from(s)[e];
                for (int i = 0; i < counts_from(src)[e]; ++i) result.lost_rows.push_back(row++);
            }
        }
        for (const int64_t row : result.lost_rows) {
            std::memset(rank.arena_data() + result.x_offset + row * a.row_bytes(), 0,
                        a.row_bytes());
        }
    }

    // Paranoid: every row and record is what its source sent, and every expert got what was
    // announced for it.
    bool verify() {
        const std::byte* record =
            rank.arena_data() + (result.meta ? result.meta->extent().offset : 0);
        for (int src = 0; src < num_ranks; ++src) {
            if (without(src)) {
                record += entry_of(src).num_rows * meta.bytes;
                continue;
            }
            std::vector<int64_t> got(experts.num_local(me), 0);
            for (int64_t j = 0; j < entry_of(src).num_rows; ++j, record += meta.bytes) {
                if (!fits_seal(src, record)) return false;
                if (!a.cached) count_selections(record, got);
            }
            for (int e = 0; !a.cached && e < experts.num_local(me); ++e) {
                if (got[e] == counts_from(src)[e]) continue;
                outcome = outcome_of(kMiscount, src, counts_from(src)[e], got[e]);
                outcome.detail[2] = 1 + e;
                return false;
            }
        }
        return true;
    }

    bool fits_seal(int src, const std::byte* record) {
        Seal seal;
        std::memcpy(&seal, record + meta.seal.offset, sizeof(seal));
        if (seal.row >= 0 && seal.row < result.num_rows * slabs()) {
            const std::byte* row = rank.arena_data() + result.x_offset + seal.row * a.row_bytes();
            if (seal.sum == sum_of(seal, seq, src, row, a.row_bytes(), record, meta.seal.offset)) {
                return true;
            }
        }
        outcome = outcome_of(kBadEpoch, src, kBadSeal, seal.token);
        return false;
    }

    void count_selections(const std::byte* record, std::vector<int64_t>& got) const {
        for (int k = 0; k < a.num_topk; ++k) {
            int32_t local;
            std::memcpy(&local, record + meta.experts.offset + 4 * k, sizeof(local));
            if (local >= 0 && local < static_cast<int32_t>(got.size())) ++got[local];
        }
    }

    DispatchArgs a;
    const MetaLayout meta;
    Dispatched result;
    std::vector<int32_t> counts;     // [num_ranks][num_local] selections of our experts
    Outcome placed;                  // why this receiver refuses, if it does
    std::vector<int64_t> first_row;  // [num_ranks] first compact row of each source
};

}  // namespace

Dispatched Rank::dispatch(uint64_t seq, const DispatchArgs& args, const WaitHooks& hooks) {
    std::lock_guard lock(running_);
    if (!verdict_.ok()) {
        Dispatched dead;
        dead.outcome = verdict_;
        dead.seq = seq;
        return dead;
    }
    return DispatchOp(*this, seq, args, hooks).run();
}

}  // namespace ep::cpu
