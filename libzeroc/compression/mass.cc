#include "libzeroc/compression/mass.h"

#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/kv_block.h"
#include "libzeroc/base/check.h"
#include "libzeroc/compression/profile.h"

namespace zeroc {
namespace {

constexpr int kNewtonSteps = 20;
// Pulls features that the data does not tell apart towards no correction; theta is in units of the feature's mean.
constexpr double kRidge = 1e-4;
// A correction beyond this factor of softmax mass is a fit gone wrong (few queries, one token holding all the mass).
constexpr double kMaxLogGain = 3.0;

}  // namespace

MassFit::MassFit(int n_features) : n_(1 + n_features), scale_(static_cast<std::size_t>(1 + n_features), 0.0) {
  ZEROC_CHECK(n_features >= 0 && n_features <= kernels::kMaxRuns, n_features);
}

void MassFit::Add(const MassQuery& query) {
  const auto n_features = static_cast<std::size_t>(n_ - 1);
  const std::size_t n_packed = query.packed.size();
  ZEROC_CHECK(n_packed <= query.exact.size() && query.features.size() == n_packed * n_features, n_packed,
              query.exact.size(), query.features.size());
  if (n_packed == 0) return;
  for (const std::span<const float> values : {query.exact, query.packed, query.features}) {
    finite_ = finite_ && std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); });
  }
  if (!finite_) return;
  Sample sample;
  sample.scores.assign(query.packed.begin(), query.packed.end());
  sample.features.assign(query.features.begin(), query.features.end());
  sample.target.assign(static_cast<std::size_t>(n_), 0.0);
  sample.exact_max = -std::numeric_limits<double>::infinity();
  for (std::size_t t = n_packed; t < query.exact.size(); ++t) {
    sample.exact_max = std::max(sample.exact_max, double{query.exact[t]});
  }
  for (std::size_t t = n_packed; t < query.exact.size(); ++t) {
    sample.exact_sum += std::exp(query.exact[t] - sample.exact_max);
  }
  const double max = *std::max_element(query.exact.begin(), query.exact.end());
  double sum = 0;
  for (const float s : query.exact) sum += std::exp(s - max);
  for (std::size_t t = 0; t < query.exact.size(); ++t) {
    const double log_p = query.exact[t] - max - std::log(sum);
    const double p = std::exp(log_p);
    sample.entropy += p * (log_p - (t < n_packed ? query.packed[t] : query.exact[t]));
    if (t >= n_packed) continue;
    sample.target[0] += p;
    for (std::size_t f = 0; f < n_features; ++f) sample.target[f + 1] += p * query.features[t * n_features + f];
  }
  scale_[0] += 1;
  for (std::size_t f = 0; f < n_features; ++f) {
    double mean = 0;
    for (std::size_t t = 0; t < n_packed; ++t) mean += query.features[t * n_features + f];
    scale_[f + 1] += mean / static_cast<double>(n_packed);
  }
  samples_.push_back(std::move(sample));
}

// Divergence of one query; with gradient and hessian (row-major), adds theirs.
double MassFit::Evaluate(const Sample& sample, std::span<const double> theta, std::vector<double>* gradient,
                         std::vector<double>* hessian) const {
  const auto n = static_cast<std::size_t>(n_);
  const std::size_t n_packed = sample.scores.size();
  std::vector<double> scores(n_packed);
  double max = sample.exact_max;
  for (std::size_t t = 0; t < n_packed; ++t) {
    scores[t] = sample.scores[t] + theta[0];
    for (std::size_t f = 1; f < n; ++f) scores[t] += theta[f] * sample.features[t * (n - 1) + f - 1];
    max = std::max(max, scores[t]);
  }
  double sum = sample.exact_sum > 0 ? sample.exact_sum * std::exp(sample.exact_max - max) : 0;
  std::vector<double> first(n, 0.0), second(n * n, 0.0), feature(n, 1.0);
  for (std::size_t t = 0; t < n_packed; ++t) {
    const double p = std::exp(scores[t] - max);
    sum += p;
    for (std::size_t f = 1; f < n; ++f) feature[f] = sample.features[t * (n - 1) + f - 1];
    if (gradient == nullptr) continue;
    for (std::size_t f = 0; f < n; ++f) {
      first[f] += p * feature[f];
      for (std::size_t g = 0; g <= f; ++g) second[f * n + g] += p * feature[f] * feature[g];
    }
  }
  double value = max + std::log(sum) + sample.entropy;
  for (std::size_t f = 0; f < n; ++f) value -= theta[f] * sample.target[f];
  if (gradient == nullptr) return value;
  for (std::size_t f = 0; f < n; ++f) {
    (*gradient)[f] += first[f] / sum - sample.target[f];
    for (std::size_t g = 0; g <= f; ++g) {
      (*hessian)[f * n + g] += second[f * n + g] / sum - first[f] * first[g] / (sum * sum);
    }
  }
  return value;
}

Result<std::vector<float>> MassFit::Solve() const {
  if (!finite_) return DataLoss("mass correction: an attention score is not finite");
  const auto n = static_cast<std::size_t>(n_);
  std::vector<float> result(n, 0.0f);
  if (samples_.empty()) return result;
  const double n_samples = static_cast<double>(samples_.size());
  Eigen::VectorXd scale(n_);
  for (int f = 0; f < n_; ++f) {
    const double mean = scale_[static_cast<std::size_t>(f)] / n_samples;
    scale[f] = mean > 0 ? 1 / mean : 0;  // a run whose half ranges are all zero has no say
  }
  std::vector<double> theta(n, 0.0);
  for (int step = 0; step < kNewtonSteps; ++step) {
    std::vector<double> gradient(n, 0.0), hessian(n * n, 0.0);
    for (const Sample& sample : samples_) Evaluate(sample, theta, &gradient, &hessian);
    Eigen::VectorXd g(n_);
    Eigen::MatrixXd h(n_, n_);
    for (int i = 0; i < n_; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const double unit = scale[i] > 0 ? theta[at] / scale[i] : 0;
      g[i] = gradient[at] / n_samples * scale[i] + kRidge * unit;
      for (int j = 0; j <= i; ++j) {
        h(i, j) = h(j, i) = hessian[at * n + static_cast<std::size_t>(j)] / n_samples * scale[i] * scale[j];
      }
      h(i, i) += kRidge;
    }
    // Damped: one step changes no feature's mean effect by more than a factor e.
    Eigen::VectorXd move = h.ldlt().solve(g);
    move *= std::min(1.0, 1.0 / std::max(move.cwiseAbs().maxCoeff(), 1e-12));
    for (int i = 0; i < n_; ++i) theta[static_cast<std::size_t>(i)] -= move[i] * scale[i];
    if (move.cwiseAbs().maxCoeff() < 1e-6) break;
  }
  for (std::size_t f = 0; f < n; ++f) {
    const double unit = scale[static_cast<int>(f)];
    const double bound = std::min<double>(kMaxMass, kMaxLogGain * unit);
    result[f] = static_cast<float>(std::clamp(theta[f], -bound, bound));
  }
  return result;
}

double MassFit::Divergence(std::span<const float> theta) const {
  const std::vector<double> wide(theta.begin(), theta.end());
  double sum = 0;
  for (const Sample& sample : samples_) sum += Evaluate(sample, wide, nullptr, nullptr);
  return samples_.empty() ? 0 : sum / static_cast<double>(samples_.size());
}

}  // namespace zeroc
