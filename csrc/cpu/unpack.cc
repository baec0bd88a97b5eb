// The receiver's side of dispatch, after the rows have arrived: metadata records become tensors,
// and the extra rows of tokens that chose several local experts are copied from the one that was
// sent.
#include <algorithm>
#include <cstring>

#include "contract/calls.h"
#include "cpu/operation.h"
#include "cpu/simd.h"

namespace ep::cpu {
namespace {

class Unpack {
public:
    Unpack(const Rank& r, const Dispatched& d, const DispatchArgs& args, const UnpackArgs& o)
        : rank(r),
          result(d),
          a(args),
          out(o),
          meta(meta_layout(args)),
          num_local(r.experts().num_local(r.rank())),
          compact(args.layout == RecvLayout::kCompact),
          total_rows(args.layout == RecvLayout::kSlab ? d.num_rows * num_local : d.num_rows),
          x(r.arena_data() + std::max<int64_t>(d.x_offset, 0)),
          records(r.arena_data() + (d.meta ? d.meta->extent().offset : 0)) {}

    // The first source whose records cannot be, -1 = none.
    int run() {
        blank();
        int64_t i = 0;
        for (int src = 0; src < rank.shape().num_ranks; ++src) {
            const int64_t rows = a.rank_counts[rank.shape().num_ranks + src];
            for (int64_t j = 0; j < rows; ++j, ++i) token(i, src);
            if (!sane && culprit < 0) culprit = src;
        }
        if (!compact) zero_padding();
        const std::vector<std::byte> none(a.scale_bytes);
        for (const int64_t row : result.lost_rows) {
            if (out.scales != nullptr) put_scales(row, none.data());
        }
        if (out.row_index != nullptr) index_rows();
        if (!sane && culprit < 0) culprit = rank.rank();
        return culprit;
    }

private:
    // Ids of padding are -1 and its weights 0, whatever the layout.
    void blank() {
        const int64_t per_row = compact ? a.num_topk : 1;
        const int64_t max_rows =
            a.layout == RecvLayout::kSlab ? out.max_rows * num_local : out.max_rows;
        const int64_t first = compact ? result.num_recv : 0;
        const int64_t count = (max_rows - first) * per_row;
        if (out.topk_idx != nullptr) {
            std::memset(static_cast<std::byte*>(out.topk_idx) + first * per_row * idx_bytes(), 0xff,
                        count * idx_bytes());
        }
        if (out.topk_weights != nullptr) {
            std::memset(out.topk_weights + first * per_row, 0, count * sizeof(float));
        }
        if (out.row_token != nullptr) std::fill_n(out.row_token, max_rows, -1);
        if (out.source_range != nullptr) {
            std::fill_n(out.source_range, int64_t{num_local} * rank.shape().num_ranks, 0);
        }
        const int64_t extra = out.max_recv - result.num_recv;
        if (out.recv_src != nullptr && extra > 0) {
            std::fill_n(out.recv_src + 2 * result.num_recv, 2 * extra, -1);
        }
        if (!a.cached && out.recv_row != nullptr && extra > 0) {
            std::fill_n(out.recv_row + a.num_topk * result.num_recv, a.num_topk * extra, -1);
        }
        if (out.offsets != nullptr) {
            out.offsets[0] = 0;
            const int align = compact ? out.row_alignment : a.alignment;
            for (int e = 0; e < num_local; ++e) {
                const int32_t padded = (a.expert_counts[e] + align - 1) / align * align;
                out.offsets[e + 1] = out.offsets[e] + padded;
            }
        }
    }

    int64_t idx_bytes() const { return out.idx_is_int64 ? 8 : 4; }

    void put_idx(int64_t at, const int32_t* local, int count) {
        if (out.topk_idx == nullptr) return;
        if (out.idx_is_int64) {
            std::copy_n(local, count, static_cast<int64_t*>(out.topk_idx) + at);
        } else {
            std::copy_n(local, count, static_cast<int32_t*>(out.topk_idx) + at);
        }
    }

    // Numbers written by peers are checked before they become addresses: what is not below `limit`
    // becomes -1.
    void check(int32_t* values, int count, int64_t limit) {
        const auto most = static_cast<uint32_t>(std::min<int64_t>(limit, INT32_MAX));
        bool outside = false;
        for (int i = 0; i < count; ++i) {
            const bool bad = static_cast<uint32_t>(values[i]) + 1 > most;
            values[i] = bad ? -1 : values[i];
            outside |= bad;
        }
        sane &= !outside;
    }

    // What a record says, copied before it is checked: its writer may change it at any time.
    struct Record {
        int32_t src_token = -1;
        int32_t local[kMaxTopk], row[kMaxTopk];
        float weights[kMaxTopk];
    };

