// Rails: what ranks with equal local index on different nodes share, and how tokens lie in it.
//
// Every rank has one symmetric segment: words and mailboxes of its peers on the rail, and a ring of
// chunks in each direction for every (peer node, channel). A channel is a range of a source's
// tokens. Rings are small and fixed when the buffer is made: a batch of any size streams through.
#pragma once

#include <array>
#include <cstdint>

#include "contract/config.h"
#include "contract/layout.h"
#include "contract/records.h"
#include "contract/shape.h"

namespace ep {

inline constexpr int64_t kRailStagingBytes = int64_t{128} << 20;  // of all rings of a rank
inline constexpr int kMaxChannels = 32;
inline constexpr int kRingShift = 4;  // of 16 places a ring: filled, on the way, read, credited
inline constexpr int kFewPlacesShift = 2;  // of 4, before chunks get smaller
inline constexpr int kChunkTokens = 8;     // of the largest record; a signal for so many is cheap
inline constexpr uint64_t kMaskAges = 16;  // unmaskings after which words of masks are used again
inline constexpr int kMailboxes = 2;       // why two are enough: docs/protocol.md, "Rails"

// Where a rank stands. Ranks are numbered node by node, and all nodes have equally many.
struct NodeShape {
    int32_t num_nodes = 1, ranks_per_node = 1;

    EP_HD constexpr int node(int rank) const { return rank / ranks_per_node; }
    EP_HD constexpr int local(int rank) const { return rank % ranks_per_node; }
    EP_HD constexpr int rank(int node, int local) const { return node * ranks_per_node + local; }
};

// Direct mode: what rows of small batches need that go straight to their ranks on other nodes
// (contract/direct.h), in each slot. No slots: a buffer without it.
struct DirectShape {
    int32_t num_slots = 0, num_ranks = 0;
    int64_t inbox_bytes = 0;   // records that come
    int64_t outbox_bytes = 0;  // and those that leave
    int64_t note_bytes = 0;    // what a source tells its rail of all its tokens
};

// Sizes of the rails of a buffer; all ranks agree on them.
struct RailShape {
    NodeShape nodes;
    int32_t num_channels = 1;
    int32_t ring_shift = 0;    // a ring has 2^ring_shift places
    int64_t chunk_bytes = 0;   // one place of a ring
    int64_t notice_bytes = 0;  // a mailbox
    DirectShape direct{};

    EP_HD constexpr int num_peers() const { return nodes.num_nodes - 1; }
    EP_HD constexpr bool is_direct() const { return direct.num_slots > 0; }

    // Notices go to the ranks of our rail, which relay them; with direct mode to every rank of every other
    // node. How many those are; which, each rank beginning with another; and who of them a rank is.
    EP_HD constexpr int num_correspondents() const {
        return is_direct() ? direct.num_ranks - nodes.ranks_per_node : num_peers();
    }
    EP_HD constexpr int correspondent(int me, int i) const {
        const int next = nodes.node(me) + 1;
        return is_direct() ? (nodes.rank(next, 0) + i) % direct.num_ranks
                           : nodes.rank((next + i) % nodes.num_nodes, nodes.local(me));
    }
    EP_HD constexpr int num_senders() const {
        return is_direct() ? direct.num_ranks : nodes.num_nodes;
    }
    EP_HD constexpr int sender(int rank) const { return is_direct() ? rank : nodes.node(rank); }
    EP_HD constexpr int num_mailboxes() const {
        return is_direct() ? direct.num_slots : kMailboxes;
    }
    EP_HD constexpr int ring_chunks() const { return 1 << ring_shift; }
    EP_HD constexpr int64_t ring_bytes() const { return ring_chunks() * chunk_bytes; }
    EP_HD constexpr int64_t staging_bytes() const {
        return 2 * int64_t{num_peers()} * num_channels * ring_bytes();
    }
    EP_HD constexpr int64_t direct_bytes() const {
        const DirectShape& d = direct;
        return d.num_slots *
               (d.inbox_bytes + d.outbox_bytes + (int64_t{nodes.num_nodes} + 1) * d.note_bytes);
    }
};

// Which of a ring's places the `count`-th chunk lies in.
EP_HD constexpr int place_in_ring(const RailShape& s, uint64_t count) {
    return static_cast<int>(count) & (s.ring_chunks() - 1);
}

// What crosses when an operation begins, as packed words (device/packed.cuh): the notice, which is the
// same for every rank, then how many records each channel brings to each node; with direct mode also what
// has ever been put into the inbox of each rank.
struct RailNoticeLayout {
    int32_t records, puts, words, num_channels;

