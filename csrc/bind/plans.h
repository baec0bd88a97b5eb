// Calls that look like an earlier one: its arguments are taken over, and tensors are compared with what
// was accepted then. So a call in a loop costs the host little more than its launch.
//
// defines: OptionTypes, DispatchPlan, CombinePlan, run
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <vector>

#include "bind/dlpack.h"
#include "host/device_rank.h"

namespace ep {

// Types of the options of a call, none of which a program can make or unmake: they are compared, not kept.
class OptionTypes {
public:
    explicit OptionTypes(const pybind11::tuple& options);
    bool are_of(const pybind11::tuple& options) const;

private:
    std::vector<const PyTypeObject*> types_;
};

struct DispatchPlan {
    DispatchArgs args;  // but for addresses and what differs from call to call
    DispatchWants wants;
    OptionTypes options;
    std::optional<dlpack::DataType> x, scales;
};

struct CombinePlan {
    CombineArgs args;
    CombineWants wants;
    OptionTypes options;
    std::optional<dlpack::DataType> x;
};

// Null: this call is not one of the plan's, or nothing can be called; nothing has happened. `options` are equal
// to those of the plan. Tensors may be None. `routing`: of a cached dispatch.
std::shared_ptr<Flight> run(DeviceRank& rank, const DispatchPlan& plan,
                            const pybind11::tuple& options, pybind11::handle x,
                            pybind11::handle topk_idx, pybind11::handle topk_weights,
                            pybind11::handle scales, pybind11::handle recv_stats,
                            pybind11::handle wait_stats, const Routing* routing);

// The current stream, when the call has been queued there; `topk_idx`, `topk_weights`: of the handle.
std::optional<Stream> run(DeviceRank& rank, const CombinePlan& plan, const pybind11::tuple& options,
                          const Routing& routing, pybind11::handle x, pybind11::handle topk_idx,
                          pybind11::handle topk_weights, pybind11::handle row_weights,
                          pybind11::handle wait_stats, pybind11::handle out);

}  // namespace ep