    void token(int64_t i, int src) {
        const std::byte* written = records + i * meta.bytes;
        const std::byte* scales = written + meta.scales.offset;
        const int num_topk = a.num_topk;
        Record record;
        if (a.with_weights) {
            std::memcpy(record.weights, written + meta.weights.offset, meta.weights.bytes);
        }
        if (!a.cached) {
            std::memcpy(&record.src_token, written + meta.src_token.offset, 4);
            std::memcpy(record.local, written + meta.experts.offset, meta.experts.bytes);
            check(record.local, num_topk, num_local);
            check(&record.src_token, 1, rank.shape().max_tokens);
            if (out.recv_src != nullptr) {
                const bool is_lost = record.src_token < 0 && !result.lost_rows.empty();
                out.recv_src[2 * i] = is_lost ? -1 : src;
                out.recv_src[2 * i + 1] = record.src_token;
            }
        }
        if (compact) {
            if (!a.cached) put_idx(i * num_topk, record.local, num_topk);
            if (out.topk_weights != nullptr) {
                std::copy_n(record.weights, num_topk, out.topk_weights + i * num_topk);
            }
            if (out.scales != nullptr) put_scales(i, scales);
            if (!a.cached && out.row_token != nullptr) out.row_token[i] = record.src_token;
            return;
        }
        if (a.cached) {
            std::copy_n(out.recv_row + i * num_topk, num_topk, record.row);
        } else {
            std::memcpy(record.row, written + meta.rows.offset, meta.rows.bytes);
        }
        check(record.row, num_topk, total_rows);
        if (!a.cached) std::copy_n(record.row, num_topk, out.recv_row + i * num_topk);
        expand(record, scales);
        if (!a.cached) trace(record, src);
    }

    // Who sent each row: rows of one source lie together in a group, in the order they are read.
    void trace(const Record& record, int src) {
        for (int k = 0; k < a.num_topk; ++k) {
            const int32_t row = record.row[k], local = record.local[k];
            if (row < 0 || local < 0) continue;
            if (out.row_token != nullptr) out.row_token[row] = record.src_token;
            if (out.source_range == nullptr) continue;
            int64_t& range = out.source_range[int64_t{local} * rank.shape().num_ranks + src];
            const int64_t first =
                a.layout == RecvLayout::kSlab ? a.capacity * local : result.group_start[local];
            if (range == 0) range = (row - first) << 32;
            ++range;
        }
    }

    // The token's data lie in the row of its first slot here; its other slots get copies.
    void expand(const Record& record, const std::byte* scales) {
        int32_t first = -1;
        for (int k = 0; k < a.num_topk; ++k) {
            const int32_t row = record.row[k];
            if (row < 0) continue;
            if (first < 0) {
                first = row;
            } else {
                simd().copy(x + row * a.row_bytes(), x + first * a.row_bytes(), a.row_bytes());
            }
            if (!a.cached) put_idx(row, record.local + k, 1);
            if (out.topk_weights != nullptr) out.topk_weights[row] = record.weights[k];
            if (out.scales != nullptr) put_scales(row, scales);
        }
    }

    void put_scales(int64_t row, const std::byte* scales) {
        if (a.layout != RecvLayout::kSlab) {
            std::memcpy(out.scales + row * a.scale_bytes, scales, a.scale_bytes);
            return;
        }
        // Column-major per expert, columns 16 bytes aligned, as masked grouped GEMMs read them.
        const int64_t words = a.scale_bytes / 4, column = (a.capacity + 3) / 4 * 4;
        const int64_t expert = row / a.capacity, i = row % a.capacity;
        for (int64_t w = 0; w < words; ++w) {
            std::memcpy(out.scales + 4 * ((expert * words + w) * column + i), scales + 4 * w, 4);
        }
    }

    // Alignment gaps of grouped read as zero; nobody wrote there, and older rows may lie there.
    void zero_padding() {
        if (a.layout != RecvLayout::kGrouped) return;
        for (int e = 0; e < num_local; ++e) {
            const int64_t used = result.group_start[e] + a.expert_counts[e];
            const int64_t gap = result.group_start[e + 1] - used;
            if (gap > 0) std::memset(x + used * a.row_bytes(), 0, gap * a.row_bytes());
        }
    }

    void index_rows() {
        std::vector<int32_t> next(out.offsets, out.offsets + num_local);
        std::fill_n(out.row_index, out.max_index, -1);
        for (int64_t i = 0; i < result.num_recv; ++i) {
            int32_t local[kMaxTopk];
            std::memcpy(local, records + i * meta.bytes + meta.experts.offset, meta.experts.bytes);
            check(local, a.num_topk, num_local);
            for (int k = 0; k < a.num_topk; ++k) {
                const int32_t e = local[k];
                if (e < 0) continue;
                if (next[e] < out.offsets[e + 1] && next[e] < out.max_index) {
                    out.row_index[next[e]++] = static_cast<int32_t>(i);
                } else {
                    sane = false;
                }
            }
        }
    }

    const Rank& rank;
    const Dispatched& result;
    const DispatchArgs& a;
    const UnpackArgs& out;
    const MetaLayout meta;
    const int num_local;
    const bool compact;
    const int64_t total_rows;
    std::byte* x;
    const std::byte* records;
    bool sane = true;
    int culprit = -1;
};

}  // namespace

bool Rank::unpack(const Dispatched& result, const DispatchArgs& args, const UnpackArgs& out) {
    const int culprit = Unpack(*this, result, args, out).run();
    if (culprit < 0) return true;
    if (args.cached) return false;  // of the caller's own handle
    std::lock_guard lock(running_);
    if (!verdict_.ok()) return false;
    Outcome why = Operation::outcome_of(kBadCount, culprit);
    why.incident.op = static_cast<uint8_t>(OpKind::kDispatch);
    why.incident.rank = static_cast<int16_t>(rank_);
    why.incident.seq = result.seq;
    give_up(why);
    return false;
}

}  // namespace ep::cpu
