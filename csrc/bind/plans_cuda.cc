#include "bind/plans.h"

#include <algorithm>
#include <cstddef>
#include <initializer_list>

#include "bind/exchange.h"
#include "bind/torch_device.h"
#include "contract/config.h"
#include "host/graph_hold.h"

namespace py = pybind11;

namespace ep {
namespace {

constexpr dlpack::DataType kInt32{dlpack::kInt, 32, 1}, kInt64{dlpack::kInt, 64, 1},
    kFloat32{dlpack::kFloat, 32, 1};

// Tensors of one call, all on the device of its rank.
class Tensors {
public:
    explicit Tensors(const DeviceRank& rank) : device_(rank.arena()->device()) {}

    // Of a type and a shape, -1 = any size; dense rows of aligned memory.
    bool take(py::handle object, const std::optional<dlpack::DataType>& type,
              std::initializer_list<int64_t> shape) {
        if (!see(object, view_) || !type || !same(view_.dtype, *type)) return false;
        if (!is_on(device_, object, view_)) return false;
        if (view_.ndim != static_cast<int>(shape.size())) return false;
        for (int i = 0; i < view_.ndim; ++i) {
            const int64_t want = shape.begin()[i];
            if (want >= 0 && view_.shape[i] != want) return false;
        }
        return is_empty() || (data() != nullptr && stride(view_.ndim - 1) == 1);
    }
    bool is_dense() const {
        int64_t apart = 1;
        for (int i = view_.ndim - 1; i >= 0 && !is_empty(); --i) {
            if (view_.shape[i] != 1 && stride(i) != apart) return false;
            apart *= view_.shape[i];
        }
        return true;
    }
    bool is_aligned() const {
        return is_empty() || reinterpret_cast<uintptr_t>(data()) % kRowAlign == 0;
    }
    int64_t size(int i) const { return view_.shape[i]; }
    int64_t stride(int i) const { return view_.strides != nullptr ? view_.strides[i] : 1; }
    int64_t item_bytes() const { return view_.dtype.bits / 8; }
    std::byte* data() const { return static_cast<std::byte*>(view_.data) + view_.byte_offset; }

private:
    static bool same(const dlpack::DataType& a, const dlpack::DataType& b) {
        return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
    }
    bool is_empty() const {
        for (int i = 0; i < view_.ndim; ++i) {
            if (view_.shape[i] == 0) return true;
        }
        return false;
    }

