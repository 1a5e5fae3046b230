// Fits the mass correction of packed keys.
//
// Coarse codes shrink the spread of the scores, exp is convex, so packed keys lose softmax mass against exact ones. The
// correction adds theta . f(t) to the score of a packed token t, with f(t) = (1, half_1(t)^2, half_2(t)^2, ..) over the
// K runs of its shape. theta minimises the mean divergence KL(p || p_theta) of the attention weights of sampled
// queries:
//   sum over queries of  log sum_t exp(s_t + theta . f(t))  -  theta . sum_t p_t f(t),
// convex, solved by Newton steps. float64; not thread-safe; the samples are copied.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "libzeroc/base/status.h"

namespace zeroc {

// Scores of one query over the tokens that it sees: the first n_packed of them packed, the rest exact.
struct MassQuery {
  std::span<const float> exact;   // [n_visible] q . k / sqrt(d) with exact keys
  std::span<const float> packed;  // [n_packed] the same with packed keys
  // [n_packed, n_features] row-major, the constant left out.
  std::span<const float> features;
};

class MassFit {
 public:
  // n_features: half ranges per token, 0 to kernels::kMaxRuns.
  explicit MassFit(int n_features);

  void Add(const MassQuery& query);

  // theta, [1 + n_features]; zeros without a query that sees a packed token. kDataLoss when a score is not finite.
  Result<std::vector<float>> Solve() const;

  // The mean divergence that theta leaves, for tests and reports. theta: [1 + n_features].
  double Divergence(std::span<const float> theta) const;

 private:
  struct Sample {
    std::vector<double> target;  // [1 + n_features] sum over packed tokens of p_t f(t)
    std::vector<float> scores;   // [n_packed]
    std::vector<float> features;
    double exact_max = 0, exact_sum = 0;  // of the tokens that stay exact: sum exp(s - max)
    double entropy = 0;                   // sum_t p_t (log p_t - s^_t): what the divergence has beside theta
  };
  double Evaluate(const Sample& sample, std::span<const double> theta, std::vector<double>* gradient,
                  std::vector<double>* hessian) const;

  int n_;  // 1 + n_features
  std::vector<Sample> samples_;
  std::vector<double> scale_;  // [n_] mean of every feature, for conditioning
  bool finite_ = true;
};

}  // namespace zeroc
