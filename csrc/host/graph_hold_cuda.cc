#include "host/graph_hold.h"

#include <cuda_runtime_api.h>

#include <mutex>
#include <vector>

#include "host/cuda_check.h"

namespace ep {
namespace {

struct Dropped {
    std::mutex mutex;
    std::vector<std::shared_ptr<void>> kept;
};

Dropped& dropped() {
    static auto* const all = new Dropped;  // graphs may end after our statics
    return *all;
}

// The graph a capture builds, or null.
cudaGraph_t graph_of(cudaStream_t stream) {
    cudaStreamCaptureStatus status;
    cudaGraph_t graph = nullptr;
    EP_CUDA(cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph, nullptr, nullptr, nullptr));
    return status == cudaStreamCaptureStatusActive ? graph : nullptr;
}

void drop(void* held) {
    auto* kept = static_cast<std::shared_ptr<void>*>(held);
    Dropped& all = dropped();
    std::lock_guard lock(all.mutex);
    all.kept.push_back(std::move(*kept));
    delete kept;
}

}  // namespace

bool is_capturing(cudaStream_t stream) { return graph_of(stream) != nullptr; }

bool in_same_graph(cudaStream_t one, cudaStream_t other) {
    return graph_of(one) == graph_of(other);
}

void keep_in_graph(cudaStream_t stream, std::shared_ptr<void> kept) {
    cudaGraph_t graph = graph_of(stream);
    if (graph == nullptr) return;
    cudaUserObject_t object;
    EP_CUDA(cudaUserObjectCreate(&object, new std::shared_ptr<void>(std::move(kept)), drop, 1,
                                 cudaUserObjectNoDestructorSync));
    EP_CUDA(cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove));
}

void release_dropped() {
    std::vector<std::shared_ptr<void>> gone;
    {
        Dropped& all = dropped();
        std::lock_guard lock(all.mutex);
        gone.swap(all.kept);
    }
}

}  // namespace ep
