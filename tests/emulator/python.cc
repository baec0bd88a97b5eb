// The module `emulator._device`, in the library of ep_comm._core: streams and events for torch_cuda.py,
// which stands in for torch.cuda.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <condition_variable>
#include <memory>
#include <mutex>

namespace py = pybind11;

namespace {

// A place in what is queued on a stream.
class Event {
public:
    explicit Event(cudaStream_t stream) {
        emulator::queue(stream, [state = state_] {
            const std::lock_guard lock(state->mutex);
            state->reached = true;
            state->changed.notify_all();
        });
    }
    bool query() const {
        const std::lock_guard lock(state_->mutex);
        return state_->reached;
    }
    void synchronize() const { await(*state_); }
    void hold_up(cudaStream_t stream) const {
        emulator::queue(stream, [state = state_] { await(*state); });
    }

private:
    struct State {
        std::mutex mutex;
        std::condition_variable changed;
        bool reached = false;
    };
    static void await(State& state) {
        std::unique_lock lock(state.mutex);
        state.changed.wait(lock, [&] { return state.reached; });
    }

    std::shared_ptr<State> state_ = std::make_shared<State>();
};

cudaStream_t as_stream(uintptr_t address) { return reinterpret_cast<cudaStream_t>(address); }

uintptr_t make_stream() {
    cudaStream_t stream = nullptr;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    return reinterpret_cast<uintptr_t>(stream);
}

int num_sms() {
    int value = 0;
    cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0);
    return value;
}

}  // namespace

PYBIND11_MODULE(_device, m) {
    const auto without_gil = py::call_guard<py::gil_scoped_release>();
    py::class_<Event>(m, "Event")
        .def(py::init([](uintptr_t stream) { return Event(as_stream(stream)); }))
        .def("query", &Event::query)
        .def("synchronize", &Event::synchronize, without_gil)
        .def("hold_up", [](const Event& e, uintptr_t stream) { e.hold_up(as_stream(stream)); });
    m.def("make_stream", &make_stream);
    m.def("is_idle", [](uintptr_t s) { return cudaStreamQuery(as_stream(s)) == cudaSuccess; });
    m.def("await_stream", [](uintptr_t s) { cudaStreamSynchronize(as_stream(s)); }, without_gil);
    m.def("await_all", [] { cudaDeviceSynchronize(); }, without_gil);
    m.def("num_sms", &num_sms);
}
