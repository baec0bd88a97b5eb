// A GPU as torch knows it.
//
// defines: torch_device, is_on, current_stream
#pragma once

#include <pybind11/pybind11.h>

#include "bind/dlpack.h"
#include "host/device_arena.h"

namespace ep {

// Where torch says that memory of a GPU is.
dlpack::Device torch_device(int device);

// Whether a tensor, which looks like this, is in memory of a GPU.
bool is_on(int device, pybind11::handle tensor, const dlpack::Tensor& view);

// The stream that torch queues on, of this thread. Needs exchange().
Stream current_stream(int device);

}  // namespace ep
