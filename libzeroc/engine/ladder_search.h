// The arithmetic of a ladder: which tier shapes are worth measuring, and how bytes are shared between layers.
//
// A *side* is K or V of one layer (or of several that share a shape). Every side is offered a few shapes, each with its
// bytes and its measured error; as the divergence of whole profiles is very nearly the sum over their sides (within 6 %
// on the demo model), the best shares of a byte budget follow from the sides' lower convex hulls by marginal gain.
// Pure functions on numbers; any thread.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "libzeroc/compression/profile.h"

namespace zeroc {

struct ShapeOption {
  TierShape shape;
  double bytes = 0;  // per token, all KV heads, scales included
  double error = 0;  // any additive measure: nats per token
};

// Codes and scales of one token, all KV heads: what one side adds to KvBytesHeld per packed token (block padding
// apart).
double ShapeBytes(const TierShape& shape, int n_kv_heads);

struct ShapeLimits {
  int runs_max = 3;    // runs of a shape; every run costs a scale and a pass of its own in attention
  bool affine = true;  // which scale kinds may be used
  bool shared = true;
};

// All shapes over `head_dim` sorted coordinates whose widths are multiples of 16 and whose bits (8, 4, 3, 2, 1, 0)
// never rise, each run with every allowed scale kind. Neighbouring runs of equal bits are one run. The shape that keeps
// nothing is left out.
std::vector<TierShape> EnumerateShapes(int head_dim, const ShapeLimits& limits);

// What one side makes of the error model below; fitted to measured errors.
struct ErrorModel {
  double drop_factor = 4;    // price of a dropped coordinate: coherent over tokens, unlike code noise
  double center_factor = 4;  // price of a run's first coordinate where no centre holds it
};

// Expected squared error of the scores (of the outputs for V), up to a factor that is the side's own. With S the
// spectrum (variance of either factor in each coordinate), a rotated run of w coordinates at b bits loses
//   delta(b) (sum S) (sum S - S_first) / w,      delta: distortion of a uniform quantiser of a Gaussian (Max 1960).
// The rotation spreads the run's first coordinate, often a mean, evenly: an affine run's centre holds it, a shared run
// adds center_factor * delta(b) S_first^2. A dropped coordinate adds drop_factor * S^2. spectra: [n_kv_heads,
// head_dim].
double PredictedError(const TierShape& shape, std::span<const float> spectra, const ErrorModel& model);

// The options on the lower convex hull of (bytes, error): bytes rise, errors fall, gains per byte fall. Of options that
// tie, the first is kept.
std::vector<ShapeOption> LowerHull(std::vector<ShapeOption> options);

// The model that fits measured errors best in the logarithm, over a grid of factors; the default one for fewer than
// three options with an error above zero.
ErrorModel FitErrorModel(std::span<const ShapeOption> measured, std::span<const float> spectra);

// For `n` byte targets, evenly in the logarithm from `bytes_low` to `bytes_high`, the shape with the least predicted
// error that fits: by rising bytes, without repeats and without those in `known`.
std::vector<ShapeOption> CandidateShapes(int head_dim, std::span<const float> spectra, const ShapeLimits& limits,
                                         const ErrorModel& model, double bytes_low, double bytes_high, int n,
                                         std::span<const ShapeOption> known);

// One choice per side.
struct Allocation {
  std::vector<int> choice;  // [sides] index into the side's options
  double bytes = 0;         // sums over the sides
  double error = 0;
};

// All efficient allocations by rising bytes, from every side's smallest option to every side's largest: each step
// takes the one downgrade back that gains most per byte. sides[i] is a lower hull and not empty.
std::vector<Allocation> EfficientAllocations(std::span<const std::vector<ShapeOption>> sides);

// Index of the largest allocation with at most `bytes_max` bytes; 0 when even the smallest has more. Not empty.
std::size_t LargestWithin(std::span<const Allocation> path, double bytes_max);

}  // namespace zeroc
