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
inline constexpr int kMaxChannels = 16;
inline constexpr int kRingChunks = 8;  // places of a ring: in flight, being read, being credited
inline constexpr int kMaxChunkTokens = 8;  // of the largest record; a signal for so many is cheap
inline constexpr int kMailboxes = 2;       // why two are enough: docs/protocol.md, "Rails"

// Where a rank stands. Ranks are numbered node by node, and all nodes have equally many.
struct NodeShape {
    int32_t num_nodes = 1, ranks_per_node = 1;

    EP_HD constexpr int node(int rank) const { return rank / ranks_per_node; }
    EP_HD constexpr int local(int rank) const { return rank % ranks_per_node; }
    EP_HD constexpr int rank(int node, int local) const { return node * ranks_per_node + local; }
};

// Sizes of the rails of a buffer; all ranks agree on them.
struct RailShape {
    NodeShape nodes;
    int32_t num_channels = 1;
    int32_t ring_chunks = 1;
    int64_t chunk_bytes = 0;  // one place of a ring
    int64_t entry_bytes = 0;  // a mailbox

    EP_HD constexpr int num_peers() const { return nodes.num_nodes - 1; }
    EP_HD constexpr int64_t ring_bytes() const { return ring_chunks * chunk_bytes; }
    EP_HD constexpr int64_t staging_bytes() const {
        return 2 * int64_t{num_peers()} * num_channels * ring_bytes();
    }
};

// What crosses when an operation begins: the entry, all counts of its source, and how many records
// each channel brings to the node it is sent to.
struct RailEntryLayout {
    Region entry, rows, selections, records;
    int64_t bytes = 0;

    EP_HD constexpr RailEntryLayout(const Shape& s, int num_channels) {
        Cursor at;
        entry = at.take(sizeof(EntryRecord));
        rows = at.take(int64_t{4} * s.num_ranks);          // int32 per rank
        selections = at.take(int64_t{4} * s.num_experts);  // int32 per expert, by position
        records = at.take(int64_t{4} * num_channels);      // int32 per channel
        bytes = at.end();
    }
};

// The symmetric segment of a rank, at the same offsets on every rank. Peers are nodes but our own.
struct RailLayout {
    Region entered, tails, heads, inbox, outbox, recv, send;
    int64_t end = 0;
    RailShape shape;

    EP_HD constexpr explicit RailLayout(const RailShape& s) : shape(s) {
        const int64_t nodes = s.nodes.num_nodes;
        const int64_t rings = int64_t{s.num_peers()} * s.num_channels;
        Cursor at;
        entered = at.take(kMailboxes * nodes * kWordStride);  // uint64 per mailbox
        tails = at.take(nodes * s.num_channels * s.ring_chunks * kWordStride);  // uint64 per place
        heads = at.take(nodes * s.num_channels * s.ring_chunks * kWordStride);
        inbox = at.take(kMailboxes * nodes * s.entry_bytes);   // RailEntryLayout per node
        outbox = at.take(kMailboxes * nodes * s.entry_bytes);  // as it leaves
        recv = at.take(rings * s.ring_bytes());                // [peer][channel][place]
        send = at.take(rings * s.ring_bytes());
        end = at.end();
    }

    static constexpr int64_t kWordStride = 64;

    // Entries that node has ever put into mailbox `seq % kMailboxes`; see entries_until.
    EP_HD constexpr int64_t entered_word(uint64_t seq, int node) const {
        return entered.offset + mailbox(seq, node) * kWordStride;
    }
    // Chunks that node has ever put into the place of the `count`-th in our ring; see chunks_until. A
    // word for each place, so that nothing depends on the order in which two puts arrive.
    EP_HD constexpr int64_t tail_word(int node, int channel, uint64_t count) const {
        return tails.offset + word(node, channel, count);
    }
    // Chunks of ours that node has ever taken out of that place of its ring; see credits_until. Several
    // warps take chunks side by side.
    EP_HD constexpr int64_t head_word(int node, int channel, uint64_t count) const {
        return heads.offset + word(node, channel, count);
    }
    EP_HD constexpr int64_t inbox_at(uint64_t seq, int node) const {
        return inbox.offset + mailbox(seq, node) * shape.entry_bytes;
    }
    EP_HD constexpr int64_t outbox_at(uint64_t seq, int node) const {
        return outbox.offset + mailbox(seq, node) * shape.entry_bytes;
    }
    // The place of the `count`-th chunk between rank `me` and the rank of `node` on its rail.
    EP_HD constexpr int64_t recv_chunk(int my_node, int node, int channel, uint64_t count) const {
        return recv.offset + place(my_node, node, channel, count);
    }
    EP_HD constexpr int64_t send_chunk(int my_node, int node, int channel, uint64_t count) const {
        return send.offset + place(my_node, node, channel, count);
    }

