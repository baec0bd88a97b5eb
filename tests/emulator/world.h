// Several ranks in one process on the emulator, and what plain loops say that has to come out.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../cpp/check.h"
#include "contract/calls.h"
#include "contract/direct.h"
#include "device/ptx.cuh"
#include "host/device_rank.h"
#include "host/loopback_rails.h"

namespace world {

using namespace ep;

constexpr std::byte kPoison{0xe7};
constexpr std::chrono::milliseconds kLate{1000};  // more than it takes to enter, on a busy machine
constexpr double kRunsOut = 6;  // limit_s where it runs out: longer than a busy machine pauses

struct Case {
    int ranks = 2, experts = 6, topk = 3, hidden = 24;
    std::vector<int> tokens = {9, 4};
    RecvLayout layout = RecvLayout::kCompact;
    int alignment = 1, num_sms = 2, scale_words = 0;
    int max_blocks = 16;  // fewer than a GPU has SMs: it is shared
    int64_t capacity = -1;
    bool is_static = false, weights = true, wide = true, row_index = false, origins = false;
    bool by_copies = false, one_expert = false, replicas = false;
    bool staged = false, halves = false;  // as small batches go
    bool masks = false;                   // go on without ranks that are lost
    bool stats = false;                   // and the last rank comes late to every call
    Quantize quantize = Quantize::kNone;
    unsigned seed = 1;
    bool weighted = false, sum_weights = false, per_rank = false, topk_order = false;  // of combine
    double limit_s = 60;
    int64_t arena_bytes = 8 << 20;

    // Of a cluster.
    int nodes = 1, channels = 2, ring_shift = 1, chunk_tokens = 2, num_warps = 0;
    int64_t chunk_bytes = 0;       // 0: for so many tokens
    std::vector<Trouble> trouble;  // of ranks, in turns

    int per_node() const { return ranks / nodes; }
};

// One rank's inputs, outputs, and streams.
struct Rank {
    std::vector<uint16_t> x;
    std::vector<int64_t> ids;
    std::vector<float> weights;
    std::vector<uint32_t> scales;
    std::vector<int32_t> send_row, counts, offsets, rank_ends, numbers;
    std::vector<int64_t> rank_counts, source_range;
    std::vector<int64_t> logical, routed, load;  // with replicas: what `ids` follows from
    std::vector<int32_t> recv_stats;
    std::vector<int64_t> wait_stats;
    Begun begun[2];  // of the dispatch, and of the combine
    std::unique_ptr<DeviceRank> device;
    std::shared_ptr<DeviceArena> arena;
    cudaStream_t stream = nullptr;
    std::shared_ptr<Flight> flight;
    DispatchArgs args;
    std::shared_ptr<LoopbackRails> rails;  // of a cluster
    std::shared_ptr<StreamHold> rail_log;  // of the last dispatch that made one
    int64_t num_logged = 0;
};

// Each logical expert has two replicas: the physical ones at 2 e and 2 e + 1.
struct TwoReplicas {
    std::vector<int32_t> first{0}, slot;
    std::vector<uint32_t> until;

    explicit TwoReplicas(int num_logical) {
        for (int e = 0; e < num_logical; ++e) {
            slot.insert(slot.end(), {2 * e, 2 * e + 1});
            until.insert(until.end(), {0x60000000u, 0xffffffffu});
            first.push_back(2 * e + 2);
        }
    }
    Replicas tables() const {
        return {first.data(), slot.data(), until.data(), static_cast<int32_t>(first.size()) - 1};
    }
};

struct World {
    Case c;
    TwoReplicas replicas;
    std::vector<int32_t> owner;
    std::vector<Rank> ranks;
    std::vector<DevicePeer> peers;
    std::vector<bool> gone;  // ranks that make no calls, and whom nobody waits for
    std::chrono::steady_clock::time_point began;  // the first of the ranks
    Shape shape;
    RailShape rail;                                       // of a cluster
    std::vector<std::shared_ptr<DeviceMemory>> segments;  // of its ranks

