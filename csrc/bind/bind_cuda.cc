// Integers and structs between Python and the GPU side of the core. No logic, as in bind.cc.
#include "bind/bind_cuda.h"

#include <pybind11/stl.h>

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/dlpack.h"
#include "bind/exchange.h"
#include "bind/fields.h"
#include "bind/plans.h"
#include "contract/args.h"
#include "host/device_arena.h"
#include "host/device_rank.h"
#include "host/graph_hold.h"
#include "host/loopback_rails.h"
#include "host/rails.h"
#include "transport/beside_captures.h"
#include "transport/device_memory.h"

namespace py = pybind11;
using namespace py::literals;

namespace ep {
namespace {

Stream as_stream(uintptr_t address) { return reinterpret_cast<Stream>(address); }

// (code, bits)
dlpack::DataType as_type(std::pair<int, int> type) {
    return {static_cast<uint8_t>(type.first), static_cast<uint8_t>(type.second), 1};
}

// Waits for a begun call without the GIL; a signal handler that raises ends the communicator.
void await_report(DeviceRank& rank, Flight& flight) {
    constexpr auto kSlice = std::chrono::milliseconds(20);
    while (true) {
        {
            py::gil_scoped_release nogil;
            if (rank.await_report(flight, kSlice)) return;
        }
        if (PyErr_CheckSignals() == 0) continue;
        rank.interrupt();
        throw py::error_already_set();
    }
}

void bind_memory(py::module_& m) {
    static PyObject* device_error =
        PyErr_NewException("ep_comm._core.DeviceCallError", PyExc_RuntimeError, nullptr);
    m.attr("DeviceCallError") = py::reinterpret_borrow<py::object>(device_error);
    py::register_exception_translator([](std::exception_ptr raised) {
        try {
            if (raised) std::rethrow_exception(raised);
        } catch (const DeviceError& e) {
            PyErr_SetObject(device_error, py::make_tuple(e.call, e.what, e.code).ptr());
        }
    });
    py::class_<DeviceMemory, std::shared_ptr<DeviceMemory>>(m, "DeviceMemory")
        .def_static(
            "create",
            [](int device, int64_t bytes, bool ipc) {
                py::gil_scoped_release nogil;
                const auto kind = ipc ? DeviceMemory::Kind::kIpc : DeviceMemory::Kind::kVmm;
                return DeviceMemory::create(device, bytes, kind);
            },
            "device"_a, "bytes"_a, "ipc"_a = false)
        .def_static("map", &DeviceMemory::map, "device"_a, "fd"_a, "bytes"_a)
        .def_property_readonly("fd", &DeviceMemory::fd)
        .def_property_readonly("bytes", &DeviceMemory::bytes)
        .def_property_readonly(
            "address", [](const DeviceMemory& d) { return reinterpret_cast<uintptr_t>(d.data()); })
        .def_property_readonly(
            "is_ipc", [](const DeviceMemory& d) { return d.kind() == DeviceMemory::Kind::kIpc; })
        .def("drop", &DeviceMemory::drop, py::call_guard<py::gil_scoped_release>())
        .def("restore", &DeviceMemory::restore, py::call_guard<py::gil_scoped_release>())
        .def("restore_from", &DeviceMemory::restore_from, "fd"_a,
             py::call_guard<py::gil_scoped_release>())
        .def("close_fd", &DeviceMemory::close_fd);
    py::class_<StreamHold, std::shared_ptr<StreamHold>>(m, "StreamHold")
        .def(
            "use_on", [](StreamHold& self, uintptr_t stream) { self.use_on(as_stream(stream)); },
            "stream"_a);
    m.attr("DLPACK_INT") = int{dlpack::kInt};
    m.attr("DLPACK_UINT") = int{dlpack::kUInt};
    m.attr("DLPACK_FLOAT") = int{dlpack::kFloat};
    m.attr("DLPACK_BFLOAT") = int{dlpack::kBfloat};
    py::class_<DeviceArena, std::shared_ptr<DeviceArena>>(m, "DeviceArena")
        .def(py::init<std::shared_ptr<DeviceMemory>>(), "memory"_a)
        .def(
            "grant",
            [](DeviceArena& self, int64_t bytes, uintptr_t stream) {
                return self.grant(bytes, as_stream(stream));
            },
            "bytes"_a, "stream"_a)
        .def(
            "tensor",
            [](DeviceArena&, std::shared_ptr<StreamHold> hold, std::vector<int64_t> shape,
               std::pair<int, int> type) {
                std::byte* const data = hold->data();
                return as_tensor(std::move(hold), data, std::move(shape), as_type(type));
            },
            "hold"_a, "shape"_a, "type"_a)
        .def("offset_of", &DeviceArena::offset_of, "address"_a, "bytes"_a)
        .def(
            "reclaim",
            [](DeviceArena& self, uintptr_t stream) { return self.reclaim(as_stream(stream)); },
            "stream"_a)
        .def("stats", [](const DeviceArena& self) {
            const ArenaStats s = self.stats();
            return py::dict("capacity"_a = s.capacity, "in_use"_a = s.in_use, "peak"_a = s.peak,
                            "largest_free"_a = s.largest_free, "num_extents"_a = s.num_extents);
        });
}

// Ends a rank's thread, which may want the GIL.
struct WithoutGil {
    void operator()(DeviceRank* rank) const {
        py::gil_scoped_release nogil;
        delete rank;
    }
};
using RankPtr = std::unique_ptr<DeviceRank, WithoutGil>;
using PeerTuple = std::tuple<std::shared_ptr<DeviceMemory>, std::shared_ptr<DeviceMemory>, int, int,
                             int64_t, int64_t>;

// A Python object that native code keeps, from whichever thread drops it. Once Python has ended it stays.
std::shared_ptr<py::object> keep(py::object object) {
    return {new py::object(std::move(object)), [](py::object* held) {
                if (Py_IsInitialized() == 0) return;
                py::gil_scoped_acquire gil;
                delete held;
            }};
}

// A Python function as a hook of the watching thread.
std::function<void(OpKind, int, double)> as_late_hook(py::object late) {
    return [held = keep(std::move(late))](OpKind kind, int peer, double waited_s) {
        py::gil_scoped_acquire gil;
        try {
            (*held)(kind, peer, waited_s);
        } catch (py::error_already_set& raised) {
            raised.discard_as_unraisable("a late peer");
        }
    };
}

RankPtr make_rank(const Shape& shape, int rank, uint64_t generation,
                  const std::vector<int32_t>& owner, const std::vector<PeerTuple>& peers,
                  std::shared_ptr<DeviceArena> arena, std::tuple<double, double, double> clocks,
                  int max_blocks, py::object late, const std::optional<RailSetup>& rails,
                  bool can_mask) {
    std::vector<DevicePeer> views;
    for (const auto& [control, memory, pidfd, socket, pid, arena_bytes] : peers) {
        views.push_back({control, memory, {pidfd, socket, pid}, arena_bytes});
    }
    const auto [warn, arrival, progress] = clocks;
    auto hook = as_late_hook(std::move(late));
    py::gil_scoped_release nogil;
    return RankPtr(new DeviceRank(shape, rank, generation, owner, std::move(views),
                                  std::move(arena), PeerClocks{warn, arrival, progress}, max_blocks,
                                  std::move(hook), rails ? &*rails : nullptr, can_mask));
}

// The tensors of a handle that a flight was granted, in their order there.
py::tuple routing_tensors(const Flight& f, int64_t num_tokens, int64_t num_topk, int64_t num_recv,
                          int64_t num_rows, int64_t num_ranks, int64_t num_local) {
    const std::shared_ptr<StreamHold>& hold = f[Out::kRankCounts].hold;
    const auto make = [&](Out out, std::vector<int64_t> shape, int bits) {
        return as_tensor(hold, f[out].data(), std::move(shape), as_type({dlpack::kInt, bits}));
    };
    return py::make_tuple(
        make(Out::kSendRow, {num_tokens, num_topk}, 32), make(Out::kSrc, {num_recv, 2}, 32),
        make(Out::kRows, {num_rows, num_topk}, 32), make(Out::kRankCounts, {2, num_ranks}, 64),
        make(Out::kCounts, {num_local}, 32));
}

void bind_flight(py::module_& m) {
    using W = DispatchWants;
    py::class_<W>(m, "DispatchWants")
        .def(py::init<>()) EP_ADDRESS(W, status) EP_ADDRESS(W, num_recv) EP_ADDRESS(W, offsets)
            EP_ADDRESS(W, source_range) EP_ADDRESS(W, recv_row) EP_FIELD(W, max_recv)
                EP_FIELD(W, max_rows) EP_FIELD(W, num_sms) EP_FIELD(W, num_warps)
                    EP_FIELD(W, wide_ids) EP_FIELD(W, row_index) EP_FIELD(W, row_token)
                        EP_FIELD(W, reports) EP_FIELD(W, grants_all) EP_FIELD(W, by_copies)
                            EP_ADDRESS(W, begun) EP_FIELD(W, in_halves);
    using C = CombineWants;
    py::class_<C>(m, "CombineWants")
        .def(py::init<>()) EP_ADDRESS(C, begun) EP_FIELD(C, num_sms) EP_FIELD(C, num_stages)
            EP_FIELD(C, in_halves);
    py::class_<BegunCombine, std::shared_ptr<BegunCombine>>(m, "BegunCombine")
        .def_property_readonly("is_half",
                               [](const BegunCombine& b) { return b.half == Half::kSend; });
    py::class_<Flight, std::shared_ptr<Flight>>(m, "Flight")
        .def_property_readonly("outcome", [](const Flight& f) { return f.report.outcome; })
        .def_property_readonly("num_recv", [](const Flight& f) { return f.report.num_recv; })
        .def_property_readonly("num_rows", [](const Flight& f) { return f.report.num_rows; })
        .def_property_readonly("index_rows", [](const Flight& f) { return f.report.index_rows; })
        .def_property_readonly("num_logged", [](const Flight& f) { return f.report.num_logged; })
        .def_property_readonly("is_half", [](const Flight& f) { return f.half == Half::kSend; })
        .def_readonly("number", &Flight::number)
        .def_property_readonly("num_tokens", [](const Flight& f) { return f.job.args.num_tokens; })
        .def_property_readonly(
            "stream", [](const Flight& f) { return reinterpret_cast<uintptr_t>(f.stream); })
        .def(
            "has", [](const Flight& f, Out out) { return bool(f[out]); }, "out"_a)
        .def(
            "tensor",
            [](const Flight& f, Out out, std::vector<int64_t> shape, std::pair<int, int> type,
               int64_t skip, std::vector<int64_t> strides) {
                if (!f[out]) throw py::value_error("this dispatch was granted no such memory");
                return as_tensor(f[out].hold, f[out].data() + skip, std::move(shape), as_type(type),
                                 std::move(strides));
            },
            "out"_a, "shape"_a, "type"_a, "skip_bytes"_a = 0, "strides"_a = std::vector<int64_t>{})
        .def("routing_tensors", &routing_tensors, "num_tokens"_a, "num_topk"_a, "num_recv"_a,
             "num_rows"_a, "num_ranks"_a, "num_local"_a)
        .def(
            "use_on", [](const Flight& f, uintptr_t stream) { f.use_on(as_stream(stream)); },
            "stream"_a)
        .def("routing", &Flight::routing);
    py::class_<Routing, std::shared_ptr<Routing>>(m, "Routing")
        .def_property_readonly("num_tokens", [](const Routing& r) { return r.args.num_tokens; });
    m.attr("BEGUN_AT") = kBegunAt;
    py::enum_<Out>(m, "Out")
        .value("X", Out::kX)
        .value("SCALES", Out::kScales)
        .value("IDS", Out::kIds)
        .value("WEIGHTS", Out::kWeights)
        .value("SRC", Out::kSrc)
        .value("ROWS", Out::kRows)
        .value("ROW_INDEX", Out::kRowIndex)
        .value("ROW_TOKEN", Out::kRowToken)
        .value("RAIL_LOG", Out::kRailLog)
        .value("SEND_ROW", Out::kSendRow)
        .value("RANK_COUNTS", Out::kRankCounts)
        .value("COUNTS", Out::kCounts)
        .value("OFFSETS", Out::kOffsets)
        .value("SOURCE_RANGE", Out::kSourceRange)
        .value("RANK_ENDS", Out::kRankEnds)
        .value("NUMBERS", Out::kNumbers);
}

// Of the tensor a plan is made for; None for none.
std::optional<dlpack::DataType> type_of(const py::object& tensor) {
    dlpack::Tensor view;
    if (tensor.is_none() || exchange() == nullptr || !see(tensor, view)) return std::nullopt;
    return view.dtype;
}

void bind_plans(py::module_& m) {
    py::class_<DispatchPlan>(m, "DispatchPlan")
        .def(py::init([](const DispatchArgs& args, const DispatchWants& wants,
                         const py::tuple& options, const py::object& x, const py::object& scales) {
                 return DispatchPlan{args, wants, OptionTypes(options), type_of(x),
                                     type_of(scales)};
             }),
             "args"_a, "wants"_a, "options"_a, "x"_a, "scales"_a)
        .def(
            "run",
            [](const DispatchPlan& self, DeviceRank& rank, const py::tuple& options, py::object x,
               py::object topk_idx, py::object topk_weights, py::object scales,
               py::object recv_stats, py::object wait_stats, const Routing* routing) {
                return run(rank, self, options, x, topk_idx, topk_weights, scales, recv_stats,
                           wait_stats, routing);
            },
            "rank"_a, "options"_a, "x"_a, "topk_idx"_a, "topk_weights"_a, "scales"_a,
            "recv_stats"_a, "wait_stats"_a, "routing"_a);
    py::class_<CombinePlan>(m, "CombinePlan")
        .def(py::init([](const CombineArgs& args, const CombineWants& wants,
                         const py::tuple& options, const py::object& x) {
                 return CombinePlan{args, wants, OptionTypes(options), type_of(x)};
             }),
             "args"_a, "wants"_a, "options"_a, "x"_a)
        .def(
            "run",
            [](const CombinePlan& self, DeviceRank& rank, const py::tuple& options,
               const Routing& routing, py::object x, py::object topk_idx, py::object topk_weights,
               py::object row_weights, py::object wait_stats,
               py::object out) -> std::optional<uintptr_t> {
                const auto stream = run(rank, self, options, routing, x, topk_idx, topk_weights,
                                        row_weights, wait_stats, out);
                if (!stream) return std::nullopt;
                return reinterpret_cast<uintptr_t>(*stream);
            },
            "rank"_a, "options"_a, "routing"_a, "x"_a, "topk_idx"_a, "topk_weights"_a,
            "row_weights"_a, "wait_stats"_a, "out"_a);
    m.def("has_plans", [] { return exchange() != nullptr; });
}

// Rails of a buffer that spans nodes: pretended ones, and those of the plugin by the address of its table.
void bind_rails(py::module_& m) {
    py::class_<RailSetup>(m, "RailSetup")
        .def(py::init([](const RailShape& shape, uintptr_t kernels, py::object keeps) {
                 return RailSetup{shape, reinterpret_cast<const kernels::RailKernels*>(kernels),
                                  keep(std::move(keeps))};
             }),
             "shape"_a, "kernels"_a, "keeps"_a);
    using T = Trouble;
    py::class_<T>(m, "Trouble")
        .def(py::init<>()) EP_FIELD(T, seed) EP_FIELD(T, max_held) EP_FIELD(T, max_delay_ns)
            EP_FIELD(T, stalled_peer) EP_FIELD(T, is_silent) EP_FIELD(T, is_mapped)
                EP_FIELD(T, lost_from);
    py::class_<LoopbackRails, std::shared_ptr<LoopbackRails>>(m, "LoopbackRails")
        .def(py::init(&LoopbackRails::create), "shape"_a, "rank"_a, "segments"_a, "max_blocks"_a,
             py::call_guard<py::gil_scoped_release>())
        .def("setup", &LoopbackRails::setup)
        .def("set_trouble", &LoopbackRails::set_trouble, "trouble"_a);
}

void bind_rank(py::module_& m) {
    m.attr("MAX_REPORTS") = kMaxReports;
    py::class_<DeviceRank, RankPtr>(m, "DeviceRank")
        .def(py::init(&make_rank), "shape"_a, "rank"_a, "generation"_a, "expert_owner"_a, "peers"_a,
             "arena"_a, "clocks"_a, "max_blocks"_a, "late"_a, "rails"_a = std::nullopt,
             "can_mask"_a = false)
        .def(
            "dispatch",
            [](DeviceRank& self, const DispatchArgs& args, const DispatchWants& wants,
               uintptr_t stream) {
                py::gil_scoped_release nogil;
                return self.dispatch(args, wants, as_stream(stream));
            },
            "args"_a, "wants"_a, "stream"_a)
        .def("push_copies", &DeviceRank::push_copies, "flight"_a,
             py::call_guard<py::gil_scoped_release>())
        .def("has_report", &DeviceRank::has_report, "flight"_a)
        .def("await_report", &await_report, "flight"_a)
        .def("settle", &DeviceRank::settle, "flight"_a)
        .def(
            "combine",
            [](DeviceRank& self, const CombineArgs& args, const CombineWants& wants,
               uintptr_t stream) {
                py::gil_scoped_release nogil;
                return self.combine(args, wants, as_stream(stream));
            },
            "args"_a, "wants"_a, "stream"_a)
        .def(
            "finish_dispatch",
            [](DeviceRank& self, Flight& flight, uintptr_t stream) {
                py::gil_scoped_release nogil;
                self.finish(flight, as_stream(stream));
            },
            "flight"_a, "stream"_a)
        .def(
            "finish_combine",
            [](DeviceRank& self, BegunCombine& begun, uintptr_t stream) {
                py::gil_scoped_release nogil;
                self.finish(begun, as_stream(stream));
            },
            "begun"_a, "stream"_a)
        .def(
            "stages_dispatch",
            [](const DeviceRank& self, const DispatchArgs& a) { return self.stages(a); }, "args"_a)
        .def(
            "stages_combine",
            [](const DeviceRank& self, const CombineArgs& a) { return self.stages(a); }, "args"_a)
        .def(
            "refuse",
            [](DeviceRank& self, OpKind kind, const Outcome& why, uintptr_t stream) {
                py::gil_scoped_release nogil;
                self.refuse(kind, why, as_stream(stream));
            },
            "kind"_a, "why"_a, "stream"_a)
        .def("mask", &DeviceRank::mask, "rank"_a, py::call_guard<py::gil_scoped_release>())
        .def("masked", &DeviceRank::masked)
        .def("masked_and_seq", &DeviceRank::masked_and_seq,
             py::call_guard<py::gil_scoped_release>())
        .def("unmask", &DeviceRank::unmask, "seq"_a, "masked"_a,
             py::call_guard<py::gil_scoped_release>())
        .def("is_gone", &DeviceRank::is_gone, "peer"_a, py::call_guard<py::gil_scoped_release>())
        .def("take_deferred", &DeviceRank::take_deferred)
        .def("failed", &DeviceRank::failed)
        .def("fault", &DeviceRank::fault, py::call_guard<py::gil_scoped_release>())
        .def("verdict", &DeviceRank::verdict)
        .def("interrupt", &DeviceRank::interrupt)
        .def("pause_watch", &DeviceRank::pause_watch, "paused"_a,
             py::call_guard<py::gil_scoped_release>())
        .def("leave", &DeviceRank::leave, py::call_guard<py::gil_scoped_release>())
        .def("default_sms", &DeviceRank::default_sms, "kind"_a)
        .def("seq", &DeviceRank::seq)
        .def("rail_counters", [](const DeviceRank& self) {
            const py::gil_scoped_release nogil;
            return self.rails() == nullptr ? std::vector<uint64_t>{} : self.rails()->counters();
        });
    m.def(
        "is_capturing", [](uintptr_t stream) { return is_capturing(as_stream(stream)); },
        "stream"_a);
    m.def("release_dropped", py::overload_cast<>(&release_dropped),
          py::call_guard<py::gil_scoped_release>());
    struct Scope {  // of a `with`
        std::optional<BesideCaptures> beside;
    };
    py::class_<Scope>(m, "BesideCaptures")
        .def(py::init<>())
        .def("__enter__", [](Scope& self) { self.beside.emplace(); })
        .def("__exit__", [](Scope& self, const py::args&) { self.beside.reset(); });
}

}  // namespace

void bind_cuda(py::module_& m) {
    bind_memory(m);
    bind_rails(m);
    bind_flight(m);
    bind_rank(m);
    bind_plans(m);
}

}  // namespace ep
