// PTX, one instruction each; the only file with asm. In order: lanes and clocks, flags, fences and
// proxies, barriers and dependent grids, mbarrier, bulk copies, arithmetic.
//
// A name is the instruction with its order and scope. Above it: the ISA's form, the ISA version and
// SM that first had it, and what it orders. No loops, no timeouts, no policy.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ep::ptx {

// ---- Lanes and clocks: "Special Registers" ----
// https://docs.nvidia.com/cuda/parallel-thread-execution/#special-registers

// mov.u32 d, %laneid;                                                  PTX ISA 1.3
__device__ __forceinline__ uint32_t lane_id() {
    uint32_t lane;
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

// mov.u32 d, %lanemask_lt;                                             PTX ISA 2.0, sm_20
__device__ __forceinline__ uint32_t lanemask_lt() {
    uint32_t mask;
    asm("mov.u32 %0, %%lanemask_lt;" : "=r"(mask));
    return mask;
}

// nanosleep.u32 t;  up to twice as long                                PTX ISA 6.3, sm_70
__device__ __forceinline__ void nanosleep(uint32_t ns) {
    asm volatile("nanosleep.u32 %0;" ::"r"(ns) : "memory");
}

// mov.u64 d, %globaltimer;  nanoseconds, ticks coarsely                PTX ISA 3.1, sm_30
__device__ __forceinline__ uint64_t globaltimer() {
    uint64_t ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
    return ns;
}

// Shared addresses of instructions that take 32 bits.
__device__ __forceinline__ uint32_t smem_addr(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// All of a block's shared memory that its launch asked for.
__device__ __forceinline__ std::byte* dynamic_shared() {
    extern __shared__ __align__(128) std::byte shared[];
    return shared;
}

// No instruction. A value is worked out here, and no later: compilers know no more of it.
template <class T>
__device__ __forceinline__ void pin(T& value) {
    if constexpr (sizeof(T) == 8) {
        asm volatile("" : "+l"(value));
    } else {
        asm volatile("" : "+r"(value));
    }
}

// ---- Flags between ranks: "Data Movement and Conversion Instructions: ld, st", "red", "atom" ----
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-ld

// ld.acquire.sys.global.u64 d, [a];                                    PTX ISA 6.0, sm_70
// Orders: our later accesses see what the peer wrote before its release.
__device__ __forceinline__ uint64_t ld_acquire_sys(const uint64_t* addr) {
    uint64_t value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(addr) : "memory");
    return value;
}

// ld.acquire.sys.global.u32 d, [a];                                    PTX ISA 6.0, sm_70
__device__ __forceinline__ uint32_t ld_acquire_sys(const uint32_t* addr) {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(addr) : "memory");
    return value;
}

// ld.relaxed.gpu.global.u32 d, [a];                                    PTX ISA 6.0, sm_70
// Orders nothing; reads past L1.
__device__ __forceinline__ uint32_t ld_relaxed_gpu(const uint32_t* addr) {
    uint32_t value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(addr) : "memory");
    return value;
}

// ld.relaxed.gpu.global.u64 d, [a];                                    PTX ISA 6.0, sm_70
__device__ __forceinline__ uint64_t ld_relaxed_gpu(const uint64_t* addr) {
    uint64_t value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(addr) : "memory");
    return value;
}

// st.relaxed.gpu.global.u64 [a], b;                                    PTX ISA 6.0, sm_70
// Orders nothing; the word is seen whole.
__device__ __forceinline__ void st_relaxed_gpu(uint64_t* addr, uint64_t value) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(addr), "l"(value) : "memory");
}

// st.relaxed.sys.global.u64 [a], b;                                    PTX ISA 6.0, sm_70
// Orders nothing; the word is seen whole, also by peers.
__device__ __forceinline__ void st_relaxed_sys(uint64_t* addr, uint64_t value) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(addr), "l"(value) : "memory");
}

// ld.relaxed.sys.global.u64 d, [a];                                    PTX ISA 6.0, sm_70
// Orders nothing; reads past L1.
__device__ __forceinline__ uint64_t ld_relaxed_sys(const uint64_t* addr) {
    uint64_t value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(addr) : "memory");
    return value;
}

