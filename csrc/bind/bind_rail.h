// The part of the module that tells how much memory rails take.
#pragma once

#include <pybind11/pybind11.h>

namespace ep {

void bind_rail(pybind11::module_& m);

}  // namespace ep
