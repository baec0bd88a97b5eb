// The part of the module that needs the CUDA toolkit; left out of a build without it.
#pragma once

#include <pybind11/pybind11.h>

namespace ep {

void bind_cuda(pybind11::module_& m);

}  // namespace ep
