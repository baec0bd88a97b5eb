// Struct fields reach Python under their own names; addresses travel as integers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#define EP_FIELD(type, field) .def_readwrite(#field, &type::field)
#define EP_ADDRESS(type, field)                                                     \
    .def_property(                                                                  \
        #field, [](const type& s) { return reinterpret_cast<uintptr_t>(s.field); }, \
        [](type& s, uintptr_t address) {                                            \
            s.field = reinterpret_cast<decltype(s.field)>(address);                 \
        })
