// Balanced bases: the coordinates in which keys and queries (or values and output weights) have equal, sorted energy.
//
// For second moments C_q and C_k (damped), C_q^(1/2) C_k^(1/2) = U S V^T and
//   A = C_q^(-1/2) U S^(1/2),   B = C_k^(-1/2) V S^(1/2),   A B^T = I,   A^T C_q A = B^T C_k B = S.
// q' = A^T q and k' = B^T k keep every score; the first p coordinates are the best rank-p approximation of the scores,
// E (q.k - q'_p.k'_p)^2 = sum of S_i^2 over i >= p (KQ-SVD, arXiv 2512.05916, proves the optimality). float64
// throughout: half-precision decompositions give garbage. Pure functions, any thread.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "kernels/kv_block.h"
#include "libzeroc/base/status.h"

namespace zeroc {

// An uncentred second moment E[x x^T], row-major [dim, dim], symmetric.
struct SecondMoment {
  static constexpr std::int64_t kExact = std::numeric_limits<std::int64_t>::max();

  int dim = 0;
  std::int64_t n_samples = 0;  // vectors averaged; kExact when it comes from weights
  std::vector<double> values;
};

enum class BasisKind {
  kBalanced,    // the above
  kStackedSvd,  // orthogonal: right singular vectors of the stacked [Q; K], A = B = eigenvectors of C_q + C_k
  kIdentity,    // A = B = I
};

struct BasisOptions {
  BasisKind kind = BasisKind::kBalanced;  // the others are for comparison
  // Multiplies A and B by the Hadamard rotation over all coordinates, so that the one which a single-run shape applies
  // is undone: shows what the rotation is worth.
  bool undo_rotation = false;
  double damping = 1e-2;        // this share of the mean diagonal is added to both diagonals
  int min_samples_per_dim = 4;  // fewer samples than this many times dim say little about the small directions
};

// Row-major [dim, dim]; column i of a and b belongs to s[i]. s is sorted, largest first (not for kIdentity). Signs are
// fixed (the largest entry of each column of b is positive), so equal moments give equal bases.
struct BalancedBasis {
  int dim = 0;
  std::vector<double> a;  // queries, or output weights (N of fold.h)
  std::vector<double> b;  // keys, or values (M of fold.h)
  std::vector<double> s;  // [dim] variance of either side in coordinate i
};

// kInvalidArgument: sizes differ, a moment is not symmetric or has a negative diagonal, options out of range.
// kFailedPrecondition: too few samples. kDataLoss: NaN or infinity in a moment (the model computed garbage).
// For kinds other than kBalanced s[i] is sqrt(E q'_i^2 E k'_i^2), the same thing where the bases coincide.
// A moment that is all zero (a dead head) gets a tiny isotropic one, so that the maps stay finite.
Result<BalancedBasis> SolveBalancedBasis(const SecondMoment& c_q, const SecondMoment& c_k,
                                         const BasisOptions& options = {});

// map * Hd, where Hd applies kernels::HadamardRun to each quantised run (1 to 8 bits): a profile's own maps from the
// plan's. As Hd is orthogonal, (A Hd)(B Hd)^T = A B^T. map is row-major [n, dim] (several heads may be stacked), dim
// the sum of the widths; a map whose size is no multiple of dim is a bug of the caller.
void RotateColumns(std::span<float> map, std::span<const kernels::KvRun> runs);

}  // namespace zeroc
