// The simulation's own strength: each deliberate mistake (mutation.h) is noticed, by the violation that is expected of
// it, within the stated number of requests. The same worlds pass without the mistake (handoff_simulation_test.cc).
#include <gtest/gtest.h>

#include <cstdio>
#include <sstream>
#include <string>

#include "tests/simulation/mutation.h"
#include "tests/simulation/random_world.h"
#include "tests/simulation/test_simulation.h"

namespace zeroc::simulation {
namespace {

constexpr int kRequestsPerWorld = 150;

bool Expects(const Mutation& mutation, const std::string& kind) {
  std::istringstream expected(mutation.caught_by);
  for (std::string one; std::getline(expected, one, '|');) {
    if (one == kind) return true;
  }
  return false;
}

class HandoffMutation : public ::testing::TestWithParam<Mutation> {};

TEST_P(HandoffMutation, IsNoticed) {
  const Mutation& mutation = GetParam();
  WorldReport all;
  for (std::uint64_t seed = FirstSeed(); all.n_requests < mutation.requests_max; ++seed) {
    WorldOptions options = RandomWorld(seed, kRequestsPerWorld);
    options.mistake = mutation.mistake;
    all.Add(World(options).Run());
    if (!all.violation.has_value()) continue;
    const Violation& violation = *all.violation;
    std::printf("%-22s noticed after %6d requests, seed %llu: %s: %s\n", mutation.name, all.n_requests,
                static_cast<unsigned long long>(seed), violation.kind.c_str(), violation.text.c_str());
    EXPECT_TRUE(Expects(mutation, violation.kind)) << mutation.what << ": expected " << mutation.caught_by << "\n"
                                                   << Explain(options, violation);
    EXPECT_LE(all.n_requests, mutation.requests_max);
    return;
  }
  FAIL() << mutation.what << " went unnoticed in " << all.n_requests << " requests; expected " << mutation.caught_by;
}

INSTANTIATE_TEST_SUITE_P(Mistakes, HandoffMutation, ::testing::ValuesIn(kMutations),
                         [](const ::testing::TestParamInfo<Mutation>& param) { return std::string(param.param.name); });

}  // namespace
}  // namespace zeroc::simulation
