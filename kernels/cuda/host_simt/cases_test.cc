// The CUDA ops on the emulation: right as they are, and seen to be wrong with every single fault that can be planted.
#include "kernels/cuda/cases/cases.h"

#include <gtest/gtest.h>

#include <set>

#include "kernels/cuda/host_simt/simt.h"

namespace zeroc::kernels::cuda {
namespace {

constexpr simt::Order kOrders[] = {simt::Order::kForward, simt::Order::kBackward};

TEST(CudaOnSimt, OpsMatchTheReference) {
  for (const Case& one : AllCases()) {
    for (const simt::Order order : kOrders) {
      simt::SetOptions({order, nullptr});
      Outcome outcome;
      one.run(outcome);
      EXPECT_EQ(outcome.n_failures(), 0) << one.family << ", " << one.name << ": " << outcome.first_failure();
      EXPECT_GT(outcome.n_checked(), 0u) << one.name;
      if (order == simt::Order::kForward) {
        std::printf("[ tolerance ] %s, %s: %.3f of the bound used in %zu values\n", one.family, one.name,
                    outcome.used(), outcome.n_checked());
      }
    }
  }
  simt::SetOptions({});
}

bool IsNoticed(const std::vector<Case>& cases, const simt::Site& site) {
  for (const Case& one : cases) {
    for (const simt::Order order : kOrders) {
      simt::SetOptions({order, &site});
      Outcome outcome(/*stops=*/true);
      try {
        one.run(outcome);
      } catch (const Outcome::Stop&) {
        return true;
      }
    }
  }
  return false;
}

// Every barrier that does not wait, every shuffle from the wrong lane, every lost copy, every swapped column, every
// grid that is one block short: some case must fail. A barrier that nothing needs fails here too: remove it.
TEST(CudaOnSimt, EveryPlantedFaultIsNoticed) {
  std::set<std::string> families;
  for (const Case& one : AllCases()) families.insert(one.family);
  for (const std::string& family : families) {
    std::vector<Case> cases;
    simt::SetOptions({});
    simt::TakeSites();
    for (const Case& one : AllCases()) {
      if (one.family != family) continue;
      cases.push_back(one);
      Outcome outcome;
      one.run(outcome);
    }
    const std::vector<simt::Site> sites = simt::TakeSites();
    EXPECT_FALSE(sites.empty()) << family;
    for (const simt::Site& site : sites) {
      EXPECT_TRUE(IsNoticed(cases, site))
          << family << ": " << site.file << ":" << site.line << ", kind " << static_cast<int>(site.kind);
    }
    std::printf("[   faults  ] %s: %zu planted\n", family.c_str(), sites.size());
  }
  simt::SetOptions({});
}

}  // namespace
}  // namespace zeroc::kernels::cuda