    int device_;
    dlpack::Tensor view_{};
};

template <class T>
T* as(std::byte* data) {
    return reinterpret_cast<T*>(data);
}

bool take_x(Tensors& t, const DispatchPlan& plan, py::handle x, int64_t max_tokens,
            DispatchArgs& a) {
    if (!t.take(x, plan.x, {-1, a.hidden}) || t.size(0) > max_tokens || !t.is_aligned()) {
        return false;
    }
    a.num_tokens = t.size(0);
    a.x = t.data();
    a.x_stride = (a.num_tokens > 0 ? t.stride(0) : a.hidden) * t.item_bytes();
    return a.num_tokens == 0 || a.x_stride % kRowAlign == 0;
}

// What a call adds to, or null.
template <class T>
bool take_stats(Tensors& t, py::handle stats, const dlpack::DataType& type, int64_t size,
                T*& address) {
    address = nullptr;
    if (stats.is_none()) return true;
    if (!t.take(stats, type, {size}) || !t.is_dense()) return false;
    address = as<T>(t.data());
    return true;
}

}  // namespace

OptionTypes::OptionTypes(const py::tuple& options) {
    for (const py::handle option : options) types_.push_back(Py_TYPE(option.ptr()));
}

bool OptionTypes::are_of(const py::tuple& options) const {
    if (options.size() != types_.size()) return false;
    for (size_t i = 0; i < types_.size(); ++i) {
        if (Py_TYPE(PyTuple_GET_ITEM(options.ptr(), static_cast<Py_ssize_t>(i))) != types_[i]) {
            return false;
        }
    }
    return true;
}

std::shared_ptr<Flight> run(DeviceRank& rank, const DispatchPlan& plan, const py::tuple& options,
                            py::handle x, py::handle topk_idx, py::handle topk_weights,
                            py::handle scales, py::handle recv_stats, py::handle wait_stats,
                            const Routing* routing) {
    if (exchange() == nullptr || rank.failed() || rank.arena()->is_crowded()) return nullptr;
    if (!plan.options.are_of(options)) return nullptr;
    DispatchArgs a = plan.args;
    DispatchWants wants = plan.wants;
    Tensors t(rank);
    if (!take_x(t, plan, x, rank.shape().max_tokens, a)) return nullptr;
    if (!t.take(topk_idx, kInt64, {a.num_tokens, a.num_topk}) || !t.is_dense()) return nullptr;
    a.topk_idx = as<int64_t>(t.data());
    if (a.with_weights) {
        const bool fits = t.take(topk_weights, kFloat32, {a.num_tokens, a.num_topk});
        if (!fits || !t.is_dense()) return nullptr;
        a.topk_weights = as<float>(t.data());
    } else if (!topk_weights.is_none()) {
        return nullptr;
    }
    if (plan.scales) {
        if (!t.take(scales, plan.scales, {a.num_tokens, a.scale_bytes / 4}) || !t.is_dense()) {
            return nullptr;
        }
        a.scales = t.data();
    } else if (!scales.is_none()) {
        return nullptr;
    }
    if (!take_stats(t, recv_stats, kInt32, rank.num_local(), a.recv_stats) ||
        !take_stats(t, wait_stats, kInt64, rank.shape().num_ranks, a.wait_stats)) {
        return nullptr;
    }
    if (a.cached != (routing != nullptr)) return nullptr;
    if (routing != nullptr) {
        if (routing->args.num_tokens != a.num_tokens) return nullptr;
        a.send_row = routing->args.send_row;
        a.rank_counts = routing->args.rank_counts;
        a.expert_counts = routing->args.expert_counts;
        a.routing = routing->number;
        wants.recv_row = routing->recv_row;
        wants.max_recv = routing->num_recv;
        wants.max_rows = routing->num_rows;
    }
    const Stream stream = current_stream(rank.arena()->device());
    if (wants.reports && is_capturing(stream)) return nullptr;
    py::gil_scoped_release nogil;
    return rank.dispatch(a, wants, stream);
}

std::optional<Stream> run(DeviceRank& rank, const CombinePlan& plan, const py::tuple& options,
                          const Routing& routing, py::handle x, py::handle topk_idx,
                          py::handle topk_weights, py::handle row_weights, py::handle wait_stats,
                          py::handle out) {
    if (exchange() == nullptr || rank.failed() || !plan.options.are_of(options)) {
        return std::nullopt;
    }
    CombineArgs a = plan.args;
    a.num_tokens = routing.args.num_tokens;
    a.num_recv = routing.num_recv;
    a.num_rows = routing.num_rows;
    a.routing = routing.number;
    Tensors t(rank);
    const int64_t slabs = a.layout == RecvLayout::kSlab ? rank.num_local() : 1;
    const int64_t rows = a.num_rows / std::max<int64_t>(slabs, 1);
    const bool is_slab = a.layout == RecvLayout::kSlab;
    const bool fits =
        is_slab ? t.take(x, plan.x, {slabs, rows, a.hidden}) : t.take(x, plan.x, {rows, a.hidden});
    if (!fits || !t.is_dense() || !t.is_aligned()) return std::nullopt;
    a.x = t.data();
    if (const int64_t bytes = a.num_rows * a.row_bytes(); bytes > 0) {
        a.arena_offset = rank.arena()->offset_of(reinterpret_cast<uintptr_t>(a.x), bytes);
    }
    if (!t.take(topk_idx, kInt64, {a.num_tokens, a.num_topk}) || !t.is_dense()) return std::nullopt;
    a.topk_idx = as<int64_t>(t.data());
    if (a.weighted && a.per_rank) {
        const bool fit = is_slab ? t.take(row_weights, kFloat32, {slabs, rows})
                                 : t.take(row_weights, kFloat32, {rows});
        if (!fit || !t.is_dense() || !t.is_aligned()) return std::nullopt;
        a.row_weights = as<float>(t.data());
    } else if (!row_weights.is_none()) {
        return std::nullopt;
    }
    if (a.weighted && !a.per_rank) {
        const bool fit = t.take(topk_weights, kFloat32, {a.num_tokens, a.num_topk});
        if (!fit || !t.is_dense()) return std::nullopt;
        a.topk_weights = as<float>(t.data());
    }
    if (!take_stats(t, wait_stats, kInt64, rank.shape().num_ranks, a.wait_stats)) {
        return std::nullopt;
    }
    if (!t.take(out, plan.x, {a.num_tokens, a.hidden}) || !t.is_dense()) return std::nullopt;
    a.out = t.data();
    a.send_row = routing.args.send_row;
    a.rank_counts = routing.args.rank_counts;
    a.recv_src = routing.recv_src;
    a.recv_row = routing.recv_row;
    const Stream stream = current_stream(rank.arena()->device());
    py::gil_scoped_release nogil;
    rank.combine(a, plan.wants, stream);
    return stream;
}

}  // namespace ep
