// Calls that look like an earlier one: its arguments are taken over, and tensors are compared with what
// was accepted then. So a call in a loop costs the host little more than its launch.
//
// defines: DispatchPlan, CombinePlan, run
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>

#include "bind/dlpack.h"
#include "host/device_rank.h"

namespace ep {

struct DispatchPlan {
    DispatchArgs args;  // but for addresses and what differs from call to call
    DispatchWants wants;
    std::optional<dlpack::DataType> x, scales;
};

struct CombinePlan {
    CombineArgs args;
    CombineWants wants;
    std::optional<dlpack::DataType> x;
};

// Null: this call is not one of the plan's, or nothing can be called; nothing has happened. Tensors may
// be None. `routing`: of a cached dispatch.
std::shared_ptr<Flight> run(DeviceRank& rank, const DispatchPlan& plan, pybind11::handle x,
                            pybind11::handle topk_idx, pybind11::handle topk_weights,
                            pybind11::handle scales, pybind11::handle recv_stats,
                            pybind11::handle wait_stats, const Routing* routing);

// The current stream, when the call has been queued there; `topk_idx`, `topk_weights`: of the handle.
std::optional<Stream> run(DeviceRank& rank, const CombinePlan& plan, const Routing& routing,
                          pybind11::handle x, pybind11::handle topk_idx,
                          pybind11::handle topk_weights, pybind11::handle row_weights,
                          pybind11::handle wait_stats, pybind11::handle out);

}  // namespace ep
