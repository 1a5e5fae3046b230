#include "libzeroc/compression/moments.h"

#include <Eigen/Core>
#include <algorithm>

#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

// Rows whose products are summed in float32 before they join the float64 sum: short enough that rounding stays near
// 1e-6, long enough that the conversion costs under 1 % of the products.
constexpr int kSliceRows = 256;

using RowMajorF = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using StridedRows = Eigen::Map<const RowMajorF, Eigen::Unaligned, Eigen::OuterStride<>>;

// sums += X^T X (lower triangle, column-major), X = n_rows rows of dim floats.
void AddProducts(const float* rows, std::int64_t stride, int n_rows, int dim, double* sums) {
  Eigen::MatrixXf slice(dim, dim);
  Eigen::Map<Eigen::MatrixXd> total(sums, dim, dim);
  for (int begin = 0; begin < n_rows; begin += kSliceRows) {
    const StridedRows x(rows + begin * stride, std::min(kSliceRows, n_rows - begin), dim, Eigen::OuterStride<>(stride));
    slice.setZero();
    slice.selfadjointView<Eigen::Lower>().rankUpdate(x.transpose());
    total += slice.cast<double>();
  }
}

}  // namespace

MomentAccumulator::MomentAccumulator(const ModelGeometry& geometry, int skip_tokens)
    : geometry_(geometry), skip_tokens_(skip_tokens), layers_(static_cast<std::size_t>(geometry.n_layers)) {
  ZEROC_CHECK(ValidateGeometry(geometry).ok() && skip_tokens >= 0, ValidateGeometry(geometry).ToString(), skip_tokens);
  const auto n_values = static_cast<std::size_t>(geometry.n_kv_heads) * static_cast<std::size_t>(geometry.head_dim) *
                        static_cast<std::size_t>(geometry.head_dim);
  for (Layer& layer : layers_) {
    layer.q.assign(n_values, 0.0);
    layer.k.assign(n_values, 0.0);
    layer.v.assign(n_values, 0.0);
  }
}

void MomentAccumulator::Add(int layer_idx, int first_pos, int n_tokens, const HeadRows& q, const HeadRows& k,
                            const HeadRows& v) {
  ZEROC_CHECK(layer_idx >= 0 && layer_idx < geometry_.n_layers && first_pos >= 0 && n_tokens >= 0, layer_idx, first_pos,
              n_tokens);
  const int skip = std::clamp(skip_tokens_ - first_pos, 0, n_tokens);
  const int n_rows = n_tokens - skip;
  if (n_rows == 0) return;
  Layer& layer = layers_[static_cast<std::size_t>(layer_idx)];
  const int dim = geometry_.head_dim;
  const int group = geometry_.n_heads / geometry_.n_kv_heads;
  const auto first_row = [skip](const HeadRows& rows, int kv_head) {
    return rows.data + skip * rows.token_stride + kv_head * rows.kv_head_stride;
  };
  for (int g = 0; g < geometry_.n_kv_heads; ++g) {
    const std::ptrdiff_t at = std::ptrdiff_t{g} * dim * dim;
    AddProducts(first_row(k, g), k.token_stride, n_rows, dim, layer.k.data() + at);
    AddProducts(first_row(v, g), v.token_stride, n_rows, dim, layer.v.data() + at);
    for (int j = 0; j < group; ++j) {
      AddProducts(first_row(q, g) + std::ptrdiff_t{j} * dim, q.token_stride, n_rows, dim, layer.q.data() + at);
    }
  }
  layer.n_tokens += n_rows;
}

SecondMoment MomentAccumulator::Average(const std::vector<double>& sums, std::int64_t n_tokens, int kv_head) const {
  ZEROC_CHECK(kv_head >= 0 && kv_head < geometry_.n_kv_heads, kv_head);
  const auto dim = static_cast<std::size_t>(geometry_.head_dim);
  const double* lower = sums.data() + static_cast<std::size_t>(kv_head) * dim * dim;
  const double scale = n_tokens > 0 ? 1.0 / static_cast<double>(n_tokens) : 0.0;
  SecondMoment moment{geometry_.head_dim, n_tokens, std::vector<double>(dim * dim)};
  for (std::size_t col = 0; col < dim; ++col) {
    for (std::size_t row = col; row < dim; ++row) {
      const double value = lower[col * dim + row] * scale;
      moment.values[row * dim + col] = value;
      moment.values[col * dim + row] = value;
    }
  }
  return moment;
}

SecondMoment MomentAccumulator::Queries(int layer, int kv_head) const {
  const Layer& sums = layers_[static_cast<std::size_t>(layer)];
  return Average(sums.q, sums.n_tokens, kv_head);
}

SecondMoment MomentAccumulator::Keys(int layer, int kv_head) const {
  const Layer& sums = layers_[static_cast<std::size_t>(layer)];
  return Average(sums.k, sums.n_tokens, kv_head);
}

SecondMoment MomentAccumulator::Values(int layer, int kv_head) const {
  const Layer& sums = layers_[static_cast<std::size_t>(layer)];
  return Average(sums.v, sums.n_tokens, kv_head);
}

}  // namespace zeroc
