// Sums on their way: a ring of stages in shared memory, which one warp feeds with pieces of rows and others
// add up, each a slice of every piece in its registers.
//
// defines: Piece, StageRing, init_stages, Lap, await_barrier, RingFeeder, Sums
#pragma once

#include <cstdint>

#include "contract/gpu.h"
#include "device/copy.cuh"
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "device/wait.cuh"
#include "kernels/enter.cuh"

namespace ep::kernels {

constexpr int kSliceBytes = 2048;  // of a piece: what a warp holds as sums in its registers
constexpr int kMaxPieceBytes = 7 * kSliceBytes;
constexpr int kMaxPullWarps = 16, kMaxGroups = 8;  // of a block
constexpr int kMaxStages = 16;                     // of a ring

// What a stage holds.
struct Piece {
    enum Flag : int32_t {
        kRow = 1,       // bytes of a row; otherwise the token has none
        kFirst = 2,     // sums start here
        kLast = 4,      // and end here
        kStop = 8,      // no more pieces
        kForRail = 16,  // sums go to the rail, and `at` is an address
    };
    int64_t at;  // its bytes in out
    int32_t bytes, flags;
    float weight;
};

// A group's stages, and who waits for them: `loaded` until the piece is there, `used` until all
// adders have read it, each lane for itself (racecheck does not see that one lane arrives for a warp).
struct StageRing {
    std::byte* data;  // [num_stages][piece_bytes]
    Piece* pieces;    // [num_stages]
    uint64_t *loaded, *used;
    int piece_bytes, num_stages;
};

// One warp, a stage a lane, before anybody uses them; a barrier of the block must follow.
__device__ __forceinline__ void init_stages(const StageRing& ring, int adders) {
    const auto stage = static_cast<int>(ptx::lane_id());
    if (stage >= ring.num_stages) return;
    ptx::mbarrier_init(ring.loaded + stage, 1);
    ptx::mbarrier_init(ring.used + stage, 32 * adders);
    ptx::fence_mbarrier_init_release_cluster();
}

// A walk around a ring.
struct Lap {
    int stage = 0;
    uint32_t parity = 0;

    __device__ void next(int num_stages) {
        if (++stage < num_stages) return;
        stage = 0;
        parity ^= 1;
    }
};

// How far a ring has been fed.
struct Fed {
    Lap lap;
    int num_put = 0;
};

// False: leave.
__device__ __forceinline__ bool await_barrier(const RankView& view, Operation op, uint64_t* barrier,
                                              uint32_t parity) {
    if (ptx::mbarrier_try_wait_parity(barrier, parity)) return true;
    return device::wait_own(view.watch, op, view.peers.rank, [barrier, parity] {
        return ptx::mbarrier_try_wait_parity(barrier, parity);
    });
}

// The warp that feeds a ring.
class RingFeeder {
public:
    // `seq` of the combine: in shared memory, so that it needs no register. `fed`: by who fed it before.
    __device__ RingFeeder(const RankView& view, const uint64_t& seq, const StageRing& ring,
                          const Fed& fed = {})
        : view_(view), seq_(seq), ring_(ring), lap_(fed.lap), num_put_(fed.num_put) {}

    __device__ Fed fed() const { return {lap_, num_put_}; }

    // The next stage gets the piece of the lane that `has` it, or nothing with null, once its adders are
    // through with the last one. `prepare(stage)`: what else they will want to know. False: leave.
    template <class Prepare>
    __device__ __forceinline__ bool put(bool has, const Piece& piece, const std::byte* src,
                                        Prepare prepare) {
        const bool free = await_barrier(view_, {OpKind::kCombine, seq_}, ring_.used + lap_.stage,
                                        lap_.parity ^ 1);
        if (!__all_sync(~0u, free)) return false;
        if (has) {
            ring_.pieces[lap_.stage] = piece;
            prepare(lap_.stage);
            uint64_t* loaded = ring_.loaded + lap_.stage;
            if (src == nullptr) {
                ptx::mbarrier_arrive(loaded);
            } else {
                ptx::fence_proxy_async_shared();  // reads of the piece before it
                device::load_stage({ring_.data + lap_.stage * ring_.piece_bytes, loaded}, src,
                                   piece.bytes);
            }
        }
        __syncwarp();
        lap_.next(ring_.num_stages);
        ++num_put_;
        return true;
    }
    __device__ bool put(const Piece& piece, const std::byte* src) {
        return put(ptx::lane_id() == 0, piece, src, [](int) {});
    }
    __device__ bool stop() { return put({0, 0, Piece::kStop, 0.0f}, nullptr); }

    // Before we leave early: what was loaded for nobody arrives all the same, before the memory of the
    // block goes.
    __device__ void drain() {
        Lap lap;
        for (int i = 0; i < num_put_; ++i) {
            while (!ptx::mbarrier_try_wait_parity(ring_.loaded + lap.stage, lap.parity) &&
                   i + ring_.num_stages >= num_put_) {
            }
            lap.next(ring_.num_stages);
        }
    }

private:
    const RankView& view_;
    const uint64_t& seq_;
    const StageRing& ring_;
    Lap lap_;
    int num_put_;
};

// A slice of the result in the registers of a warp.
template <DType kDtype, int kBytes = kSliceBytes>
struct Sums {
    static constexpr int kUnits = kBytes / (16 * 32);
    device::Unit<kDtype> unit[kUnits];
    int first;  // byte of this lane's first unit in a piece

    // f(unit, bytes behind the first one) for the units of this lane that lie in the piece. What differs between
    // units is constant, so that no registers hold it.
    template <class F>
    __device__ __forceinline__ void each(int bytes, F f) {
        const int left = bytes - first;
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            if (16 * 32 * u < left) f(u, 16 * 32 * u);
        }
    }

    __device__ __forceinline__ void clear() {
        for (auto& u : unit) u.clear();
    }

    // The first bias replaces the zero, so that a bias of -0.0 stays what it is.
    __device__ __forceinline__ void start(const CombineArgs& a, const Piece& piece) {
        clear();
        const std::byte* bias = a.bias0 != nullptr ? a.bias0 : a.bias1;
        if (bias == nullptr) return;
        const int64_t begin = piece.at + first;
        each(piece.bytes, [&](int u, int at) {
            unit[u].set(*reinterpret_cast<const uint4*>(bias + begin + at));
            if (a.bias0 == nullptr || a.bias1 == nullptr) return;
            unit[u].add(*reinterpret_cast<const uint4*>(a.bias1 + begin + at));
        });
    }

    // All loads, then all sums.
    template <class Add>
    __device__ __forceinline__ void add(const std::byte* data, int bytes, Add add_to) {
        uint4 bits[kUnits];
        data += first;
        each(bytes, [&](int u, int at) { bits[u] = ptx::ld_shared_v4(data + at); });
        each(bytes, [&](int u, int) { add_to(unit[u], bits[u]); });
    }
    __device__ __forceinline__ void finish(std::byte* out, int bytes) {
        out += first;
        each(bytes,
             [&](int u, int at) { *reinterpret_cast<uint4*>(out + at) = unit[u].rounded(); });
    }
};

}  // namespace ep::kernels
