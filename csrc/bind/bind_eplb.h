// The part of the module that plans where experts live.
#pragma once

#include <pybind11/pybind11.h>

namespace ep {

void bind_eplb(pybind11::module_& m);

}  // namespace ep