    EP_HD constexpr RailNoticeLayout(const Shape& s, int num_nodes, int channels)
        : records(NoticeLayout(s).words),
          puts(records + num_nodes * channels),
          words((puts + (s.stage_bytes > 0 ? s.num_ranks : 0) + 15) / 16 * 16),
          num_channels(channels) {}
    EP_HD constexpr int record_word(int node, int channel) const {
        return records + node * num_channels + channel;
    }
    EP_HD constexpr int puts_word(int rank) const { return puts + rank; }
    EP_HD constexpr int64_t bytes() const { return int64_t{8} * words; }
};

// The symmetric segment of a rank, at the same offsets on every rank. Peers are nodes but our own.
struct RailLayout {
    Region entered, released, tails, heads, came, masks, inbox, outbox, recv, send;
    Region direct_recv, direct_send, notes_recv, notes_send;
    int64_t end = 0;
    RailShape shape;

    EP_HD constexpr explicit RailLayout(const RailShape& s) : shape(s) {
        const DirectShape& d = s.direct;
        const int64_t nodes = s.nodes.num_nodes;
        const int64_t rings = int64_t{s.num_peers()} * s.num_channels;
        const int64_t mails = int64_t{s.num_mailboxes()} * s.num_senders();
        const int64_t pairs = int64_t{d.num_slots} * d.num_ranks;
        Cursor at;
        entered = at.take(mails * kWordStride);   // uint64 per mailbox
        released = at.take(pairs * kWordStride);  // direct mode: uint64 per slot and rank
        tails =
            at.take(nodes * s.num_channels * s.ring_chunks() * kWordStride);  // uint64 per place
        heads = at.take(nodes * s.num_channels * s.ring_chunks() * kWordStride);
        came = at.take(pairs * kWordStride);  // direct mode: uint64 per slot and rank
        masks = at.take(int64_t{8} * kMaskAges * d.num_ranks);  // direct mode: uint64 per age, rank
        inbox = at.take(mails * s.notice_bytes);                // RailNoticeLayout per sender
        outbox = at.take(s.num_mailboxes() * s.notice_bytes);   // ours, as it leaves
        recv = at.take(rings * s.ring_bytes());                 // [peer][channel][place]
        send = at.take(rings * s.ring_bytes());
        direct_recv = at.take(d.num_slots * d.inbox_bytes);        // [slot] records, see stage.h
        direct_send = at.take(d.num_slots * d.outbox_bytes);       // [slot] the same
        notes_recv = at.take(d.num_slots * nodes * d.note_bytes);  // [slot][node] of our rail
        notes_send = at.take(d.num_slots * d.note_bytes);          // [slot] ours
        end = at.end();
    }

    static constexpr int64_t kWordStride = 64;

    // Notices that a sender has ever put into mailbox `seq % num_mailboxes`; see notices_until.
    EP_HD constexpr int64_t entered_word(uint64_t seq, int sender) const {
        return entered.offset + mailbox(seq, sender) * kWordStride;
    }
    // Direct mode: operations after which a rank of another node has ever released its slot to us; see
    // releases_until. And what it has ever put into ours.
    EP_HD constexpr int64_t released_word(int slot, int rank) const {
        return released.offset + pair(slot, rank) * kWordStride;
    }
    EP_HD constexpr int64_t came_word(int slot, int rank) const {
        return came.offset + pair(slot, rank) * kWordStride;
    }
    // Direct mode: a bit for each rank that rank has masked since the unmasking of this number.
    EP_HD constexpr int64_t masks_word(uint64_t age, int rank) const {
        return masks.offset +
               8 * (static_cast<int64_t>(age % kMaskAges) * shape.direct.num_ranks + rank);
    }
    // Chunks that node has ever put into the place of the `count`-th in our ring; see chunks_until. A word
    // for each place, so that nothing depends on the order in which two puts arrive.
    EP_HD constexpr int64_t tail_word(int node, int channel, uint64_t count) const {
        return tails.offset + word(node, channel, count);
    }
    // Chunks of ours that node has ever taken out of that place of its ring; see credits_until. Several
    // warps take chunks side by side.
    EP_HD constexpr int64_t head_word(int node, int channel, uint64_t count) const {
        return heads.offset + word(node, channel, count);
    }
    EP_HD constexpr int64_t inbox_at(uint64_t seq, int sender) const {
        return inbox.offset + mailbox(seq, sender) * shape.notice_bytes;
    }
    EP_HD constexpr int64_t outbox_at(uint64_t seq) const {
        return outbox.offset + box(seq) * shape.notice_bytes;
    }
    // Direct mode: where records begin that come to a slot and leave from it, and what the source on `node`
    // tells of its tokens.
    EP_HD constexpr int64_t direct_inbox(int slot) const {
        return direct_recv.offset + slot * shape.direct.inbox_bytes;
    }
    EP_HD constexpr int64_t direct_outbox(int slot) const {
        return direct_send.offset + slot * shape.direct.outbox_bytes;
    }
    EP_HD constexpr int64_t notes_of(int slot, int node) const {
        return notes_recv.offset +
               (int64_t{slot} * shape.nodes.num_nodes + node) * shape.direct.note_bytes;
    }
    EP_HD constexpr int64_t own_notes(int slot) const {
        return notes_send.offset + slot * shape.direct.note_bytes;
    }
    // The place of the `count`-th chunk between rank `me` and the rank of `node` on its rail.
    EP_HD constexpr int64_t recv_chunk(int my_node, int node, int channel, uint64_t count) const {
        return recv.offset + place(my_node, node, channel, count);
    }
    EP_HD constexpr int64_t send_chunk(int my_node, int node, int channel, uint64_t count) const {
        return send.offset + place(my_node, node, channel, count);
    }

