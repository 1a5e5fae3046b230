// What the simulation's tests share: scale, seeds, and what to print when a world fails.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "tests/simulation/world.h"

namespace zeroc::simulation {

inline bool OneSeedOnly() { return std::getenv("ZEROC_SIMULATION_SEED") != nullptr; }
inline std::uint64_t FirstSeed() {
  return OneSeedOnly() ? std::strtoull(std::getenv("ZEROC_SIMULATION_SEED"), nullptr, 10) : 1;
}
inline int Scaled(int n) {
  const char* scale = std::getenv("ZEROC_SIMULATION_SCALE");
  return scale == nullptr ? n : static_cast<int>(n * std::atof(scale));
}

// The world once more, with its log.
inline std::string Explain(WorldOptions options, const Violation& violation) {
  options.log = true;
  World world(options);
  world.Run();
  std::string text = "seed " + std::to_string(options.seed) + " at " + std::to_string(violation.at) +
                     " s: " + violation.kind + ": " + violation.text + "\n";
  for (const std::string& line : world.log()) text += "  " + line + "\n";
  return text + "replay with ZEROC_SIMULATION_SEED=" + std::to_string(options.seed);
}

inline void Print(const std::string& name, const WorldReport& r) {
  std::printf(
      "%-12s requests %6d ok %6d cancelled %5d failed %4d  attempts %6d migrations %4d local %5d refused %5d  "
      "leases failed %5d expired %4d bad checksums %4d quarantined %6d  steps checked %7llu  %.0f s\n",
      name.c_str(), r.n_requests, r.n_ok, r.n_cancelled, r.n_failed, r.n_attempts, r.n_migrations, r.n_local,
      r.n_refused, r.n_lease_failures, r.n_lease_expiries, r.n_bad_checksums, r.n_quarantined,
      static_cast<unsigned long long>(r.n_steps_checked), r.seconds);
}

}  // namespace zeroc::simulation
