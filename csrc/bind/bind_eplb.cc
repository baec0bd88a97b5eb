#include "bind/bind_eplb.h"

#include <cstdint>

#include "eplb/plan.h"

namespace py = pybind11;

namespace ep {
namespace {

template <class Class, class T>
void address(Class& c, const char* name, T* eplb::PlanArgs::* field) {
    c.def_property(
        name, [field](const eplb::PlanArgs& a) { return reinterpret_cast<uintptr_t>(a.*field); },
        [field](eplb::PlanArgs& a, uintptr_t value) { a.*field = reinterpret_cast<T*>(value); });
}

}  // namespace

void bind_eplb(py::module_& m) {
    py::enum_<eplb::Distinct>(m, "Distinct")
        .value("NEVER", eplb::Distinct::kNever)
        .value("PREFER", eplb::Distinct::kPrefer)
        .value("ALWAYS", eplb::Distinct::kAlways);
    using A = eplb::PlanArgs;
    auto args = py::class_<A>(m, "PlanArgs").def(py::init<>());
    address(args, "load", &A::load);
    address(args, "together", &A::together);
    address(args, "current", &A::current);
    address(args, "expert", &A::expert);
    args.def_readwrite("num_layers", &A::num_layers)
        .def_readwrite("num_experts", &A::num_experts)
        .def_readwrite("num_shared", &A::num_shared)
        .def_readwrite("num_slots", &A::num_slots)
        .def_readwrite("num_ranks", &A::num_ranks)
        .def_readwrite("num_nodes", &A::num_nodes)
        .def_readwrite("num_groups", &A::num_groups)
        .def_readwrite("hierarchical", &A::hierarchical)
        .def_readwrite("distinct", &A::distinct)
        .def_readwrite("slack", &A::slack)
        .def_readwrite("node_slack", &A::node_slack);
    m.def("plan", &eplb::plan, py::arg("args"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace ep
