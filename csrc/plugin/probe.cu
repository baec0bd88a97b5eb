#include "plugin/probe.h"

#include <cuda_runtime_api.h>

#include <memory>

#include "device/rail_nvshmem.cuh"
#include "kernels/rail_probe.cuh"
#include "plugin/on_device.h"

namespace ep {
namespace {

using Job = kernels::RailProbeJob<device::NvshmemRail>;

struct FreeHost {
    void operator()(void* memory) const { cudaFreeHost(memory); }
};

}  // namespace

ProbeResult probe_nvshmem(const NvshmemSegment& segment, const RailShape& shape, int rank,
                          const std::vector<int>& pe, bool has_network, uint64_t first,
                          int num_chunks, double limit_s) {
    void* pinned = nullptr;
    check_cuda(cudaHostAlloc(&pinned, sizeof(HostPage), cudaHostAllocMapped), "cudaHostAlloc");
    const std::unique_ptr<HostPage, FreeHost> page(new (pinned) HostPage{});
    const auto pes = on_device(pe.data(), pe.size());
    const auto abort = on_device<uint32_t>(nullptr, 1);
    const auto wrong = on_device<unsigned long long>(nullptr, 1);
    // Our own header and a blank one for all others, each with room for everybody's life behind it.
    const int64_t lives = sizeof(ControlHeader);
    const int64_t block = lives + 8 * static_cast<int64_t>(pe.size());
    const auto blocks = on_device<std::byte>(nullptr, 2 * block);
    std::vector<std::byte*> headers(pe.size(), blocks.get() + block);
    headers[rank] = blocks.get();
    const auto control = on_device(headers.data(), headers.size());

    Job job{
        {segment.data, pes.get(), has_network}, shape, {}, wrong.get(), first, rank, num_chunks};
    const auto limit_ns = static_cast<int64_t>(limit_s * 1e9);
    job.watch = {.lives = lives,
                 .abort = abort.get(),
                 .page = page.get(),
                 .control = control.get(),
                 .arrival_ns = limit_ns,
                 .progress_ns = limit_ns,
                 .post_ns = limit_ns,
                 .rank = rank,
                 .num_ranks = static_cast<int32_t>(pe.size()),
                 .near_begin = rank,
                 .near_end = rank + 1};
    check_cuda(kernels::launch_rail_probe(job, nullptr), "rail_probe_kernel");
    check_cuda(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");

    ProbeResult result;
    check_cuda(cudaMemcpy(&result.wrong_units, wrong.get(), sizeof(result.wrong_units),
                          cudaMemcpyDeviceToHost),
               "cudaMemcpy");
    if (page->incident_valid != 0) {
        result.code = page->incident.code;
        result.peer = page->incident.peer;
    }
    return result;
}

}  // namespace ep
