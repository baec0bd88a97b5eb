// The generated header says what it must, and each lack has a reason.
#include <cstring>
#include <string>

#include "check.h"
#include "contract/build_info.h"

int main() {
    ep::test("every field that must be there is there", [] {
        ep::expect(std::strlen(ep::kBuildInfo.version) > 0, "version is empty");
        ep::expect(std::strlen(ep::kBuildInfo.compiler) > 0, "compiler is empty");
        ep::expect(std::string(ep::kBuildInfo.simd).starts_with("portable"), "no portable path");
    });
    ep::test("what is missing says why, what is there does not", [] {
        ep::expect_eq(*ep::kBuildInfo.cuda == '\0', *ep::kBuildInfo.cuda_missing != '\0');
        ep::expect_eq(*ep::kBuildInfo.nvshmem == '\0', *ep::kBuildInfo.nvshmem_missing != '\0');
    });
    ep::test("EP_HAS_CUDA agrees with the build", [] {
#ifdef EP_HAS_CUDA
        ep::expect(*ep::kBuildInfo.cuda != '\0', "EP_HAS_CUDA without a CUDA version");
#else
        ep::expect_eq(std::string(ep::kBuildInfo.cuda), "");
#endif
    });
    return ep::finish();
}
