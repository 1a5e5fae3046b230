#include "libzeroc/compression/fold.h"

#include <Eigen/Core>
#include <cmath>
#include <cstring>
#include <string>

#include "kernels/bf16.h"
#include "libzeroc/base/check.h"
#include "libzeroc/checkpoint/safetensors.h"

namespace zeroc {
namespace {

using RowMajorF = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using MapF = Eigen::Map<const RowMajorF>;

Status CheckWeight(const char* name, const TensorView& w, std::vector<std::int64_t> shape) {
  if (w.shape != shape) {
    return InvalidArgument(std::string(name) + " has shape " + ShapeToString(w.shape) + ", the model needs " +
                           ShapeToString(shape));
  }
  if (w.dtype != DType::kBf16 && w.dtype != DType::kF16 && w.dtype != DType::kF32) {
    return InvalidArgument(std::string(name) + " is " + std::string(DTypeName(w.dtype)) +
                           "; BF16, F16 and F32 can be folded");
  }
  return OkStatus();
}

// n values from `index` on. memcpy: a checkpoint need not align its tensors.
void ReadRow(const TensorView& w, std::int64_t index, std::int64_t n, float* out) {
  const std::byte* from = w.data + static_cast<std::size_t>(index) * DTypeBytes(w.dtype);
  if (w.dtype == DType::kF32) {
    std::memcpy(out, from, static_cast<std::size_t>(n) * sizeof(float));
    return;
  }
  const bool is_bf16 = w.dtype == DType::kBf16;
  for (std::int64_t i = 0; i < n; ++i) {
    std::uint16_t bits;
    std::memcpy(&bits, from + i * static_cast<std::int64_t>(sizeof(bits)), sizeof(bits));
    out[i] = is_bf16 ? kernels::Bf16ToFloat(bits)
                     : Eigen::half_impl::half_to_float(Eigen::half_impl::raw_uint16_to_half(bits));
  }
}

// Rows [row, row + n_rows), columns [col, col + n_cols) of w [*, row_length].
RowMajorF ReadPart(const TensorView& w, std::int64_t row_length, std::int64_t row, std::int64_t n_rows,
                   std::int64_t col, std::int64_t n_cols) {
  RowMajorF part(n_rows, n_cols);
  for (std::int64_t r = 0; r < n_rows; ++r) {
    ReadRow(w, (row + r) * row_length + col, n_cols, part.data() + r * n_cols);
  }
  return part;
}

// False if a value is not finite in bf16.
bool WritePart(const RowMajorF& part, std::uint16_t* out, std::int64_t row_length) {
  bool finite = true;
  for (Eigen::Index r = 0; r < part.rows(); ++r) {
    for (Eigen::Index c = 0; c < part.cols(); ++c) {
      const std::uint16_t bits = kernels::FloatToBf16(part(r, c));
      finite = finite && std::isfinite(kernels::Bf16ToFloat(bits));
      out[r * row_length + c] = bits;
    }
  }
  return finite;
}

MapF HeadMap(std::span<const float> maps, int kv_head, int dim) {
  return MapF(maps.data() + std::ptrdiff_t{kv_head} * dim * dim, dim, dim);
}

Status NotFinite(const char* name) {
  return Status(StatusCode::kOutOfRange, "fold: " + std::string(name) +
                                             ": a folded weight is not finite in bf16 (NaN or infinity in the weight "
                                             "or its bias, or values beyond 3.4e38)");
}

void AppendFloats(const std::vector<double>& values, std::vector<float>& out) {
  for (const double value : values) out.push_back(static_cast<float>(value));
}

}  // namespace

Result<SecondMoment> OutputGram(const TensorView& w_o, const ModelGeometry& geometry, int kv_head) {
  ZEROC_CHECK(kv_head >= 0 && kv_head < geometry.n_kv_heads, kv_head);
  const int dim = geometry.head_dim;
  const std::int64_t row_length = std::int64_t{geometry.n_heads} * dim;
  ZEROC_RETURN_IF_ERROR(CheckWeight("W_O", w_o, {geometry.hidden, row_length}));
  const int group = geometry.n_heads / geometry.n_kv_heads;
  Eigen::MatrixXd gram = Eigen::MatrixXd::Zero(dim, dim);
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const Eigen::MatrixXd w =
        ReadPart(w_o, row_length, 0, geometry.hidden, std::int64_t{head} * dim, dim).cast<double>();
    gram.noalias() += w.transpose() * w;
  }
  SecondMoment moment{dim, SecondMoment::kExact, std::vector<double>(static_cast<std::size_t>(gram.size()))};
  Eigen::Map<Eigen::MatrixXd>(moment.values.data(), dim, dim) = gram;
  return moment;
}

