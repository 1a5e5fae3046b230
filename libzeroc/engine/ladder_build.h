// Builds the ladder of a plan: measures every side's candidate shapes, shares the bytes between sides, and picks
// windows and mass correction for each rung by what the whole profile then costs on calibration text.
//
//   probe     everything exact but one side in one candidate shape; its cost is the divergence it adds. First a few
//             shapes over the whole range of bytes, then those that the error model, fitted to them, finds best
//   share     lower hull per side, marginal gain over all sides (ladder_search.h)
//   rung      for each choice of windows the largest share that fits the bytes, measured whole; the best one stays
//
// A probe's cost is its KL times the side's ratio of direct increase to KL where that exceeds one: the promise is the
// larger of the two (design section 2), the ratio is a property of the side (keys that lose mass make the model copy
// less), and as one number per side it is not noise. The mass correction is used where a probe says that it helps.
// Not thread-safe.
#pragma once

#include <functional>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/compression/plan.h"
#include "libzeroc/engine/ladder_mass.h"
#include "libzeroc/engine/ladder_probe.h"
#include "libzeroc/engine/ladder_search.h"

namespace zeroc {

// Packed blocks on their way to the final shapes: `blocks` of 64 tokens with at least `bits` in every run.
struct YoungChoice {
  int blocks = 1;
  int bits = 8;
  bool operator==(const YoungChoice&) const = default;
};

// What is kept better than the final shapes: the first `sink_tokens` and the newest `recent_tokens` exact, then the
// young tiers, youngest first.
struct WindowChoice {
  int recent_tokens = 64;
  std::vector<YoungChoice> young;
  int sink_tokens = kernels::kSinkTokens;
  bool operator==(const WindowChoice&) const = default;
};

struct LadderOptions {
  // One rung each: at most this many bits per element, everything counted at kCostContext tokens.
  std::vector<double> rungs = {6, 5, 4, 3.5, 3, 2.5, 2.25, 2, 1.75, 1.5, 1.25};
  int first_probes = 6;   // shapes measured per side over the whole range
  int second_probes = 8;  // and of those that are best by the model fitted to the first
  ShapeLimits shapes;
  // Windows to choose from; probes use the first. The best one is tried with `sinks` too.
  std::vector<WindowChoice> windows = {{64, {}},
                                       {128, {}},
                                       {64, {{2, 4}}},
                                       {64, {{1, 8}, {2, 4}}},
                                       {0, {{1, 8}}},
                                       {0, {{1, 8}, {2, 4}}},
                                       {0, {{2, 8}, {4, 4}}}};
  std::vector<int> sinks = {0};
  bool layer_axis = true;  // false: every layer has the same two shapes
  bool mass = true;        // correct the softmax mass of packed keys
  bool standard = true;    // measure the profiles of one width too, not only bf16 and the rungs
};

// Stage names as CalibrationProgress: "probe", "rungs".
using LadderProgress = std::function<bool(const char* stage, double done)>;

class LadderBuilder {
 public:
  struct Side {
    bool is_key = false;
    std::vector<int> layers;     // that share the shape
    std::vector<float> spectra;  // [layers, n_kv_heads, head_dim]
    double direct_over_kl = 1;
    double mass_strength = 0;          // times the fitted correction, of a key side
    std::vector<ShapeOption> options;  // measured; the lower hull once probed
    std::vector<double> direct;        // direct increase of the options measured so far, until the hull is made
  };

  // `masses` may be null (no correction). All must outlive the object.
  LadderBuilder(const Plan& plan, LadderProbe& probe, const MassTable* masses, LadderOptions options,
                LadderProgress progress);

  // Measures the candidates of every side. Call once, first.
  Status ProbeSides();

  // The best profile of at most `bytes_max` bytes per token at kCostContext; the smallest of the first window when none
  // is so small. Of the windows, those are tried that the nearest rungs have, all of them before Rungs().
  Result<Profile> Rung(double bytes_max);

  // All of options.rungs, by falling bytes; a rung that would repeat its neighbour is left out. Every choice of windows
  // is tried at every other rung and the last, and their choices at those between.
  Result<std::vector<Profile>> Rungs();

  // What was measured, after ProbeSides.
  const std::vector<Side>& sides() const { return sides_; }

 private:
  std::vector<Side> MakeSides() const;
  Profile Exact() const;  // packed, but every run 16 bits wide
  Result<std::vector<float>> MassOf(int layer, const TierShape& k_shape, const Profile& windows);
  Status AddMass(Profile& profile);
  Profile ProfileOf(const Allocation& allocation, const WindowChoice& window) const;
  Profile LargestProfile(double bytes_max, const WindowChoice& window) const;
  std::vector<WindowChoice> WindowsFor(double bytes_max) const;
  Result<Profile> BestOfAll(double bytes_max, WindowChoice* chosen);
  Result<Profile> Best(double bytes_max, std::span<const WindowChoice> windows, WindowChoice* chosen);
  Result<std::vector<double>> Promises(std::span<const Profile> profiles);
  Profile ProbeOf(const Side& side, const TierShape& shape) const;
  Status MeasureOptions(double stage_begin, double stage_end);
  Status ChooseMass();

  const Plan& plan_;
  LadderProbe& probe_;
  const MassTable* masses_;
  LadderOptions options_;
  LadderProgress progress_;
  std::vector<Side> sides_;
  ProbeResult floor_;  // of the profile that is packed in 16 bits everywhere
  std::vector<Allocation> path_;
  std::map<double, WindowChoice> chosen_;  // windows of the rungs, by bytes
  std::map<std::string, std::vector<float>> mass_cache_;
};

}  // namespace zeroc
