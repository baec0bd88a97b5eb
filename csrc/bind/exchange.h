// Tensors of torch without the detour through Python: seen and made by the C functions that torch offers
// (Tensor.__dlpack_c_exchange_api__). Arena memory becomes a tensor also without them.
//
// defines: exchange, see, as_tensor
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "bind/dlpack.h"
#include "host/device_arena.h"

namespace ep {

// What torch offers, or null.
const dlpack::Exchange* exchange();

// A plain torch.Tensor, not one of a subclass, as it lies in memory; false: it is something else, or torch
// offers nothing. Needs exchange().
bool see(pybind11::handle object, dlpack::Tensor& view);

// `data` in an extent as a tensor, which keeps the extent; no strides: dense.
pybind11::object as_tensor(std::shared_ptr<StreamHold> hold, std::byte* data,
                           std::vector<int64_t> shape, dlpack::DataType type,
                           std::vector<int64_t> strides = {});

}  // namespace ep
