// The module ep_comm._nvshmem: integers and structs, and nothing else. Opened only for a buffer that
// spans nodes; the core does not know of it. RailShape is bound in the core, and means the same here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string_view>

#include "plugin/probe.h"
#include "plugin/rails.h"
#include "transport/nvshmem.h"

namespace py = pybind11;
using namespace py::literals;

namespace ep {
namespace {

using Nogil = py::call_guard<py::gil_scoped_release>;

NvshmemId id_of(const py::bytes& data) {
    const std::string_view view = data;
    NvshmemId id;
    if (view.size() != id.size()) throw py::value_error("an id has 128 bytes");
    std::memcpy(id.data(), view.data(), id.size());
    return id;
}

}  // namespace

PYBIND11_MODULE(_nvshmem, m) {
    m.doc() = "NVSHMEM for ep_comm: its world, its memory, kernels that use it.";
    static PyObject* error =
        PyErr_NewException("ep_comm._nvshmem.NvshmemError", PyExc_RuntimeError, nullptr);
    m.attr("NvshmemError") = py::reinterpret_borrow<py::object>(error);
    py::register_exception_translator([](std::exception_ptr raised) {
        try {
            if (raised) std::rethrow_exception(raised);
        } catch (const NvshmemError& e) {
            PyErr_SetObject(error, py::make_tuple(e.call, e.status).ptr());
        }
    });
    m.def("compiled_version", &nvshmem::compiled_version);
    m.def("host_version", &nvshmem::host_version);
    m.def("is_initialized", &nvshmem::is_initialized);
    m.def("new_id", [] {
        const NvshmemId id = nvshmem::new_id();
        return py::bytes(reinterpret_cast<const char*>(id.data()), id.size());
    });
    py::class_<NvshmemSegment>(m, "Segment")
        .def_property_readonly(
            "address", [](const NvshmemSegment& s) { return reinterpret_cast<uintptr_t>(s.data); })
        .def_readonly("bytes", &NvshmemSegment::bytes);
    py::class_<NvshmemWorld, std::shared_ptr<NvshmemWorld>>(m, "World")
        .def_static(
            "join",
            [](const py::bytes& id, int pe, int num_pes,
               const std::vector<std::pair<std::string, std::string>>& settings) {
                const NvshmemId unique = id_of(id);
                const py::gil_scoped_release nogil;
                return NvshmemWorld::join(unique, pe, num_pes, settings);
            },
            "id"_a, "pe"_a, "num_pes"_a, "settings"_a)
        .def("my_pe", &NvshmemWorld::my_pe)
        .def("num_pes", &NvshmemWorld::num_pes)
        .def("is_mapped", &NvshmemWorld::is_mapped, "segment"_a, "pe"_a)
        .def("allocate", &NvshmemWorld::allocate, "bytes"_a, Nogil())
        .def("clear", &NvshmemWorld::clear, "segment"_a, Nogil())
        .def("leave", &NvshmemWorld::leave, Nogil());
    py::class_<NvshmemRails, std::shared_ptr<NvshmemRails>>(m, "Rails")
        .def(py::init(&make_nvshmem_rails), "segment"_a, "pe"_a, "has_network"_a, Nogil())
        .def_property_readonly("kernels", [](const NvshmemRails& rails) {
            return reinterpret_cast<uintptr_t>(&rails.table());
        });
    m.def(
        "probe",
        [](const NvshmemSegment& segment, const RailShape& shape, int rank,
           const std::vector<int>& pe, bool has_network, uint64_t first, int num_chunks,
           double limit_s) {
            ProbeResult r;
            {
                const py::gil_scoped_release nogil;
                r = probe_nvshmem(segment, shape, rank, pe, has_network, first, num_chunks,
                                  limit_s);
            }
            return py::make_tuple(r.wrong_units, r.code, r.peer);
        },
        "segment"_a, "shape"_a, "rank"_a, "pe"_a, "has_network"_a, "first"_a, "num_chunks"_a,
        "limit_s"_a);
}

}  // namespace ep