    explicit World(const Case& given)
        : c(given), replicas(given.experts / 2), ranks(given.ranks), gone(given.ranks) {
        std::mt19937 random(c.seed);
        for (int e = 0; e < c.experts; ++e) owner.push_back(e * c.ranks / c.experts);
        shape.num_ranks = c.ranks;
        shape.num_experts = c.experts;
        shape.num_topk = c.topk;
        shape.max_tokens = std::max(1, *std::max_element(c.tokens.begin(), c.tokens.end()));
        for (int r = 0; r < c.ranks; ++r) {
            shape.max_local_experts =
                std::max<int>(shape.max_local_experts, std::count(owner.begin(), owner.end(), r));
        }
        if (c.staged) shape.stage_bytes = stage_bytes_for(shape, c.hidden);
        for (int r = 0; r < c.ranks; ++r)
            make_inputs(ranks[r], c.tokens[r % c.tokens.size()], random);
        for (int r = 0; r < c.ranks; ++r) {
            peers.push_back({DeviceMemory::create(0, ControlLayout(shape).end),
                             DeviceMemory::create(0, c.arena_bytes),
                             {-1, -1, 0}});
            std::fill_n(peers[r].arena->data(), c.arena_bytes, kPoison);
        }
        if (c.nodes > 1) make_rails();
        for (int r = 0; r < c.ranks; ++r) {
            ranks[r].arena = std::make_shared<DeviceArena>(peers[r].arena);
            std::vector<DevicePeer> seen = peers;
            for (int p = 0; p < c.ranks; ++p) {
                if (node(p) != node(r)) seen[p] = {nullptr, nullptr, {-1, -1, 0}, c.arena_bytes};
            }
            RailSetup setup;
            if (c.nodes > 1) setup = ranks[r].rails->setup();
            ranks[r].device = std::make_unique<DeviceRank>(
                shape, r, 1, owner, seen, ranks[r].arena, PeerClocks{5, c.limit_s, c.limit_s},
                c.max_blocks, [](OpKind, int, double) {}, c.nodes > 1 ? &setup : nullptr, c.masks);
            cudaStreamCreateWithFlags(&ranks[r].stream, cudaStreamNonBlocking);
        }
    }
    ~World() {
        for (Rank& r : ranks) r.flight.reset();
        cudaDeviceSynchronize();
        for (Rank& r : ranks) r.device.reset();
        for (Rank& r : ranks) cudaStreamDestroy(r.stream);
    }

    int node(int rank) const { return rank / c.per_node(); }

    // Nodes that are pretended: all rails in one process.
    void make_rails() {
        rail = {{c.nodes, c.per_node()}, c.channels, c.ring_shift, c.chunk_bytes, 0};
        if (rail.chunk_bytes == 0) {
            const RailHeadLayout head(c.topk, c.weights, true, 4 * c.scale_words + c.hidden);
            rail.chunk_bytes = c.chunk_tokens * (head.bytes + 2 * c.hidden);
        }
        rail.chunk_bytes = (rail.chunk_bytes + 127) / 128 * 128;
        rail.notice_bytes = RailNoticeLayout(shape, c.nodes, c.channels).bytes();
        rail.direct = direct_shape_for(shape, rail.nodes, c.hidden);
        for (int r = 0; r < c.ranks; ++r) {
            segments.push_back(DeviceMemory::create(0, RailLayout(rail).end));
        }
        for (int r = 0; r < c.ranks; ++r) {
            ranks[r].rails = LoopbackRails::create(rail, r, segments, 16);
            if (!c.trouble.empty()) {
                ranks[r].rails->set_trouble(c.trouble[r % c.trouble.size()]);
            }
        }
    }

    void make_inputs(Rank& r, int tokens, std::mt19937& random) {
        const auto choose = [&] {
            return c.one_expert ? c.experts - 1 : static_cast<int>(random() % (c.experts + 1)) - 1;
        };
        for (int i = 0; i < tokens * c.topk; ++i) {
            r.ids.push_back(choose());
            r.weights.push_back(static_cast<float>(random() % 1000) / 128.0f);
        }
        if (c.replicas) replicate(r);
        for (int i = 0; i < tokens * c.hidden; ++i) {
            r.x.push_back(static_cast<uint16_t>(0x3c00 + random() % 0x700));
        }
        for (int i = 0; i < tokens * c.scale_words; ++i) r.scales.push_back(random());
    }

    // Ids drawn so far name logical experts; afterwards the physical ones that come of them.
    void replicate(Rank& r) const {
        const int source = static_cast<int>(&r - ranks.data());
        const int num_logical = replicas.tables().num_logical;
        for (int64_t& id : r.ids) id = id < 0 ? id : id % num_logical;
        r.logical = r.ids;
        for (size_t i = 0; i < r.ids.size(); ++i) {
            if (r.ids[i] < 0) continue;
            const auto spread = spread_of(static_cast<int64_t>(i) / c.topk, source);
            r.ids[i] = choose_replica(replicas.tables(), r.ids[i], spread);
        }
        r.load.assign(num_logical, 0);
    }