// st.relaxed.sys.global.v2.u64 [a], {b, c};                            PTX ISA 6.0, sm_70
// Orders nothing. Eight lanes that store 128 bytes together are one transaction, see device/lines.cuh.
__device__ __forceinline__ void st_relaxed_sys_v2(uint64_t* addr, uint64_t b, uint64_t c) {
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(addr), "l"(b), "l"(c)
                 : "memory");
}

// ld.relaxed.sys.global.v2.u64 {d, e}, [a];                            PTX ISA 6.0, sm_70
// Orders nothing; reads past L1. Of lanes together as st_relaxed_sys_v2.
__device__ __forceinline__ void ld_relaxed_sys_v2(const uint64_t* addr, uint64_t& d, uint64_t& e) {
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(d), "=l"(e)
                 : "l"(addr)
                 : "memory");
}

// st.release.sys.global.u64 [a], b;                                    PTX ISA 6.0, sm_70
// Orders: whoever acquires b sees our earlier writes, and those of threads we met at a barrier.
__device__ __forceinline__ void st_release_sys(uint64_t* addr, uint64_t value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(addr), "l"(value) : "memory");
}

// st.release.sys.global.u32 [a], b;                                    PTX ISA 6.0, sm_70
__device__ __forceinline__ void st_release_sys(uint32_t* addr, uint32_t value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(addr), "r"(value) : "memory");
}

// red.release.sys.global.add.u64 [a], b;                               PTX ISA 6.0, sm_70
// Orders: as st_release_sys; several blocks may add to one word.
__device__ __forceinline__ void red_release_sys_add(uint64_t* addr, uint64_t value) {
    asm volatile("red.release.sys.global.add.u64 [%0], %1;" ::"l"(addr), "l"(value) : "memory");
}

// red.release.gpu.global.add.u32 [a], b;                               PTX ISA 6.0, sm_70
// Orders: our earlier accesses, and those of threads we met at a barrier, before those of who acquires it.
__device__ __forceinline__ void red_release_gpu_add(uint32_t* addr, uint32_t value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(addr), "r"(value) : "memory");
}

// ld.acquire.gpu.global.u32 d, [a];                                    PTX ISA 6.0, sm_70
__device__ __forceinline__ uint32_t ld_acquire_gpu(const uint32_t* addr) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(addr) : "memory");
    return value;
}

// atom.acq_rel.gpu.global.exch.b32 d, [a], b;                          PTX ISA 6.0, sm_70
__device__ __forceinline__ uint32_t atom_acq_rel_gpu_exch(uint32_t* addr, uint32_t value) {
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.exch.b32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(addr), "r"(value)
                 : "memory");
    return old;
}

// atom.acq_rel.gpu.global.add.u32 d, [a], b;                           PTX ISA 6.0, sm_70
__device__ __forceinline__ uint32_t atom_acq_rel_gpu_add(uint32_t* addr, uint32_t value) {
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(addr), "r"(value)
                 : "memory");
    return old;
}

// atom.acq_rel.gpu.global.cas.b64 d, [a], b, c;                        PTX ISA 6.0, sm_70
__device__ __forceinline__ uint64_t atom_acq_rel_gpu_cas(uint64_t* addr, uint64_t expected,
                                                         uint64_t value) {
    uint64_t old;
    asm volatile("atom.acq_rel.gpu.global.cas.b64 %0, [%1], %2, %3;"
                 : "=l"(old)
                 : "l"(addr), "l"(expected), "l"(value)
                 : "memory");
    return old;
}

// atom.relaxed.gpu.global.add.u32 d, [a], b;                           PTX ISA 6.0, sm_70
// Orders nothing.
__device__ __forceinline__ uint32_t atom_relaxed_gpu_add(uint32_t* addr, uint32_t value) {
    uint32_t old;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(addr), "r"(value)
                 : "memory");
    return old;
}

// atom.relaxed.gpu.global.or.b64 d, [a], b;                            PTX ISA 6.0, sm_70
// Orders nothing.
__device__ __forceinline__ uint64_t atom_relaxed_gpu_or(uint64_t* addr, uint64_t value) {
    uint64_t old;
    asm volatile("atom.relaxed.gpu.global.or.b64 %0, [%1], %2;"
                 : "=l"(old)
                 : "l"(addr), "l"(value)
                 : "memory");
    return old;
}

// red.relaxed.sys.global.or.b64 [a], b;                                PTX ISA 6.0, sm_70
// Orders nothing; several ranks may set bits of one word.
__device__ __forceinline__ void red_relaxed_sys_or(uint64_t* addr, uint64_t value) {
    asm volatile("red.relaxed.sys.global.or.b64 [%0], %1;" ::"l"(addr), "l"(value) : "memory");
}

