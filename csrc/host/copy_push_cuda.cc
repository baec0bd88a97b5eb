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
    EP_CUDA(
        cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(&event_), cudaEventDisableTiming));
}

CopyPush::~CopyPush() {
    const BesideCaptures beside;
    cudaStreamSynchronize(copies_);
    cudaStreamDestroy(copies_);
    cudaEventDestroy(as_event(event_));
    cudaFreeHost(places_);
}

void CopyPush::begin(DispatchJob& job, int most_blocks, Stream stream) {
    const int64_t tokens = std::max<int64_t>(job.args.num_tokens, 1);
    job.num_chunks =
        static_cast<int32_t>(std::min<int64_t>(std::min(kMostPackChunks, most_blocks), tokens));
    job.tokens_per_chunk = static_cast<int32_t>((tokens + job.num_chunks - 1) / job.num_chunks);
    EP_CUDA(kernels::launch_plan({job, mapped_places_, nullptr, 0, 0}, stream));
}

void CopyPush::run(const DispatchJob& job, DeviceArena& arena, int num_blocks, int few_blocks,
                   Stream stream) {
    const auto num_ranks = static_cast<int>(arenas_.size());
    std::vector<int64_t> start(num_ranks, 0);
    int64_t total = 0;
    for (int p = 0; p < num_ranks; ++p) {
        start[p] = total;
        if (p != rank_) total += places_[p].num_rows;
    }
    const auto rows = arena.grant(total * job.args.row_bytes(), stream);
    PackJob pack{job, mapped_places_, rows ? rows->data() : nullptr, 0, job.num_chunks};
    if (!rows) {
        EP_CUDA(kernels::launch_pack(pack, few_blocks, smem_bytes_, stream));
        EP_CUDA(kernels::launch_arrive(pack, stream));
        return;
    }
    for (int piece = 0; piece < kPieces; ++piece) {
        pack.first_chunk = piece_begin(piece, job.num_chunks);
        pack.end_chunk = piece_begin(piece + 1, job.num_chunks);
        if (pack.first_chunk == pack.end_chunk) continue;
        EP_CUDA(kernels::launch_pack(pack, num_blocks, smem_bytes_, stream));
        EP_CUDA(cudaEventRecord(as_event(event_), stream));
        EP_CUDA(cudaStreamWaitEvent(copies_, as_event(event_), 0));
        copy_piece(pack, piece, start);
    }
    EP_CUDA(kernels::launch_arrive(pack, copies_));
    // Packed rows, and the input, are free again behind the copies.
    EP_CUDA(cudaEventRecord(as_event(event_), copies_));
    EP_CUDA(cudaStreamWaitEvent(stream, as_event(event_), 0));
}

void CopyPush::copy_piece(const PackJob& pack, int piece, const std::vector<int64_t>& start) {
    const auto num_ranks = static_cast<int>(arenas_.size());
    const int64_t row_bytes = pack.dispatch.args.row_bytes();
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
                                pack.rows + (start[p] + first) * row_bytes, count * row_bytes,
                                cudaMemcpyDeviceToDevice, copies_));
    }
}

}  // namespace ep
