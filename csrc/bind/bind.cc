// Integers and structs between Python and C++. No logic: every line here names something that lives
// elsewhere.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <exception>

#ifdef EP_HAS_CUDA
#include "bind/bind_cuda.h"
#endif
#include "bind/bind_eplb.h"
#include "bind/bind_rail.h"
#include "bind/dlpack.h"
#include "bind/fields.h"
#include "contract/args.h"
#include "contract/build_info.h"
#include "contract/calls.h"
#include "contract/config.h"
#include "contract/layout.h"
#include "contract/records.h"
#include "contract/shape.h"
#include "contract/stage.h"
#include "contract/status.h"
#include "cpu/communicator.h"
#include "cpu/rank.h"
#include "cpu/simd.h"
#include "host/arena.h"
#include "transport/segment.h"

namespace py = pybind11;
using namespace py::literals;

namespace ep {
namespace {

// A signal handler that raised while a call waited, thrown once the call has come home.
struct Interrupt {
    std::exception_ptr raised;

    bool poll() {
        py::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() == 0) return false;
        raised = std::make_exception_ptr(py::error_already_set());
        return true;
    }
    void rethrow() const {
        if (raised) std::rethrow_exception(raised);
    }
};

// Runs `call(hooks)` without the GIL.
template <class Call>
auto blocking(const py::object& late, Call call) {
    Interrupt interrupt;
    const cpu::WaitHooks hooks{[&] { return interrupt.poll(); },
                               [&](Site site, int peer, double waited_s) {
                                   py::gil_scoped_acquire gil;
                                   if (!late.is_none())
                                       late(static_cast<int>(site), peer, waited_s);
                               }};
    auto result = [&] {
        py::gil_scoped_release nogil;
        return call(hooks);
    }();
    interrupt.rethrow();
    return result;
}

// Bytes of a held extent as a DLPack capsule; the extent returns when the last array over it dies,
// on any thread.
using ByteShape = std::vector<int64_t>;  // of a dense array, its last size in bytes

struct HeldArray {
    dlpack::ManagedTensor managed;
    ByteShape shape;
    std::shared_ptr<ExtentHold> hold;
};

py::capsule to_dlpack(std::shared_ptr<ExtentHold> hold, uintptr_t address, ByteShape shape) {
    auto* array = new HeldArray{{}, std::move(shape), std::move(hold)};
    array->managed.tensor = {reinterpret_cast<void*>(address),
                             {dlpack::kCpu, 0},
                             static_cast<int32_t>(array->shape.size()),
                             {dlpack::kUInt, 8, 1},
                             array->shape.data(),
                             nullptr,
                             0};
    array->managed.context = array;
    array->managed.deleter = [](dlpack::ManagedTensor* self) {
        delete static_cast<HeldArray*>(self->context);
    };
    return py::capsule(&array->managed, "dltensor", [](PyObject* capsule) {
        if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // taken over by an array
        auto* managed =
            static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
        managed->deleter(managed);
    });
}

Outcome make_outcome(int code, const std::string& reason, std::array<int64_t, 4> detail) {
    Outcome outcome;
    outcome.incident.code = static_cast<uint16_t>(code);
    std::copy(detail.begin(), detail.end(), outcome.detail);
    std::strncpy(outcome.reason, reason.c_str(), kReasonBytes - 1);
    return outcome;
}

template <class Layout>
py::list regions_of(const Layout& layout) {
    py::list out;
    for (const NamedRegion& r : layout.regions()) {
        out.append(py::make_tuple(r.name, r.region.offset, r.region.bytes));
    }
    return out;
}

void bind_contract(py::module_& m) {
    m.attr("MAX_TOPK") = kMaxTopk;
    m.attr("MAX_RANKS") = kMaxRanks;
    m.attr("MAX_SLOTS") = kMaxSlots;
    m.attr("ROW_ALIGN") = kRowAlign;
    m.attr("EXTENT_ALIGN") = kExtentAlign;
    m.attr("REASON_BYTES") = kReasonBytes;
    m.attr("PROTOCOL_VERSION") = kProtocolVersion;
    m.attr("BAD_SEAL") = kBadSeal;
    m.attr("STRUCT_SIZES") =
        py::make_tuple(sizeof(EntryRecord), sizeof(BaseRecord), sizeof(ControlHeader),
                       sizeof(Incident), ControlLayout::kEntryStride, ControlLayout::kWordStride);
    py::list fields;
    for (const char* name : kFieldNames) fields.append(name);
    m.attr("DESCRIPTOR_FIELDS") = py::tuple(fields);

    py::enum_<OpKind>(m, "OpKind")
        .value("NONE", OpKind::kNone)
        .value("DISPATCH", OpKind::kDispatch)
        .value("COMBINE", OpKind::kCombine);
    py::enum_<RecvLayout>(m, "RecvLayout")
        .value("COMPACT", RecvLayout::kCompact)
        .value("GROUPED", RecvLayout::kGrouped)
        .value("SLAB", RecvLayout::kSlab);
    py::enum_<DType>(m, "DType")
        .value("BF16", DType::kBF16)
        .value("F16", DType::kF16)
        .value("F32", DType::kF32)
        .value("E4M3", DType::kE4M3)
        .value("E5M2", DType::kE5M2)
        .value("I8", DType::kI8)
        .value("U8", DType::kU8);
    py::enum_<Quantize>(m, "Quantize")
        .value("NONE", Quantize::kNone)
        .value("FP8", Quantize::kFp8)
        .value("FP8_UE8M0", Quantize::kFp8Ue8m0);
    py::enum_<Site>(m, "Site")
        .value("NONE", Site::kNone)
        .value("SLOT", Site::kSlot)
        .value("ENTRY", Site::kEntry)
        .value("BASE", Site::kBase)
        .value("ROWS", Site::kRows)
        .value("PULLED", Site::kPulled)
        .value("LINE", Site::kLine)
        .value("RAIL_NOTICE", Site::kRailNotice)
        .value("RAIL_CHUNK", Site::kRailChunk)
        .value("RAIL_CREDIT", Site::kRailCredit);

    py::class_<Shape>(m, "Shape")
        .def(py::init<>()) EP_FIELD(Shape, num_ranks) EP_FIELD(Shape, num_slots)
            EP_FIELD(Shape, num_experts) EP_FIELD(Shape, max_local_experts)
                EP_FIELD(Shape, num_topk) EP_FIELD(Shape, max_tokens) EP_FIELD(Shape, stage_bytes);
    m.def("stage_bytes_for", &stage_bytes_for, "shape"_a, "hidden"_a);
    py::class_<ControlLayout>(m, "ControlLayout")
        .def(py::init<const Shape&>())
        .def_readonly("end", &ControlLayout::end)
        .def("regions", &regions_of<ControlLayout>);
    py::class_<MetaLayout>(m, "MetaLayout")
        .def(py::init<int, bool, bool, bool, int64_t, bool>(), "num_topk"_a, "with_routing"_a,
             "with_weights"_a, "with_rows"_a, "scale_bytes"_a, "with_seal"_a = false)
        .def_readonly("bytes", &MetaLayout::bytes);
}

void bind_status(py::module_& m) {
    py::class_<Outcome>(m, "Outcome")
        .def(py::init(&make_outcome), "code"_a, "reason"_a = "",
             "detail"_a = std::array<int64_t, 4>{})
        .def_property_readonly("code", [](const Outcome& o) { return int{o.incident.code}; })
        .def_property_readonly("site", [](const Outcome& o) { return o.incident.site; })
        .def_property_readonly("op", [](const Outcome& o) { return OpKind{o.incident.op}; })
        .def_property_readonly("rank", [](const Outcome& o) { return int{o.incident.rank}; })
        .def_property_readonly("peer", [](const Outcome& o) { return int{o.incident.peer}; })
        .def_property_readonly("seq", [](const Outcome& o) { return o.incident.seq; })
        .def_property_readonly("peer_seq", [](const Outcome& o) { return o.incident.peer_seq; })
        .def_property_readonly("waited_s",
                               [](const Outcome& o) { return double(o.incident.waited_ns) * 1e-9; })
        .def_property_readonly("want", [](const Outcome& o) { return o.incident.want; })
        .def_property_readonly("have", [](const Outcome& o) { return o.incident.have; })
        .def_property_readonly("detail",
                               [](const Outcome& o) {
                                   return py::make_tuple(o.detail[0], o.detail[1], o.detail[2],
                                                         o.detail[3]);
                               })
        .def_property_readonly("reason", [](const Outcome& o) {  // a peer's bytes: any may be there
            return py::reinterpret_steal<py::str>(PyUnicode_DecodeUTF8(
                o.reason, static_cast<Py_ssize_t>(strnlen(o.reason, kReasonBytes)), "replace"));
        });
}

void bind_args(py::module_& m) {
    using R = Replicas;
    py::class_<R>(m, "Replicas")
        .def(py::init<>()) EP_ADDRESS(R, first) EP_ADDRESS(R, slot) EP_ADDRESS(R, until)
            EP_FIELD(R, num_logical);
    using D = DispatchArgs;
    py::class_<D>(m, "DispatchArgs")
        .def(py::init<>()) EP_ADDRESS(D, x) EP_ADDRESS(D, scales) EP_ADDRESS(D, topk_idx)
            EP_ADDRESS(D, topk_weights) EP_ADDRESS(D, send_row) EP_ADDRESS(D, rank_counts)
                EP_ADDRESS(D, expert_counts) EP_FIELD(D, num_tokens) EP_FIELD(D, x_stride)
                    EP_FIELD(D, hidden) EP_FIELD(D, scale_bytes) EP_FIELD(D, capacity) EP_FIELD(
                        D, given_capacity) EP_FIELD(D, index_capacity) EP_FIELD(D, num_topk)
                        EP_FIELD(D, alignment) EP_FIELD(D, scale_block) EP_FIELD(D, layout)
                            EP_FIELD(D, dtype) EP_FIELD(D, quantize) EP_FIELD(D, with_weights)
                                EP_FIELD(D, is_static) EP_FIELD(D, cached) EP_FIELD(D, paranoid)
                                    EP_FIELD(D, routing) EP_ADDRESS(D, rank_ends)
                                        EP_FIELD(D, x_offset) EP_FIELD(D, replicas)
                                            EP_ADDRESS(D, routed_idx) EP_ADDRESS(D, logical_load)
                                                EP_ADDRESS(D, recv_stats) EP_ADDRESS(D, wait_stats)
        .def("row_bytes", &D::row_bytes);
    using U = UnpackArgs;
    py::class_<U>(m, "UnpackArgs")
        .def(py::init<>()) EP_ADDRESS(U, recv_src) EP_ADDRESS(U, recv_row) EP_ADDRESS(U, topk_idx)
            EP_ADDRESS(U, topk_weights) EP_ADDRESS(U, scales) EP_ADDRESS(U, offsets)
                EP_ADDRESS(U, row_index) EP_ADDRESS(U, row_token) EP_ADDRESS(U, source_range)
                    EP_FIELD(U, max_recv) EP_FIELD(U, max_rows) EP_FIELD(U, max_index)
                        EP_FIELD(U, row_alignment) EP_FIELD(U, idx_is_int64);
    using C = CombineArgs;
    py::class_<C>(m, "CombineArgs")
        .def(py::init<>()) EP_ADDRESS(C, x) EP_ADDRESS(C, y_weights) EP_ADDRESS(C, topk_idx)
            EP_ADDRESS(C, topk_weights) EP_ADDRESS(C, send_row) EP_ADDRESS(C, rank_counts)
                EP_ADDRESS(C, recv_src) EP_ADDRESS(C, recv_row) EP_ADDRESS(C, bias0)
                    EP_ADDRESS(C, bias1) EP_ADDRESS(C, out) EP_ADDRESS(C, out_weights)
                        EP_FIELD(C, num_tokens) EP_FIELD(C, num_recv) EP_FIELD(C, num_rows)
                            EP_FIELD(C, hidden) EP_FIELD(C, arena_offset) EP_FIELD(C, num_topk)
                                EP_FIELD(C, layout) EP_FIELD(C, dtype) EP_FIELD(C, weighted)
                                    EP_FIELD(C, with_weights) EP_FIELD(C, sum_weights)
                                        EP_FIELD(C, topk_order) EP_FIELD(C, per_rank)
                                            EP_FIELD(C, routing) EP_ADDRESS(C, row_weights)
                                                EP_ADDRESS(C, wait_stats) EP_ADDRESS(C, rail_log)
                                                    EP_FIELD(C, num_logged)
                                                        EP_FIELD(C, log_has_weights);
}

// Memory of one rank: extents of its arena as arrays.
struct ArenaView {
    std::shared_ptr<Segment> segment;
    std::shared_ptr<Arena> arena;

