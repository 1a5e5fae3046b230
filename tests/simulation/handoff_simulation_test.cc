// The hand-off under random trouble: >= 100,000 requests over many seeded worlds (world.h says what must hold).
//
//   ZEROC_SIMULATION_SEED=N     only world N, with its event log
//   ZEROC_SIMULATION_SCALE=0.1  a tenth of the requests
#include <gtest/gtest.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "tests/simulation/random_world.h"
#include "tests/simulation/test_simulation.h"

namespace zeroc::simulation {
namespace {

constexpr int kRequestsPerWorld = 150;

TEST(HandoffSimulation, NothingIsLostLeakedOrWrongUnderRandomTrouble) {
  WorldReport totals[kTroubles];
  WorldReport all;
  const int n_requests = Scaled(100'000);
  for (std::uint64_t seed = FirstSeed(); all.n_requests < n_requests; ++seed) {
    const WorldOptions options = RandomWorld(seed, kRequestsPerWorld);
    const WorldReport report = World(options).Run();
    totals[seed % kTroubles].Add(report);
    all.Add(report);
    if (report.violation.has_value()) {
      ADD_FAILURE() << Explain(options, *report.violation);
      break;
    }
    if (OneSeedOnly()) break;
  }
  for (int t = 0; t < kTroubles; ++t) Print(TroubleName(static_cast<Trouble>(t)), totals[t]);
  Print("all", all);
  if (OneSeedOnly() || HasFailure()) return;
  // The troubles bite.
  EXPECT_EQ(all.n_requests, all.n_ok + all.n_cancelled + all.n_failed);
  EXPECT_GT(all.n_ok, all.n_requests / 2);
  EXPECT_GT(all.n_migrations, all.n_requests / 1000);
  EXPECT_GT(all.n_attempts, all.n_requests);
  EXPECT_GT(all.n_lease_expiries, all.n_requests / 1000);
  EXPECT_GT(all.n_local, all.n_requests / 50);
  EXPECT_GT(all.n_refused, 0);
  EXPECT_GT(all.n_bad_checksums, 0);
  EXPECT_GT(all.n_quarantined, 0);
}

TEST(HandoffSimulation, TheSameSeedGivesTheSameRun) {
  for (const std::uint64_t seed : {7u, 10u, 21u}) {
    WorldOptions options = RandomWorld(seed, 50);
    options.log = true;
    World first(options), second(options);
    first.Run();
    second.Run();
    EXPECT_EQ(first.log(), second.log()) << "seed " << seed;
    EXPECT_EQ(first.network().steps(), second.network().steps()) << "seed " << seed;
  }
}

}  // namespace
}  // namespace zeroc::simulation
