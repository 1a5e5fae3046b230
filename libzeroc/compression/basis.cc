#include "libzeroc/compression/basis.h"

#include <Eigen/Eigenvalues>
#include <Eigen/SVD>
#include <cmath>
#include <string>

#include "kernels/hadamard.h"
#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

using Eigen::MatrixXd;
using Eigen::VectorXd;
using RowMajor = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using RowMajorF = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// Rounding in a float64 sum of float32 products stays far below this.
constexpr double kSymmetryTolerance = 1e-6;
// Stands for the energy of a dead head; small against any living one, large enough for float32 maps.
constexpr double kDeadHeadEnergy = 1e-12;

Status CheckMoment(const char* name, const SecondMoment& moment, const BasisOptions& options) {
  const std::string what = std::string("second moment ") + name;
  const auto dim = static_cast<std::size_t>(moment.dim);
  if (moment.dim < 1 || moment.dim > kernels::kMaxHeadDim || moment.values.size() != dim * dim) {
    return InvalidArgument(what + ": " + std::to_string(moment.values.size()) + " values for dim " +
                           std::to_string(moment.dim));
  }
  double largest = 0;
  for (const double value : moment.values) {
    if (!std::isfinite(value)) return DataLoss(what + " holds NaN or infinity");
    largest = std::max(largest, std::abs(value));
  }
  for (std::size_t i = 0; i < dim; ++i) {
    if (moment.values[i * dim + i] < 0) return InvalidArgument(what + " has a negative diagonal");
    for (std::size_t j = 0; j < i; ++j) {
      if (std::abs(moment.values[i * dim + j] - moment.values[j * dim + i]) > kSymmetryTolerance * largest) {
        return InvalidArgument(what + " is not symmetric at (" + std::to_string(i) + ", " + std::to_string(j) + ")");
      }
    }
  }
  const std::int64_t needed = std::int64_t{options.min_samples_per_dim} * moment.dim;
  if (moment.n_samples < needed) {
    return FailedPrecondition(what + ": " + std::to_string(moment.n_samples) + " samples, at least " +
                              std::to_string(needed) + " are needed for dim " + std::to_string(moment.dim));
  }
  return OkStatus();
}

MatrixXd Damped(const SecondMoment& moment, double damping) {
  MatrixXd c = Eigen::Map<const RowMajor>(moment.values.data(), moment.dim, moment.dim);
  c = (0.5 * (c + c.transpose())).eval();
  const double mean = c.trace() / moment.dim;
  c.diagonal().array() += mean > 0 ? damping * mean : kDeadHeadEnergy;
  return c;
}

struct Roots {
  MatrixXd root, inverse_root;
};

Result<Roots> RootsOf(const char* name, const MatrixXd& c) {
  const Eigen::SelfAdjointEigenSolver<MatrixXd> eigen(c);
  const VectorXd& values = eigen.eigenvalues();
  const double smallest = values.minCoeff();
  if (eigen.info() != Eigen::Success || !(smallest > values.maxCoeff() * 1e-13)) {
    return InvalidArgument(std::string("second moment ") + name + " is not positive definite (eigenvalues " +
                           std::to_string(smallest) + " to " + std::to_string(values.maxCoeff()) +
                           "); more damping may help");
  }
  const VectorXd roots = values.cwiseSqrt();
  const MatrixXd& q = eigen.eigenvectors();
  return Roots{q * roots.asDiagonal() * q.transpose(), q * roots.cwiseInverse().asDiagonal() * q.transpose()};
}

// Singular vectors are known up to a common sign of each pair.
void FixSigns(MatrixXd& a, MatrixXd& b) {
  for (Eigen::Index i = 0; i < b.cols(); ++i) {
    Eigen::Index at = 0;
    b.col(i).cwiseAbs().maxCoeff(&at);
    if (b(at, i) >= 0) continue;
    a.col(i) = -a.col(i);
    b.col(i) = -b.col(i);
  }
}

std::vector<double> RowMajorValues(const MatrixXd& m) {
  std::vector<double> values(static_cast<std::size_t>(m.size()));
  Eigen::Map<RowMajor>(values.data(), m.rows(), m.cols()) = m;
  return values;
}

struct Pair {
  MatrixXd a, b;
  VectorXd s;
};

