// The kernels of csrc/kernels with their host code, on a CPU: several ranks in one process, compared with
// plain loops, bit for bit.
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
#include "host/device_rank.h"

namespace {

using namespace ep;

constexpr int64_t kArenaBytes = 8 << 20;
constexpr std::byte kPoison{0xe7};
constexpr std::chrono::milliseconds kLate{200};

struct Case {
    int ranks = 2, experts = 6, topk = 3, hidden = 24;
    std::vector<int> tokens = {9, 4};
    RecvLayout layout = RecvLayout::kCompact;
    int alignment = 1, num_sms = 2, scale_words = 0;
    int64_t capacity = -1;
    bool is_static = false, weights = true, wide = true, row_index = false, origins = false;
    bool by_copies = false, one_expert = false, replicas = false;
    bool staged = false, halves = false;  // as small batches go
    bool weighted = false, per_rank = false, topk_order = false;
    bool stats = false;  // and the last rank comes late to every call
    Quantize quantize = Quantize::kNone;
    unsigned seed = 1;
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
    Shape shape;

    explicit World(const Case& given) : c(given), replicas(given.experts / 2), ranks(given.ranks) {
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
        std::vector<DevicePeer> peers;
        for (int r = 0; r < c.ranks; ++r) {
            peers.push_back({DeviceMemory::create(0, ControlLayout(shape).end),
                             DeviceMemory::create(0, kArenaBytes),
                             {-1, -1, 0}});
            std::fill_n(peers[r].arena->data(), kArenaBytes, kPoison);
        }
        for (int r = 0; r < c.ranks; ++r) {
            ranks[r].arena = std::make_shared<DeviceArena>(peers[r].arena);
            ranks[r].device =
                std::make_unique<DeviceRank>(shape, r, 1, owner, peers, ranks[r].arena,
                                             PeerClocks{5, 20, 20}, 16, [](OpKind, int, double) {});
            cudaStreamCreateWithFlags(&ranks[r].stream, cudaStreamNonBlocking);
        }
    }
    ~World() {
        for (Rank& r : ranks) r.flight.reset();
        cudaDeviceSynchronize();
        for (Rank& r : ranks) r.device.reset();
        for (Rank& r : ranks) cudaStreamDestroy(r.stream);
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
        if (i == c.ranks - 1) std::this_thread::sleep_for(kLate);
    }

    // Everybody waited for the last rank, and for others less. By copies rows come one rank after the
    // other, whenever the host gets there.
    void check_waits() const {
        const int last = c.ranks - 1;
        for (int r = 0; r < last; ++r) {
            const std::vector<int64_t>& waited = ranks[r].wait_stats;
            expect(waited[r] >= 100, "of itself");
            if (c.halves) continue;  // all have begun before anybody waits
            expect(waited[last] - 100 >= kLate * 3 / 4 / std::chrono::nanoseconds(1), "waited");
            for (int p = 0; p < last; ++p) {
                expect(waited[p] >= 100 && (c.by_copies || waited[p] < waited[last]), "blamed");
            }
        }
    }

    void finish(bool reports) {
        for (Rank& r : ranks) r.device->finish(*r.flight, r.stream);
        for (Rank& r : ranks) {
            if (reports) {
                while (!r.device->await_report(*r.flight, std::chrono::milliseconds(100))) {
                }
                if (!r.flight->report.outcome.ok()) continue;
                if (c.by_copies) r.device->push_copies(*r.flight);
            }
            r.device->settle(*r.flight);
        }
        for (Rank& r : ranks) cudaStreamSynchronize(r.stream);
    }