    constexpr std::array<NamedRegion, 14> regions() const {
        return {{{"entered", entered},
                 {"released", released},
                 {"tails", tails},
                 {"heads", heads},
                 {"came", came},
                 {"masks", masks},
                 {"inbox", inbox},
                 {"outbox", outbox},
                 {"recv", recv},
                 {"send", send},
                 {"direct_recv", direct_recv},
                 {"direct_send", direct_send},
                 {"notes_recv", notes_recv},
                 {"notes_send", notes_send}}};
    }

private:
    EP_HD constexpr int64_t box(uint64_t seq) const {
        return static_cast<int64_t>(seq % static_cast<uint64_t>(shape.num_mailboxes()));
    }
    EP_HD constexpr int64_t mailbox(uint64_t seq, int sender) const {
        return box(seq) * shape.num_senders() + sender;
    }
    EP_HD constexpr int64_t pair(int slot, int rank) const {
        return int64_t{slot} * shape.direct.num_ranks + rank;
    }
    EP_HD constexpr int64_t word(int node, int channel, uint64_t count) const {
        const int64_t ring = int64_t{node} * shape.num_channels + channel;
        return ((ring << shape.ring_shift) + index(count)) * kWordStride;
    }
    EP_HD constexpr int64_t index(uint64_t count) const { return place_in_ring(shape, count); }
    EP_HD constexpr int64_t place(int my_node, int node, int channel, uint64_t count) const {
        const int peer = node < my_node ? node : node - 1;  // no ring for our own node
        return (int64_t{peer} * shape.num_channels + channel) * shape.ring_bytes() +
               index(count) * shape.chunk_bytes;
    }
};

// What `entered_word` shows once the notice of operation `seq`, counted from 1, is there.
EP_HD constexpr uint64_t notices_until(const RailShape& s, uint64_t seq) {
    const auto boxes = static_cast<uint64_t>(s.num_mailboxes());
    return seq / boxes + (seq % boxes != 0 ? 1 : 0);
}

// Of operations up to `seq` those in a slot of this number.
EP_HD constexpr uint64_t operations_in(const RailShape& s, int slot, uint64_t seq) {
    const auto boxes = static_cast<uint64_t>(s.num_mailboxes());
    const auto first = static_cast<uint64_t>(slot);
    return seq / boxes + (first != 0 && seq % boxes >= first ? 1 : 0);
}

// What `released_word` shows once the slot of operation `seq` is free for it: one for each before it there.
EP_HD constexpr uint64_t releases_until(const RailShape& s, uint64_t seq) {
    return notices_until(s, seq) - 1;
}

// What `tail_word` shows once the `count`-th chunk of a ring, counted from 0, is there.
EP_HD constexpr uint64_t chunks_until(const RailShape& s, uint64_t count) {
    return (count >> s.ring_shift) + 1;
}

// What `head_word` shows once the place of the `count`-th chunk is free for it.
EP_HD constexpr uint64_t credits_until(const RailShape& s, uint64_t count) {
    return count >> s.ring_shift;
}

// What stands before the row of a token that crosses. All rows in it are final: who forwards computes
// nothing. One entry for each slot of the token.
struct RailHeadLayout {
    Region
        token;  // int32 [2]: of the source; its turn among those of its channel that visit this node
    Region experts;  // int32 [num_topk]: see expert_at, -1 = on another node
    Region rows;     // int32 [num_topk]: of x
    Region
        records;  // int32 [num_topk]: the token's among all that its rank receives; compact: the row
    Region weights;  // float [num_topk]
    Region scales;
    int64_t bytes = 0;  // where the row begins

