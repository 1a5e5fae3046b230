#include "libzeroc/compression/moments.h"

#include <gtest/gtest.h>

#include <limits>

#include "libzeroc/compression/test_moments.h"

namespace zeroc {
namespace {

constexpr ModelGeometry kGeometry = {.n_layers = 2, .n_heads = 6, .n_kv_heads = 2, .head_dim = 16, .hidden = 96};

std::vector<float> RandomRows(int n_tokens, int width, std::mt19937& rng) {
  std::normal_distribution<float> normal(0.3F, 1.5F);
  std::vector<float> rows(static_cast<std::size_t>(n_tokens) * static_cast<std::size_t>(width));
  for (float& value : rows) value = normal(rng);
  return rows;
}

// The definition, in float64: the mean over tokens from `skip` on of the sum over `heads` of x x^T.
Eigen::MatrixXd Naive(const std::vector<float>& rows, int n_tokens, int width, int dim, int first_head, int n_heads,
                      int skip) {
  Eigen::MatrixXd sum = Eigen::MatrixXd::Zero(dim, dim);
  for (int t = skip; t < n_tokens; ++t) {
    for (int h = first_head; h < first_head + n_heads; ++h) {
      const Eigen::VectorXd x =
          Eigen::Map<const Eigen::VectorXf>(rows.data() + std::ptrdiff_t{t} * width + h * dim, dim).cast<double>();
      sum += x * x.transpose();
    }
  }
  return sum / (n_tokens - skip);
}

void ExpectNear(const SecondMoment& moment, const Eigen::MatrixXd& expected) {
  // Float32 sums over slices of 256: relative 256 eps at worst, sqrt(256) eps in practice.
  const double tolerance = 256 * std::numeric_limits<float>::epsilon() * expected.cwiseAbs().maxCoeff();
  EXPECT_LT((testing::MatrixOf(moment.values, moment.dim) - expected).cwiseAbs().maxCoeff(), tolerance);
}

class MomentsTest : public ::testing::TestWithParam<int> {};

TEST_P(MomentsTest, MatchTheDefinition) {
  const int n_tokens = GetParam();
  std::mt19937 rng(11);
  const int dim = kGeometry.head_dim;
  const std::vector<float> q = RandomRows(n_tokens, 6 * dim, rng);
  const std::vector<float> k = RandomRows(n_tokens, 2 * dim, rng);
  const std::vector<float> v = RandomRows(n_tokens, 2 * dim, rng);
  MomentAccumulator moments(kGeometry);
  // In uneven chunks, the first of them wholly inside the skipped tokens.
  for (int begin = 0, size = 5; begin < n_tokens; begin += size, size += 100) {
    const int n = std::min(size, n_tokens - begin);
    moments.Add(1, begin, n, {q.data() + std::ptrdiff_t{begin} * 6 * dim, 6 * dim, 3 * dim},
                {k.data() + std::ptrdiff_t{begin} * 2 * dim, 2 * dim, dim},
                {v.data() + std::ptrdiff_t{begin} * 2 * dim, 2 * dim, dim});
  }
  ASSERT_EQ(moments.n_tokens(1), std::max(0, n_tokens - 16));
  EXPECT_EQ(moments.n_tokens(0), 0);
  if (n_tokens <= 16) {
    EXPECT_EQ(moments.Keys(1, 0).values, std::vector<double>(256, 0.0));
    return;
  }
  for (int g = 0; g < 2; ++g) {
    ExpectNear(moments.Queries(1, g), Naive(q, n_tokens, 6 * dim, dim, 3 * g, 3, 16));
    ExpectNear(moments.Keys(1, g), Naive(k, n_tokens, 2 * dim, dim, g, 1, 16));
    ExpectNear(moments.Values(1, g), Naive(v, n_tokens, 2 * dim, dim, g, 1, 16));
    EXPECT_EQ(moments.Keys(1, g).n_samples, n_tokens - 16);
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, MomentsTest, ::testing::Values(1, 16, 17, 272, 273, 1001));

// The query op's own output, [n_kv_heads, n_tokens, group, head_dim], can be fed as it lies.
TEST(Moments, TakeGroupedQueries) {
  const int n_tokens = 40;
  const int dim = kGeometry.head_dim;
  std::mt19937 rng(12);
  const std::vector<float> plain = RandomRows(n_tokens, 6 * dim, rng);
  std::vector<float> grouped(plain.size());
  for (int t = 0; t < n_tokens; ++t) {
    for (int h = 0; h < 6; ++h) {
      for (int i = 0; i < dim; ++i) {
        grouped[static_cast<std::size_t>((((h / 3) * n_tokens + t) * 3 + h % 3) * dim + i)] =
            plain[static_cast<std::size_t>((t * 6 + h) * dim + i)];
      }
    }
  }
  const HeadRows kv = {plain.data(), 2 * dim, dim};
  MomentAccumulator from_plain(kGeometry), from_grouped(kGeometry);
  from_plain.Add(0, 0, n_tokens, {plain.data(), 6 * dim, 3 * dim}, kv, kv);
  from_grouped.Add(0, 0, n_tokens, {grouped.data(), 3 * dim, std::int64_t{n_tokens} * 3 * dim}, kv, kv);
  EXPECT_EQ(from_plain.Queries(0, 0).values, from_grouped.Queries(0, 0).values);
  EXPECT_EQ(from_plain.Queries(0, 1).values, from_grouped.Queries(0, 1).values);
}

TEST(Moments, GarbageIsSeenWhenTheBasisIsSolved) {
  const int dim = kGeometry.head_dim;
  std::mt19937 rng(13);
  std::vector<float> rows = RandomRows(200, 6 * dim, rng);
  rows[150 * 6 * 16 + 3] = std::numeric_limits<float>::quiet_NaN();
  MomentAccumulator moments(kGeometry);
  const HeadRows kv = {rows.data(), 6 * dim, dim};
  moments.Add(0, 0, 200, {rows.data(), 6 * dim, 3 * dim}, kv, kv);
  EXPECT_EQ(SolveBalancedBasis(moments.Queries(0, 0), moments.Keys(0, 0)).status().code(), StatusCode::kDataLoss);
  EXPECT_TRUE(SolveBalancedBasis(moments.Queries(0, 1), moments.Keys(0, 1)).ok());
}

}  // namespace
}  // namespace zeroc
