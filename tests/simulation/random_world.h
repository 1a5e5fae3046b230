// Worlds drawn from a seed: sizes, speeds and one kind of trouble, or all of them.
#pragma once

#include <cstdint>

#include "tests/simulation/world.h"

namespace zeroc::simulation {

enum class Trouble : std::uint8_t {
  kNone,  // delay, reordering, duplicates, queues longer than a lease
  kCancels,
  kFullPool,
  kLoss,
  kKills,
  kStalls,
  kCuts,
  kClockJumps,
  kCorruption,
  kBrokenCalls,
  kEverything,
};
inline constexpr int kTroubles = 11;
const char* TroubleName(Trouble trouble);
Trouble TroubleOf(std::uint64_t seed);

WorldOptions RandomWorld(std::uint64_t seed, int n_requests);

}  // namespace zeroc::simulation