// atom.acq_rel.cta.shared::cta.add.u32 d, [a], b;                      PTX ISA 7.8, sm_70
// Orders: as acq_rel says, among threads of the block: who completes a count has seen what all did before.
__device__ __forceinline__ uint32_t atom_acq_rel_cta_add(uint32_t* shared, uint32_t value) {
    uint32_t old;
    asm volatile("atom.acq_rel.cta.shared::cta.add.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "r"(smem_addr(shared)), "r"(value)
                 : "memory");
    return old;
}

// ld.acquire.cta.shared::cta.u32 d, [a];                               PTX ISA 7.8, sm_70
// Orders: our later accesses see what a thread of the block did before its release.
__device__ __forceinline__ uint32_t ld_acquire_cta(const uint32_t* shared) {
    uint32_t value;
    asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];"
                 : "=r"(value)
                 : "r"(smem_addr(shared))
                 : "memory");
    return value;
}

// st.release.cta.shared::cta.u32 [a], b;                               PTX ISA 7.8, sm_70
// Orders: whoever acquires b in the block sees our earlier accesses, and those we have acquired.
__device__ __forceinline__ void st_release_cta(uint32_t* shared, uint32_t value) {
    asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(smem_addr(shared)), "r"(value)
                 : "memory");
}

// prefetch.global.L2 [a];                                              PTX ISA 2.0, sm_20
// Orders nothing: a later load of the line waits less.
__device__ __forceinline__ void prefetch_global_l2(const void* addr) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(addr));
}

// ---- Fences and proxies: "Parallel Synchronization and Communication Instructions: membar, fence" ----
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-membar

// fence.acq_rel.sys;                                                   PTX ISA 6.0, sm_70
// Orders: our accesses before it, and those of threads we met at a barrier, before accesses after it,
// as other devices see them.
__device__ __forceinline__ void fence_acq_rel_sys() {
    asm volatile("fence.acq_rel.sys;" ::: "memory");
}

// fence.proxy.async.global;                                            PTX ISA 8.0, sm_90
// Orders: ordinary accesses to global memory before it, and what we have acquired, before bulk copies issued
// after. (Without .global it also waits until our stores are performed.)
__device__ __forceinline__ void fence_proxy_async_global() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// fence.proxy.async.shared::cta;                                       PTX ISA 8.0, sm_90
// Orders: ordinary accesses to shared memory before bulk copies that read or overwrite it.
__device__ __forceinline__ void fence_proxy_async_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- Barriers of some warps, dependent grids: "barrier", "griddepcontrol" ----
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-griddepcontrol

// barrier.sync.aligned a, b;  b threads, whole warps                   PTX ISA 6.0, sm_30
// Orders: accesses of the threads that meet, before it and after it.
__device__ __forceinline__ void barrier_sync_aligned(int barrier, int threads) {
    asm volatile("barrier.sync.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// griddepcontrol.wait;                                                 PTX ISA 7.8, sm_90
// Orders: all that the kernel before us in the stream wrote, before our accesses. Returns at once in a
// kernel that was launched without the attribute.
__device__ __forceinline__ void griddepcontrol_wait() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// griddepcontrol.launch_dependents;                                    PTX ISA 7.8, sm_90
// Orders nothing: the next kernel's blocks may start and run up to their griddepcontrol_wait.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- mbarrier: "Parallel Synchronization and Communication Instructions: mbarrier" ----
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier

// mbarrier.init.shared.b64 [a], count;                                 PTX ISA 7.0, sm_80
__device__ __forceinline__ void mbarrier_init(uint64_t* bar, uint32_t count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(smem_addr(bar)), "r"(count) : "memory");
}

// fence.mbarrier_init.release.cluster;                                 PTX ISA 8.0, sm_90
// Orders: our mbarrier.init before bulk copies that complete on it.
__device__ __forceinline__ void fence_mbarrier_init_release_cluster() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.arrive.shared.b64 _, [a];                                   PTX ISA 7.0, sm_80
// Orders: our earlier accesses, before those of whoever finds the phase complete.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* bar) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(smem_addr(bar)) : "memory");
}

