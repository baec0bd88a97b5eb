// Rails: regions are disjoint, every word and every chunk lies in its own place, staging keeps to its
// budget whatever the cluster.
#include "contract/direct.h"

#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include "check.h"
#include "contract/rail.h"

namespace {

constexpr int64_t kBf16 = 14336 + 112, kWide = 262144 + 4096;  // a row of 7168, one of 65536 floats

std::vector<ep::RailShape> shapes() {
    std::vector<ep::RailShape> all;
    for (int nodes : {1, 2, 3, 40, 128, 1024}) {
        for (int channels : {1, 10, ep::kMaxChannels}) {
            for (int64_t record : {int64_t{64}, kBf16, kWide}) {
                const int ranks = nodes == 1024 ? 1 : 8;
                ep::RailShape s = ep::divide_staging({nodes, ranks}, channels, record);
                const ep::Shape shape{nodes * ranks, 2, 2 * nodes * ranks, 2, 8, 4096};
                s.notice_bytes = ep::RailNoticeLayout(shape, nodes, s.num_channels).bytes();
                all.push_back(s);
            }
        }
    }
    return all;
}

// Clusters with direct mode, and without where it does not fit.
std::vector<ep::RailShape> direct_shapes() {
    std::vector<ep::RailShape> all;
    for (int nodes : {2, 4, 8}) {
        for (int tokens : {1, 128, 1024}) {
            for (int64_t hidden : {int64_t{64}, int64_t{7168}}) {
                ep::Shape shape{8 * nodes, 3, 64 * nodes, 8, 8, tokens};
                shape.stage_bytes = ep::stage_bytes_for(shape, hidden);
                ep::RailShape s = ep::divide_staging({nodes, 8}, 4, kBf16);
                s.direct = ep::direct_shape_for(shape, s.nodes, hidden);
                s.notice_bytes = ep::RailNoticeLayout(shape, nodes, s.num_channels).bytes();
                all.push_back(s);
            }
        }
    }
    return all;
}

bool holds(const ep::Region& region, int64_t offset, int64_t bytes) {
    return offset >= region.offset && offset + bytes <= region.offset + region.bytes;
}

}  // namespace

