#include "libzeroc/baselines/head_store.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace zeroc {
namespace {

std::vector<float> Random(std::size_t n, unsigned seed, float sigma = 1) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0, sigma);
  std::vector<float> x(n);
  for (float& value : x) value = normal(rng);
  return x;
}

HeadStore Filled(int d, int n, int capacity, const std::vector<float>& k, const std::vector<float>& v) {
  HeadStore store(d, capacity);
  for (int t = 0; t < n; ++t) store.Append(k.data() + t * d, v.data() + t * d);
  return store;
}

// [rows][slots] probabilities in float64.
std::vector<double> Softmax(const float* q, const std::vector<float>& k, int d, int n) {
  std::vector<double> p(static_cast<std::size_t>(n));
  double max = -std::numeric_limits<double>::infinity(), sum = 0;
  for (int t = 0; t < n; ++t) {
    for (int i = 0; i < d; ++i) p[static_cast<std::size_t>(t)] += double{q[i]} * k[static_cast<std::size_t>(t * d + i)];
    max = std::max(max, p[static_cast<std::size_t>(t)]);
  }
  for (double& x : p) sum += x = std::exp(x - max);
  for (double& x : p) x /= sum;
  return p;
}

struct Shape {
  int d, n, n_rows;
};

class HeadStoreAttention : public ::testing::TestWithParam<Shape> {};

TEST_P(HeadStoreAttention, AgreesWithFloat64) {
  const auto [d, n, n_rows] = GetParam();
  const std::vector<float> k = Random(static_cast<std::size_t>(n * d), 1),
                           v = Random(static_cast<std::size_t>(n * d), 2);
  const std::vector<float> q = Random(static_cast<std::size_t>(n_rows * d), 3, 1 / std::sqrt(static_cast<float>(d)));
  const HeadStore store = Filled(d, n, n + 3, k, v);
  std::vector<int> visible;
  for (int r = 0; r < n_rows; ++r) visible.push_back(std::max(1, n - n_rows + 1 + r));
  const int stride = (n + 63) / 64 * 64;
  std::vector<float> p(static_cast<std::size_t>(n_rows * stride), std::nanf(""));
  std::vector<float> out(static_cast<std::size_t>(n_rows * d), std::nanf(""));
  store.Probabilities(q.data(), visible, p.data(), stride);
  store.WeightedValues(p.data(), stride, n_rows, n, out.data());
  for (int r = 0; r < n_rows; ++r) {
    const int seen = visible[static_cast<std::size_t>(r)];
    const std::vector<double> want = Softmax(q.data() + r * d, k, d, seen);
    // A score errs by at most d eps sum|q_i k_i| (about d^1.5 eps at these norms), and p by that relative to itself.
    const double tolerance = 4e-7 + std::pow(d, 1.5) * 1.2e-7;
    for (int t = 0; t < stride; ++t) {
      const double expected = t < seen ? want[static_cast<std::size_t>(t)] : 0.0;
      ASSERT_NEAR(p[static_cast<std::size_t>(r * stride + t)], expected, tolerance * expected) << r << ' ' << t;
    }
    for (int i = 0; i < d; ++i) {
      double sum = 0, magnitude = 0;
      for (int t = 0; t < seen; ++t) {
        sum += want[static_cast<std::size_t>(t)] * v[static_cast<std::size_t>(t * d + i)];
        magnitude += want[static_cast<std::size_t>(t)] * std::fabs(v[static_cast<std::size_t>(t * d + i)]);
      }
      ASSERT_NEAR(out[static_cast<std::size_t>(r * d + i)], sum, (tolerance + n * 1.2e-7) * magnitude) << r << ' ' << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, HeadStoreAttention,
                         ::testing::Values(Shape{16, 1, 1}, Shape{64, 63, 3}, Shape{64, 64, 4}, Shape{64, 65, 5},
                                           Shape{48, 200, 7}, Shape{80, 129, 2}, Shape{128, 300, 11}));

TEST(HeadStore, SoftmaxStandsLargeScores) {
  const int d = 16;
  std::vector<float> k(3 * d), v(3 * d);
  k[0] = 2000;
  k[d] = 2000;
  k[2 * d] = -2000;
  HeadStore store = Filled(d, 3, 3, k, v);
  std::vector<float> q(d), p(64);
  q[0] = 50;
  const int visible[] = {3};
  store.Probabilities(q.data(), visible, p.data(), 64);
  EXPECT_FLOAT_EQ(p[0], 0.5f);
  EXPECT_FLOAT_EQ(p[1], 0.5f);
  EXPECT_LT(p[2], 1e-37f);
}

TEST(HeadStore, KeepAndReplaceMoveKeysWithTheirValues) {
  const int d = 16, n = 130;
  std::vector<float> k(n * d), v(n * d);
  for (int t = 0; t < n; ++t) {
    for (int i = 0; i < d; ++i) {
      k[static_cast<std::size_t>(t * d + i)] = static_cast<float>(100 * t + i);
      v[static_cast<std::size_t>(t * d + i)] = static_cast<float>(-100 * t - i);
    }
  }
  HeadStore store = Filled(d, n, n, k, v);
  const int keep[] = {0, 5, 63, 64, 129};
  store.Keep(keep);
  ASSERT_EQ(store.size(), 5);
  store.ReplaceByLast(1);
  ASSERT_EQ(store.size(), 4);
  const int expected[] = {0, 129, 63, 64};
  std::vector<float> row(d);
  for (int slot = 0; slot < 4; ++slot) {
    store.GetKey(slot, row.data());
    EXPECT_EQ(row[3], static_cast<float>(100 * expected[slot] + 3));
    EXPECT_EQ(store.Value(slot)[7], static_cast<float>(-100 * expected[slot] - 7));
  }
  store.ReplaceByLast(3);  // the last one itself
  EXPECT_EQ(store.size(), 3);
}

}  // namespace
}  // namespace zeroc
