#include "libzeroc/engine/ladder_search.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>
#include <queue>

#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

using kernels::KvRun;
using kernels::KvScaleKind;

constexpr int kCell = 16;  // the granule of a run
constexpr std::array<int, 6> kWidths = {8, 4, 3, 2, 1, 0};
// Factors tried by FitErrorModel. Measured on a trained model they lie between 0.5 and 12.
constexpr std::array<double, 8> kFactors = {0.25, 0.5, 1, 2, 4, 8, 16, 32};

// Distortion of a unit Gaussian by the best uniform quantiser (Max 1960); 8 bits: step^2 / 12 over +-2.6 sigma.
double Distortion(int bits) {
  switch (bits) {
    case 1:
      return 0.3634;
    case 2:
      return 0.1188;
    case 3:
      return 0.03744;
    case 4:
      return 0.01154;
    default:
      return 3.5e-5;
  }
}

void AppendScaleKinds(const TierShape& shape, std::size_t run, const ShapeLimits& limits,
                      std::vector<TierShape>& shapes) {
  if (run == shape.runs.size()) {
    shapes.push_back(shape);
    return;
  }
  TierShape next = shape;
  if (shape.runs[run].bits == 0) return AppendScaleKinds(next, run + 1, limits, shapes);
  for (const auto& [allowed, kind] :
       {std::pair{limits.affine, KvScaleKind::kAffine}, std::pair{limits.shared, KvScaleKind::kShared}}) {
    if (!allowed) continue;
    next.runs[run].scale = kind;
    AppendScaleKinds(next, run + 1, limits, shapes);
  }
}

void AppendShapes(int cells_left, std::size_t first_width, const TierShape& begun, const ShapeLimits& limits,
                  std::vector<TierShape>& shapes) {
  if (cells_left == 0) return AppendScaleKinds(begun, 0, limits, shapes);
  if (static_cast<int>(begun.runs.size()) == limits.runs_max) return;
  for (std::size_t w = first_width; w < kWidths.size(); ++w) {
    if (kWidths[w] == 0 && begun.runs.empty()) continue;
    for (int n = 1; n <= cells_left; ++n) {
      if (kWidths[w] == 0 && n != cells_left) continue;  // nothing follows a dropped run
      TierShape next = begun;
      next.runs.push_back(KvRun{kWidths[w], n * kCell});
      AppendShapes(cells_left - n, w + 1, next, limits, shapes);
    }
  }
}

double Slope(const ShapeOption& from, const ShapeOption& to) {
  return (to.error - from.error) / (to.bytes - from.bytes);
}

}  // namespace

double ShapeBytes(const TierShape& shape, int n_kv_heads) {
  double bytes = 0;
  for (const KvRun& run : shape.runs) {
    bytes += run.bits * run.width / 8.0;
    if (!kernels::IsQuantised(run.bits)) continue;
    bytes += run.scale == KvScaleKind::kShared ? 0.5 + 1.0 / kernels::kBlockTokens : 2.0;
  }
  return bytes * n_kv_heads;
}

std::vector<TierShape> EnumerateShapes(int head_dim, const ShapeLimits& limits) {
  ZEROC_CHECK(head_dim > 0 && head_dim % kCell == 0 && limits.runs_max >= 1, head_dim, limits.runs_max);
  std::vector<TierShape> shapes;
  AppendShapes(head_dim / kCell, 0, {}, limits, shapes);
  return shapes;
}

double PredictedError(const TierShape& shape, std::span<const float> spectra, const ErrorModel& model) {
  std::size_t dim = 0;
  for (const KvRun& run : shape.runs) dim += static_cast<std::size_t>(run.width);
  ZEROC_CHECK(dim > 0 && spectra.size() % dim == 0, dim, spectra.size());
  double error = 0;
  for (std::size_t head = 0; head < spectra.size(); head += dim) {
    std::size_t first = head;
    for (const KvRun& run : shape.runs) {
      const std::span<const float> s = spectra.subspan(first, static_cast<std::size_t>(run.width));
      first += s.size();
      double sum = 0, squares = 0;
      for (const float x : s) {
        sum += x;
        squares += double{x} * x;
      }
      if (run.bits == 0) error += model.drop_factor * squares;
      if (!kernels::IsQuantised(run.bits)) continue;
      error += Distortion(run.bits) * sum * (sum - s[0]) / run.width;
      if (run.scale == KvScaleKind::kShared) error += model.center_factor * Distortion(run.bits) * s[0] * s[0];
    }
  }
  return error;
}