    constexpr std::array<NamedRegion, 7> regions() const {
        return {{{"entered", entered},
                 {"tails", tails},
                 {"heads", heads},
                 {"inbox", inbox},
                 {"outbox", outbox},
                 {"recv", recv},
                 {"send", send}}};
    }

private:
    EP_HD constexpr int64_t mailbox(uint64_t seq, int node) const {
        return static_cast<int64_t>(seq % kMailboxes) * shape.nodes.num_nodes + node;
    }
    EP_HD constexpr int64_t word(int node, int channel, uint64_t count) const {
        const int64_t ring = int64_t{node} * shape.num_channels + channel;
        return (ring * shape.ring_chunks + index(count)) * kWordStride;
    }
    EP_HD constexpr int64_t index(uint64_t count) const {
        return static_cast<int64_t>(count % static_cast<uint64_t>(shape.ring_chunks));
    }
    EP_HD constexpr int64_t place(int my_node, int node, int channel, uint64_t count) const {
        const int peer = node < my_node ? node : node - 1;  // no ring for our own node
        return (int64_t{peer} * shape.num_channels + channel) * shape.ring_bytes() +
               index(count) * shape.chunk_bytes;
    }
};

// What `entered_word` shows once the entry of operation `seq`, counted from 1, is there.
EP_HD constexpr uint64_t entries_until(uint64_t seq) {
    return seq / kMailboxes + (seq % kMailboxes != 0 ? 1 : 0);
}

// What `tail_word` shows once the `count`-th chunk of a ring, counted from 0, is there.
EP_HD constexpr uint64_t chunks_until(uint64_t count, int ring_chunks) {
    return count / static_cast<uint64_t>(ring_chunks) + 1;
}

// What `head_word` shows once the place of the `count`-th chunk is free for it.
EP_HD constexpr uint64_t credits_until(uint64_t count, int ring_chunks) {
    return count / static_cast<uint64_t>(ring_chunks);
}

// Tokens of a channel are [first, first of the next).
EP_HD constexpr int64_t first_of_channel(int64_t num_tokens, int num_channels, int channel) {
    return num_tokens * channel / num_channels;
}

// A token on a rail, the row of x behind it. All rows in it are final: who forwards computes nothing.
struct RailRecordLayout {
    Region src_token;  // int32
    Region records;    // int32 [ranks_per_node]: of its metadata at each rank, -1 = not sent there
    Region rows;       // int32 [ranks_per_node]: of x; compact: the same as records, and left out
    Region experts;    // int32 [num_topk]: see expert_at, -1 = on another node
    Region weights;    // float [num_topk]
    Region slot_rows;  // int32 [num_topk]: row of each slot (grouped, slab)
    Region scales;
    int64_t bytes = 0;  // where the row begins

    EP_HD constexpr RailRecordLayout(int ranks_per_node, int num_topk, bool with_routing,
                                     bool with_weights, bool with_rows, int64_t scale_bytes) {
        int64_t at = 0;
        const auto take = [&at](bool wanted, int64_t size) {
            const Region region{at, wanted ? size : 0};
            at += region.bytes;
            return region;
        };
        src_token = take(true, 4);
        records = take(true, int64_t{4} * ranks_per_node);
        rows = take(with_rows, int64_t{4} * ranks_per_node);
        experts = take(with_routing, int64_t{4} * num_topk);
        weights = take(with_weights, int64_t{4} * num_topk);
        slot_rows = take(with_routing && with_rows, int64_t{4} * num_topk);
        at = (at + kRowAlign - 1) / kRowAlign * kRowAlign;
        scales = take(scale_bytes > 0, scale_bytes);
        bytes = (at + kRowAlign - 1) / kRowAlign * kRowAlign;
    }
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
    // Chunks of a channel that brings `count` records.
    EP_HD constexpr int64_t chunks(int64_t count) const {
        return (count + records - 1) / records * pieces;
    }
};

// Divides the staging of a rank among its rings: kRingChunks chunks of kMaxChunkTokens of the largest
// record, where that fits; else rings of half as many, smaller chunks, rings of two, fewer channels,
// and in the end pieces of rows.
EP_HD constexpr RailShape divide_staging(const NodeShape& nodes, int num_channels,
                                         int64_t record_bytes, int64_t budget = kRailStagingBytes) {
    constexpr int64_t kAlign = Cursor::kAlign;
    RailShape s;
    s.nodes = nodes;
    s.num_channels = num_channels;
    s.ring_chunks = kRingChunks;
    if (s.num_peers() == 0) return s;
    const auto room = [&] {
        const int64_t places = 2 * int64_t{s.num_peers()} * s.num_channels * s.ring_chunks;
        return budget / places / kAlign * kAlign;
    };
    const int64_t wanted = (kMaxChunkTokens * record_bytes + kAlign - 1) / kAlign * kAlign;
    if (room() < wanted) s.ring_chunks /= 2;
    while (room() < record_bytes && s.ring_chunks > 2) s.ring_chunks /= 2;
    while (room() < record_bytes && s.num_channels > 1) s.num_channels /= 2;
    s.chunk_bytes = wanted < room() ? wanted : room();
    return s;
}

}  // namespace ep
