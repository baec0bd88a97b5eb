#include "bind/torch_device.h"

#include "bind/exchange.h"

namespace ep {

dlpack::Device torch_device(int device) { return {dlpack::kCuda, device}; }

bool is_on(int device, pybind11::handle, const dlpack::Tensor& view) {
    return view.device.type == dlpack::kCuda && view.device.id == device;
}

Stream current_stream(int device) {
    void* stream = nullptr;
    if (exchange()->current_stream(dlpack::kCuda, device, &stream) != 0) {
        throw pybind11::error_already_set();
    }
    return static_cast<Stream>(stream);
}

}  // namespace ep
