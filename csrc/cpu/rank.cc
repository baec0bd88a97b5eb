#include "cpu/rank.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/operation.h"

namespace ep::cpu {

ExpertMap::ExpertMap(std::vector<int32_t> owner, int num_ranks)
    : owner_(std::move(owner)), local_(owner_.size()), first_(num_ranks + 1, 0) {
    std::vector<int32_t> count(num_ranks, 0);
    for (size_t e = 0; e < owner_.size(); ++e) local_[e] = count[owner_[e]]++;
    for (int r = 0; r < num_ranks; ++r) first_[r + 1] = first_[r] + count[r];
}

Rank::Rank(const Shape& shape, int rank, uint64_t generation, std::vector<int32_t> expert_owner,
           std::vector<Peer> peers, std::shared_ptr<Arena> arena, const Clocks& clocks,
           bool can_mask)
    : shape_(shape),
      layout_(shape),
      rank_(rank),
      experts_(std::move(expert_owner), shape.num_ranks),
      peers_(std::move(peers)),
      arena_(std::move(arena)),
      clocks_(clocks),
      can_mask_(can_mask),
      masks_(rank, all_headers(), mask_words()),
      expected_(size_t(shape.num_slots) * shape.num_ranks, 0),
      flows_(shape.num_ranks) {
    for (const Peer& peer : peers_) processes_.push_back(peer.process);
    ControlHeader& own = header(rank_);
    own.magic = kControlMagic;
    own.generation = generation;
    std::atomic_ref(own.life).store(static_cast<uint32_t>(Life::kAlive), std::memory_order_release);
}

ControlHeader& Rank::header(int rank) const {
    return *reinterpret_cast<ControlHeader*>(peers_[rank].control->data() + layout_.header.offset);
}

std::vector<ControlHeader*> Rank::all_headers() const {
    std::vector<ControlHeader*> headers;
    for (int p = 0; p < shape_.num_ranks; ++p) headers.push_back(&header(p));
    return headers;
}

std::vector<uint64_t*> Rank::mask_words() const {
    std::vector<uint64_t*> words;
    for (const Peer& peer : peers_) {
        words.push_back(reinterpret_cast<uint64_t*>(peer.control->data() + layout_.masks.offset));
    }
    return words;
}

bool Rank::is_gone(int peer) const {
    const auto life = std::atomic_ref(header(peer).life).load(std::memory_order_acquire);
    return ep::is_gone(processes_[peer]) || life != static_cast<uint32_t>(Life::kAlive);
}

// Nobody is in an operation, and counts that go on from one to the next may have come apart: they begin
// anew, everywhere.
void Rank::unmask(uint64_t seq, uint64_t masked) {
    std::lock_guard lock(running_);
    const auto put = [this](int64_t offset, uint64_t value) {
        auto* word = reinterpret_cast<uint64_t*>(peers_[rank_].control->data() + offset);
        store_release(*word, value);
    };
    for (int p = 0; p < shape_.num_ranks; ++p) {
        for (int slot = 0; slot < shape_.num_slots; ++slot) {
            put(layout_.released_word(slot, p), seq);
            put(layout_.arrived_word(slot, p), 0);
        }
        put(layout_.staged_word(p), 0);
        put(layout_.taken_word(p), 0);
    }
    std::fill(expected_.begin(), expected_.end(), 0);
    std::fill(flows_.begin(), flows_.end(), Flow{});
    last_seq_ = seq;
    masks_.reset(masked);
}

void Rank::leave() {
    auto life = std::atomic_ref(header(rank_).life);
    uint32_t alive = static_cast<uint32_t>(Life::kAlive);
    if (!life.compare_exchange_strong(alive, static_cast<uint32_t>(Life::kLeft))) return;
    wake_all();
}

// Our life has changed: whoever waits, for us or for another, has to know.
void Rank::wake_all() const {
    for (int p = 0; p < shape_.num_ranks; ++p) ring(header(p), kAnyRank);
}

void Rank::give_up(const Outcome& why) {
    verdict_ = why;
    ControlHeader& own = header(rank_);
    own.verdict = why.incident;
    store_release(own.verdict_valid, 1);
    std::atomic_ref(own.life).store(static_cast<uint32_t>(Life::kFailed),
                                    std::memory_order_release);
    wake_all();
}

void Rank::seed_seq(uint64_t seq) {
    last_seq_ = seq;
    // Every slot counts as released up to here; each rank writes the words its peers wait for.
    for (int slot = 0; slot < shape_.num_slots; ++slot) {
        for (int p = 0; p < shape_.num_ranks; ++p) {
            auto* word = reinterpret_cast<uint64_t*>(peers_[p].control->data() +
                                                     layout_.released_word(slot, rank_));
            store_release(*word, seq);
        }
    }
}

bool ends_communicator(int code) {
    return code == kInterrupted || (code >= 100 && code < 200) || code == kBadCount ||
           code == kBadEpoch || code == kMiscount || code == kOutOfStep;
}

Operation::Operation(Rank& r, OpKind op, uint64_t sequence, const WaitHooks& hooks, bool can_lack)
    : rank(r),
      layout(r.layout_),
      experts(r.experts_),
      kind(op),
      seq(sequence),
      me(r.rank_),
      num_ranks(r.shape_.num_ranks),
      slot(static_cast<int>(sequence % uint64_t(r.shape_.num_slots))),
      watch(r.rank_, r.all_headers(), r.processes_, r.clocks_, hooks, op, sequence,
            can_lack && r.can_mask_ ? &r.masks_ : nullptr),
      gone_(can_lack && r.can_mask_ ? r.masked() : 0),
      entries_(num_ranks),
      bases_(num_ranks) {
    ControlHeader& own = rank.header(me);
    std::atomic_ref(own.entered_kind).store(static_cast<uint32_t>(op), std::memory_order_relaxed);
    store_release(own.entered_seq, seq);
}

bool Operation::goes_without(int peer) {
    if (!watch.outcome().ok()) return false;
    gone_ |= uint64_t{1} << peer;
    return true;
}

bool Operation::acquire_slot() {
    if (!watch.is_wanted()) return false;
    const uint64_t num_slots = static_cast<uint64_t>(rank.shape_.num_slots);
    if (seq <= num_slots) return true;  // nobody has used it yet
    for (int p = 0; p < num_ranks; ++p) {
        if (without(p)) continue;
        uint64_t& released = at<uint64_t>(me, layout.released_word(slot, p));
        // pairs with the release in release_slot
        const auto free = [&] { return load_acquire(released) + num_slots >= seq; };
        if (!watch.until(Site::kSlot, p, free) && !goes_without(p)) return false;
    }
    return true;
}

void Operation::enter(int peer, EntryRecord entry, const int32_t* expert_counts) {
    if (without(peer)) return;
    EntryRecord& theirs = at<EntryRecord>(peer, layout.entry(slot, me));
    entry.seq = theirs.seq;  // the word itself is published last
    entry.kind = static_cast<int32_t>(kind);
    if (peer == me) entries_[me] = entry;
    std::memcpy(reinterpret_cast<std::byte*>(&theirs) + sizeof(theirs.seq),
                reinterpret_cast<const std::byte*>(&entry) + sizeof(entry.seq),
                sizeof(entry) - sizeof(entry.seq));
    if (expert_counts != nullptr) {
        std::memcpy(&at<int32_t>(peer, layout.count_row(slot, me)), expert_counts,
                    sizeof(int32_t) * experts.num_local(peer));
    }
    store_release(theirs.seq, seq);  // pairs with the acquire in await_entries
}

void Operation::ring_all() const {
    for (int p = 0; p < num_ranks; ++p) {
        if (p != me) ring(rank.header(p), me);
    }
}

bool Operation::await_entries(const Descriptor& mine, int64_t* wait_stats) {
    // pairs with the release in enter
    const auto seen = [&](int p) {
        return load_acquire(at<EntryRecord>(me, layout.entry(slot, p)).seq);
    };
    const auto there = [&](int p) { return seen(p) >= seq; };
    WaitTimes times(wait_stats, num_ranks);
    for (int p = 0; p < num_ranks; ++p) {
        if (without(p)) continue;
        const auto ready = [&] {
            times.look(there);
            return there(p);
        };
        if (!watch.until(Site::kEntry, p, ready, nullptr, 0, times.woken_by())) {
            if (goes_without(p)) continue;
            outcome = watch.outcome();
            return false;
        }
        if (seen(p) != seq) {
            outcome =
                outcome_of(kBadEpoch, p, static_cast<int64_t>(seq), static_cast<int64_t>(seen(p)));
            return false;
        }
        if (p != me) entries_[p] = at<EntryRecord>(me, layout.entry(slot, p));
    }
    return judge_entries(mine);
}

// Every rank reads the same entries, so every rank comes to the same verdict.
bool Operation::judge_entries(const Descriptor& mine) {
    for (int p = 0; p < num_ranks; ++p) {
        if (!without(p) && entry_of(p).kind != static_cast<int32_t>(kind)) {
            outcome = outcome_of(kOutOfStep, p, static_cast<int64_t>(kind), entry_of(p).kind);
            return false;
        }
    }
    for (int p = 0; p < num_ranks; ++p) {
        const EntryRecord& entry = entry_of(p);
        if (entry.code == kOk || without(p)) continue;
        if (!may_poison_entry(entry.code)) {
            outcome = outcome_of(kBadCount, p, kOk, entry.code);
            return false;
        }
        outcome = outcome_of(entry.code, p);
        std::memcpy(outcome.detail, entry.detail, sizeof(outcome.detail));
        std::memcpy(outcome.reason, entry.reason, sizeof(outcome.reason));
        outcome.reason[kReasonBytes - 1] = '\0';
        return false;
    }
    for (int p = 0; p < num_ranks; ++p) {
        for (int f = 0; !without(p) && f < kNumFields; ++f) {
            const int64_t theirs = entry_of(p).descriptor.value[f];
            if (theirs == mine.value[f]) continue;
            outcome = outcome_of(kCallDiffers, p, mine.value[f], theirs);
            outcome.detail[0] = f;
            return false;
        }
    }
    return true;
}

void Operation::release_slot() {
    for (int p = 0; p < num_ranks; ++p) {
        store_release(at<uint64_t>(p, layout.released_word(slot, me)), seq);
    }
    store_release(rank.header(me).finished_seq, seq);
    ring_all();
}

Outcome Operation::outcome_of(int code, int peer, int64_t a, int64_t b) {
    Outcome result;
    result.incident.code = static_cast<uint16_t>(code);
    result.incident.peer = static_cast<int16_t>(peer);
    result.incident.want = a;
    result.incident.have = b;
    return result;
}

Outcome Operation::fail(const Outcome& why) {
    outcome = why;
    Incident& incident = outcome.incident;
    incident.op = static_cast<uint8_t>(kind);
    incident.rank = static_cast<int16_t>(me);
    incident.epoch = static_cast<uint32_t>(seq);
    incident.seq = seq;
    if (incident.peer_seq == 0 && incident.peer >= 0) {
        incident.peer_seq = load_acquire(rank.header(incident.peer).entered_seq);
    }
    if (!ends_communicator(incident.code)) {
        release_slot();  // everybody fails this call; the next one works
        return outcome;
    }
    rank.give_up(outcome);
    return outcome;
}

Outcome Rank::refuse(uint64_t seq, OpKind kind, const Outcome& why, const WaitHooks& hooks) {
    std::lock_guard lock(running_);
    if (!verdict_.ok()) return verdict_;
    Operation op(*this, kind, seq, hooks, true);
    if (!op.acquire_slot()) return op.fail(op.watch.outcome());
    EntryRecord entry{};
    entry.code = why.incident.code;
    std::memcpy(entry.detail, why.detail, sizeof(entry.detail));
    std::memcpy(entry.reason, why.reason, sizeof(entry.reason));
    for (int p = 0; p < op.num_ranks; ++p) op.enter(p, entry, nullptr);
    op.ring_all();
    Outcome outcome = why;
    outcome.incident.peer = static_cast<int16_t>(rank_);
    return op.fail(outcome);
}

}  // namespace ep::cpu
