// Pretended nodes on one GPU: chunks arrive whole, in spite of puts held back, reordered and delayed;
// a rail that stalls ends in a named wait, not in a hang.
#include <cuda_runtime_api.h>

#include <array>
#include <bit>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "device/rail_loopback.cuh"
#include "kernels/rail_probe.cuh"

namespace {

using ep::Trouble;
using ep::device::LoopbackRail;
using Job = ep::kernels::RailProbeJob<LoopbackRail>;

void must(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

struct Free {
    void operator()(void* memory) const { cudaFree(memory); }
};
using Memory = std::unique_ptr<std::byte, Free>;

Memory zeroed(size_t bytes) {
    void* memory = nullptr;
    must(cudaMalloc(&memory, bytes));
    must(cudaMemset(memory, 0, bytes));
    return Memory(static_cast<std::byte*>(memory));
}

template <class T>
Memory on_device(const std::vector<T>& values) {
    Memory memory = zeroed(values.size() * sizeof(T));
    must(
        cudaMemcpy(memory.get(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return memory;
}

// One pretended rank.
struct Rank {
    Memory segment, headers, control, abort, wrong, held;
    ep::HostPage* page = nullptr;
    cudaStream_t stream = nullptr;

    ~Rank() {
        cudaFreeHost(page);
        cudaStreamDestroy(stream);
    }
};

class Cluster {
public:
    Cluster(int num_nodes, int ranks_per_node, int64_t chunk_bytes, int ring_chunks,
            double limit_s = 10) {
        shape_.nodes = {num_nodes, ranks_per_node};
        shape_.num_channels = 1;
        shape_.ring_shift = std::countr_zero(static_cast<unsigned>(ring_chunks));
        shape_.chunk_bytes = chunk_bytes;
        shape_.notice_bytes = 128;
        const int size = num_nodes * ranks_per_node;
        std::vector<std::byte*> segments;
        const int64_t block = kLives + 8 * size;  // a header, and everybody's life behind it
        for (int r = 0; r < size; ++r) {
            auto rank = std::make_unique<Rank>();
            rank->segment = zeroed(ep::RailLayout(shape_).end);
            rank->headers = zeroed(2 * block);  // our own, and a blank one
            rank->abort = zeroed(4);
            rank->wrong = zeroed(8);
            rank->held = zeroed(sizeof(ep::device::HeldPuts) * num_nodes);
            std::vector<std::byte*> control(size, rank->headers.get() + block);
            control[r] = rank->headers.get();
            rank->control = on_device(control);
            must(cudaHostAlloc(reinterpret_cast<void**>(&rank->page), sizeof(ep::HostPage),
                               cudaHostAllocMapped));
            *rank->page = {};
            must(cudaStreamCreateWithFlags(&rank->stream, cudaStreamNonBlocking));
            segments.push_back(rank->segment.get());
            ranks_.push_back(std::move(rank));
        }
        segments_ = on_device(segments);
        limit_ns_ = static_cast<int64_t>(limit_s * 1e9);
    }

    static constexpr int64_t kLives = sizeof(ep::ControlHeader);

    // All ranks at once; `trouble` of each, or of all.
    void probe(int num_chunks, const std::vector<Trouble>& trouble) {
        for (size_t r = 0; r < ranks_.size(); ++r) {
            Rank& rank = *ranks_[r];
            Job job;
            job.rail = {reinterpret_cast<std::byte* const*>(segments_.get()),
                        reinterpret_cast<ep::device::HeldPuts*>(rank.held.get()), shape_.nodes,
                        static_cast<int>(r), trouble[r % trouble.size()]};
            job.shape = shape_;
            job.watch = {.lives = kLives,
                         .abort = reinterpret_cast<uint32_t*>(rank.abort.get()),
                         .page = rank.page,
                         .control = reinterpret_cast<std::byte* const*>(rank.control.get()),
                         .arrival_ns = limit_ns_,
                         .progress_ns = limit_ns_,
                         .post_ns = limit_ns_,
                         .rank = static_cast<int>(r),
                         .num_ranks = static_cast<int>(ranks_.size()),
                         .near_begin = static_cast<int>(r),
                         .near_end = static_cast<int>(r) + 1};
            job.wrong = reinterpret_cast<unsigned long long*>(rank.wrong.get());
            job.first = first_;
            job.rank = static_cast<int>(r);
            job.num_chunks = num_chunks;
            must(static_cast<cudaError_t>(ep::kernels::launch_rail_probe(job, rank.stream)));
        }
        must(cudaDeviceSynchronize());
        first_ += num_chunks;
    }

    unsigned long long wrong() const {
        unsigned long long total = 0;
        for (const auto& rank : ranks_) {
            unsigned long long here = 0;
            must(cudaMemcpy(&here, rank->wrong.get(), 8, cudaMemcpyDeviceToHost));
            total += here;
        }
        return total;
    }
    const ep::HostPage& page(int rank) const { return *ranks_[rank]->page; }

private:
    ep::RailShape shape_;
    std::vector<std::unique_ptr<Rank>> ranks_;
    Memory segments_;
    int64_t limit_ns_;
    uint64_t first_ = 0;
};

void expect_whole(Cluster& cluster, int num_ranks) {
    ep::expect_eq(cluster.wrong(), 0ull);
    for (int r = 0; r < num_ranks; ++r) {
        ep::expect_eq(cluster.page(r).incident_valid, 0ull);
    }
}

Trouble troubled(uint32_t seed) {
    Trouble t;
    t.seed = seed;
    t.max_held = 3;
    t.max_delay_ns = 5000;
    return t;
}

}  // namespace

int main() {
    // Streams of ranks that wait for each other must not share a hardware queue.
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return ep::kSkip;

    ep::test("chunks arrive whole on clusters of any shape, with a ring of one and of more", [] {
        for (const auto& [nodes, ranks, ring] :
             {std::array{2, 1, 1}, std::array{2, 4, 4}, std::array{4, 2, 2}, std::array{4, 4, 8},
              std::array{8, 2, 1}}) {
            Cluster cluster(nodes, ranks, 4096, ring);
            cluster.probe(50, {Trouble{}});
            cluster.probe(7, {Trouble{}});  // counts go on
            expect_whole(cluster, nodes * ranks);
        }
    });

    ep::test("puts that are held back, reordered and delayed change nothing", [] {
        Cluster cluster(4, 2, 16 * 100, 4);
        for (uint32_t seed = 1; seed <= 20; ++seed) cluster.probe(20, {troubled(seed)});
        expect_whole(cluster, 8);
    });

    ep::test("a stalled rail ends in a wait that names the peer", [] {
        Cluster cluster(2, 2, 256, 2, 0.3);
        std::vector<Trouble> trouble(4);
        trouble[1].stalled_peer = 3;
        cluster.probe(5, trouble);
        ep::expect_eq(cluster.page(3).incident_valid, 1ull);
        ep::expect_eq(int{cluster.page(3).incident.code}, int{ep::kStalled});
        ep::expect_eq(int{cluster.page(3).incident.peer}, 1);
        ep::expect_eq(cluster.page(0).incident_valid, 0ull);
        must(cudaDeviceSynchronize());  // the context lives on
    });

    ep::test("a silent rank is named by all on its rail", [] {
        Cluster cluster(3, 1, 256, 2, 0.3);
        std::vector<Trouble> trouble(3);
        trouble[2].is_silent = true;
        cluster.probe(5, trouble);
        for (int r : {0, 1}) ep::expect_eq(int{cluster.page(r).incident.peer}, 2);
    });
    return ep::finish();
}
