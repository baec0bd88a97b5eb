#include "bind/exchange.h"

#include <utility>

#include "bind/torch_device.h"

namespace py = pybind11;

namespace ep {
namespace {

// A tensor over arena memory, in the form that the array library takes over.
template <class Managed>
struct HeldTensor {
    Managed managed{};
    std::vector<int64_t> shape, strides;
    std::shared_ptr<StreamHold> hold;

    HeldTensor(std::shared_ptr<StreamHold> h, std::byte* data, std::vector<int64_t> sizes,
               dlpack::DataType type, std::vector<int64_t> apart)
        : shape(std::move(sizes)), strides(std::move(apart)), hold(std::move(h)) {
        if (strides.empty()) {
            strides.assign(shape.size(), 1);
            for (size_t i = shape.size(); i > 1; --i) {
                strides[i - 2] = strides[i - 1] * shape[i - 1];
            }
        }
        managed.tensor = {data,
                          torch_device(hold->device()),
                          static_cast<int32_t>(shape.size()),
                          type,
                          shape.data(),
                          strides.data(),
                          0};
        managed.context = this;
        managed.deleter = [](Managed* self) { delete static_cast<HeldTensor*>(self->context); };
    }
};

PyTypeObject* tensor_type() {
    static PyObject* const type =
        py::object(py::module_::import("torch").attr("Tensor")).release().ptr();
    return reinterpret_cast<PyTypeObject*>(type);
}

const dlpack::Exchange* find_exchange() {
    const py::handle type(reinterpret_cast<PyObject*>(tensor_type()));
    const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
    const auto* table = static_cast<const dlpack::Exchange*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    const bool known = table->version.major == 1 && table->view != nullptr;
    return known ? table : nullptr;
}

// As an object that torch asks for its capsule.
py::object from_capsule(std::unique_ptr<HeldTensor<dlpack::ManagedTensor>> held) {
    static PyObject* const from_dlpack =
        py::object(py::module_::import("torch.utils.dlpack").attr("from_dlpack")).release().ptr();
    py::capsule capsule(&held.release()->managed, "dltensor", [](PyObject* object) {
        if (!PyCapsule_IsValid(object, "dltensor")) return;  // taken over by a tensor
        auto* managed =
            static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(object, "dltensor"));
        managed->deleter(managed);
    });
    return py::handle(from_dlpack)(capsule);
}

}  // namespace

const dlpack::Exchange* exchange() {
    static const dlpack::Exchange* const table = find_exchange();
    return table;
}

bool see(py::handle object, dlpack::Tensor& view) {
    if (Py_TYPE(object.ptr()) != tensor_type()) return false;
    if (exchange()->view(object.ptr(), &view) == 0) return true;
    PyErr_Clear();  // what has no memory to be seen
    return false;
}

py::object as_tensor(std::shared_ptr<StreamHold> hold, std::byte* data, std::vector<int64_t> shape,
                     dlpack::DataType type, std::vector<int64_t> strides) {
    if (exchange() == nullptr) {
        using Held = HeldTensor<dlpack::ManagedTensor>;
        return from_capsule(std::make_unique<Held>(std::move(hold), data, std::move(shape), type,
                                                   std::move(strides)));
    }
    using Held = HeldTensor<dlpack::VersionedTensor>;
    auto held =
        std::make_unique<Held>(std::move(hold), data, std::move(shape), type, std::move(strides));
    held->managed.version = {1, 0};
    void* object = nullptr;
    if (exchange()->to_object(&held.release()->managed, &object) != 0) {
        throw py::error_already_set();
    }
    return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

}  // namespace ep