Result<Pair> SolveBalanced(const MatrixXd& c_q, const MatrixXd& c_k) {
  ZEROC_ASSIGN_OR_RETURN(const Roots q, RootsOf("C_q", c_q));
  ZEROC_ASSIGN_OR_RETURN(const Roots k, RootsOf("C_k", c_k));
  const Eigen::BDCSVD<MatrixXd> svd(q.root * k.root, Eigen::ComputeFullU | Eigen::ComputeFullV);
  const VectorXd& s = svd.singularValues();
  const VectorXd half = s.cwiseSqrt();
  Pair pair{q.inverse_root * svd.matrixU() * half.asDiagonal(), k.inverse_root * svd.matrixV() * half.asDiagonal(), s};
  FixSigns(pair.a, pair.b);
  return pair;
}

// An orthogonal basis: both maps are `u`.
Pair Orthogonal(const MatrixXd& c_q, const MatrixXd& c_k, const MatrixXd& u) {
  const VectorXd q = (u.transpose() * c_q * u).diagonal();
  const VectorXd k = (u.transpose() * c_k * u).diagonal();
  return {u, u, q.cwiseProduct(k).cwiseMax(0).cwiseSqrt()};
}

Result<Pair> SolvePair(BasisKind kind, const MatrixXd& c_q, const MatrixXd& c_k) {
  if (kind == BasisKind::kBalanced) return SolveBalanced(c_q, c_k);
  if (kind == BasisKind::kIdentity) return Orthogonal(c_q, c_k, MatrixXd::Identity(c_q.rows(), c_q.rows()));
  const Eigen::SelfAdjointEigenSolver<MatrixXd> eigen(c_q + c_k);
  if (eigen.info() != Eigen::Success) return Internal("stacked basis: the decomposition did not converge");
  MatrixXd u = eigen.eigenvectors().rowwise().reverse();  // largest first
  MatrixXd same = u;
  FixSigns(same, u);
  return Orthogonal(c_q, c_k, u);
}

void UndoRotation(MatrixXd& map) {
  RowMajorF rows = map.cast<float>();
  for (Eigen::Index i = 0; i < rows.rows(); ++i) {
    kernels::HadamardRun(rows.data() + i * rows.cols(), static_cast<int>(rows.cols()));
  }
  map = rows.cast<double>();
}

}  // namespace

Result<BalancedBasis> SolveBalancedBasis(const SecondMoment& c_q, const SecondMoment& c_k,
                                         const BasisOptions& options) {
  if (!(options.damping >= 0 && options.damping <= 1) || options.min_samples_per_dim < 0) {
    return InvalidArgument("balanced basis: damping " + std::to_string(options.damping) + " is not in 0..1");
  }
  ZEROC_RETURN_IF_ERROR(CheckMoment("C_q", c_q, options));
  ZEROC_RETURN_IF_ERROR(CheckMoment("C_k", c_k, options));
  if (c_q.dim != c_k.dim) {
    return InvalidArgument("balanced basis: C_q has dim " + std::to_string(c_q.dim) + ", C_k " +
                           std::to_string(c_k.dim));
  }
  ZEROC_ASSIGN_OR_RETURN(Pair pair,
                         SolvePair(options.kind, Damped(c_q, options.damping), Damped(c_k, options.damping)));
  if (!pair.a.allFinite() || !pair.b.allFinite()) return Internal("balanced basis: the decomposition did not converge");
  if (options.undo_rotation) {
    UndoRotation(pair.a);
    UndoRotation(pair.b);
  }
  return BalancedBasis{c_q.dim, RowMajorValues(pair.a), RowMajorValues(pair.b),
                       std::vector<double>(pair.s.begin(), pair.s.end())};
}

void RotateColumns(std::span<float> map, std::span<const kernels::KvRun> runs) {
  std::size_t dim = 0;
  for (const kernels::KvRun& run : runs) dim += static_cast<std::size_t>(run.width);
  ZEROC_CHECK(dim > 0 && map.size() % dim == 0, map.size(), dim);
  for (std::size_t row = 0; row < map.size(); row += dim) {
    std::size_t first = row;
    for (const kernels::KvRun& run : runs) {
      if (kernels::IsQuantised(run.bits)) kernels::HadamardRun(map.data() + first, run.width);
      first += static_cast<std::size_t>(run.width);
    }
  }
}

}  // namespace zeroc
