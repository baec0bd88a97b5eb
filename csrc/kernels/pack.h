// Launchers of a dispatch by copy engine; as those of kernels/launch.h.
#pragma once

#include "contract/pack.h"
#include "kernels/launch.h"

namespace ep::kernels {

// Decides the call and tells the host where rows go, and the verdict with it.
int launch_plan(const PackJob& job, Stream stream);
// Brings the rows of some chunks together, our own to their final rows.
int launch_pack(const PackJob& job, int num_blocks, int smem_bytes, Stream stream);
// Counts all rows as arrived, behind the copies, and waits for those of others.
int launch_arrive(const PackJob& job, Stream stream);

}  // namespace ep::kernels