    EP_HD constexpr RailHeadLayout(int num_topk, bool with_weights, bool with_records,
                                   int64_t scale_bytes) {
        int64_t at = 0;
        const auto take = [&at](bool wanted, int64_t size) {
            const Region region{at, wanted ? size : 0};
            at += region.bytes;
            return region;
        };
        token = take(true, 8);
        experts = take(true, int64_t{4} * num_topk);
        rows = take(true, int64_t{4} * num_topk);
        records = take(with_records, int64_t{4} * num_topk);
        weights = take(with_weights, int64_t{4} * num_topk);
        at = (at + kRowAlign - 1) / kRowAlign * kRowAlign;
        scales = take(scale_bytes > 0, scale_bytes);
        bytes = (at + kRowAlign - 1) / kRowAlign * kRowAlign;
    }
};

// What stands before a sum that comes back: weights of the token's slots on that node.
EP_HD constexpr int64_t sum_head_bytes(int num_topk, bool with_weights) {
    return with_weights ? (int64_t{4} * num_topk + kRowAlign - 1) / kRowAlign * kRowAlign : 0;
}

// What the rank where a token crossed keeps of it for combine: int32 for each slot. A handle's `rail`
// has one such record for each token of the own rail that came, by (node, token).
struct RailLog {
    int32_t num_topk;
    bool with_weights;

    EP_HD constexpr int words() const { return (with_weights ? 3 : 2) * num_topk; }
    // Of slot k: see expert_at, -1 = not on this node; row of x there; weight, as bits.
    EP_HD constexpr int expert(int k) const { return k; }
    EP_HD constexpr int row(int k) const { return num_topk + k; }
    EP_HD constexpr int weight(int k) const { return 2 * num_topk + k; }
};

// A slot's expert: which rank of the node, and which local expert there.
inline constexpr int kExpertBits = 20;
EP_HD constexpr int32_t expert_at(int local_rank, int local_expert) {
    return local_rank << kExpertBits | local_expert;
}
EP_HD constexpr int rank_of_expert(int32_t place) { return place >> kExpertBits; }
EP_HD constexpr int id_of_expert(int32_t place) { return place & ((1 << kExpertBits) - 1); }
static_assert(kMaxRanks <= 1 << (31 - kExpertBits));

// How the records of one operation lie in chunks: several in one, or the row of one in pieces, each
// behind a copy of its head.
struct RailChunks {
    int64_t head_bytes, row_bytes;
    int32_t records = 1;  // in a full chunk
    int32_t pieces = 1;   // chunks of a record
    int64_t piece_bytes;  // of the row in one chunk

