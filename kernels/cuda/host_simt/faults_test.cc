// How strong the cases are: with every single fault that can be planted in the kernels, one of them must fail.
#include <gtest/gtest.h>

#include <set>

#include "kernels/cuda/cases/cases.h"
#include "kernels/cuda/host_simt/simt.h"

namespace zeroc::kernels::cuda {
namespace {

constexpr simt::Order kOrders[] = {simt::Order::kForward, simt::Order::kBackward};

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
// grid that is one block short: some case of a family that goes there must fail. A barrier that nothing needs fails
// here too: remove it.
TEST(CudaOnSimt, EveryPlantedFaultIsNoticed) {
  std::set<std::string> families;
  for (const Case& one : AllCases()) families.insert(one.family);
  std::set<simt::Site> noticed, missed;
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
      const bool is_shared = site.kind != simt::Site::Kind::kBlock && noticed.contains(site);
      if (is_shared) continue;  // with another family
      (IsNoticed(cases, site) ? noticed : missed).insert(site);
      EXPECT_TRUE(site.kind != simt::Site::Kind::kBlock || noticed.contains(site)) << family << ": one block short";
    }
    std::printf("[   faults  ] %s: %zu places\n", family.c_str(), sites.size());
  }
  for (const simt::Site& site : missed) {
    EXPECT_TRUE(noticed.contains(site)) << site.file << ":" << site.line << ", kind " << static_cast<int>(site.kind);
  }
  simt::SetOptions({});
}

}  // namespace
}  // namespace zeroc::kernels::cuda