    void dispatch() {
        for (int i = 0; i < c.ranks; ++i) {
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

Expected expect_of(const World& w) {
    const Case& c = w.c;
    Expected e;
    e.send_row.resize(c.ranks);
    e.recv.resize(c.ranks);
    e.recv_row.resize(c.ranks);
    for (int r = 0; r < c.ranks; ++r) e.send_row[r].assign(w.tokens(r) * c.topk, -1);
    for (int d = 0; d < c.ranks; ++d) {
        std::vector<int> count(w.num_local(d), 0), next(w.num_local(d) + 1, 0);
        for (int s = 0; s < c.ranks; ++s) {
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
            for (int t = 0; t < w.tokens(s); ++t) {
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

int64_t id_at(const World& w, const void* ids, int64_t i) {
    return w.c.wide ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
}

void check_rank(const World& w, const Expected& e, int d, bool cached) {
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
    const auto* x = reinterpret_cast<const uint16_t*>((*r.flight)[Out::kX].data());
    for (int i = 0; i < num_recv; ++i) {
        const auto [s, t] = e.recv[d][i];
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
            if (c.quantize == Quantize::kNone) {
                expect(std::equal(x + row * c.hidden, x + (row + 1) * c.hidden,
                                  w.ranks[s].x.begin() + t * c.hidden),
                       "row of x");
            }
            for (int j = 0; j < c.scale_words; ++j) {
                const int64_t cap4 = (c.capacity + 3) / 4 * 4;
                const int64_t word =
                    c.layout == RecvLayout::kSlab
                        ? (row / c.capacity * c.scale_words + j) * cap4 + row % c.capacity
                        : int64_t{row} * c.scale_words + j;
                expect_eq(reinterpret_cast<const uint32_t*>(out.scales)[word],
                          w.ranks[s].scales[t * c.scale_words + j]);
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
            for (int h = 0; h < c.hidden / (c.quantize == Quantize::kNone ? 1 : 2); ++h) {
                expect_eq(x[row * c.hidden + h], uint16_t{0});
            }
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

float to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
uint16_t to_bf16(float v) {
    const auto u = std::bit_cast<uint32_t>(v);
    return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// What a rank sends back of one token, by loops: the sum of its rows, each times its weight.
struct Sum {
    std::vector<float> value;
    bool rounds;  // each rank's part by itself

    void add(const std::vector<float>& part) {
        for (size_t h = 0; h < value.size(); ++h) {
            value[h] += rounds ? to_float(to_bf16(part[h])) : part[h];
        }
    }
};

// Sends every received row back; from the arena or from ordinary memory.
void check_combine(World& w, const Expected& e, bool in_arena) {
    const Case& c = w.c;
    const bool compact = c.layout == RecvLayout::kCompact;
    std::vector<std::vector<uint16_t>> y(c.ranks), out(c.ranks);
    std::vector<std::vector<float>> back(c.ranks), home(c.ranks);
    std::vector<std::shared_ptr<StreamHold>> holds;
    std::vector<std::shared_ptr<BegunCombine>> begun;
    for (int d = 0; d < c.ranks; ++d) {
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
        a.num_recv = c.is_static ? r.flight->job.out.max_recv : e.recv[d].size();
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
        CombineWants wants;
        wants.num_sms = c.num_sms;
        wants.begun = &r.begun[1];
        wants.in_halves = c.halves;
        begun.push_back(r.device->combine(a, wants, r.stream));
    }
    for (int d = 0; d < c.ranks; ++d) w.ranks[d].device->finish(*begun[d], w.ranks[d].stream);
    for (Rank& r : w.ranks) cudaStreamSynchronize(r.stream);
    for (int s = 0; s < c.ranks; ++s) {
        for (int t = 0; t < w.tokens(s); ++t) {
            Sum sum{std::vector<float>(c.hidden, 0.0f), c.per_rank};
            const auto add = [&](int d, int k, std::vector<float>& to) {
                const int64_t row = e.send_row[s][t * c.topk + k];
                const float weight = c.weighted ? w.ranks[s].weights[t * c.topk + k] : 1.0f;
                for (int h = 0; h < c.hidden; ++h) {
                    to[h] += weight * to_float(y[d][row * c.hidden + h]);
                }
            };
            const auto here = [&](int d, int k) {
                const int64_t id = w.ranks[s].ids[t * c.topk + k];
                return id >= 0 && w.owner[id] == d;
            };
            for (int k = 0; c.topk_order && k < c.topk; ++k) {
                for (int d = 0; d < c.ranks; ++d) {
                    if (here(d, k)) add(d, k, sum.value);
                }
            }
            for (int d = 0; !c.topk_order && d < c.ranks; ++d) {
                bool any = false;
                std::vector<float> part(c.hidden, 0.0f);
                for (int k = 0; k < c.topk; ++k) {
                    if (!here(d, k)) continue;
                    const int64_t row = e.send_row[s][t * c.topk + k];
                    if (!c.staged && !c.per_rank) {
                        expect_eq(home[s][t * c.topk + k],
                                  back[d][compact ? row * c.topk + k : row]);
                    }
                    if (compact && any) continue;
                    any = true;
                    add(d, k, c.per_rank ? part : sum.value);
                }
                if (c.per_rank && any) sum.add(part);
            }
            for (int h = 0; h < c.hidden; ++h) {
                expect_eq(out[s][t * c.hidden + h], to_bf16(sum.value[h]));
            }
        }
    }
    for (Rank& r : w.ranks) expect(!r.device->take_deferred().has_value(), "combine failed");
}

void run(const Case& c) {
    World w(c);
    for (int round = 0; round < 3; ++round) {
        w.dispatch();
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

template <class Change>
Case with(Case c, Change change) {
    change(c);
    return c;
}

// What is counted is added to what was there.
void run_stats(const Case& given) {
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

Case grouped() {
    Case c;
    c.layout = RecvLayout::kGrouped;
    c.alignment = 4;
    return c;
}
Case slab() {
    Case c;
    c.layout = RecvLayout::kSlab;
    c.capacity = 30;
    return c;
}
Case ranks(int n, int sms, Case c = {}) {
    c.ranks = n;
    c.num_sms = sms;
    c.tokens = {7, 0, 12, 3, 5};
    c.experts = 10;
    return c;
}
int code_of(const Rank& r) { return r.flight->report.outcome.incident.code; }

}  // namespace

int main() {
    test("two ranks", [] { run({}); });
    test("one rank, one block", [] { run(ranks(1, 1)); });
    test("three ranks", [] { run(ranks(3, 3)); });
    test("five ranks, one block each", [] { run(ranks(5, 1)); });
    test("narrow ids, no weights",
         [] { run(with(ranks(4, 2), [](Case& c) { c.wide = false, c.weights = false; })); });
    test("top 1, and top 32", [] {
        run(with(ranks(3, 2), [](Case& c) { c.topk = 1; }));
        run(with(ranks(2, 2), [](Case& c) { c.topk = 32, c.experts = 40; }));
    });
    test("all to one expert", [] { run(with(ranks(4, 2), [](Case& c) { c.one_expert = true; })); });
    test("fewer experts than ranks",
         [] { run(with(ranks(4, 2), [](Case& c) { c.experts = 2; })); });
    test("many tokens are counted in chunks",
         [] { run(with(ranks(2, 4), [](Case& c) { c.tokens = {1400, 1026}, c.hidden = 8; })); });
    test("many on one rank, few on the other",
         [] { run(with(ranks(2, 3), [](Case& c) { c.tokens = {1100, 3}, c.hidden = 8; })); });
    test("scales in units, and not", [] {
        run(with(ranks(3, 2), [](Case& c) { c.scale_words = 4; }));
        run(with(ranks(3, 2), [](Case& c) { c.scale_words = 3; }));
    });
    test("static", [] { run(with(ranks(3, 2), [](Case& c) { c.is_static = true; })); });
    test("static with scales and a capacity", [] {
        run(with(ranks(3, 2),
                 [](Case& c) { c.is_static = true, c.capacity = 40, c.scale_words = 4; }));
    });
    test("row index", [] {
        run(with(ranks(3, 2), [](Case& c) { c.row_index = true, c.alignment = 4; }));
        run(with(ranks(3, 2), [](Case& c) { c.row_index = c.is_static = true, c.alignment = 4; }));
    });
    test("origins", [] {
        run(with(ranks(3, 2), [](Case& c) { c.origins = true; }));
        run(with(ranks(3, 2, grouped()), [](Case& c) { c.origins = true; }));
        run(with(ranks(3, 2, slab()), [](Case& c) { c.origins = c.is_static = true; }));
    });
    test("grouped", [] { run(ranks(3, 2, grouped())); });
    test("grouped, static, with scales", [] {
        run(with(ranks(3, 2, grouped()), [](Case& c) { c.is_static = true, c.scale_words = 3; }));
    });
    test("grouped, many tokens", [] {
        run(with(ranks(2, 3, grouped()), [](Case& c) { c.tokens = {1200, 1030}, c.hidden = 8; }));
    });
    test("slab", [] { run(ranks(3, 2, slab())); });
    test("slab, static, with scales", [] {
        run(with(ranks(3, 2, slab()), [](Case& c) { c.is_static = true, c.scale_words = 3; }));
    });
    test("rows in pieces",
         [] { run(with(ranks(2, 2), [](Case& c) { c.hidden = 20000, c.tokens = {3, 2}; })); });
    test("owners add up their rows", [] {
        for (const Case& base : {grouped(), slab()}) {
            for (const int hidden : {24, 2408}) {
                const Case mine = with(ranks(3, 2, base), [hidden](Case& c) {
                    c.hidden = hidden, c.topk = 5, c.per_rank = true;
                });
                run(mine);
                run(with(mine, [](Case& c) { c.weighted = true; }));
                run(with(mine, [](Case& c) { c.weighted = c.is_static = true; }));
            }
            run(with(ranks(1, 2, base), [](Case& c) { c.per_rank = c.weighted = true; }));
            run(with(ranks(4, 1, base), [](Case& c) {
                c.per_rank = c.one_expert = true;
                if (c.capacity > 0) c.capacity = 90;
            }));
        }
        run(with(ranks(2, 3, grouped()), [](Case& c) {
            c.tokens = {1200, 1030}, c.hidden = 8, c.per_rank = c.weighted = true;
        }));
        run(with(ranks(2, 2, grouped()),
                 [](Case& c) { c.topk = 32, c.experts = 40, c.per_rank = c.weighted = true; }));
    });
    test("statistics", [] {
        run_stats(ranks(3, 2));
        run_stats(ranks(3, 2, grouped()));
        run_stats(with(ranks(4, 1, slab()), [](Case& c) { c.is_static = true; }));
        run_stats(with(ranks(3, 4), [](Case& c) { c.by_copies = true; }));
        for (const bool halves : {false, true}) {
            run_stats(with(ranks(3, 2), [halves](Case& c) {
                c.is_static = c.staged = true, c.halves = halves;
            }));
            run_stats(with(ranks(3, 2, slab()),
                           [halves](Case& c) { c.staged = c.per_rank = true, c.halves = halves; }));
        }
        World w(with(ranks(3, 2), [](Case& c) { c.stats = true; }));
        w.ranks[2].ids[7] = 10;
        w.dispatch();
        for (const Rank& r : w.ranks) {
            expect_eq(code_of(r), int{kBadExpertId});
            const auto none = std::count(r.recv_stats.begin(), r.recv_stats.end(), 100);
            expect_eq(size_t(none), r.recv_stats.size());
        }
    });
    test("by copy engine", [] {
        run(with(ranks(3, 4), [](Case& c) { c.by_copies = true, c.tokens = {50, 0, 33}; }));
    });
    for (const bool halves : {false, true}) {
        const std::string how = halves ? ", in halves" : "";
        const auto small = [halves](int ranks_, int sms, Case c) {
            Case all = ranks(ranks_, sms, c);
            all.staged = true, all.halves = halves;
            return all;
        };
        const auto fixed = with({}, [](Case& c) { c.is_static = true; });
        test(("small: compact" + how).c_str(), [&] {
            run(small(3, 2, fixed));
            run(small(1, 1, fixed));
            run(with(small(5, 3, fixed), [](Case& c) { c.wide = c.weights = false; }));
        });
        test(("small: slab" + how).c_str(), [&] {
            run(small(3, 2, slab()));
            run(with(small(2, 5, slab()), [](Case& c) { c.topk = 32, c.experts = 40; }));
            run(with(small(4, 1, slab()), [](Case& c) { c.is_static = true; }));
            run(with(small(3, 2, slab()), [](Case& c) { c.one_expert = true, c.capacity = 90; }));
        });
        test(("small: rows in pieces, scales" + how).c_str(), [&] {
            for (const Case& base : {fixed, slab()}) {
                run(with(small(2, 4, base),
                         [](Case& c) { c.hidden = 2408, c.scale_words = 7, c.tokens = {5, 0}; }));
                run(with(small(3, 2, base), [](Case& c) { c.hidden = 8, c.scale_words = 1; }));
                run(with(small(2, 2, base), [](Case& c) { c.scale_words = 700; }));
            }
        });
        test(("small: sums in every order" + how).c_str(), [&] {
            for (const int hidden : {24, 2408}) {
                const Case base = with(small(3, 4, slab()), [hidden](Case& c) {
                    c.hidden = hidden, c.topk = 5, c.weighted = true;
                });
                run(base);
                run(with(base, [](Case& c) { c.topk_order = true; }));
                run(with(base, [](Case& c) { c.per_rank = true; }));
                run(with(base, [](Case& c) { c.per_rank = true, c.weighted = false; }));
            }
        });
        test(("small: origins, row index, replicas" + how).c_str(), [&] {
            for (const Case& base : {fixed, slab()}) {
                run(with(small(3, 2, base), [](Case& c) { c.origins = true; }));
                run(with(small(3, 2, base), [](Case& c) { c.replicas = true; }));
            }
            run(with(small(3, 2, fixed), [](Case& c) { c.row_index = true, c.alignment = 4; }));
        });
        test(("small: what fails, fails everywhere" + how).c_str(), [&] {
            World w(with(small(3, 2, slab()), [](Case& c) { c.replicas = true; }));
            const int64_t good = w.ranks[2].logical[7];
            w.ranks[2].logical[7] = 5;
            w.dispatch();
            for (const Rank& r : w.ranks) {
                expect_eq(code_of(r), int{kBadExpertId});
                expect_eq(r.flight->report.outcome.detail[3], int64_t{5});
                expect_eq(r.numbers[0], int{kBadExpertId});
                expect_eq(r.numbers[1], 0);
                expect(r.send_row == std::vector<int32_t>(r.send_row.size(), -1), "send_row");
            }
            expect(w.ranks[2].load == std::vector<int64_t>(5, 0), "load");
            w.ranks[2].logical[7] = good;
            w.c.capacity = 2;
            w.dispatch();
            for (const Rank& r : w.ranks) expect_eq(code_of(r), int{kOverCapacity});
            w.c.capacity = 30;
            for (int i = 0; i < 3; ++i) {
                DispatchArgs a = w.args_of(i);
                if (i == 1) a.num_topk = 2;
                w.queue(i, a, true);
            }
            w.finish(true);
            for (const Rank& r : w.ranks) expect_eq(code_of(r), int{kCallDiffers});
            Outcome why;
            why.incident.code = kBadShape;
            for (int i = 0; i < 2; ++i) w.queue(i, w.args_of(i), true);
            w.ranks[2].device->refuse(OpKind::kDispatch, why, w.ranks[2].stream);
            for (int i = 0; i < 2; ++i) {
                Rank& r = w.ranks[i];
                r.device->finish(*r.flight, r.stream);
                while (!r.device->await_report(*r.flight, std::chrono::milliseconds(50))) {
                }
                expect_eq(code_of(r), int{kBadShape});
            }
            w.dispatch();
            const Expected e = expect_of(w);
            for (int d = 0; d < 3; ++d) check_rank(w, e, d, false);
        });
    }
    test("bad ids fail everywhere, and the next call works", [] {
        World w(ranks(3, 2));
        const int64_t good = w.ranks[2].ids[7];
        w.ranks[2].ids[7] = 10;
        w.dispatch();
        for (const Rank& r : w.ranks) {
            expect_eq(code_of(r), int{kBadExpertId});
            const Outcome& o = r.flight->report.outcome;
            expect_eq(o.incident.peer, int16_t{2});
            expect_eq(o.detail[0], int64_t{1});
            expect_eq(o.detail[1] * 3 + o.detail[2], int64_t{7});
            expect_eq(o.detail[3], int64_t{10});
        }
        w.ranks[2].ids[7] = good;
        w.dispatch();
        const Expected e = expect_of(w);
        for (int d = 0; d < 3; ++d) check_rank(w, e, d, false);
    });
    test("too many rows fail everywhere", [] {
        World w(with(ranks(3, 2), [](Case& c) { c.capacity = 2; }));
        w.dispatch();
        for (const Rank& r : w.ranks) expect_eq(code_of(r), int{kOverCapacity});
    });
    test("no memory for what comes fails everywhere", [] {
        World w(ranks(3, 2));
        auto hold = w.ranks[1].arena->grant(kArenaBytes - 2 * kExtentAlign, w.ranks[1].stream);
        w.dispatch();
        for (const Rank& r : w.ranks) {
            expect_eq(code_of(r), int{kOutOfArena});
            expect_eq(r.flight->report.outcome.incident.peer, int16_t{1});
        }
        hold.reset();
        w.dispatch();
        for (const Rank& r : w.ranks) expect_eq(code_of(r), 0);
    });
    test("replicas are chosen, and load is counted", [] {
        for (const Case& base : {ranks(3, 2), ranks(3, 2, grouped()), ranks(3, 1, slab())}) {
            run(with(base, [](Case& c) { c.replicas = true; }));
        }
        World w(with(ranks(3, 2), [](Case& c) { c.replicas = true; }));
        w.dispatch();
        w.dispatch();
        for (const Rank& r : w.ranks) {
            expect(r.routed == r.ids, "routed ids");
            for (size_t e = 0; e < r.load.size(); ++e) {
                const auto n = std::count(r.logical.begin(), r.logical.end(), int64_t(e));
                expect_eq(r.load[e], 2 * int64_t{n});
            }
        }
    });
    test("a call with an id of no logical expert counts none", [] {
        for (const int tokens : {9, 1100}) {
            World w(with(ranks(2, 3), [tokens](Case& c) {
                c.replicas = true, c.hidden = 8, c.tokens = {tokens, 5};
            }));
            w.ranks[0].logical[13] = w.replicas.tables().num_logical;
            w.dispatch();
            for (const Rank& r : w.ranks) expect_eq(code_of(r), int{kBadExpertId});
            expect(w.ranks[0].load == std::vector<int64_t>(5, 0), "load of the one with the id");
            expect_eq(w.ranks[1].flight->report.outcome.detail[3], int64_t{5});
        }
    });
    test("a refusal, and arguments that differ, fail everywhere", [] {
        World w(ranks(3, 2));
        Outcome why;
        why.incident.code = kBadShape;
        std::snprintf(why.reason, sizeof(why.reason), "a reason");
        for (int i = 0; i < 2; ++i) w.queue(i, w.args_of(i), true);
        w.ranks[2].device->refuse(OpKind::kDispatch, why, w.ranks[2].stream);
        for (int i = 0; i < 2; ++i) {
            Rank& r = w.ranks[i];
            while (!r.device->await_report(*r.flight, std::chrono::milliseconds(50))) {
            }
            expect_eq(code_of(r), int{kBadShape});
            expect_eq(std::string(r.flight->report.outcome.reason), std::string("a reason"));
        }
        for (int i = 0; i < 3; ++i) {
            DispatchArgs a = w.args_of(i);
            if (i == 1) a.alignment = 8;
            w.queue(i, a, true);
        }
        w.finish(true);
        for (const Rank& r : w.ranks) expect_eq(code_of(r), int{kCallDiffers});
        w.dispatch();
        for (const Rank& r : w.ranks) expect_eq(code_of(r), 0);
    });
    test("a changed handle fails everywhere", [] {
        World w(ranks(3, 2));
        w.dispatch();
        std::vector<std::shared_ptr<Flight>> kept;
        w.ranks[1].rank_counts[3] += 1;
        for (int i = 0; i < 3; ++i) {
            kept.push_back(w.ranks[i].flight);
            DispatchArgs a = w.args_of(i);
            a.cached = true;
            w.queue(i, a, true);
        }
        w.finish(true);
        for (const Rank& r : w.ranks) {
            expect_eq(code_of(r), int{kStaleHandle});
            expect_eq(r.flight->report.outcome.incident.peer, int16_t{1});
        }
    });
    return finish();
}