int main() {
    ep::test("regions are disjoint, aligned and inside the end", [] {
        std::vector<ep::RailShape> all = shapes();
        for (const ep::RailShape& s : direct_shapes()) all.push_back(s);
        for (const ep::RailShape& shape : all) {
            const ep::RailLayout layout(shape);
            auto regions = layout.regions();
            std::sort(regions.begin(), regions.end(), [](const auto& a, const auto& b) {
                return a.region.offset < b.region.offset;
            });
            int64_t end = 0;
            for (const ep::NamedRegion& r : regions) {
                ep::expect(r.region.offset >= end, r.name);
                ep::expect_eq(r.region.offset % ep::Cursor::kAlign, 0);
                end = r.region.offset + r.region.bytes;
            }
            ep::expect(end <= layout.end, "a region passes the end");
        }
    });

    ep::test("every word has a cache line of its own", [] {
        for (const ep::RailShape& shape : shapes()) {
            const ep::RailLayout layout(shape);
            std::set<int64_t> lines;
            int words = 0;
            for (int node = 0; node < shape.nodes.num_nodes; ++node) {
                for (uint64_t seq : {1, 2}) {
                    ep::expect(holds(layout.entered, layout.entered_word(seq, node), 8), "entered");
                    ep::expect(holds(layout.inbox, layout.inbox_at(seq, node), shape.notice_bytes),
                               "inbox");
                    ep::expect(holds(layout.outbox, layout.outbox_at(seq), shape.notice_bytes),
                               "outbox");
                    lines.insert(layout.entered_word(seq, node) / 64);
                    ++words;
                }
                for (int channel = 0; channel < shape.num_channels; ++channel) {
                    for (int place = 0; place < shape.ring_chunks(); ++place) {
                        const int64_t tail = layout.tail_word(node, channel, place);
                        const int64_t head = layout.head_word(node, channel, place);
                        ep::expect(holds(layout.tails, tail, 8), "tail");
                        ep::expect(holds(layout.heads, head, 8), "head");
                        lines.insert({tail / 64, head / 64});
                        words += 2;
                    }
                }
            }
            ep::expect_eq(int(lines.size()), words);
        }
    });

    ep::test("direct mode: words and places of a slot are its own, and bounded", [] {
        int num_direct = 0;
        for (const ep::RailShape& shape : direct_shapes()) {
            if (!shape.is_direct()) continue;
            ++num_direct;
            const ep::RailLayout layout(shape);
            const ep::DirectShape& d = shape.direct;
            ep::expect(shape.direct_bytes() <= int64_t{9} << 27, "more than a rank gives");
            std::set<int64_t> lines;
            for (int slot = 0; slot < d.num_slots; ++slot) {
                ep::expect(holds(layout.direct_recv, layout.direct_inbox(slot), d.inbox_bytes),
                           "in");
                ep::expect(holds(layout.direct_send, layout.direct_outbox(slot), d.outbox_bytes),
                           "out");
                ep::expect(holds(layout.notes_send, layout.own_notes(slot), d.note_bytes), "own");
                for (int node = 0; node < shape.nodes.num_nodes; ++node) {
                    const int64_t notes = layout.notes_of(slot, node);
                    ep::expect(holds(layout.notes_recv, notes, d.note_bytes), "notes");
                }
                for (int rank = 0; rank < d.num_ranks; ++rank) {
                    const auto seq = static_cast<uint64_t>(slot);
                    ep::expect(holds(layout.inbox, layout.inbox_at(seq, rank), shape.notice_bytes),
                               "inbox");
                    lines.insert(layout.entered_word(seq, rank) / 64);
                    lines.insert(layout.released_word(slot, rank) / 64);
                    lines.insert(layout.came_word(slot, rank) / 64);
                }
            }
            ep::expect_eq(int(lines.size()), 3 * d.num_slots * d.num_ranks);
        }
        // All but those with 512 experts on 64 ranks, and with 1024 tokens of 7168.
        ep::expect_eq(num_direct, 10);
    });

    ep::test("notices go to the rail, with direct mode to every rank of another node", [] {
        for (const bool is_direct : {false, true}) {
            ep::RailShape s;
            s.nodes = {3, 2};
            if (is_direct) s.direct = {2, 6, 0, 0, 0};
            for (int me = 0; me < 6; ++me) {
                std::set<int> others;
                for (int i = 0; i < s.num_correspondents(); ++i) {
                    const int p = s.correspondent(me, i);
                    ep::expect(s.nodes.node(p) != s.nodes.node(me), "of our own node");
                    ep::expect(is_direct || s.nodes.local(p) == s.nodes.local(me), "another rail");
                    others.insert(p);
                }
                ep::expect_eq(int(others.size()), is_direct ? 4 : 2);
            }
        }
    });

    ep::test("chunks of different peers, channels and places are disjoint", [] {
        const ep::RailShape shape = ep::divide_staging({4, 2}, 3, kBf16);
        const ep::RailLayout layout(shape);
        for (int me = 0; me < 4; ++me) {
            std::set<int64_t> starts;
            for (int node = 0; node < 4; ++node) {
                for (int channel = 0; node != me && channel < 3; ++channel) {
                    for (int place = 0; place < shape.ring_chunks(); ++place) {
                        const int64_t recv = layout.recv_chunk(me, node, channel, place);
                        ep::expect(holds(layout.recv, recv, shape.chunk_bytes), "recv");
                        ep::expect_eq(
                            recv - layout.recv.offset,
                            layout.send_chunk(me, node, channel, place) - layout.send.offset);
                        ep::expect_eq((recv - layout.recv.offset) % shape.chunk_bytes, 0);
                        starts.insert(recv);
                    }
                    ep::expect_eq(layout.recv_chunk(me, node, channel, shape.ring_chunks()),
                                  layout.recv_chunk(me, node, channel, 0));
                }
            }
            ep::expect_eq(int(starts.size()), 3 * 3 * shape.ring_chunks());
        }
    });

    ep::test("staging keeps to its budget, whatever nodes, channels and rows", [] {
        for (const ep::RailShape& shape : shapes()) {
            ep::expect(shape.staging_bytes() <= ep::kRailStagingBytes, "over the budget");
            if (shape.num_peers() == 0) continue;
            ep::expect(shape.num_channels >= 1 && shape.ring_chunks() >= 2, "no ring");
            for (int64_t row : {int64_t{16}, int64_t{7168}, kBf16, kWide}) {
                const ep::RailChunks chunks(shape.chunk_bytes, 112, row);
                const int64_t used = chunks.pieces == 1 ? chunks.records * chunks.record_bytes()
                                                        : 112 + chunks.piece_bytes;
                ep::expect(used <= shape.chunk_bytes, "more than a chunk holds");
                ep::expect(chunks.pieces * chunks.piece_bytes >= row, "a row is cut short");
                ep::expect((chunks.pieces - 1) * chunks.piece_bytes < row, "an empty piece");
                ep::expect_eq(chunks.piece_bytes % ep::kRowAlign, 0);
            }
        }
    });

    ep::test("few nodes have eight tokens to a chunk, many have fewer", [] {
        const auto tokens = [](int nodes, int64_t row) {
            const ep::RailShape s = ep::divide_staging({nodes, 8}, 10, row + 112);
            return ep::RailChunks(s.chunk_bytes, 112, row).records;
        };
        ep::expect_eq(tokens(2, 14336), 8);
        ep::expect_eq(tokens(4, 14336), 8);
        ep::expect_eq(tokens(40, 14336), 2);
        ep::expect_eq(tokens(40, 7168 + 224), 5);
        const ep::RailShape many = ep::divide_staging({1024, 1}, 10, 14336 + 112);
        ep::expect_eq(many.num_channels, 2);
        ep::expect_eq(many.ring_chunks(), 2);
    });

    ep::test("a channel that brings nothing needs no chunk", [] {
        const ep::RailChunks chunks(1000, 100, 200);
        ep::expect_eq(chunks.records, 3);
        ep::expect_eq(chunks.chunks(0), 0);
        ep::expect_eq(chunks.chunks(3), 1);
        ep::expect_eq(chunks.chunks(4), 2);
        const ep::RailChunks cut(1000, 100, 2000);
        ep::expect_eq(cut.pieces, 3);
        ep::expect_eq(cut.chunks(2), 6);
    });

    ep::test("words of a place count the chunks put there, and taken before the next", [] {
        const ep::RailLayout layout(ep::divide_staging({2, 1}, 1, kBf16));
        const int ring = layout.shape.ring_chunks();
        std::map<int64_t, uint64_t> put, taken;
        for (uint64_t count = 0; count < 30; ++count) {
            ep::expect_eq(taken[layout.head_word(0, 0, count)],
                          ep::credits_until(layout.shape, count));
            ++put[layout.tail_word(0, 0, count)];
            ep::expect_eq(put[layout.tail_word(0, 0, count)],
                          ep::chunks_until(layout.shape, count));
            ++taken[layout.head_word(0, 0, count)];
        }
        ep::expect_eq(int(put.size()), ring);
    });

    ep::test("mailbox words count the operations that used the mailbox", [] {
        uint64_t put[ep::kMailboxes] = {};
        for (uint64_t seq = 1; seq <= 9; ++seq) {
            ep::expect_eq(++put[seq % ep::kMailboxes], ep::notices_until(ep::RailShape{}, seq));
        }
        // With direct mode a mailbox, like all else, is of a slot: it was left once for each notice in it.
        ep::RailShape direct;
        direct.direct.num_slots = 3;
        uint64_t ever[3] = {};
        for (uint64_t seq = 1; seq <= 9; ++seq) {
            ep::expect_eq(ever[seq % 3], ep::releases_until(direct, seq));
            ep::expect_eq(++ever[seq % 3], ep::notices_until(direct, seq));
        }
    });

    ep::test("a head holds what was asked for, and its row is aligned", [] {
        const ep::RailHeadLayout compact(8, true, false, 224);
        ep::expect_eq(compact.records.bytes, 0);
        ep::expect_eq(compact.weights.offset, 72);
        ep::expect_eq(compact.scales.offset, 112);
        ep::expect_eq(compact.bytes, 336);
        ep::expect_eq(ep::RailHeadLayout(8, true, true, 0).bytes, 144);
        ep::expect_eq(ep::RailHeadLayout(8, false, false, 0).bytes, 80);
        ep::expect_eq(ep::sum_head_bytes(6, true), 32);
        ep::expect_eq(ep::sum_head_bytes(6, false), 0);
    });

    ep::test("a log keeps three numbers for each slot, or two", [] {
        const ep::RailLog log{3, true};
        ep::expect_eq(log.words(), 9);
        ep::expect_eq(log.weight(2), 8);
        ep::expect_eq(ep::RailLog{3, false}.words(), 6);
    });

    ep::test("the expert of a slot comes back", [] {
        const int32_t place = ep::expert_at(1023, (1 << 20) - 1);
        ep::expect(place >= 0, "looks like none");
        ep::expect_eq(ep::rank_of_expert(place), 1023);
        ep::expect_eq(ep::id_of_expert(place), (1 << 20) - 1);
    });
    return ep::finish();
}
