// The runtime under the kernels: streams come and go in one thread while another waits for all of them. Where that
// goes wrong the address sanitizer says so (EP_SANITIZE=address).
#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "../cpp/check.h"

using namespace ep;

int main() {
    test("streams end while the device is waited for", [] {
        std::atomic<int> done = 0;
        std::thread other([&] {
            for (int i = 0; i < 500; ++i) {
                cudaStream_t stream = nullptr;
                cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
                emulator::queue(stream, [&] {
                    std::this_thread::sleep_for(std::chrono::microseconds(50));
                    ++done;
                });
                std::this_thread::sleep_for(std::chrono::microseconds(20));
                cudaStreamDestroy(stream);
            }
        });
        while (done < 500) cudaDeviceSynchronize();
        other.join();
        expect_eq(done.load(), 500);  // what was queued ran
    });
    return finish();
}
