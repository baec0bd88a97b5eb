#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>

#include "contract/calls.h"
#include "host/copy_push.h"
#include "host/cuda_check.h"
#include "kernels/pack.h"
#include "transport/beside_captures.h"

namespace ep {
namespace {

cudaEvent_t as_event(void* event) { return static_cast<cudaEvent_t>(event); }

}  // namespace

CopyPush::CopyPush(int rank, std::vector<std::byte*> arenas, int smem_bytes)
    : rank_(rank), arenas_(std::move(arenas)), smem_bytes_(smem_bytes) {
    const BesideCaptures beside;
    const size_t bytes = sizeof(Place) * arenas_.size();
    EP_CUDA(cudaHostAlloc(reinterpret_cast<void**>(&places_), bytes, cudaHostAllocMapped));
    std::memset(static_cast<void*>(places_), 0, bytes);
    EP_CUDA(cudaHostGetDevicePointer(reinterpret_cast<void**>(&mapped_places_), places_, 0));
    EP_CUDA(cudaStreamCreateWithFlags(&copies_, cudaStreamNonBlocking));
    for (void** event : every_event()) {
        EP_CUDA(cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(event),
                                         cudaEventDisableTiming));
    }
}

CopyPush::~CopyPush() {
    const BesideCaptures beside;
    cudaStreamSynchronize(copies_);
    cudaStreamDestroy(copies_);
    for (void** event : every_event()) cudaEventDestroy(as_event(*event));
    cudaFreeHost(places_);
}

std::array<void**, kPieces + 1> CopyPush::every_event() {
    std::array<void**, kPieces + 1> events{&over_};
    for (int piece = 0; piece < kPieces; ++piece) events[1 + piece] = &packed_[piece];
    return events;
}

void CopyPush::begin(Flight& flight, DeviceArena& arena, int most_blocks) {
    DispatchJob& job = flight.job;
    const int64_t tokens = std::max<int64_t>(job.args.num_tokens, 1);
    job.num_chunks =
        static_cast<int32_t>(std::min<int64_t>(std::min(kMostPackChunks, most_blocks), tokens));
    job.tokens_per_chunk = static_cast<int32_t>((tokens + job.num_chunks - 1) / job.num_chunks);
    EP_CUDA(kernels::launch_plan({job, mapped_places_, nullptr, 0, 0}, flight.stream));
    // It goes on while the host waits for the report; how many rows there are, the kernels know.
    const int64_t others = static_cast<int64_t>(arenas_.size()) - 1;
    (void)pack(flight, arena, most_blocks,
               job.args.num_tokens * std::min<int64_t>(others, job.args.num_topk));
}

bool CopyPush::pack(Flight& flight, DeviceArena& arena, int num_blocks, int64_t num_rows) {
    const DispatchJob& job = flight.job;
    flight.packed = arena.grant(num_rows * job.args.row_bytes(), flight.stream);
    if (!flight.packed) return false;
    PackJob rows{job, mapped_places_, flight.packed->data(), 0, 0};
    for (int piece = 0; piece < kPieces; ++piece) {
        rows.first_chunk = rows.end_chunk;
        rows.end_chunk = piece_begin(piece + 1, job.num_chunks);
        if (rows.first_chunk == rows.end_chunk) continue;
        EP_CUDA(kernels::launch_pack(rows, num_blocks, smem_bytes_, flight.stream));
        EP_CUDA(cudaEventRecord(as_event(packed_[piece]), flight.stream));
    }
    return true;
}

void CopyPush::run(Flight& flight, DeviceArena& arena, int num_blocks, int few_blocks) {
    const DispatchJob& job = flight.job;
    const auto num_ranks = static_cast<int>(arenas_.size());
    std::vector<int64_t> start(num_ranks, 0);
    int64_t total = 0;
    for (int p = 0; p < num_ranks; ++p) {
        start[p] = total;
        if (p != rank_) total += places_[p].num_rows;
    }
    if (!flight.packed && !pack(flight, arena, num_blocks, total)) {
        const PackJob straight{job, mapped_places_, nullptr, 0, job.num_chunks};
        EP_CUDA(kernels::launch_pack(straight, few_blocks, smem_bytes_, flight.stream));
        EP_CUDA(kernels::launch_arrive(straight, flight.stream));
        return;
    }
    for (int piece = 0; piece < kPieces; ++piece) {
        if (piece_begin(piece, job.num_chunks) == piece_begin(piece + 1, job.num_chunks)) continue;
        EP_CUDA(cudaStreamWaitEvent(copies_, as_event(packed_[piece]), 0));
        copy_piece(flight, piece, start);
    }
    EP_CUDA(kernels::launch_arrive({job}, copies_));
    // Packed rows, and the input, are free again behind the copies.
    EP_CUDA(cudaEventRecord(as_event(over_), copies_));
    EP_CUDA(cudaStreamWaitEvent(flight.stream, as_event(over_), 0));
    flight.packed.reset();
}

void CopyPush::copy_piece(const Flight& flight, int piece, const std::vector<int64_t>& start) {
    const auto num_ranks = static_cast<int>(arenas_.size());
    const int64_t row_bytes = flight.job.args.row_bytes();
    for (int i = 1; i < num_ranks; ++i) {  // not all to the same rank at once
        const int p = (rank_ + i) % num_ranks;
        const Place& place = places_[p];
        // A damaged handle may say anything; what it says stays within our rows there.
        const auto until = [&place](int n) {
            return n == 0 ? 0 : std::clamp<int64_t>(place.until[n - 1], 0, place.num_rows);
        };
        const int64_t first = until(piece), count = until(piece + 1) - first;
        if (count <= 0) continue;
        EP_CUDA(cudaMemcpyAsync(arenas_[p] + place.x + (place.row + first) * row_bytes,
                                flight.packed->data() + (start[p] + first) * row_bytes,
                                count * row_bytes, cudaMemcpyDeviceToDevice, copies_));
    }
}

}  // namespace ep
