// A GPU as torch knows it, in place of csrc/bind/torch_device_cuda.cc: its memory is the host's, marks
// and streams are those of torch_cuda.py.
#include "bind/torch_device.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace ep {

dlpack::Device torch_device(int) { return {dlpack::kCpu, 0}; }

bool is_on(int, py::handle tensor, const dlpack::Tensor&) {
    return py::hasattr(tensor.attr("untyped_storage")(), "on_gpu");
}

Stream current_stream(int) {
    const py::object stream = py::module_::import("torch.cuda").attr("current_stream")();
    return reinterpret_cast<Stream>(stream.attr("cuda_stream").cast<uintptr_t>());
}

}  // namespace ep
