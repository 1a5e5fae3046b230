// Made-up second moments for the tests of this folder: random, anisotropic, exactly known.
#pragma once

#include <Eigen/Core>
#include <Eigen/QR>
#include <cmath>
#include <random>
#include <vector>

#include "libzeroc/compression/basis.h"

namespace zeroc::testing {

inline Eigen::MatrixXd RandomMatrix(int rows, int cols, std::mt19937& rng) {
  std::normal_distribution<double> normal;
  return Eigen::MatrixXd::NullaryExpr(rows, cols, [&] { return normal(rng); });
}

// Q diag(e) Q^T with random directions and energies falling from 1 to 1/spread.
inline Eigen::MatrixXd RandomMoment(int dim, double spread, std::mt19937& rng) {
  const Eigen::MatrixXd q = Eigen::HouseholderQR<Eigen::MatrixXd>(RandomMatrix(dim, dim, rng)).householderQ();
  Eigen::VectorXd energies(dim);
  for (int i = 0; i < dim; ++i) energies(i) = std::pow(spread, -static_cast<double>(i) / dim);
  return q * energies.asDiagonal() * q.transpose();
}

inline SecondMoment MomentOf(const Eigen::MatrixXd& c, std::int64_t n_samples = SecondMoment::kExact) {
  // Row- and column-major agree: c is symmetric.
  return SecondMoment{static_cast<int>(c.rows()), n_samples, std::vector<double>(c.data(), c.data() + c.size())};
}

inline Eigen::MatrixXd MatrixOf(const std::vector<double>& row_major, int dim) {
  return Eigen::Map<const Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>(row_major.data(), dim,
                                                                                                  dim);
}

inline Eigen::MatrixXd HeadMatrixOf(const std::vector<float>& maps, int head, int dim) {
  using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  return Eigen::Map<const RowMajor>(maps.data() + std::ptrdiff_t{head} * dim * dim, dim, dim).cast<double>();
}

}  // namespace zeroc::testing
