// Compiles the rail over NVSHMEM, where that is installed; nothing runs.
#include "device/rail_nvshmem.cuh"
#include "every_rail_operation.cuh"

template __global__ void every_rail_operation(ep::device::NvshmemRail, ep::Watch, bool*);
