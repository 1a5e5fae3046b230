// Runs every case of the CUDA ops on the GPU and prints a table. Exit code 0 when all passed, 1 when one failed, 77
// where there is no GPU.
//
//   zeroc-gpu-tests [FAMILY ..]     all families, or those named
#include <chrono>
#include <cstdio>
#include <string_view>

#include "kernels/cuda/cases/cases.h"

int main(int argc, char** argv) {
  namespace cuda = zeroc::kernels::cuda;
  if (const char* why = cuda::WhyUnavailable()) {
    std::printf("SKIPPED: no GPU can be used: %s\n", why);
    return 77;
  }
  char device[256];
  cuda::DescribeDevice(device, sizeof(device));
  std::printf("%s\n\n%-10s %-22s %-8s %10s %8s %8s\n", device, "family", "case", "result", "values", "of bound", "ms");
  int n_passed = 0, n_failed = 0;
  for (const cuda::Case& one : cuda::AllCases()) {
    bool is_wanted = argc == 1;
    for (int i = 1; i < argc; ++i) is_wanted |= std::string_view(argv[i]) == one.family;
    if (!is_wanted) continue;
    cuda::Outcome outcome;
    const auto start = std::chrono::steady_clock::now();
    one.run(outcome);
    const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;
    const bool failed = outcome.n_failures() > 0 || outcome.n_checked() == 0;
    ++(failed ? n_failed : n_passed);
    std::printf("%-10s %-22s %-8s %10zu %8.3f %8.1f\n", one.family, one.name, failed ? "FAILED" : "passed",
                outcome.n_checked(), outcome.used(), spent.count());
    if (failed) std::printf("    %d failures, the first: %s\n", outcome.n_failures(), outcome.first_failure().c_str());
  }
  std::printf("\n%d passed, %d failed\n", n_passed, n_failed);
  return n_failed > 0 || n_passed == 0 ? 1 : 0;
}
