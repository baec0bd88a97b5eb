// Compiles every wrapper of device/ptx.cuh, so that ptxas has accepted each; nothing runs.
#include "device/copy.cuh"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "device/quantize.cuh"
#include "device/reduce.cuh"
#include "device/wait.cuh"

namespace {

using namespace ep;

template <class F>
__device__ void keep(void** out, int i, F* wrapper) {
    out[i] = reinterpret_cast<void*>(wrapper);
}

}  // namespace

__global__ void every_wrapper(void** out) {
    using Word = uint64_t;
    keep(out, 0, &ptx::lane_id);
    keep(out, 1, &ptx::lanemask_lt);
    keep(out, 2, &ptx::globaltimer);
    keep(out, 3, &ptx::smem_addr);
    keep<Word(const Word*)>(out, 4, &ptx::ld_acquire_sys);
    keep<uint32_t(const uint32_t*)>(out, 5, &ptx::ld_acquire_sys);
    keep<uint32_t(const uint32_t*)>(out, 6, &ptx::ld_relaxed_gpu);
    keep<void(Word*, Word)>(out, 7, &ptx::st_release_sys);
    keep<void(uint32_t*, uint32_t)>(out, 8, &ptx::st_release_sys);
    keep(out, 9, &ptx::red_release_sys_add);
    keep(out, 11, &ptx::atom_acq_rel_gpu_exch);
    keep(out, 12, &ptx::fence_proxy_async_global);
    keep(out, 13, &ptx::fence_proxy_async_shared);
    keep(out, 14, &ptx::mbarrier_init);
    keep(out, 15, &ptx::fence_mbarrier_init_release_cluster);
    keep(out, 16, &ptx::mbarrier_arrive_expect_tx);
    keep(out, 17, &ptx::mbarrier_try_wait_parity);
    keep(out, 18, &ptx::bulk_load);
    keep(out, 19, &ptx::bulk_store);
    keep(out, 20, &ptx::bulk_commit_group);
    keep(out, 21, &ptx::bulk_wait_group_read<0>);
    keep(out, 22, &ptx::bulk_wait_group<0>);
    keep(out, 23, &ptx::cvt_rn_satfinite_e4m3x2);
    keep(out, 24, &ptx::cvt_rn_bf16x2);
    keep(out, 25, &ptx::cvt_rn_f16x2);
    keep(out, 26, &ptx::cvt_f32_f16);
    keep(out, 27, &ptx::ld_shared_v4);
    keep(out, 10, &ptx::st_global);
    keep(out, 46, &ptx::ld_global_v4);
    keep(out, 28, &ptx::st_global_v2);
    keep(out, 29, &ptx::griddepcontrol_wait);
    keep(out, 30, &ptx::griddepcontrol_launch_dependents);
    keep(out, 31, &ptx::mbarrier_arrive);
    keep<Word(const Word*)>(out, 32, &ptx::ld_relaxed_gpu);
    keep(out, 33, &ptx::st_relaxed_gpu);
    keep(out, 34, &ptx::st_relaxed_sys);
    keep(out, 35, &ptx::dynamic_shared);
    keep(out, 36, &ptx::nanosleep);
    keep(out, 37, &ptx::fence_acq_rel_sys);
    keep(out, 38, &ptx::ld_relaxed_sys);
    keep(out, 39, &ptx::st_relaxed_sys_v2);
    keep(out, 40, &ptx::ld_relaxed_sys_v2);
    keep(out, 41, &ptx::atom_acq_rel_gpu_add);
    keep(out, 42, &ptx::atom_acq_rel_gpu_cas);
    keep(out, 43, &ptx::red_relaxed_sys_or);
    keep(out, 44, &ptx::atom_relaxed_gpu_or);
    keep(out, 45, &ptx::atom_relaxed_gpu_add);
}