    py::object array(ByteShape shape) const {
        int64_t bytes = 1;
        for (const int64_t size : shape) bytes *= size;
        const auto extent = arena->grant(bytes);
        if (!extent) return py::none();
        auto hold = std::make_shared<ExtentHold>(arena, *extent);
        const auto address = reinterpret_cast<uintptr_t>(segment->data()) + extent->offset;
        return to_dlpack(std::move(hold), address, std::move(shape));
    }
    int64_t offset_of(uintptr_t address, int64_t bytes) const {
        const auto base = reinterpret_cast<uintptr_t>(segment->data());
        if (address < base || address + bytes > base + segment->bytes()) return -1;
        const auto offset = static_cast<int64_t>(address - base);
        return arena->find(offset, bytes) ? offset : -1;
    }
    void discard_free() const {
        // An operation begun on the communication thread may take memory at any time.
        arena->visit_free(
            [this](const Extent& range) { segment->discard(range.offset, range.bytes); });
    }
};

void bind_memory(py::module_& m) {
    static PyObject* system_error = nullptr;
    system_error = PyErr_NewException("ep_comm._core.SystemCallError", PyExc_OSError, nullptr);
    m.attr("SystemCallError") = py::reinterpret_borrow<py::object>(system_error);
    py::register_exception_translator([](std::exception_ptr raised) {
        try {
            if (raised) std::rethrow_exception(raised);
        } catch (const SystemError& e) {
            PyErr_SetObject(system_error, py::make_tuple(e.error, e.call).ptr());
        }
    });
    py::class_<Segment, std::shared_ptr<Segment>>(m, "Segment")
        .def_static(
            "create",
            [](const std::string& label, int64_t bytes) {
                return Segment::create(label.c_str(), bytes);
            },
            "label"_a, "bytes"_a)
        .def_static("map", &Segment::map, "fd"_a, "bytes"_a)
        .def_property_readonly("fd", &Segment::fd)
        .def_property_readonly("bytes", &Segment::bytes)
        .def_property_readonly(
            "address", [](const Segment& s) { return reinterpret_cast<uintptr_t>(s.data()); })
        .def("committed_bytes", &Segment::committed_bytes)
        .def("close_fd", &Segment::close_fd);
    py::class_<ArenaView>(m, "Arena")
        .def(py::init([](std::shared_ptr<Segment> segment) {
                 auto arena = std::make_shared<Arena>(segment->bytes(), segment);
                 return ArenaView{std::move(segment), std::move(arena)};
             }),
             "segment"_a)
        .def("array", &ArenaView::array, "byte_shape"_a)
        .def("offset_of", &ArenaView::offset_of, "address"_a, "bytes"_a)
        .def("discard_free", &ArenaView::discard_free, py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("in_use", [](const ArenaView& a) { return a.arena->in_use(); })
        .def("stats", [](const ArenaView& a) {
            const ArenaStats s = a.arena->stats();
            return py::dict("capacity"_a = s.capacity, "in_use"_a = s.in_use, "peak"_a = s.peak,
                            "largest_free"_a = s.largest_free, "num_extents"_a = s.num_extents);
        });
}

std::unique_ptr<cpu::Communicator> make_communicator(
    const Shape& shape, int rank, uint64_t generation, std::vector<int32_t> owner,
    const std::vector<
        std::tuple<std::shared_ptr<Segment>, std::shared_ptr<Segment>, int, int, int64_t>>& peers,
    const ArenaView& arena, std::tuple<double, double, double> clocks, bool can_mask) {
    std::vector<cpu::Peer> views;
    for (const auto& [control, memory, pidfd, socket, pid] : peers) {
        views.push_back({control, memory, {pidfd, socket, pid}});
    }
    const auto [warn, arrival, progress] = clocks;
    return std::make_unique<cpu::Communicator>(
        std::make_unique<cpu::Rank>(shape, rank, generation, std::move(owner), std::move(views),
                                    arena.arena, cpu::Clocks{warn, arrival, progress}, can_mask));
}

void bind_cpu(py::module_& m) {
    using cpu::Communicator;
    using cpu::Dispatched;
    using cpu::Pending;
    py::class_<Dispatched>(m, "Dispatched")
        .def_readonly("outcome", &Dispatched::outcome)
        .def_readonly("seq", &Dispatched::seq)
        .def_readonly("num_recv", &Dispatched::num_recv)
        .def_readonly("num_rows", &Dispatched::num_rows)
        .def_readonly("group_start", &Dispatched::group_start)
        .def_property_readonly("has_lost", [](const Dispatched& d) { return !d.lost_rows.empty(); })
        .def("drop", [](Dispatched& d) {
            d.x.reset();
            d.meta.reset();
        });
    py::class_<Pending, std::shared_ptr<Pending>>(m, "Pending")
        .def("done", &Pending::done)
        .def("wait",
             [](Pending& self) {
                 return blocking(py::none(), [&](const auto& hooks) { return self.wait(hooks); });
             })
        .def_readonly("dispatched", &Pending::dispatched)
        .def_readonly("combined", &Pending::combined);
    py::class_<Communicator>(m, "CpuCommunicator")
        .def(py::init(&make_communicator), "shape"_a, "rank"_a, "generation"_a, "expert_owner"_a,
             "peers"_a, "arena"_a, "clocks"_a, "can_mask"_a = false)
        .def(
            "dispatch",
            [](Communicator& self, const DispatchArgs& args, const py::object& late) {
                return blocking(late,
                                [&](const auto& hooks) { return self.dispatch(args, hooks); });
            },
            "args"_a, "late"_a = py::none())
        .def(
            "combine",
            [](Communicator& self, const CombineArgs& args, const py::object& late) {
                return blocking(late, [&](const auto& hooks) { return self.combine(args, hooks); });
            },
            "args"_a, "late"_a = py::none())
        .def("refuse", &Communicator::refuse, "kind"_a, "why"_a,
             py::call_guard<py::gil_scoped_release>())
        .def("begin_dispatch", &Communicator::begin_dispatch, "args"_a,
             py::call_guard<py::gil_scoped_release>())
        .def("begin_combine", &Communicator::begin_combine, "args"_a,
             py::call_guard<py::gil_scoped_release>())
        .def("drain",
             [](Communicator& self) {
                 return blocking(py::none(), [&](const auto& hooks) { return self.drain(hooks); });
             })
        .def(
            "unpack",
            [](Communicator& self, const Dispatched& d, const DispatchArgs& a,
               const UnpackArgs& out) {
                py::gil_scoped_release nogil;
                return self.rank().unpack(d, a, out);
            },
            "dispatched"_a, "args"_a, "out"_a)
        .def(
            "x_array",
            [](Communicator& self, const Dispatched& d, ByteShape shape) {
                const auto address =
                    reinterpret_cast<uintptr_t>(self.rank().arena_data()) + d.x->extent().offset;
                return to_dlpack(d.x, address, std::move(shape));
            },
            "dispatched"_a, "byte_shape"_a)
        .def("close", &Communicator::close, py::call_guard<py::gil_scoped_release>())
        .def("verdict", [](Communicator& self) { return self.rank().verdict(); })
        .def(
            "mask", [](Communicator& self, int rank) { self.rank().mask(rank); }, "rank"_a)
        .def("masked", [](Communicator& self) { return self.rank().masked(); })
        .def("masked_and_seq",
             [](Communicator& self) { return std::pair(self.rank().masked(), self.rank().seq()); })
        .def(
            "unmask",
            [](Communicator& self, uint64_t seq, uint64_t masked) {
                py::gil_scoped_release nogil;
                self.rank().unmask(seq, masked);
            },
            "seq"_a, "masked"_a)
        .def(
            "is_gone", [](Communicator& self, int peer) { return self.rank().is_gone(peer); },
            "peer"_a)
        .def("seq", [](Communicator& self) { return self.rank().seq(); })
        .def("seed_seq", [](Communicator& self, uint64_t seq) { self.rank().seed_seq(seq); });
    m.def(
        "dispatch_can_lack_ranks", [](const DispatchArgs& a) { return can_lack_ranks(a); },
        "args"_a);
    m.def(
        "combine_can_lack_ranks", [](const CombineArgs& a) { return can_lack_ranks(a); }, "args"_a);
    m.def("simd", [] { return std::string(cpu::simd().name); });
    m.def(
        "force_simd",
        [](std::optional<std::string> name) {
            return cpu::force_simd(name ? name->c_str() : nullptr);
        },
        "name"_a);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "Native part of ep_comm: contract, transport, arena, CPU backend.";
    m.attr("BUILD") = py::dict(
        "version"_a = kBuildInfo.version, "build_type"_a = kBuildInfo.build_type,
        "compiler"_a = kBuildInfo.compiler, "simd"_a = kBuildInfo.simd, "cuda"_a = kBuildInfo.cuda,
        "cuda_archs"_a = kBuildInfo.cuda_archs, "cuda_missing"_a = kBuildInfo.cuda_missing,
        "nvshmem"_a = kBuildInfo.nvshmem, "nvshmem_missing"_a = kBuildInfo.nvshmem_missing);
    bind_contract(m);
    bind_status(m);
    bind_args(m);
    bind_memory(m);
    bind_cpu(m);
    bind_eplb(m);
    bind_rail(m);
#ifdef EP_HAS_CUDA
    bind_cuda(m);
#endif
}

}  // namespace ep
