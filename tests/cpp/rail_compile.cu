// Compiles the rail without a network, and the kernel that takes a rail; nothing runs.
#include "device/rail_loopback.cuh"
#include "every_rail_operation.cuh"
#include "kernels/rail_probe.cuh"

using ep::device::LoopbackRail;
using ep::kernels::RailProbeJob;

template __global__ void every_rail_operation(LoopbackRail, ep::Watch, bool*);
template __global__ void ep::kernels::rail_probe_kernel(
    const __grid_constant__ RailProbeJob<LoopbackRail>);
