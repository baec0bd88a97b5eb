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

// While the stream is captured: `kept`, of the current device, lives as long as the graph. Else nothing.
// CUDA forbids to free anything at a graph's end, so a thread of ours does it soon after. `arena`: whose
// extent it is, which may ask for it earlier.
void keep_in_graph(CUstream_st* stream, std::shared_ptr<void> kept, const void* arena = nullptr);

// Lets go of extents of a living arena that graphs which are gone have kept; frees no memory.
void release_dropped(const void* arena);
// Lets go of all that they have kept, and waits until that is free.
void release_dropped();

}  // namespace ep
