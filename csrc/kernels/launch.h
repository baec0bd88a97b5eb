// The launchers that close the kernel files; host code calls these and nothing else of this room.
#pragma once

#include <cstdint>

#include "contract/gpu.h"

struct CUstream_st;

namespace ep::kernels {

using Stream = CUstream_st*;

// Each returns a cudaError_t as an int, 0 = launched. None waits, allocates or loads a module.
int launch_notify(const DispatchJob& job, Stream stream);
int launch_push(const DispatchJob& job, const LaunchPlan& plan, Stream stream);
int launch_unpack(const UnpackJob& job, const LaunchPlan& plan, Stream stream);
// Origins of a dispatch: ranges before unpack releases the slot, tokens of rows after it.
int launch_ranges(const UnpackJob& job, Stream stream);
int launch_row_tokens(const UnpackJob& job, int num_blocks, Stream stream);
int launch_combine(const CombineJob& job, const LaunchPlan& plan, Stream stream);
// Enters an operation only to make it fail on every rank.
int launch_refuse(const RankView& view, const Begin& begin, Stream stream);
// Writes the life word of our control block, so that peers stop waiting for us.
int launch_leave(const RankView& view, Stream stream);

// Loads every kernel now: a module loaded behind a waiting kernel would wait for it. `smem_bytes`
// is what one block may have.
int load_kernels(int smem_bytes);

// Into how many ranges of tokens a dispatch is counted, and how long they are.
void divide_tokens(DispatchJob& job, int max_blocks);
// Shared memory that notify needs for an expert count and a rank count; its warps get fewer when it
// is more than the block may have.
int notify_warps(const Shape& shape, int smem_bytes);
// As many SMs as fill the link while they also store a rank's own rows; with more, stores of both
// directions get in each other's way (bench/results/nvlink_gpus.jsonl).
int link_sms(int num_ranks);
// Of the SMs of a call, those that unpack while the others push; 0 = all do one after the other.
int unpack_share(const DispatchArgs& args, int num_blocks);
// How push and combine spread over `num_blocks` SMs for rows of `row_bytes`.
LaunchPlan push_plan(const DispatchArgs& args, int num_ranks, int num_blocks, int smem_bytes);
LaunchPlan unpack_plan(const DispatchArgs& args, int num_blocks, int all_blocks, int smem_bytes);
LaunchPlan combine_plan(const CombineArgs& args, int num_ranks, int num_blocks, int smem_bytes);

}  // namespace ep::kernels
