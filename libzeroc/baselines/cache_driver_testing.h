// Shared by the cache tests: a stream of random projections fed to a cache, and float64 attention to compare with.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "libzeroc/baselines/cache_attention.h"

namespace zeroc::testing {

inline constexpr CacheShape kShape = {.n_layers = 2, .n_heads = 4, .n_kv_heads = 2, .head_dim = 32, .exact_bytes = 4};

// Rows of q | k | v for n tokens of one layer.
class Stream {
 public:
  explicit Stream(const CacheShape& shape, int n_tokens, unsigned seed = 1)
      : shape_(shape), n_tokens_(n_tokens), data_(static_cast<std::size_t>(shape.n_layers * n_tokens * width())) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal(0, 1);
    for (float& x : data_) x = normal(rng);
  }

  int n_tokens() const { return n_tokens_; }
  int q_width() const { return shape_.n_heads * shape_.head_dim; }
  int width() const { return q_width() + 2 * shape_.kv_width(); }
  float* Row(int layer, int t) { return data_.data() + (static_cast<std::ptrdiff_t>(layer) * n_tokens_ + t) * width(); }
  float* Q(int layer, int t, int head) { return Row(layer, t) + head * shape_.head_dim; }
  float* K(int layer, int t, int head) { return Row(layer, t) + q_width() + head * shape_.head_dim; }
  float* V(int layer, int t, int head) { return K(layer, t, head) + shape_.kv_width(); }

  // Tokens [begin, begin + n) of all layers in one step; out [n_layers][n, q_width].
  std::vector<std::vector<float>> Step(SequenceAttention& cache, int begin, int n) {
    std::vector<std::vector<float>> out(static_cast<std::size_t>(shape_.n_layers));
    cache.BeginStep(n);
    for (int layer = 0; layer < shape_.n_layers; ++layer) {
      auto& rows = out[static_cast<std::size_t>(layer)];
      rows.resize(static_cast<std::size_t>(n * q_width()));
      float* q = Row(layer, begin);
      cache.Attend(layer, {q, q + q_width(), q + q_width() + shape_.kv_width(), width(), n, {nullptr, nullptr}},
                   threads_, rows.data());
    }
    cache.EndStep();
    return out;
  }

  // Attention of query head `head` at token t over the given tokens and key and value rows, in float64.
  template <typename KeyOf, typename ValueOf>
  std::vector<double> Attend(int layer, int t, int head, const std::vector<int>& tokens, const KeyOf& key,
                             const ValueOf& value) {
    const int d = shape_.head_dim;
    std::vector<double> p(tokens.size()), out(static_cast<std::size_t>(d));
    double max = -1e300, sum = 0;
    for (std::size_t j = 0; j < tokens.size(); ++j) {
      for (int i = 0; i < d; ++i) p[j] += double{Q(layer, t, head)[i]} * key(tokens[j])[i];
      p[j] /= std::sqrt(static_cast<double>(d));
      max = std::max(max, p[j]);
    }
    for (double& x : p) sum += x = std::exp(x - max);
    for (std::size_t j = 0; j < tokens.size(); ++j) {
      for (int i = 0; i < d; ++i) out[static_cast<std::size_t>(i)] += p[j] / sum * value(tokens[j])[i];
    }
    return out;
  }

 private:
  CacheShape shape_;
  int n_tokens_;
  std::vector<float> data_;
  ThreadPool threads_{2};
};

inline std::vector<int> Range(int n) {
  std::vector<int> tokens;
  for (int t = 0; t < n; ++t) tokens.push_back(t);
  return tokens;
}

}  // namespace zeroc::testing