    int tokens(int r) const { return c.tokens[r % c.tokens.size()]; }
    int num_local(int r) const { return std::count(owner.begin(), owner.end(), r); }
    int first(int r) const { return std::find(owner.begin(), owner.end(), r) - owner.begin(); }

    DispatchArgs args_of(int i) {
        Rank& r = ranks[i];
        r.send_row.resize(tokens(i) * c.topk, -7);
        r.rank_counts.resize(2 * c.ranks, -7);
        r.counts.resize(num_local(i), -7);
        DispatchArgs a;
        a.x = reinterpret_cast<std::byte*>(r.x.data());
        a.topk_idx = r.ids.data();
        a.send_row = r.send_row.data();
        a.rank_counts = r.rank_counts.data();
        a.expert_counts = r.counts.data();
        a.num_tokens = tokens(i);
        a.hidden = c.hidden;
        a.x_stride = 2 * c.hidden;
        a.num_topk = c.topk;
        a.alignment = c.alignment;
        a.layout = c.layout;
        a.capacity = a.given_capacity = c.capacity;
        a.is_static = c.is_static;
        if (c.is_static && c.layout != RecvLayout::kSlab && c.capacity < 0) {
            const int64_t worst = int64_t{c.ranks} * shape.max_tokens;
            a.capacity = worst;
            if (c.layout == RecvLayout::kGrouped) {
                a.capacity =
                    worst * std::min(c.topk, num_local(i)) + num_local(i) * (c.alignment - 1);
            }
        }
        if (c.is_static && c.row_index) {
            a.index_capacity = int64_t{c.ranks} * shape.max_tokens * c.topk + 100;
        }
        if (c.weights) a.topk_weights = r.weights.data(), a.with_weights = true;
        if (c.replicas) {
            r.routed.assign(r.ids.size(), -7);
            a.topk_idx = r.logical.data();
            a.replicas = replicas.tables();
            a.routed_idx = r.routed.data();
            a.logical_load = r.load.data();
        }
        if (c.scale_words > 0) {
            a.scales = reinterpret_cast<std::byte*>(r.scales.data());
            a.scale_bytes = 4 * c.scale_words;
        }
        if (c.quantize != Quantize::kNone) {
            a.quantize = c.quantize;
            a.scale_block = 32;
            a.scale_bytes = 4 * (c.hidden / 32);
        }
        if (c.origins && c.layout == RecvLayout::kCompact) {
            r.rank_ends.assign(c.ranks * c.ranks, -7);
            a.rank_ends = r.rank_ends.data();
        }
        if (c.stats) a.recv_stats = r.recv_stats.data(), a.wait_stats = r.wait_stats.data();
        return a;
    }

    void queue(int i, const DispatchArgs& a, bool reports) {
        Rank& r = ranks[i];
        DispatchWants w;
        r.numbers.assign(2, -7);
        w.status = &r.numbers[0];
        w.num_recv = &r.numbers[1];
        w.num_sms = c.num_sms;
        w.num_warps = c.num_warps;
        w.wide_ids = c.wide;
        w.reports = reports;
        w.by_copies = c.by_copies;
        w.begun = &r.begun[0];
        w.in_halves = c.halves;
        w.row_index = c.row_index;
        if (c.row_index || c.layout == RecvLayout::kGrouped) {
            r.offsets.assign(num_local(i) + 1, -7);
            w.offsets = r.offsets.data();
        }
        if (c.origins) w.row_token = true;
        if (c.origins && c.layout != RecvLayout::kCompact) {
            r.source_range.assign(num_local(i) * c.ranks, -7);
            w.source_range = r.source_range.data();
        }
        if (a.cached) {
            w.max_recv = r.flight->report.num_recv;
            w.max_rows = r.flight->report.num_rows;
            w.recv_row = r.flight->job.out.recv_row;
        }
        r.args = a;
        r.flight = r.device->dispatch(a, w, r.stream);
    }

    // A rank is about to be called: the last one late.
    void come(int i) {
        ranks[i].recv_stats.assign(num_local(i), 100);
        ranks[i].wait_stats.assign(c.ranks, 100);
        if (i == 0) began = std::chrono::steady_clock::now();
        if (i == c.ranks - 1) std::this_thread::sleep_for(kLate);
    }