    EP_HD constexpr RailChunks(int64_t chunk_bytes, int64_t head, int64_t row)
        : head_bytes(head), row_bytes(row), piece_bytes(row) {
        if (record_bytes() <= chunk_bytes) {
            records = static_cast<int32_t>(chunk_bytes / record_bytes());
        } else {
            const int64_t room = (chunk_bytes - head) / kRowAlign * kRowAlign;
            pieces = static_cast<int32_t>((row + room - 1) / room);
            piece_bytes = (row / kRowAlign + pieces - 1) / pieces * kRowAlign;
        }
    }
    EP_HD constexpr int64_t record_bytes() const { return head_bytes + row_bytes; }
    EP_HD constexpr int64_t piece_begin(int piece) const { return piece * piece_bytes; }
    EP_HD constexpr int64_t piece_end(int piece) const {
        return piece + 1 < pieces ? (piece + 1) * piece_bytes : row_bytes;
    }
    // Records of chunk j of a channel that brings `count`.
    EP_HD constexpr int32_t in_chunk(int64_t j, int64_t count) const {
        return pieces > 1 || count - j * records > records
                   ? records
                   : static_cast<int32_t>(count - j * records);
    }
    // Chunks of a channel that brings `count` records.
    EP_HD constexpr int64_t chunks(int64_t count) const {
        return (count + records - 1) / records * pieces;
    }
};

// Divides the staging of a rank among its rings: rings of chunks of `chunk_tokens` of the largest
// record, where that fits; else rings of fewer, down to a quarter, smaller chunks, rings of two, fewer
// channels, and in the end pieces of rows.
EP_HD constexpr RailShape divide_staging(const NodeShape& nodes, int num_channels,
                                         int64_t record_bytes, int chunk_tokens = kChunkTokens,
                                         int64_t budget = kRailStagingBytes) {
    constexpr int64_t kAlign = Cursor::kAlign;
    RailShape s;
    s.nodes = nodes;
    s.num_channels = num_channels;
    s.ring_shift = kRingShift;
    if (s.num_peers() == 0) return s;
    const auto room = [&] {
        const int64_t places = 2 * int64_t{s.num_peers()} * s.num_channels * s.ring_chunks();
        return budget / places / kAlign * kAlign;
    };
    const int64_t wanted = (chunk_tokens * record_bytes + kAlign - 1) / kAlign * kAlign;
    while (room() < wanted && s.ring_shift > kFewPlacesShift) --s.ring_shift;
    while (room() < record_bytes && s.ring_shift > 1) --s.ring_shift;
    while (room() < record_bytes && s.num_channels > 1) s.num_channels /= 2;
    s.chunk_bytes = wanted < room() ? wanted : room();
    return s;
}

// Private device memory of a rank on its rails; nobody else sees it.
struct RailState {
    uint64_t* sent;      // [nodes][channels] chunks ever put into each ring
    uint64_t* taken;     // [nodes][channels] chunks ever taken out of each
    uint64_t* brings;    // [channels][nodes] packed: records of this operation, by who counted them
    uint64_t* incoming;  // [nodes][channels] packed: records that each of them brings to us
    uint64_t* visits;    // [groups of 32 tokens][nodes] which of them go there, how many did before
    uint64_t* ever;      // [RailCounter::kCount]
    uint64_t* puts;      // direct mode: [slots][ranks] what we have ever put there
    uint64_t* coming;    // [ranks] packed: the same, as each of them tells it of us and this slot
    uint64_t* missed;    // direct mode: [Missed::kCount][slots][ranks]
    uint64_t* masks;     // [MaskWord::kCount]
};

// What a rank of another node was not told of while it was masked.
enum class Missed : int32_t { kNotices, kReleases, kCount };

// What a rank knows of masks beside what its node does.
enum class MaskWord : int32_t {
    kAge,      // unmaskings so far
    kTold,     // whom we have masked since the last one, and told other nodes
    kSkipped,  // [2] packed, 32 ranks each: whom a small operation sends nothing
    kCount = 4,
};

// What a rank has moved since its buffer was made.
enum class RailCounter : int32_t {
    kTokens,      // own ones, in dispatches
    kHomeVisits,  // of these, those that visit the own node
    kRecordsOut,  // rows that crossed in dispatches
    kRecordsIn,
    kSumsOut,  // and came back in combines
    kSumsIn,
    kDirectOut,  // tokens put straight to ranks of other nodes, in both
    kCount,
};

struct RailStateLayout {
    Region sent, taken, brings, incoming, visits, ever, puts, coming, missed, masks;
    int64_t end = 0;

    constexpr RailStateLayout(const Shape& s, const RailShape& r) {
        const int64_t pairs = int64_t{r.nodes.num_nodes} * r.num_channels;
        Cursor at;
        sent = at.take(8 * pairs);
        taken = at.take(8 * pairs);
        brings = at.take(8 * pairs);
        incoming = at.take(8 * pairs);
        // Every channel begins a group of its own.
        visits = at.take(8 * r.nodes.num_nodes * (s.max_tokens / 32 + 2 * r.num_channels + 2));
        ever = at.take(8 * static_cast<int>(RailCounter::kCount));
        puts = at.take(int64_t{8} * r.direct.num_slots * r.direct.num_ranks);
        coming = at.take(int64_t{8} * r.direct.num_ranks);
        missed = at.take(int64_t{8} * static_cast<int>(Missed::kCount) * r.direct.num_slots *
                         r.direct.num_ranks);
        masks = at.take(8 * static_cast<int>(MaskWord::kCount));
        end = at.end();
    }
};

// All of a rank's rails but how bytes get there.
struct RailView {
    RailShape shape;
    RailLayout layout{RailShape{}};
    RailState state{};
    int32_t num_blocks = 1;  // of the kernel; each has a channel
    int32_t tokens_per_block = 0;
    bool log_has_weights = false;
    int32_t* log = nullptr;  // [num_logged][RailLog] dispatch: written, or null; combine: read
    int64_t num_logged = 0;  // at most; combine: there are
};

}  // namespace ep
