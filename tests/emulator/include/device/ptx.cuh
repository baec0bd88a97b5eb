// The wrappers of csrc/device/ptx.cuh for the emulator: the same names, as far as kernels use them.
//
// Bulk copies are asynchronous: a load lands in shared memory at some later time, a store reads shared
// memory as late as its group is waited for, and writes later still. Whoever forgets to wait finds out.
#pragma once

#include "emulator.h"

namespace emulator {

void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* barrier);
void bulk_store(void* dst, const void* src, uint32_t bytes);
void bulk_commit();
void bulk_wait(int pending, bool reads_only);
void barrier_init(uint64_t* barrier, uint32_t count);
void barrier_arrive(uint64_t* barrier, uint32_t bytes);
bool barrier_done(uint64_t* barrier, uint32_t parity);
uint16_t e4m3x2(float upper, float lower);
uint32_t bf16(float value);
uint32_t f16(float value);
float from_f16(uint16_t half);

}  // namespace emulator

namespace ep::ptx {

inline uint32_t lane_id() { return emulator::lane(); }
inline uint32_t lanemask_lt() { return (1u << emulator::lane()) - 1; }
inline uint64_t globaltimer() {
    return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}
inline std::byte* dynamic_shared() { return emulator::dynamic_shared(); }

template <class T>
T load(const T* addr, std::memory_order order) {
    emulator::yield();
    return std::atomic_ref(*const_cast<T*>(addr)).load(order);
}
template <class T>
T ld_acquire_sys(const T* addr) {
    return load(addr, std::memory_order_acquire);
}
template <class T>
T ld_relaxed_gpu(const T* addr) {
    return load(addr, std::memory_order_relaxed);
}
// A kernel's launch orders what ran before it, here as there; relaxed words of one kernel only have to
// be whole. Release makes up for what the end of a kernel gives on a GPU.
template <class T>
void st_relaxed_gpu(T* addr, std::type_identity_t<T> value) {
    std::atomic_ref(*addr).store(value, std::memory_order_relaxed);
}
template <class T>
void st_relaxed_sys(T* addr, std::type_identity_t<T> value) {
    std::atomic_ref(*addr).store(value, std::memory_order_release);
}
template <class T>
T ld_relaxed_sys(const T* addr) {
    return load(addr, std::memory_order_relaxed);
}
// Lanes of a line store it as a whole, and load it so: the number in its last word comes last, and is
// looked at first. Another turn for all lanes makes that so.
inline void st_relaxed_sys_v2(uint64_t* addr, uint64_t b, uint64_t c) {
    const bool last = lane_id() % 8 == 7;
    if (last) emulator::yield();
    std::atomic_ref(addr[0]).store(b, std::memory_order_relaxed);
    std::atomic_ref(addr[1]).store(c, last ? std::memory_order_release : std::memory_order_relaxed);
}
inline void ld_relaxed_sys_v2(const uint64_t* addr, uint64_t& d, uint64_t& e) {
    auto* words = const_cast<uint64_t*>(addr);
    if (lane_id() % 8 != 7) emulator::yield();
    e = std::atomic_ref(words[1]).load(std::memory_order_acquire);
    d = std::atomic_ref(words[0]).load(std::memory_order_relaxed);
    if (lane_id() % 8 == 7) emulator::yield();
}
template <class T>
void st_release_sys(T* addr, std::type_identity_t<T> value) {
    std::atomic_ref(*addr).store(value, std::memory_order_release);
}
inline void red_release_sys_add(uint64_t* addr, uint64_t value) {
    std::atomic_ref(*addr).fetch_add(value, std::memory_order_release);
}
inline uint32_t atom_acq_rel_gpu_add(uint32_t* addr, uint32_t value) {
    return std::atomic_ref(*addr).fetch_add(value);
}
inline uint32_t atom_relaxed_gpu_add(uint32_t* addr, uint32_t value) {
    return std::atomic_ref(*addr).fetch_add(value, std::memory_order_relaxed);
}
inline uint64_t atom_relaxed_gpu_or(uint64_t* addr, uint64_t value) {
    return std::atomic_ref(*addr).fetch_or(value, std::memory_order_relaxed);
}
inline uint64_t atom_acq_rel_gpu_cas(uint64_t* addr, uint64_t expected, uint64_t value) {
    std::atomic_ref(*addr).compare_exchange_strong(expected, value);
    return expected;
}
inline void red_relaxed_sys_or(uint64_t* addr, uint64_t value) {
    std::atomic_ref(*addr).fetch_or(value, std::memory_order_relaxed);
}
inline void red_release_gpu_add(uint32_t* addr, uint32_t value) {
    std::atomic_ref(*addr).fetch_add(value, std::memory_order_release);
}
inline uint32_t ld_acquire_gpu(const uint32_t* addr) {
    return load(addr, std::memory_order_acquire);
}
inline void prefetch_global_l2(const void*) {}
inline void barrier_sync_aligned(int barrier, int threads) {
    emulator::meet_some(barrier, threads);
}
inline uint32_t ld_acquire_cta(const uint32_t* shared) {
    return load(shared, std::memory_order_acquire);
}
inline void st_release_cta(uint32_t* shared, uint32_t value) {
    std::atomic_ref(*shared).store(value, std::memory_order_release);
}
inline uint32_t atom_acq_rel_cta_add(uint32_t* shared, uint32_t value) {
    return std::atomic_ref(*shared).fetch_add(value);
}
inline uint32_t atom_acq_rel_gpu_exch(uint32_t* addr, uint32_t value) {
    return std::atomic_ref(*addr).exchange(value);
}

inline void nanosleep(uint32_t) { emulator::yield(); }
inline void fence_acq_rel_sys() { std::atomic_thread_fence(std::memory_order_acq_rel); }
inline void fence_proxy_async_global() {}
inline void fence_proxy_async_shared() {}
inline void griddepcontrol_wait() {}
inline void griddepcontrol_launch_dependents() {}
inline void fence_mbarrier_init_release_cluster() {}

inline void mbarrier_init(uint64_t* bar, uint32_t count) { emulator::barrier_init(bar, count); }
inline void mbarrier_arrive(uint64_t* bar) { emulator::barrier_arrive(bar, 0); }
inline void mbarrier_arrive_expect_tx(uint64_t* bar, uint32_t bytes) {
    emulator::barrier_arrive(bar, bytes);
}
inline bool mbarrier_try_wait_parity(uint64_t* bar, uint32_t parity) {
    if (emulator::barrier_done(bar, parity)) return true;
    emulator::yield();
    return emulator::barrier_done(bar, parity);
}

inline void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar) {
    emulator::bulk_load(dst, src, bytes, bar);
}
inline void bulk_store(void* dst, const void* src, uint32_t bytes) {
    emulator::bulk_store(dst, src, bytes);
}
inline void bulk_commit_group() { emulator::bulk_commit(); }
template <int kPending>
void bulk_wait_group_read() {
    emulator::bulk_wait(kPending, true);
}
template <int kPending>
void bulk_wait_group() {
    emulator::bulk_wait(kPending, false);
}

inline uint4 ld_shared_v4(const void* addr) {
    uint4 v;
    std::memcpy(&v, addr, 16);
    return v;
}

inline uint4 ld_global_v4(const void* addr) {
    uint4 v;
    std::memcpy(&v, addr, 16);
    return v;
}
template <class T>
void pin(T&) {}

inline void st_global_v2(void* addr, uint64_t b, uint64_t c) {
    std::memcpy(addr, &b, 8), std::memcpy(static_cast<std::byte*>(addr) + 8, &c, 8);
}
inline void st_global(uint32_t* addr, uint32_t b) { *addr = b; }

inline uint16_t cvt_rn_satfinite_e4m3x2(float upper, float lower) {
    return emulator::e4m3x2(upper, lower);
}
inline uint32_t cvt_rn_bf16x2(float upper, float lower) {
    return emulator::bf16(upper) << 16 | emulator::bf16(lower);
}
inline uint32_t cvt_rn_f16x2(float upper, float lower) {
    return emulator::f16(upper) << 16 | emulator::f16(lower);
}
inline float cvt_f32_f16(uint16_t half) { return emulator::from_f16(half); }

}  // namespace ep::ptx