Result<LayerMaps> SolveLayer(const MomentAccumulator& moments, int layer, const TensorView& w_o,
                             const BasisOptions& options) {
  LayerMaps maps;
  for (int g = 0; g < moments.geometry().n_kv_heads; ++g) {
    const std::string context = "layer " + std::to_string(layer) + ", KV head " + std::to_string(g);
    const Result<BalancedBasis> qk = SolveBalancedBasis(moments.Queries(layer, g), moments.Keys(layer, g), options);
    if (!qk.ok()) return qk.status().WithContext(context + ": keys");
    const Result<SecondMoment> gram = OutputGram(w_o, moments.geometry(), g);
    if (!gram.ok()) return gram.status().WithContext(context);
    const Result<BalancedBasis> vo = SolveBalancedBasis(*gram, moments.Values(layer, g), options);
    if (!vo.ok()) return vo.status().WithContext(context + ": values");
    AppendFloats(qk->a, maps.a);
    AppendFloats(qk->b, maps.b);
    AppendFloats(qk->s, maps.s_qk);
    AppendFloats(vo->a, maps.n);
    AppendFloats(vo->b, maps.m);
    AppendFloats(vo->s, maps.s_vo);
  }
  return maps;
}

Result<FoldedHeads> FoldHeads(const char* name, const TensorView& w, const TensorView* bias, int n_heads,
                              const ModelGeometry& geometry, std::span<const float> maps) {
  const int dim = geometry.head_dim;
  const std::int64_t hidden = geometry.hidden;
  const std::int64_t width = std::int64_t{n_heads} * dim;
  const auto n_map = static_cast<std::size_t>(geometry.n_kv_heads) * static_cast<std::size_t>(dim * dim);
  ZEROC_CHECK(maps.size() == n_map && n_heads % geometry.n_kv_heads == 0, maps.size(), n_map, n_heads);
  ZEROC_RETURN_IF_ERROR(CheckWeight(name, w, {width, hidden}));
  if (bias != nullptr) ZEROC_RETURN_IF_ERROR(CheckWeight((std::string(name) + " bias").c_str(), *bias, {width}));

  FoldedHeads out;
  out.w.resize(static_cast<std::size_t>(width * hidden));
  bool finite = true;
  for (int head = 0; head < n_heads; ++head) {
    const MapF map = HeadMap(maps, head / (n_heads / geometry.n_kv_heads), dim);
    const std::int64_t row = std::int64_t{head} * dim;
    const RowMajorF folded = map.transpose() * ReadPart(w, hidden, row, dim, 0, hidden);
    finite = WritePart(folded, out.w.data() + row * hidden, hidden) && finite;
    if (bias == nullptr) continue;
    const RowMajorF rotated = map.transpose() * ReadPart(*bias, 1, row, dim, 0, 1);
    finite = rotated.allFinite() && finite;
    out.bias.insert(out.bias.end(), rotated.data(), rotated.data() + dim);
  }
  if (!finite) return NotFinite(name);
  return out;
}

Result<FoldedValueOutput> FoldValueOutput(const TensorView& w_v, const TensorView& w_o, const TensorView* v_bias,
                                          const ModelGeometry& geometry, std::span<const float> m,
                                          std::span<const float> n) {
  const int dim = geometry.head_dim;
  const std::int64_t hidden = geometry.hidden;
  const std::int64_t q_width = std::int64_t{geometry.n_heads} * dim;
  const auto n_map = static_cast<std::size_t>(geometry.n_kv_heads) * static_cast<std::size_t>(dim * dim);
  ZEROC_CHECK(n.size() == n_map, n.size(), n_map);
  ZEROC_RETURN_IF_ERROR(CheckWeight("W_O", w_o, {hidden, q_width}));
  ZEROC_ASSIGN_OR_RETURN(FoldedHeads values, FoldHeads("W_V", w_v, v_bias, geometry.n_kv_heads, geometry, m));

  FoldedValueOutput out{std::move(values.w), {}, std::move(values.bias)};
  out.w_o.resize(static_cast<std::size_t>(hidden * q_width));
  bool finite = true;
  const int group = geometry.n_heads / geometry.n_kv_heads;
  for (int head = 0; head < geometry.n_heads; ++head) {
    const std::int64_t col = std::int64_t{head} * dim;
    const RowMajorF folded = ReadPart(w_o, q_width, 0, hidden, col, dim) * HeadMap(n, head / group, dim);
    finite = WritePart(folded, out.w_o.data() + col, q_width) && finite;
  }
  if (!finite) return NotFinite("W_O");
  return out;
}

}  // namespace zeroc