    // Everybody waited for the last rank, and for others no longer than all took but for that.
    void check_waits() const {
        const int last = c.ranks - 1;
        const auto late = std::chrono::nanoseconds(kLate).count();
        const auto took =
            std::chrono::nanoseconds(std::chrono::steady_clock::now() - began - kLate).count();
        for (int r = 0; r < last; ++r) {
            const std::vector<int64_t>& waited = ranks[r].wait_stats;
            expect(waited[r] >= 100, "of itself");
            if (c.halves) continue;  // all have begun before anybody waits
            expect(waited[last] - 100 >= late / 2, "waited");
            for (int p = 0; p < last; ++p) {
                expect(waited[p] >= 100 && waited[p] - 100 <= took + late / 2, "blamed");
            }
        }
    }

    void finish(bool reports) {
        for (int i : left()) ranks[i].device->finish(*ranks[i].flight, ranks[i].stream);
        for (int i : left()) {
            Rank& r = ranks[i];
            if (reports) {
                while (!r.device->await_report(*r.flight, std::chrono::milliseconds(100))) {
                }
                if (!r.flight->report.outcome.ok()) continue;
                if (c.by_copies) r.device->push_copies(*r.flight);
            }
            r.device->settle(*r.flight);
        }
        for (int i : left()) {
            Rank& r = ranks[i];
            cudaStreamSynchronize(r.stream);
            if (!(*r.flight)[Out::kRailLog]) continue;
            r.rail_log = (*r.flight)[Out::kRailLog].hold;
            r.num_logged =
                reports ? r.flight->report.num_logged : (c.nodes - 1) * int64_t{shape.max_tokens};
        }
    }

    std::vector<int> left() const {
        std::vector<int> all;
        for (int i = 0; i < c.ranks; ++i) {
            if (!gone[i]) all.push_back(i);
        }
        return all;
    }

