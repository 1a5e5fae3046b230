#include "tests/simulation/random_world.h"

#include <random>
#include <string>

namespace zeroc::simulation {
namespace {

class Draw {
 public:
  explicit Draw(std::uint64_t seed) : rng_(seed * 0x9e3779b97f4a7c15u + 1) {}
  double Real(double min, double max) { return std::uniform_real_distribution<double>(min, max)(rng_); }
  int Int(int min, int max) { return std::uniform_int_distribution<int>(min, max)(rng_); }
  bool Coin(double p = 0.5) { return Real(0, 1) < p; }

 private:
  std::mt19937_64 rng_;
};

std::string AnyWorker(Draw& draw, const WorldOptions& options, bool decode) {
  std::string name(decode ? "d" : "p");
  name += std::to_string(draw.Int(0, (decode ? options.n_decode : options.n_prefill) - 1));
  return name;
}

void AddFaults(Draw& draw, Fault fault, int n, double until, WorldOptions* options) {
  for (int i = 0; i < n; ++i) {
    FaultEvent event;
    event.fault = fault;
    event.at = draw.Real(0.1, until);
    const bool decode = draw.Coin();
    event.node = AnyWorker(draw, *options, decode);
    event.other = AnyWorker(draw, *options, !decode);
    switch (fault) {
      case Fault::kKill:
        event.seconds = draw.Coin() ? draw.Real(0.01, 0.5) : draw.Real(0.5, 6);  // back before or after it was missed
        break;
      case Fault::kStall:
        event.seconds = draw.Coin() ? draw.Real(0.01, 1) : draw.Real(1, 8);
        break;
      case Fault::kClockJump:
        event.seconds = draw.Coin() ? draw.Real(0.1, 3) : draw.Real(3, 100);
        break;
      case Fault::kCancelStorm:
      case Fault::kBreakCalls:
        event.share = draw.Real(0.1, 1);
        break;
      case Fault::kCut:
      case Fault::kRouterRestart:
        break;
    }
    options->faults.push_back(event);
  }
}

}  // namespace

const char* TroubleName(Trouble trouble) {
  static const char* const kNames[kTroubles] = {"none",       "cancels",      "full pool", "loss",
                                                "kills",      "stalls",       "cuts",      "clock jumps",
                                                "corruption", "broken calls", "everything"};
  return kNames[static_cast<int>(trouble)];
}

Trouble TroubleOf(std::uint64_t seed) { return static_cast<Trouble>(seed % kTroubles); }

WorldOptions RandomWorld(std::uint64_t seed, int n_requests) {
  Draw draw(seed);
  const Trouble trouble = TroubleOf(seed);
  WorldOptions options;
  options.seed = seed;
  options.n_requests = n_requests;
  options.delivery = draw.Coin() ? Delivery::kPut : Delivery::kActiveMessage;
  options.n_decode = draw.Int(1, 3);
  options.n_prefill = draw.Int(2, 4);
  options.ranks_max = draw.Coin() ? 1 : 3;
  options.network.delay_max_seconds = draw.Coin() ? 1e-3 : draw.Real(0.02, 0.3);
  // A put that arrives twice cannot be refused by anybody, and no network card does that.
  if (options.delivery == Delivery::kActiveMessage) {
    // Not both: a second copy under way while its lease commits ends the lease, which no single copy would.
    if (draw.Coin()) {
      options.network.duplicate_probability = 0.1;
    } else {
      options.network.rendezvous_probability = 0.5;
    }
  }
  options.compute_seconds = draw.Coin() ? 0.001 : 0.004;
  options.arrival_seconds = draw.Real(0.015, 0.04);
  if (draw.Coin()) options.local_prefill_tokens = 48;
  if (draw.Coin(0.3)) options.cancel_probability = 0.1;
  const double until = options.arrival_seconds * n_requests;
  const auto some = [&](double seconds_each) { return 1 + static_cast<int>(until / seconds_each); };
  const bool all = trouble == Trouble::kEverything;
  options.calm = trouble == Trouble::kNone || trouble == Trouble::kCancels || trouble == Trouble::kFullPool;
  if (trouble == Trouble::kNone) options.compute_seconds = draw.Coin() ? 0.001 : 0.01;  // queues
  if (trouble == Trouble::kCancels || all) {
    options.cancel_probability = draw.Real(0.1, 0.7);
    AddFaults(draw, Fault::kCancelStorm, some(1), until, &options);
  }
  if (trouble == Trouble::kFullPool || all) options.decode_arena_bytes = 512 << 10;
  if (trouble == Trouble::kFullPool) options.prefill_arena_bytes = 512 << 10;
  if (trouble == Trouble::kLoss || all) options.network.drop_probability = draw.Real(0.0002, 0.01);
  if (trouble == Trouble::kKills || all) AddFaults(draw, Fault::kKill, some(2), until, &options);
  if (trouble == Trouble::kStalls || all) AddFaults(draw, Fault::kStall, some(2), until, &options);
  if (trouble == Trouble::kCuts || all) AddFaults(draw, Fault::kCut, some(1), until, &options);
  if (trouble == Trouble::kClockJumps || all) AddFaults(draw, Fault::kClockJump, some(1), until, &options);
  if (trouble == Trouble::kCorruption || all) options.network.corrupt_probability = draw.Real(0.001, 0.02);
  if (trouble == Trouble::kBrokenCalls || all) {
    AddFaults(draw, Fault::kBreakCalls, some(1), until, &options);
    AddFaults(draw, Fault::kRouterRestart, some(4), until, &options);
  }
  return options;
}

}  // namespace zeroc::simulation
