#include "libzeroc/compression/basis.h"

#include <gtest/gtest.h>

#include <Eigen/Eigenvalues>
#include <algorithm>
#include <limits>

#include "libzeroc/compression/test_moments.h"

namespace zeroc {
namespace {

using Eigen::MatrixXd;
using testing::MatrixOf;
using testing::MomentOf;
using testing::RandomMatrix;
using testing::RandomMoment;

MatrixXd DampedMoment(const MatrixXd& c, double damping) {
  return c + MatrixXd::Identity(c.rows(), c.cols()) * (damping * c.trace() / static_cast<double>(c.rows()));
}

class BalancedBasisTest : public ::testing::TestWithParam<int> {};

TEST_P(BalancedBasisTest, KeepsScoresAndBalancesBothSides) {
  const int dim = GetParam();
  std::mt19937 rng(static_cast<unsigned>(dim));
  const MatrixXd c_q = RandomMoment(dim, 1e4, rng) * 37.0;  // sides of very different size
  const MatrixXd c_k = RandomMoment(dim, 1e3, rng) * 0.02;
  const Result<BalancedBasis> basis = SolveBalancedBasis(MomentOf(c_q), MomentOf(c_k));
  ASSERT_TRUE(basis.ok()) << basis.status().ToString();
  const MatrixXd a = MatrixOf(basis->a, dim);
  const MatrixXd b = MatrixOf(basis->b, dim);
  EXPECT_LT((a * b.transpose() - MatrixXd::Identity(dim, dim)).cwiseAbs().maxCoeff(), 1e-10);

  const Eigen::Map<const Eigen::VectorXd> s(basis->s.data(), dim);
  const MatrixXd spectrum = s.asDiagonal();
  EXPECT_LT((a.transpose() * DampedMoment(c_q, 1e-2) * a - spectrum).cwiseAbs().maxCoeff(), 1e-10 * s(0));
  EXPECT_LT((b.transpose() * DampedMoment(c_k, 1e-2) * b - spectrum).cwiseAbs().maxCoeff(), 1e-10 * s(0));
  EXPECT_TRUE(std::is_sorted(basis->s.rbegin(), basis->s.rend()));
  EXPECT_GT(basis->s.back(), 0);
}

INSTANTIATE_TEST_SUITE_P(Sizes, BalancedBasisTest, ::testing::Values(1, 3, 16, 48, 64, 128));

// E (q.k - q^T X k)^2 for independent q and k is tr(D^T C_q D C_k) with D = I - X.
double ScoreError(const MatrixXd& x, const MatrixXd& c_q, const MatrixXd& c_k) {
  const MatrixXd d = MatrixXd::Identity(x.rows(), x.cols()) - x;
  return (d.transpose() * c_q * d * c_k).trace();
}

TEST(BalancedBasis, FirstCoordinatesAreTheBestRankP) {
  const int dim = 24;
  std::mt19937 rng(7);
  const MatrixXd c_q = RandomMoment(dim, 300, rng);
  const MatrixXd c_k = RandomMoment(dim, 300, rng);
  const Result<BalancedBasis> basis = SolveBalancedBasis(MomentOf(c_q), MomentOf(c_k), BasisOptions{.damping = 0});
  ASSERT_TRUE(basis.ok()) << basis.status().ToString();
  const MatrixXd a = MatrixOf(basis->a, dim);
  const MatrixXd b = MatrixOf(basis->b, dim);
  const MatrixXd pca = Eigen::SelfAdjointEigenSolver<MatrixXd>(c_k).eigenvectors();
  const MatrixXd joint_pca = Eigen::SelfAdjointEigenSolver<MatrixXd>(c_k + c_q).eigenvectors();
  for (const int p : {1, 5, 12, 23}) {
    double dropped = 0;
    for (int i = p; i < dim; ++i)
      dropped += basis->s[static_cast<std::size_t>(i)] * basis->s[static_cast<std::size_t>(i)];
    const MatrixXd best = a.leftCols(p) * b.leftCols(p).transpose();
    EXPECT_NEAR(ScoreError(best, c_q, c_k), dropped, 1e-10 * dropped);

    const MatrixXd top_k = pca.rightCols(p) * pca.rightCols(p).transpose();
    const MatrixXd top_joint = joint_pca.rightCols(p) * joint_pca.rightCols(p).transpose();
    EXPECT_GT(ScoreError(top_k, c_q, c_k), dropped);
    EXPECT_GT(ScoreError(top_joint, c_q, c_k), dropped);
    for (int trial = 0; trial < 50; ++trial) {
      const double step = std::pow(10.0, -static_cast<double>(trial % 5));
      const MatrixXd near = (a.leftCols(p) + step * RandomMatrix(dim, p, rng)) *
                            (b.leftCols(p) + step * RandomMatrix(dim, p, rng)).transpose();
      EXPECT_GT(ScoreError(near, c_q, c_k), dropped) << "p " << p << " step " << step;
    }
  }
}

TEST(BalancedBasis, EqualMomentsGiveEqualBases) {
  std::mt19937 rng(3);
  const SecondMoment c_q = MomentOf(RandomMoment(32, 100, rng));
  const SecondMoment c_k = MomentOf(RandomMoment(32, 100, rng));
  const Result<BalancedBasis> first = SolveBalancedBasis(c_q, c_k);
  const Result<BalancedBasis> second = SolveBalancedBasis(c_q, c_k);
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_EQ(first->a, second->a);
  EXPECT_EQ(first->b, second->b);
  for (int i = 0; i < 32; ++i) {
    const Eigen::VectorXd column = MatrixOf(first->b, 32).col(i);
    EXPECT_EQ(column.maxCoeff(), column.cwiseAbs().maxCoeff()) << "column " << i;
  }
}

TEST(BalancedBasis, ADeadHeadGetsFiniteDualMaps) {
  std::mt19937 rng(4);
  const SecondMoment dead = MomentOf(MatrixXd::Zero(16, 16));
  const Result<BalancedBasis> basis = SolveBalancedBasis(MomentOf(RandomMoment(16, 10, rng)), dead);
  ASSERT_TRUE(basis.ok()) << basis.status().ToString();
  const MatrixXd product = MatrixOf(basis->a, 16) * MatrixOf(basis->b, 16).transpose();
  EXPECT_LT((product - MatrixXd::Identity(16, 16)).cwiseAbs().maxCoeff(), 1e-9);
}

TEST(BalancedBasis, RefusesBadMoments) {
  std::mt19937 rng(5);
  const SecondMoment good = MomentOf(RandomMoment(16, 10, rng));

  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    SecondMoment moment = good;
    moment.values[17] = bad;
    EXPECT_EQ(SolveBalancedBasis(moment, good).status().code(), StatusCode::kDataLoss);
    EXPECT_EQ(SolveBalancedBasis(good, moment).status().code(), StatusCode::kDataLoss);
  }
  SecondMoment skewed = good;
  skewed.values[1] += 0.1;
  EXPECT_EQ(SolveBalancedBasis(skewed, good).status().code(), StatusCode::kInvalidArgument);
  SecondMoment few = good;
  few.n_samples = 63;
  EXPECT_EQ(SolveBalancedBasis(few, good).status().code(), StatusCode::kFailedPrecondition);
  few.n_samples = 64;
  EXPECT_TRUE(SolveBalancedBasis(few, good).ok());
  SecondMoment indefinite = good;
  indefinite.values[1] = indefinite.values[16] = 5.0;
  EXPECT_EQ(SolveBalancedBasis(indefinite, good).status().code(), StatusCode::kInvalidArgument);
  SecondMoment short_one = good;
  short_one.values.pop_back();
  EXPECT_EQ(SolveBalancedBasis(good, short_one).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(SolveBalancedBasis(good, MomentOf(RandomMoment(32, 10, rng))).status().code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(SolveBalancedBasis(good, good, BasisOptions{.damping = -1}).status().code(), StatusCode::kInvalidArgument);
  // Singular and undamped: no inverse root exists.
  EXPECT_EQ(SolveBalancedBasis(good, MomentOf(MatrixXd::Ones(16, 16)), BasisOptions{.damping = 0}).status().code(),
            StatusCode::kInvalidArgument);
}

// Sylvester's matrix by its definition: sign (-1)^popcount(i & j).
MatrixXd Sylvester(int n) {
  return MatrixXd::NullaryExpr(n, n, [n](Eigen::Index i, Eigen::Index j) {
    return (__builtin_popcountll(static_cast<unsigned long long>(i & j)) % 2 == 0 ? 1.0 : -1.0) / std::sqrt(n);
  });
}

TEST(RotateColumns, AppliesOneHadamardPerCellAndLeavesTheRest) {
  const std::vector<kernels::KvRun> runs = {{4, 48}, {16, 16}, {1, 16}, {0, 16}};
  const int dim = 96;
  MatrixXd hd = MatrixXd::Identity(dim, dim);
  hd.block(0, 0, 32, 32) = Sylvester(32);  // 48 = 32 + 16
  hd.block(32, 32, 16, 16) = Sylvester(16);
  hd.block(64, 64, 16, 16) = Sylvester(16);

  std::mt19937 rng(6);
  const MatrixXd before = RandomMatrix(dim * 2, dim, rng);  // two heads, stacked
  std::vector<float> map;
  for (int r = 0; r < before.rows(); ++r) {
    for (int c = 0; c < dim; ++c) map.push_back(static_cast<float>(before(r, c)));
  }
  RotateColumns(map, runs);
  const MatrixXd expected = before * hd;
  for (int r = 0; r < before.rows(); ++r) {
    for (int c = 0; c < dim; ++c) {
      ASSERT_NEAR(map[static_cast<std::size_t>(r * dim + c)], expected(r, c), 1e-5) << r << ", " << c;
    }
  }
}

}  // namespace
}  // namespace zeroc