    void dispatch() {
        for (int i : left()) {
            if (c.stats) come(i);
            queue(i, args_of(i), !c.is_static);
        }
        finish(!c.is_static);
    }
};

// What has to come out, by loops.
struct Expected {
    std::vector<std::vector<int>> send_row;              // [rank][token * topk + k]
    std::vector<std::vector<std::pair<int, int>>> recv;  // [rank] source, token
    std::vector<std::vector<int>> recv_row;              // [rank][i * topk + k]
    std::vector<std::vector<int>> counts, starts;        // [rank][local expert]
    std::vector<int> num_rows;
};

inline Expected expect_of(const World& w) {
    const Case& c = w.c;
    Expected e;
    e.send_row.resize(c.ranks);
    e.recv.resize(c.ranks);
    e.recv_row.resize(c.ranks);
    for (int r = 0; r < c.ranks; ++r) e.send_row[r].assign(w.tokens(r) * c.topk, -1);
    for (int d = 0; d < c.ranks; ++d) {
        std::vector<int> count(w.num_local(d), 0), next(w.num_local(d) + 1, 0);
        for (int s = 0; s < c.ranks; ++s) {
            if (w.gone[s]) continue;
            for (const int64_t id : w.ranks[s].ids) {
                if (id >= 0 && w.owner[id] == d) ++count[id - w.first(d)];
            }
        }
        for (int l = 0; l < w.num_local(d); ++l) {
            const int size = c.layout == RecvLayout::kSlab
                                 ? int(c.capacity)
                                 : (count[l] + c.alignment - 1) / c.alignment * c.alignment;
            next[l + 1] = next[l] + size;
        }
        e.counts.push_back(count);
        e.starts.push_back(next);
        for (int s = 0; s < c.ranks; ++s) {
            for (int t = 0; !w.gone[s] && !w.gone[d] && t < w.tokens(s); ++t) {
                std::vector<int> rows(c.topk, -1);
                bool here = false;
                for (int k = 0; k < c.topk; ++k) {
                    const int64_t id = w.ranks[s].ids[t * c.topk + k];
                    if (id < 0 || w.owner[id] != d) continue;
                    here = true;
                    rows[k] = c.layout == RecvLayout::kCompact ? int(e.recv[d].size())
                                                               : next[id - w.first(d)]++;
                    e.send_row[s][t * c.topk + k] = rows[k];
                }
                if (!here) continue;
                e.recv[d].push_back({s, t});
                e.recv_row[d].insert(e.recv_row[d].end(), rows.begin(), rows.end());
            }
        }
        e.num_rows.push_back(c.layout == RecvLayout::kCompact ? int(e.recv[d].size())
                                                              : e.starts[d].back());
    }
    return e;
}

inline float to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
inline uint16_t to_bf16(float v) {
    const auto u = std::bit_cast<uint32_t>(v);
    return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// A token as it travels.
struct Wire {
    std::vector<uint8_t> row;
    std::vector<uint32_t> scales;
};
inline Wire wire_of(const World& w, int s, int t) {
    const Case& c = w.c;
    const uint16_t* x = w.ranks[s].x.data() + int64_t{t} * c.hidden;
    Wire wire;
    if (c.quantize == Quantize::kNone) {
        const auto* bytes = reinterpret_cast<const uint8_t*>(x);
        wire.row.assign(bytes, bytes + 2 * c.hidden);
        const uint32_t* scales = w.ranks[s].scales.data() + int64_t{t} * c.scale_words;
        wire.scales.assign(scales, scales + c.scale_words);
        return wire;
    }
    for (int block = 0; block < c.hidden / 32; ++block) {  // ep_comm/reference/fp8.py, of "fp8"
        float amax = 1e-4f;
        for (int i = 0; i < 32; ++i) {
            amax = std::max(amax, std::fabs(to_float(x[32 * block + i])));
        }
        for (int i = 0; i < 32; ++i) {
            const float value = to_float(x[32 * block + i]) * (448.0f / amax);
            wire.row.push_back(static_cast<uint8_t>(emulator::e4m3x2(0.0f, value) & 0xff));
        }
        wire.scales.push_back(std::bit_cast<uint32_t>(amax / 448.0f));
    }
    return wire;
}

inline int64_t id_at(const World& w, const void* ids, int64_t i) {
    return w.c.wide ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
}

inline void check_rank(const World& w, const Expected& e, int d, bool cached) {
    const Case& c = w.c;
    const Rank& r = w.ranks[d];
    const UnpackArgs& out = r.flight->job.out;
    const bool compact = c.layout == RecvLayout::kCompact;
    const auto num_recv = static_cast<int>(e.recv[d].size());
    if (!c.is_static) {
        expect_eq(r.flight->report.num_recv, int64_t{num_recv});
        expect_eq(r.flight->report.num_rows, int64_t{e.num_rows[d]});
    }
    expect_eq(r.numbers[0], 0);
    expect_eq(r.numbers[1], num_recv);
    expect(r.send_row == e.send_row[d], "send_row");
    expect(r.counts == e.counts[d], "expert counts");
    for (int p = 0; p < c.ranks; ++p) {
        const auto from = std::count_if(e.recv[d].begin(), e.recv[d].end(),
                                        [p](const auto& s) { return s.first == p; });
        expect_eq(r.rank_counts[c.ranks + p], int64_t{from});
    }
    std::vector<std::byte> given(out.max_rows, std::byte{0});
    const auto* x = reinterpret_cast<const uint8_t*>((*r.flight)[Out::kX].data());
    const int64_t row_bytes = r.args.row_bytes();
    for (int i = 0; i < num_recv; ++i) {
        const auto [s, t] = e.recv[d][i];
        const Wire wire = wire_of(w, s, t);
        if (!cached) {
            expect_eq(out.recv_src[2 * i], s);
            expect_eq(out.recv_src[2 * i + 1], t);
        }
        for (int k = 0; k < c.topk; ++k) {
            const int row = e.recv_row[d][i * c.topk + k];
            const int64_t id = w.ranks[s].ids[t * c.topk + k];
            const int64_t local = row >= 0 ? id - w.first(d) : -1;
            const float weight = row >= 0 ? w.ranks[s].weights[t * c.topk + k] : 0.0f;
            const int64_t at = compact ? i * c.topk + k : row;
            if (!compact && !cached) expect_eq(out.recv_row[i * c.topk + k], row);
            if (at < 0) continue;
            if (!cached) expect_eq(id_at(w, out.topk_idx, at), local);
            if (c.weights) expect_eq(out.topk_weights[at], weight);
            if (row < 0) continue;
            given[row] = std::byte{1};
            expect(std::equal(wire.row.begin(), wire.row.end(), x + row * row_bytes), "row of x");
            const auto words = static_cast<int>(wire.scales.size());
            for (int j = 0; j < words; ++j) {
                const int64_t cap4 = (c.capacity + 3) / 4 * 4;
                const int64_t word = c.layout == RecvLayout::kSlab
                                         ? (row / c.capacity * words + j) * cap4 + row % c.capacity
                                         : int64_t{row} * words + j;
                expect_eq(reinterpret_cast<const uint32_t*>(out.scales)[word], wire.scales[j]);
            }
            if (c.origins) expect_eq(out.row_token[row], t);
        }
    }
    // Rows nobody was given.
    const int64_t rows =
        c.is_static || c.layout == RecvLayout::kSlab ? out.max_rows : e.num_rows[d];
    for (int64_t row = 0; row < rows; ++row) {
        if (given[row] == std::byte{1}) continue;
        for (int k = 0; k < (compact ? c.topk : 1); ++k) {
            if (!cached)
                expect_eq(id_at(w, out.topk_idx, row * (compact ? c.topk : 1) + k), int64_t{-1});
            if (c.weights) expect_eq(out.topk_weights[row * (compact ? c.topk : 1) + k], 0.0f);
        }
        if (c.origins) expect_eq(out.row_token[row], -1);
        if (c.layout == RecvLayout::kGrouped && row < e.num_rows[d]) {
            for (int64_t b = 0; b < row_bytes; ++b) expect_eq(x[row * row_bytes + b], uint8_t{0});
        }
    }
    for (int64_t i = num_recv; c.is_static && !cached && i < out.max_recv; ++i) {
        expect_eq(out.recv_src[2 * i], -1);
    }
    if (c.layout == RecvLayout::kGrouped) expect(r.offsets == e.starts[d], "offsets");
    if (c.row_index) {
        std::vector<int> index;
        for (int l = 0; l < w.num_local(d); ++l) {
            for (int i = 0; i < num_recv; ++i) {
                for (int k = 0; k < c.topk; ++k) {
                    const auto [s, t] = e.recv[d][i];
                    if (w.ranks[s].ids[t * c.topk + k] == w.first(d) + l) index.push_back(i);
                }
            }
            while (index.size() % c.alignment != 0) index.push_back(-1);
        }
        if (!c.is_static) expect_eq(r.flight->report.index_rows, int64_t(index.size()));
        for (size_t i = 0; i < index.size(); ++i) expect_eq(out.row_index[i], index[i]);
    }
    if (!r.rank_ends.empty()) {
        for (int dst = 0; dst < c.ranks; ++dst) {
            expect_eq(r.rank_ends[(c.ranks - 1) * c.ranks + dst], int32_t(e.recv[dst].size()));
        }
    }
}

// What comes home of a token.
struct Sum {
    std::vector<float> row, weights;

    explicit Sum(const Case& c) : row(c.hidden, 0.0f), weights(c.topk, 0.0f) {}

    // Part of it: what one rank, or one node, has added up and rounded.
    void add(const Sum& part) {
        for (size_t h = 0; h < row.size(); ++h) row[h] += to_float(to_bf16(part.row[h]));
        for (size_t k = 0; k < weights.size(); ++k) weights[k] += part.weights[k];
    }
};

// What the ranks of a token hold of it.
struct Holders {
    const World& w;
    const Expected& e;
    const std::vector<std::vector<uint16_t>>& y;
    const std::vector<std::vector<float>>& back;

    bool holds(int d, int s, int t, int k) const {
        const int64_t id = w.ranks[s].ids[t * w.c.topk + k];
        return id >= 0 && w.owner[id] == d && !w.gone[d];
    }
    // The row of slot k.
    void add_row(Sum& sum, int d, int s, int t, int k) const {
        const Case& c = w.c;
        const int64_t row = e.send_row[s][t * c.topk + k];
        for (int j = 0; c.sum_weights && j < c.topk; ++j) {
            sum.weights[j] += back[d][row * c.topk + j];
        }
        for (int h = 0; h < c.hidden; ++h) {
            const float value = to_float(y[d][row * c.hidden + h]);
            sum.row[h] += c.weighted ? w.ranks[s].weights[t * c.topk + k] * value : value;
        }
    }
    // All of rank d; false: it holds none.
    bool add_rank(Sum& sum, int d, int s, int t) const {
        const bool compact = w.c.layout == RecvLayout::kCompact;
        bool any = false;
        for (int k = 0; k < w.c.topk; ++k) {
            if (!holds(d, s, t, k) || (compact && any)) continue;
            add_row(sum, d, s, t, k);
            any = true;
        }
        return any;
    }
    // Weights that are not summed: each from the rank of its slot.
    void take_weights(Sum& sum, int s, int t) const {
        const Case& c = w.c;
        for (int k = 0; k < c.topk; ++k) {
            const int64_t id = w.ranks[s].ids[t * c.topk + k], row = e.send_row[s][t * c.topk + k];
            if (id < 0 || w.gone[w.owner[id]]) continue;
            sum.weights[k] =
                back[w.owner[id]][c.layout == RecvLayout::kCompact ? row * c.topk + k : row];
        }
    }
};

// What token t of rank s is the sum of, in the documented order: by slots; or by ranks, those of another node
// first among themselves and rounded.
inline Sum add_up(const Holders& all, int s, int t) {
    const World& w = all.w;
    const Case& c = w.c;
    Sum sum(c);
    for (int k = 0; c.topk_order && k < c.topk; ++k) {
        for (int d = 0; d < c.ranks; ++d) {
            if (all.holds(d, s, t, k)) all.add_row(sum, d, s, t, k);
        }
    }
    for (int node = 0; !c.topk_order && node < c.nodes; ++node) {
        const bool own = node == w.node(s);
        Sum of_node(c);
        bool visited = false;
        for (int d = node * c.per_node(); d < (node + 1) * c.per_node(); ++d) {
            Sum of_rank(c);
            Sum& to = own ? sum : of_node;
            const bool any = all.add_rank(c.per_rank ? of_rank : to, d, s, t);
            if (any && c.per_rank) to.add(of_rank);
            visited = visited || any;
        }
        if (!own && visited) sum.add(of_node);
    }
    if (!c.sum_weights) all.take_weights(sum, s, t);
    return sum;
}

// Sends every received row back; from the arena or from ordinary memory. `between`: once first halves are
// over, or all of them is queued.
template <class Between>
inline void check_combine(World& w, const Expected& e, bool in_arena, Between between) {
    const Case& c = w.c;
    const bool compact = c.layout == RecvLayout::kCompact;
    std::vector<std::vector<uint16_t>> y(c.ranks), out(c.ranks);
    std::vector<std::vector<float>> back(c.ranks), home(c.ranks);
    std::vector<std::shared_ptr<StreamHold>> holds;
    std::vector<std::shared_ptr<BegunCombine>> begun(c.ranks);
    for (int d : w.left()) {
        Rank& r = w.ranks[d];
        const int64_t rows = r.flight->job.out.max_rows;
        const int64_t used = c.is_static || c.layout == RecvLayout::kSlab ? rows : e.num_rows[d];
        y[d].assign(used * c.hidden, 0);
        for (size_t i = 0; i < y[d].size(); ++i) y[d][i] = uint16_t(0x3f00 + (i * 37 + d) % 0x180);
        back[d].resize(used * (compact ? c.topk : 1));
        std::iota(back[d].begin(), back[d].end(), 1000.0f * d);
        out[d].assign(w.tokens(d) * c.hidden, 7);
        home[d].assign(w.tokens(d) * c.topk, -1.0f);
        CombineArgs a;
        a.x = reinterpret_cast<std::byte*>(y[d].data());
        if (in_arena && used > 0) {
            holds.push_back(r.arena->grant(2 * used * c.hidden, r.stream));
            std::copy(y[d].begin(), y[d].end(), reinterpret_cast<uint16_t*>(holds.back()->data()));
            a.x = holds.back()->data();
            a.arena_offset = holds.back()->extent().offset;
        }
        if (!c.staged && !c.per_rank) {
            a.y_weights = back[d].data();
            a.out_weights = home[d].data();
            a.with_weights = true;
        }
        a.topk_idx = r.ids.data();
        a.send_row = r.send_row.data();
        a.rank_counts = r.rank_counts.data();
        a.recv_src = r.flight->job.out.recv_src;
        a.recv_row = r.flight->job.out.recv_row;
        a.out = reinterpret_cast<std::byte*>(out[d].data());
        a.num_tokens = w.tokens(d);
        a.num_recv = c.is_static || c.masks ? r.flight->job.out.max_recv : e.recv[d].size();
        a.num_rows = used;
        a.hidden = c.hidden;
        a.num_topk = c.topk;
        a.layout = c.layout;
        a.weighted = c.weighted;
        a.per_rank = c.per_rank;
        a.topk_order = c.topk_order;
        if (c.weighted) a.topk_weights = r.weights.data();
        if (c.weighted) a.row_weights = r.flight->job.out.topk_weights;
        if (c.stats) w.come(d), a.wait_stats = r.wait_stats.data();
        a.sum_weights = c.sum_weights;
        if (r.rail_log) a.rail_log = reinterpret_cast<int32_t*>(r.rail_log->data());
        a.num_logged = r.num_logged;
        a.log_has_weights = c.weights;
        CombineWants wants;
        wants.num_sms = c.num_sms;
        wants.begun = &r.begun[1];
        wants.in_halves = c.halves;
        begun[d] = r.device->combine(a, wants, r.stream);
    }
    between();
    for (int d : w.left()) w.ranks[d].device->finish(*begun[d], w.ranks[d].stream);
    for (int d : w.left()) cudaStreamSynchronize(w.ranks[d].stream);
    for (int s : w.left()) {
        for (int t = 0; t < w.tokens(s); ++t) {
            const Sum sum = add_up({w, e, y, back}, s, t);
            for (int k = 0; !c.staged && !c.per_rank && k < c.topk; ++k) {
                expect_eq(home[s][t * c.topk + k], sum.weights[k]);
            }
            for (int h = 0; h < c.hidden; ++h) {
                expect_eq(out[s][t * c.hidden + h], to_bf16(sum.row[h]));
            }
        }
    }
    for (int d : w.left()) {
        expect(!w.ranks[d].device->take_deferred().has_value(), "combine failed");
    }
}
inline void check_combine(World& w, const Expected& e, bool in_arena) {
    check_combine(w, e, in_arena, [] {});
}

inline Case grouped() {
    Case c;
    c.layout = RecvLayout::kGrouped;
    c.alignment = 4;
    return c;
}
inline Case slab() {
    Case c;
    c.layout = RecvLayout::kSlab;
    c.capacity = 30;
    return c;
}
inline Case ranks(int n, int sms, Case c = {}) {
    c.ranks = n;
    c.num_sms = sms;
    c.tokens = {7, 0, 12, 3, 5};
    c.experts = 10;
    return c;
}
template <class Change>
inline Case with(Case c, Change change) {
    change(c);
    return c;
}

inline int code_of(const Rank& r) { return r.flight->report.outcome.incident.code; }

inline void run(const Case& c) {
    World w(c);
    for (int round = 0; round < 3; ++round) {
        w.dispatch();
        for (const Rank& r : w.ranks) {
            expect_eq(r.numbers[0], int{kOk});
            expect_eq(int{r.device->verdict().incident.code}, int{kOk});
            if (r.numbers[0] != kOk || r.device->failed()) return;
        }
        const Expected e = expect_of(w);
        for (int d = 0; d < c.ranks; ++d) check_rank(w, e, d, false);
        if (c.quantize == Quantize::kNone) check_combine(w, e, round != 1);
        if (c.is_static || c.row_index || c.origins || c.staged) continue;
        std::vector<std::shared_ptr<Flight>> kept;
        for (int i = 0; i < c.ranks; ++i) {
            kept.push_back(w.ranks[i].flight);
            DispatchArgs a = w.args_of(i);
            a.cached = true;
            a.routing = 1;
            if (c.replicas) a.topk_idx = w.ranks[i].ids.data(), a.replicas = {};
            w.queue(i, a, true);
        }
        w.finish(true);
        for (int d = 0; d < c.ranks; ++d) check_rank(w, e, d, true);
    }
}

// What is counted is added to what was there.
inline void run_stats(const Case& given) {
    World w(with(given, [](Case& c) { c.stats = true; }));
    w.dispatch();
    w.check_waits();
    const Expected e = expect_of(w);
    for (int d = 0; d < w.c.ranks; ++d) {
        check_rank(w, e, d, false);
        std::vector<int32_t> want(w.ranks[d].counts);
        for (int32_t& n : want) n += 100;
        expect(w.ranks[d].recv_stats == want, "recv_stats");
    }
    check_combine(w, e, true);
    w.check_waits();
}

// The handle of a rank expects another number of rows than comes from rank 0: everybody names that rank.
inline void run_changed_handle(const Case& c, int rank) {
    World w(c);
    w.dispatch();
    std::vector<std::shared_ptr<Flight>> kept;
    w.ranks[rank].rank_counts[c.ranks] += 1;
    for (int i = 0; i < c.ranks; ++i) {
        kept.push_back(w.ranks[i].flight);
        DispatchArgs a = w.args_of(i);
        a.cached = true;
        w.queue(i, a, true);
    }
    w.finish(true);
    for (const Rank& r : w.ranks) {
        expect_eq(code_of(r), int{kStaleHandle});
        expect_eq(int{r.flight->report.outcome.incident.peer}, rank);
    }
}

}  // namespace world
