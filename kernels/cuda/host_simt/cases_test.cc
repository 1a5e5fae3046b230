// The CUDA ops on the emulation, in both orders of threads. faults_test.cc shows that this finds what it should.
#include "kernels/cuda/cases/cases.h"

#include <gtest/gtest.h>

#include "kernels/cuda/host_simt/simt.h"

namespace zeroc::kernels::cuda {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr simt::Order kOrders[] = {
    simt::Order::kBackward};  // a fiber costs the sanitizer much; both in the other builds
#else
constexpr simt::Order kOrders[] = {simt::Order::kForward, simt::Order::kBackward};
#endif

TEST(CudaOnSimt, OpsMatchTheReference) {
  for (const Case& one : AllCases()) {
    for (const simt::Order order : kOrders) {
      simt::SetOptions({order, nullptr});
      Outcome outcome;
      one.run(outcome);
      EXPECT_EQ(outcome.n_failures(), 0) << one.family << ", " << one.name << ": " << outcome.first_failure();
      EXPECT_GT(outcome.n_checked(), 0u) << one.name;
      if (order == simt::Order::kBackward) {
        std::printf("[ tolerance ] %s, %s: %.3f of the bound used in %zu values\n", one.family, one.name,
                    outcome.used(), outcome.n_checked());
      }
    }
  }
  simt::SetOptions({});
}

}  // namespace
}  // namespace zeroc::kernels::cuda
