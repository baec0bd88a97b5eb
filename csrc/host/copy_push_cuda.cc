#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>

#include "contract/calls.h"
#include "host/copy_push.h"
#include "host/cuda_check.h"
#include "kernels/pack.h"

namespace ep {
namespace {

// A copy more costs 2 us, a piece that is not overlapped its packing.
constexpr int kPieces = 4;

cudaEvent_t as_event(void* event) { return static_cast<cudaEvent_t>(event); }

}  // namespace

CopyPush::CopyPush(int rank, std::vector<std::byte*> arenas, int smem_bytes)
    : rank_(rank), arenas_(std::move(arenas)) {
    EP_CUDA(kernels::load_pack(smem_bytes));
    const size_t bytes = sizeof(Place) * arenas_.size();
    EP_CUDA(cudaHostAlloc(reinterpret_cast<void**>(&places_), bytes, cudaHostAllocMapped));
    std::memset(static_cast<void*>(places_), 0, bytes);
    EP_CUDA(cudaHostGetDevicePointer(reinterpret_cast<void**>(&mapped_places_), places_, 0));
    EP_CUDA(cudaMalloc(reinterpret_cast<void**>(&start_), sizeof(int32_t) * arenas_.size()));
    EP_CUDA(cudaStreamCreateWithFlags(&copies_, cudaStreamNonBlocking));
    EP_CUDA(
        cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(&event_), cudaEventDisableTiming));
}

CopyPush::~CopyPush() {
    cudaStreamSynchronize(copies_);
    cudaStreamDestroy(copies_);
    cudaEventDestroy(as_event(event_));
    cudaFree(start_);
    cudaFreeHost(places_);
}

// The routing of a handle is not counted, so it was not divided, either.
void CopyPush::begin(DispatchJob& job, Stream stream) {
    if (job.args.cached) {
        const int64_t tokens = std::max<int64_t>(job.args.num_tokens, 1);
        job.num_chunks = static_cast<int32_t>(std::min<int64_t>(kPieces, tokens));
        job.tokens_per_chunk = static_cast<int32_t>((tokens + job.num_chunks - 1) / job.num_chunks);
    }
    EP_CUDA(kernels::launch_places({job, mapped_places_, start_, nullptr, nullptr, 0, 0}, stream));
}

bool CopyPush::run(const DispatchJob& job, DeviceArena& arena, int num_blocks, Stream stream) {
    const auto num_ranks = static_cast<int>(arenas_.size());
    std::vector<int64_t> start(num_ranks, 0);
    int64_t total = 0;
    for (int p = 0; p < num_ranks; ++p) {
        start[p] = total;
        if (p != rank_) total += places_[p].num_rows;
    }
    const auto rows = arena.grant(total * job.args.row_bytes(), stream);
    const auto records = arena.grant(total * meta_layout(job.args).bytes, stream);
    if (!rows || !records) return false;
    PackJob pack{job, mapped_places_, start_, rows->data(), records->data(), 0, 0};
    for (int piece = 0; piece < kPieces; ++piece) {
        pack.first_chunk = piece * job.num_chunks / kPieces;
        pack.end_chunk = (piece + 1) * job.num_chunks / kPieces;
        if (pack.first_chunk == pack.end_chunk) continue;
        EP_CUDA(kernels::launch_pack(pack, num_blocks, stream));
        EP_CUDA(cudaEventRecord(as_event(event_), stream));
        EP_CUDA(cudaStreamWaitEvent(copies_, as_event(event_), 0));
        copy_piece(pack, start);
    }
    EP_CUDA(kernels::launch_arrive(pack, copies_));
    // Packed rows, and the input, are free again behind the copies.
    EP_CUDA(cudaEventRecord(as_event(event_), copies_));
    EP_CUDA(cudaStreamWaitEvent(stream, as_event(event_), 0));
    return true;
}

void CopyPush::copy_piece(const PackJob& pack, const std::vector<int64_t>& start) {
    const auto num_ranks = static_cast<int>(arenas_.size());
    const int64_t row_bytes = pack.dispatch.args.row_bytes();
    const int64_t record_bytes = meta_layout(pack.dispatch.args).bytes;
    for (int i = 1; i < num_ranks; ++i) {  // not all to the same rank at once
        const int p = (rank_ + i) % num_ranks;
        const Place& place = places_[p];
        // A damaged handle may say anything; what it says stays within our rows there.
        const auto until = [&place](int chunk) {
            return chunk == 0 ? 0 : std::clamp<int64_t>(place.until[chunk - 1], 0, place.num_rows);
        };
        const int64_t first = until(pack.first_chunk), count = until(pack.end_chunk) - first;
        const auto copy = [&](std::byte* from, int64_t offset, int64_t bytes) {
            if (count <= 0 || bytes == 0) return;
            EP_CUDA(cudaMemcpyAsync(arenas_[p] + offset + (place.row + first) * bytes,
                                    from + (start[p] + first) * bytes, count * bytes,
                                    cudaMemcpyDeviceToDevice, copies_));
        };
        copy(pack.rows, place.x_offset, row_bytes);
        copy(pack.records, place.meta_offset, record_bytes);
    }
}

}  // namespace ep
