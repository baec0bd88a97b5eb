// Calls that a capture does not allow, made beside one. Memory, events and streams come and go in whatever
// thread drops the last reference; a graph that another thread captures meanwhile, or this one, must not
// end for it.
#pragma once

#if __has_include(<cuda_runtime_api.h>)  // a header has to compile alone without CUDA, too
#include <cuda_runtime_api.h>

namespace ep {

class BesideCaptures {
public:
    BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    ~BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    BesideCaptures(const BesideCaptures&) = delete;
    BesideCaptures& operator=(const BesideCaptures&) = delete;

private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the one there was
};

}  // namespace ep
#endif
