// Loads every kernel when a rank is made, not at its first launch.
//
// A module loaded lazily waits for the kernels that run, and those may be waiting for a peer.
#include "kernels/launch.h"

namespace ep::kernels {

int load_dispatch(int smem_bytes);
int load_expand(int smem_bytes);
int load_combine(int smem_bytes);
int load_leave(int smem_bytes);
int load_mask(int smem_bytes);
int load_stage_dispatch(int smem_bytes);
int load_stage_combine(int smem_bytes);

int load_kernels(int smem_bytes) {
    for (const auto load : {load_dispatch, load_expand, load_combine, load_leave, load_mask,
                            load_stage_dispatch, load_stage_combine}) {
        if (const int error = load(smem_bytes)) return error;
    }
    return 0;
}

}  // namespace ep::kernels
