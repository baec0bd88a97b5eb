// Launchers of a dispatch by copy engine, between notify and unpack; as those of kernels/launch.h.
#pragma once

#include "contract/pack.h"
#include "kernels/launch.h"

namespace ep::kernels {

// Tells the host where rows go, and the verdict with it.
int launch_places(const PackJob& job, Stream stream);
// Brings the rows of some chunks together, our own to their final rows.
int launch_pack(const PackJob& job, int num_blocks, Stream stream);
// Counts all rows as arrived, behind the copies.
int launch_arrive(const PackJob& job, Stream stream);

int load_pack(int smem_bytes);

}  // namespace ep::kernels