std::vector<ShapeOption> LowerHull(std::vector<ShapeOption> options) {
  std::stable_sort(options.begin(), options.end(), [](const ShapeOption& x, const ShapeOption& y) {
    return x.bytes != y.bytes ? x.bytes < y.bytes : x.error < y.error;
  });
  std::vector<ShapeOption> hull;
  for (ShapeOption& option : options) {
    if (!hull.empty() && option.error >= hull.back().error) continue;
    while (hull.size() >= 2 && Slope(hull[hull.size() - 2], hull.back()) >= Slope(hull.back(), option)) hull.pop_back();
    hull.push_back(std::move(option));
  }
  return hull;
}

ErrorModel FitErrorModel(std::span<const ShapeOption> measured, std::span<const float> spectra) {
  ErrorModel best;
  double best_spread = std::numeric_limits<double>::infinity();
  for (const double drop : kFactors) {
    for (const double center : kFactors) {
      const ErrorModel model{drop, center};
      double sum = 0, squares = 0;
      int n = 0;
      for (const ShapeOption& option : measured) {
        if (option.error <= 0) continue;
        const double ratio = std::log(option.error / PredictedError(option.shape, spectra, model));
        sum += ratio;
        squares += ratio * ratio;
        ++n;
      }
      if (n < 3) return {};
      const double spread = squares - sum * sum / n;
      if (spread >= best_spread) continue;
      best_spread = spread;
      best = model;
    }
  }
  return best;
}

std::vector<ShapeOption> CandidateShapes(int head_dim, std::span<const float> spectra, const ShapeLimits& limits,
                                         const ErrorModel& model, double bytes_low, double bytes_high, int n,
                                         std::span<const ShapeOption> known) {
  const int n_kv_heads = static_cast<int>(spectra.size()) / head_dim;
  std::vector<ShapeOption> all;
  for (TierShape& shape : EnumerateShapes(head_dim, limits)) {
    const double bytes = ShapeBytes(shape, n_kv_heads);
    const double error = PredictedError(shape, spectra, model);
    all.push_back({std::move(shape), bytes, error});
  }
  std::vector<ShapeOption> candidates;
  const auto is_among = [](std::span<const ShapeOption> options, const ShapeOption& option) {
    return std::any_of(options.begin(), options.end(), [&](const ShapeOption& o) { return o.shape == option.shape; });
  };
  for (int i = 0; i < n; ++i) {
    const double target = bytes_low * std::pow(bytes_high / bytes_low, n == 1 ? 1.0 : static_cast<double>(i) / (n - 1));
    const ShapeOption* best = nullptr;
    for (const ShapeOption& option : all) {
      if (option.bytes > target * (1 + 1e-9)) continue;
      if (best == nullptr || option.error < best->error) best = &option;
    }
    if (best != nullptr && !is_among(candidates, *best) && !is_among(known, *best)) candidates.push_back(*best);
  }
  return candidates;
}

std::vector<Allocation> EfficientAllocations(std::span<const std::vector<ShapeOption>> sides) {
  Allocation at;
  at.choice.assign(sides.size(), 0);
  struct Step {
    double slope;
    std::size_t side;
    bool operator<(const Step& other) const { return slope != other.slope ? slope > other.slope : side > other.side; }
  };
  std::priority_queue<Step> steps;
  const auto offer = [&](std::size_t side) {
    const auto next = static_cast<std::size_t>(at.choice[side]) + 1;
    if (next < sides[side].size()) steps.push({Slope(sides[side][next - 1], sides[side][next]), side});
  };
  for (std::size_t side = 0; side < sides.size(); ++side) {
    ZEROC_CHECK(!sides[side].empty(), side);
    at.bytes += sides[side][0].bytes;
    at.error += sides[side][0].error;
    offer(side);
  }
  std::vector<Allocation> path{at};
  while (!steps.empty()) {
    const std::size_t side = steps.top().side;
    steps.pop();
    const auto now = static_cast<std::size_t>(at.choice[side]++);
    at.bytes += sides[side][now + 1].bytes - sides[side][now].bytes;
    at.error += sides[side][now + 1].error - sides[side][now].error;
    path.push_back(at);
    offer(side);
  }
  return path;
}

std::size_t LargestWithin(std::span<const Allocation> path, double bytes_max) {
  ZEROC_CHECK(!path.empty());
  const auto above = std::upper_bound(path.begin(), path.end(), bytes_max,
                                      [](double bytes, const Allocation& a) { return bytes < a.bytes; });
  return above == path.begin() ? 0 : static_cast<std::size_t>(above - path.begin()) - 1;
}

}  // namespace zeroc