// mbarrier.arrive.expect_tx.shared.b64 _, [a], bytes;                  PTX ISA 8.0, sm_90
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(smem_addr(bar)),
                 "r"(bytes)
                 : "memory");
}

// mbarrier.try_wait.parity.shared.b64 p, [a], parity;  may sleep a little  PTX ISA 7.8, sm_90
// Orders: when true, the bytes of the bulk loads counted on it are readable.
__device__ __forceinline__ bool mbarrier_try_wait_parity(uint64_t* bar, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(smem_addr(bar)), "r"(parity)
        : "memory");
    return done != 0;
}

// ---- Bulk copies: "Data Movement and Conversion Instructions: cp.async.bulk" ----
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk

// cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [dst], [src], bytes, [bar];
//                                                                      PTX ISA 8.0, sm_90
// Addresses and bytes are multiples of 16. Any peer's mapped memory is global memory.
__device__ __forceinline__ void bulk_load(void* dst_shared, const void* src, uint32_t bytes,
                                          uint64_t* bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(smem_addr(dst_shared)),
        "l"(src), "r"(bytes), "r"(smem_addr(bar))
        : "memory");
}

// cp.async.bulk.global.shared::cta.bulk_group [dst], [src], bytes;     PTX ISA 8.0, sm_90
__device__ __forceinline__ void bulk_store(void* dst, const void* src_shared, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst),
                 "r"(smem_addr(src_shared)), "r"(bytes)
                 : "memory");
}

// cp.async.bulk.commit_group;                                          PTX ISA 8.0, sm_90
__device__ __forceinline__ void bulk_commit_group() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// cp.async.bulk.wait_group.read n;                                     PTX ISA 8.0, sm_90
// Orders: shared memory our older stores read may be overwritten; nothing about the destination.
template <int kPending>
__device__ __forceinline__ void bulk_wait_group_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// cp.async.bulk.wait_group n;                                          PTX ISA 8.0, sm_90
// Orders: our older stores are complete and visible to us, so that a release may publish them.
template <int kPending>
__device__ __forceinline__ void bulk_wait_group() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ld.shared.v4.u32 {a, b, c, d}, [addr];                               PTX ISA 2.0, sm_20
// For addresses the compiler does not know to be shared; stays behind the wait before it.
__device__ __forceinline__ uint4 ld_shared_v4(const void* addr) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(smem_addr(addr))
                 : "memory");
    return v;
}

// ld.global.v4.u32 {a, b, c, d}, [addr];                               PTX ISA 2.0, sm_20
// Compilers leave it where it stands.
__device__ __forceinline__ uint4 ld_global_v4(const void* addr) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(addr)
                 : "memory");
    return v;
}

// st.global.v2.u64 [a], {b, c};                                        PTX ISA 2.0, sm_20
// For addresses the compiler does not know to be global.
__device__ __forceinline__ void st_global_v2(void* addr, uint64_t b, uint64_t c) {
    asm volatile("st.global.v2.u64 [%0], {%1, %2};" ::"l"(addr), "l"(b), "l"(c) : "memory");
}

// st.global.u32 [a], b;                                                PTX ISA 1.0, sm_10
// The same.
__device__ __forceinline__ void st_global(uint32_t* addr, uint32_t b) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(addr), "r"(b) : "memory");
}

// ---- Arithmetic: "Data Movement and Conversion Instructions: cvt" ----
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cvt

// cvt.rn.satfinite.e4m3x2.f32 d, a, b;  a in the upper byte            PTX ISA 7.8, sm_89
__device__ __forceinline__ uint16_t cvt_rn_satfinite_e4m3x2(float upper, float lower) {
    uint16_t packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(upper), "f"(lower));
    return packed;
}

// cvt.rn.bf16x2.f32 d, a, b;  a in the upper half                      PTX ISA 7.0, sm_80
__device__ __forceinline__ uint32_t cvt_rn_bf16x2(float upper, float lower) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(upper), "f"(lower));
    return packed;
}

// cvt.rn.f16x2.f32 d, a, b;  a in the upper half                       PTX ISA 7.0, sm_80
__device__ __forceinline__ uint32_t cvt_rn_f16x2(float upper, float lower) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(upper), "f"(lower));
    return packed;
}

// cvt.f32.f16 d, a;  exact                                             PTX ISA 2.3
__device__ __forceinline__ float cvt_f32_f16(uint16_t half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}

}  // namespace ep::ptx
