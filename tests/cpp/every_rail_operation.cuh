// A kernel that uses all a rail has, for tests that only compile.
#pragma once

#include "device/rail.cuh"

template <ep::device::Rail R>
__global__ void every_rail_operation(R rail, ep::Watch watch, bool* out) {
    const ep::device::RailWord word{64, 1};
    rail.put(1, 0, 0, 16);
    rail.put_signal(1, 0, 0, 16, word);
    ep::device::fence_stage();
    out[0] = ep::device::rail_ready(rail, word);
    out[1] = ep::device::rail_wait(rail, watch, {ep::OpKind::kNone, 0}, ep::Site::kRows, 1, word);
    rail.flush();
    if (threadIdx.x != 0) return;
    rail.signal_add(1, word);
    out[2] = rail.peer_ptr(0, 1) == rail.own(0);
    rail.quiet();
}
