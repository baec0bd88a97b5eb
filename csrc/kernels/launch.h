// The launchers that close the kernel files; host code calls these and nothing else of this room.
#pragma once

#include <cstdint>

#include "contract/gpu.h"

struct CUstream_st;

namespace ep::kernels {

using Stream = CUstream_st*;

// Each returns a cudaError_t as an int, 0 = launched. None waits, allocates or loads a module.
int launch_dispatch(const DispatchJob& job, const LaunchPlan& plan, Stream stream);
// What a receiver makes of what came, on `num_blocks` SMs; for calls that need it.
int launch_expand(const DispatchJob& job, int num_local, int num_blocks, int smem_bytes,
                  Stream stream);
bool needs_expansion(const DispatchJob& job);
// The index of compact rows by expert, alone.
int launch_row_index(const DispatchJob& job, int num_local, Stream stream);
// Small batches, whole or in halves, see contract/stage.h: is_staged.
int launch_stage_dispatch(const DispatchJob& job, Half half, int num_blocks, Stream stream);
int launch_stage_combine(const CombineJob& job, Half half, int num_blocks, Stream stream);
int launch_combine(const CombineJob& job, const LaunchPlan& plan, Stream stream);
// The first of its steps: rows of an ordinary tensor are copied to where peers can read them, or an owner
// adds up its rows of a token there.
int launch_stage(const CombineJob& job, int num_blocks, Stream stream);
// Enters an operation only to make it fail on every rank.
int launch_refuse(const RankView& view, const Begin& begin, Stream stream);
// Writes the life word of our control block, so that peers stop waiting for us.
int launch_leave(const RankView& view, Stream stream);
// Tells every rank that nobody waits for `rank` any more.
int launch_mask(const RankView& view, int rank, Stream stream);
// Of all ranks that stay, between operations: from now on these are masked, and `seq` is the last number.
int launch_unmask(const RankView& view, uint64_t seq, uint64_t masked, Stream stream);

// Loads every kernel now: a module loaded behind a waiting kernel would wait for it. `smem_bytes`
// is what one block may have.
int load_kernels(int smem_bytes);

// Whether a block's shared memory holds what a dispatch counts.
bool fits_shared(const Shape& shape, int smem_bytes);
// As many SMs as fill the link while they also store a rank's own rows; with more, stores of both
// directions get in each other's way (bench/results/ceilings.jsonl).
int link_sms(int num_ranks);
// SMs of a dispatch that names none: a small one is bound by latency, and spreads.
int default_sms(const DispatchArgs& args, int num_ranks);
// As many as have something to do in a small operation.
StageBlocks stage_blocks(const DispatchJob& job);
StageBlocks stage_blocks(const CombineJob& job);
// Into how many ranges of tokens a dispatch on so many blocks is counted.
void divide_tokens(DispatchJob& job, int num_blocks);
// How dispatch and combine spread over `num_blocks` SMs.
LaunchPlan dispatch_plan(const DispatchJob& job, int num_blocks, int smem_bytes);
LaunchPlan combine_plan(const CombineArgs& args, int num_ranks, int num_blocks, int smem_bytes);

}  // namespace ep::kernels
