// The probe of the NVSHMEM rail, for the host: rail_probe.cuh without device code.
#pragma once

#include <cstdint>

#include "contract/rail.h"
#include "transport/nvshmem.h"

struct CUstream_st;

namespace ep {

struct ProbeResult {
    unsigned long long wrong_units = 0;  // 16 bytes each
    int code = 0;                        // of the wait that ran out, or 0
    int peer = -1;                       // whom it waited for
};

// Puts `num_chunks` chunks to every rank on our rail and takes as many; all ranks do so at once.
// `pe`: of each rank. `first`: chunks of the probes before, all ranks alike.
ProbeResult probe_nvshmem(const NvshmemSegment& segment, const RailShape& shape, int rank,
                          const std::vector<int>& pe, bool has_network, uint64_t first,
                          int num_chunks, double limit_s);

}  // namespace ep
