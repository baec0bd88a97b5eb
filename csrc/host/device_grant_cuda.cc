// What a dispatch is granted, before and after its sizes are known.
#include <algorithm>
#include <limits>
#include <utility>

#include "contract/config.h"
#include "contract/stage.h"
#include "host/device_rank.h"

namespace ep {
namespace {

int64_t slabs_of(const DispatchArgs& a, int num_local) {
    return a.layout == RecvLayout::kSlab ? num_local : 1;
}

// All that a dispatch is granted. Where sizes are known later, what is large comes back in part.
std::vector<Part> parts_of(const DispatchArgs& a, const DispatchWants& wants, const Shape& shape,
                           int num_local, bool staged) {
    const bool compact = a.layout == RecvLayout::kCompact, slab = a.layout == RecvLayout::kSlab;
    const int64_t slots = compact ? a.num_topk : 1;  // of a row
    std::vector<Part> parts;
    parts.reserve(kNumOuts);
    // Of a static call nothing comes back: one extent for all.
    parts.push_back({Out::kX, a.is_static ? Lies::kBeside : Lies::kAlone, a.row_bytes(), 0, 0});
    if (a.scale_bytes > 0) {
        const int64_t apart = (a.capacity + 3) / 4 * 4;  // columns of a slab
        const Lies lies = a.is_static || a.cached ? Lies::kBeside : Lies::kAlone;
        parts.push_back({Out::kScales, lies, slab ? 0 : a.scale_bytes, 0,
                         slab ? num_local * a.scale_bytes * apart : 0});
        if (!compact && !staged) {
            parts.push_back({Out::kTokenScales, Lies::kAlone, 0, a.scale_bytes, 0});
        }
    }
    const auto beside = [&parts](Out out, int64_t per_row, int64_t per_token, int64_t rest) {
        parts.push_back({out, Lies::kBeside, per_row, per_token, rest});
    };
    const auto in_routing = [&parts](Out out, int64_t per_token, int64_t rest) {
        parts.push_back({out, Lies::kInRouting, 0, per_token, rest});
    };
    if (!a.cached) {
        beside(Out::kIds, slots * (wants.wide_ids ? 8 : 4), 0, 0);
        in_routing(Out::kSrc, 8, 0);
        if (!compact) in_routing(Out::kRows, int64_t{4} * a.num_topk, 0);
    }
    if (a.with_weights) beside(Out::kWeights, 4 * slots, 0, 0);
    if (wants.row_token) beside(Out::kRowToken, 4, 0, 0);
    if (wants.row_index && a.index_capacity >= 0) {
        beside(Out::kRowIndex, 0, 0, 4 * a.index_capacity);
    } else if (wants.row_index) {
        beside(Out::kRowIndex, 0, 4 * a.num_topk, int64_t{4} * num_local * (a.alignment - 1));
    }
    if (!wants.grants_all) return parts;
    const int64_t ranks = shape.num_ranks;
    in_routing(Out::kNumbers, 0, kBegunAt + int64_t{sizeof(Begun)});
    if (!a.cached) {
        in_routing(Out::kSendRow, 0, 4 * a.num_tokens * a.num_topk);
        in_routing(Out::kRankCounts, 0, 2 * 8 * ranks);
        in_routing(Out::kCounts, 0, int64_t{4} * num_local);
    }
    if (wants.row_index || a.layout == RecvLayout::kGrouped) {
        beside(Out::kOffsets, 0, 0, int64_t{4} * (num_local + 1));
    }
    if (wants.row_token && compact) beside(Out::kRankEnds, 0, 0, 4 * ranks * ranks);
    if (wants.row_token && !compact) beside(Out::kSourceRange, 0, 0, 8 * num_local * ranks);
    return parts;
}

int64_t in_pages(int64_t bytes) { return (bytes + kExtentAlign - 1) / kExtentAlign * kExtentAlign; }

// Of parts that lie in one free piece.
int64_t bytes_of(const std::vector<Part>& parts, int64_t rows, int64_t tokens) {
    int64_t bytes = 0;
    for (const Part& part : parts) bytes += in_pages(part.bytes(rows, tokens));
    return bytes;
}

template <class T>
void set_granted(T*& pointer, const Granted& granted) {
    if (granted) pointer = reinterpret_cast<T*>(granted.data());
}

}  // namespace

// Granted before the size is known: the worst case, or all there is of it. What is too much comes
// back in settle. False: see dispatch.
bool DeviceRank::grant(Flight& flight, const DispatchWants& wants) {
    const DispatchArgs& args = flight.job.args;
    const int num_local = state_->num_local();
    flight.parts = parts_of(args, wants, shape_, num_local, stages(args));
    if (rails_) {
        flight.parts.push_back({Out::kRailLog, Lies::kAlone, 0, 0, rails_->log_bytes(args)});
    }
    const int64_t worst = int64_t{shape_.num_ranks} * shape_.max_tokens;
    const bool compact = args.layout == RecvLayout::kCompact;
    const bool grouped = args.layout == RecvLayout::kGrouped;
    const int64_t most = grouped ? args.num_topk : 1;                       // rows of a token
    const int64_t each = grouped ? std::min(args.num_topk, num_local) : 1;  // of distinct experts
    const int64_t padding = compact ? 0 : int64_t{num_local} * (args.alignment - 1);
    int64_t tokens = worst, rows = worst * most + padding;
    if (args.cached) {
        tokens = wants.max_recv, rows = wants.max_rows;
    } else if (args.capacity >= 0) {
        rows = args.capacity * slabs_of(args, num_local);
        if (compact) tokens = std::min(worst, args.capacity);
    }
    if (take_extents(flight, rows, tokens)) return true;
    const bool has_size = args.cached || args.is_static;
    const int64_t distinct = std::min(rows, worst * each + padding);
    if (!has_size && distinct < rows && take_extents(flight, distinct, tokens)) {
        flight.job.begin.head.grant.free_pages =
            static_cast<uint32_t>(arena_->stats().largest_free / kExtentAlign);
        return true;
    }
    if (wants.grants_all) return false;

    // As many tokens as one free piece holds with all that belongs to them.
    const int64_t free = arena_->reclaim(flight.stream);
    const auto rows_for = [&](int64_t n) {
        return args.layout == RecvLayout::kSlab ? rows : std::min(rows, n * each + padding);
    };
    int64_t some = 0;
    for (int64_t end = has_size ? 0 : tokens; some < end;) {
        const int64_t middle = (some + end + 1) / 2;
        if (bytes_of(flight.parts, rows_for(middle), middle) <= free) {
            some = middle;
        } else {
            end = middle - 1;
        }
    }
    const bool fits = some > 0 && take_extents(flight, rows_for(some), some);
    if (!fits) refuse_memory(flight, bytes_of(flight.parts, rows, tokens), free);
    flight.job.begin.head.grant.free_pages = static_cast<uint32_t>(free / kExtentAlign);
    return true;
}

// False: nothing is granted.
bool DeviceRank::take_extents(Flight& flight, int64_t rows, int64_t tokens) {
    int64_t sizes[2] = {};  // of the extents of many
    const auto index = [](const Part& part) { return part.lies == Lies::kInRouting ? 1 : 0; };
    bool ok = true;
    for (const Part& part : flight.parts) {
        const int64_t bytes = part.bytes(rows, tokens);
        Granted& granted = flight[part.out] = {};
        if (part.lies != Lies::kAlone) {
            granted.at = std::exchange(sizes[index(part)], sizes[index(part)] + in_pages(bytes));
        } else if (ok && bytes > 0) {
            granted.hold = arena_->grant(bytes, flight.stream, flight.is_captured);
            ok = granted.hold != nullptr;
        }
    }
    std::shared_ptr<StreamHold> holds[2];
    for (int i = 0; i < 2; ++i) {
        if (ok && sizes[i] > 0)
            holds[i] = arena_->grant(sizes[i], flight.stream, flight.is_captured);
        ok = ok && (sizes[i] == 0 || holds[i]);
    }
    for (const Part& part : flight.parts) {
        if (!ok) {
            flight[part.out] = {};
        } else if (part.lies != Lies::kAlone && part.bytes(rows, tokens) > 0) {
            flight[part.out].hold = holds[index(part)];
        }
    }
    if (ok) tell_extents(flight, rows, tokens);
    return ok;
}

// Where they are: peers, and kernels of ours.
void DeviceRank::tell_extents(Flight& flight, int64_t rows, int64_t tokens) {
    const auto page = [&flight](Out out) {
        return flight[out] ? static_cast<uint32_t>(flight[out].offset() / kExtentAlign)
                           : Grant::kNone;
    };
    DispatchJob& job = flight.job;
    const bool compact = job.args.layout == RecvLayout::kCompact;
    Grant& grant = job.begin.head.grant;
    grant.page[Grant::kX] = page(Out::kX);
    grant.page[Grant::kIds] = page(Out::kIds);
    grant.page[Grant::kWeights] = page(Out::kWeights);
    grant.page[Grant::kSrc] = page(Out::kSrc);
    grant.page[Grant::kRows] = page(Out::kRows);
    grant.page[Grant::kScales] = page(compact ? Out::kScales : Out::kTokenScales);
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    grant.max_rows = static_cast<int32_t>(std::min(rows, kMost));
    grant.max_recv = static_cast<int32_t>(std::min(tokens, kMost));
    UnpackArgs& out = job.out;
    set_granted(out.topk_idx, flight[Out::kIds]);
    set_granted(out.topk_weights, flight[Out::kWeights]);
    set_granted(out.recv_src, flight[Out::kSrc]);
    set_granted(out.recv_row, flight[Out::kRows]);
    set_granted(out.scales, flight[Out::kScales]);
    set_granted(out.row_index, flight[Out::kRowIndex]);
    set_granted(out.row_token, flight[Out::kRowToken]);
    set_granted(out.offsets, flight[Out::kOffsets]);
    set_granted(out.source_range, flight[Out::kSourceRange]);
    set_granted(job.args.send_row, flight[Out::kSendRow]);
    set_granted(job.args.rank_counts, flight[Out::kRankCounts]);
    set_granted(job.args.expert_counts, flight[Out::kCounts]);
    set_granted(job.args.rank_ends, flight[Out::kRankEnds]);
    if (const Granted& numbers = flight[Out::kNumbers]) {
        job.status = reinterpret_cast<int32_t*>(numbers.data());
        job.num_recv = job.status + 1;
        job.begun = reinterpret_cast<Begun*>(numbers.data() + kBegunAt);
    }
    out.max_rows = rows;
    out.max_recv = tokens;
    out.max_index = job.args.index_capacity;
}

// Peers learn it from what we tell them: a fresh call when it does not fit, a cached one at once.
void DeviceRank::refuse_memory(Flight& flight, int64_t needed, int64_t free) {
    Begin& begin = flight.job.begin;
    begin.head.grant.max_rows = begin.head.grant.max_recv = -1;
    if (!flight.job.args.cached) return;
    begin.head.set(OpKind::kDispatch, kOutOfArena);
    begin.refusal.detail[0] = needed;
    begin.refusal.detail[1] = free;
}

void DeviceRank::settle(Flight& flight) {
    const DispatchArgs& args = flight.job.args;
    flight[Out::kTokenScales] = {};
    const HostPage::Report& report = flight.report;
    if (args.is_static) return;
    if (const Granted& log = flight[Out::kRailLog]) {
        arena_->trim(*log.hold, Rails::log_bytes(args, report.num_logged));
    }
    if (args.cached) return;
    for (const Part& part : flight.parts) {
        const Granted& granted = flight[part.out];
        if (part.lies == Lies::kAlone && part.out != Out::kRailLog && granted) {
            arena_->trim(*granted.hold, part.bytes(report.num_rows, report.num_recv));
        }
    }
}

}  // namespace ep
