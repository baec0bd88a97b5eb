#include "bind/bind_rail.h"

#include "contract/direct.h"
#include "contract/rail.h"

namespace py = pybind11;
using namespace py::literals;

namespace ep {
namespace {

py::list regions_of(const RailLayout& layout) {
    py::list out;
    for (const NamedRegion& r : layout.regions()) {
        out.append(py::make_tuple(r.name, r.region.offset, r.region.bytes));
    }
    return out;
}

}  // namespace

void bind_rail(py::module_& m) {
    m.attr("RAIL_STAGING_BYTES") = kRailStagingBytes;
    m.attr("MAX_CHANNELS") = kMaxChannels;
    py::class_<RailShape>(m, "RailShape")
        .def_property_readonly("num_nodes", [](const RailShape& s) { return s.nodes.num_nodes; })
        .def_property_readonly("ranks_per_node",
                               [](const RailShape& s) { return s.nodes.ranks_per_node; })
        .def_readonly("num_channels", &RailShape::num_channels)
        .def_property_readonly("ring_chunks", &RailShape::ring_chunks)
        .def_readonly("chunk_bytes", &RailShape::chunk_bytes)
        .def_readwrite("notice_bytes", &RailShape::notice_bytes)
        .def_property_readonly("staging_bytes", &RailShape::staging_bytes)
        .def(
            "add_direct",
            [](RailShape& s, const Shape& shape, int64_t hidden) {
                s.direct = direct_shape_for(shape, s.nodes, hidden);
            },
            "shape"_a, "hidden"_a)
        .def_property_readonly("is_direct", &RailShape::is_direct)
        .def_property_readonly("direct_bytes", &RailShape::direct_bytes);
    py::class_<RailLayout>(m, "RailLayout")
        .def(py::init<const RailShape&>(), "shape"_a)
        .def_readonly("end", &RailLayout::end)
        .def("regions", &regions_of);
    py::class_<RailNoticeLayout>(m, "RailNoticeLayout")
        .def(py::init<const Shape&, int, int>(), "shape"_a, "num_nodes"_a, "num_channels"_a)
        .def_property_readonly("bytes", &RailNoticeLayout::bytes);
    py::class_<RailHeadLayout>(m, "RailHeadLayout")
        .def(py::init<int, bool, bool, int64_t>(), "num_topk"_a, "with_weights"_a, "with_records"_a,
             "scale_bytes"_a)
        .def_readonly("bytes", &RailHeadLayout::bytes);
    m.def("sum_head_bytes", &sum_head_bytes, "num_topk"_a, "with_weights"_a);
    py::class_<RailChunks>(m, "RailChunks")
        .def(py::init<int64_t, int64_t, int64_t>(), "chunk_bytes"_a, "head_bytes"_a, "row_bytes"_a)
        .def_readonly("records", &RailChunks::records)
        .def_readonly("pieces", &RailChunks::pieces)
        .def("chunks", &RailChunks::chunks, "count"_a);
    m.def(
        "divide_staging",
        [](int num_nodes, int ranks_per_node, int num_channels, int64_t record_bytes,
           int chunk_tokens, int64_t budget) {
            return divide_staging({num_nodes, ranks_per_node}, num_channels, record_bytes,
                                  chunk_tokens, budget);
        },
        "num_nodes"_a, "ranks_per_node"_a, "num_channels"_a, "record_bytes"_a,
        "chunk_tokens"_a = kChunkTokens, "budget"_a = kRailStagingBytes);
}

}  // namespace ep
