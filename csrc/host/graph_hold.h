// What a captured graph keeps: every replay uses the addresses it was captured with.
#pragma once

#include <memory>

struct CUstream_st;

namespace ep {

// Whether work queued on the stream is being captured into a graph.
bool is_capturing(CUstream_st* stream);
// Whether work on one can be ordered behind work on the other: both are captured into one graph, or
// none is captured.
bool in_same_graph(CUstream_st* one, CUstream_st* other);

// While the stream is captured: `kept` lives as long as the graph. Else nothing.
void keep_in_graph(CUstream_st* stream, std::shared_ptr<void> kept);

// Lets go of what graphs that are gone have kept: CUDA forbids to free anything at their end.
void release_dropped();

}  // namespace ep
