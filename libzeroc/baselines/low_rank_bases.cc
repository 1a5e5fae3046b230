// The calibration side of low_rank_caches.h: second moments, eigenvectors, ranks.
#include <Eigen/Eigenvalues>
#include <Eigen/QR>
#include <algorithm>
#include <cmath>
#include <random>
#include <string>

#include "libzeroc/baselines/low_rank_caches.h"
#include "libzeroc/checkpoint/tensor_names.h"
#include "libzeroc/compression/fold.h"

namespace zeroc {
namespace {

using RowMajor = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using RowMajorFloat = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr int kChunk = 512;  // tokens per step

// sum += x^T x for rows x [n, dim].
void AddMoment(const float* rows, int n, int dim, double* sum) {
  const Eigen::Map<const RowMajorFloat> x(rows, n, dim);
  const RowMajorFloat product = x.transpose() * x;
  Eigen::Map<RowMajor>(sum, dim, dim) += product.cast<double>();
}

// Exact attention that adds up what it sees.
class StatisticsCache final : public CacheAttention {
 public:
  StatisticsCache(const CacheShape& shape, int max_tokens, std::vector<LayerStatistics>& statistics)
      : CacheAttention(shape, max_tokens), statistics_(statistics) {}

 protected:
  void MapRows(int layer, int n_tokens, float* k, float* v) override {
    LayerStatistics& s = statistics_[static_cast<std::size_t>(layer)];
    AddMoment(k, n_tokens, shape().kv_width(), s.k_before_rope.data());
    AddMoment(v, n_tokens, shape().kv_width(), s.v.data());
    s.n_tokens += n_tokens;
  }
  void OnAppended(Head& head, int first_slot) override {
    const int d = shape().head_dim;
    const int n = head.store.size() - first_slot;
    std::vector<float> rows(static_cast<std::size_t>(n * d));
    for (int t = 0; t < n; ++t) head.store.GetKey(first_slot + t, rows.data() + static_cast<std::ptrdiff_t>(t) * d);
    AddMoment(rows.data(), n, d, Moment(statistics_[static_cast<std::size_t>(head.layer)].k, head));
  }
  void MapQueries(Head& head, int n_tokens, float* q) override {
    const int d = shape().head_dim;
    std::vector<float> rows(q, q + static_cast<std::ptrdiff_t>(n_tokens * shape().group()) * d);
    for (float& x : rows) x *= std::sqrt(static_cast<float>(d));  // without the softmax scale
    AddMoment(rows.data(), n_tokens * shape().group(), d,
              Moment(statistics_[static_cast<std::size_t>(head.layer)].q, head));
  }
  std::uint64_t HeadBytes(const Head&) const override { return 0; }

 private:
  double* Moment(std::vector<double>& moments, const Head& head) const {
    return moments.data() + static_cast<std::ptrdiff_t>(head.kv_head) * shape().head_dim * shape().head_dim;
  }
  std::vector<LayerStatistics>& statistics_;
};

std::vector<double> Block(const std::vector<double>& matrix, int dim, int begin, int n) {
  const Eigen::Map<const RowMajor> all(matrix.data(), dim, dim);
  std::vector<double> block(static_cast<std::size_t>(n) * static_cast<std::size_t>(n));
  Eigen::Map<RowMajor>(block.data(), n, n) = all.block(begin, begin, n, n);
  return block;
}

int Rank(double dims, int full) { return std::clamp(static_cast<int>(std::floor(dims + 1e-9)), 1, full); }

// The same subspace in coordinates of which none stands out. Deterministic.
void RotateLatents(Projection* projection) {
  const int r = projection->rank;
  std::mt19937 random(static_cast<unsigned>(r));
  std::normal_distribution<double> normal;
  Eigen::MatrixXd gaussian(r, r);
  for (Eigen::Index i = 0; i < gaussian.size(); ++i) gaussian.data()[i] = normal(random);
  const Eigen::MatrixXd rotation = Eigen::HouseholderQR<Eigen::MatrixXd>(gaussian).householderQ();
  Eigen::Map<RowMajorFloat> basis(projection->basis.data(), projection->dim, r);
  basis = (basis.cast<double>() * rotation).cast<float>().eval();
}

}  // namespace

Result<std::vector<LayerStatistics>> GatherStatistics(Transformer& model,
                                                      std::span<const std::vector<std::int32_t>> windows,
                                                      const std::function<bool(double)>& progress) {
  const CacheShape shape = CacheShape::Of(model);
  if (windows.empty()) return InvalidArgument("calibration of a low-rank method needs at least one window of text");
  const auto kv = static_cast<std::size_t>(shape.kv_width());
  const auto d = static_cast<std::size_t>(shape.head_dim);
  LayerStatistics empty;
  empty.k_before_rope.resize(kv * kv);
  empty.v.resize(kv * kv);
  empty.q.resize(kv * d);
  empty.k.resize(kv * d);
  std::vector<LayerStatistics> statistics(static_cast<std::size_t>(shape.n_layers), empty);
  for (std::size_t w = 0; w < windows.size(); ++w) {
    const std::span<const std::int32_t> ids(windows[w]);
    StatisticsCache cache(shape, static_cast<int>(ids.size()), statistics);
    for (std::size_t begin = 0; begin < ids.size(); begin += kChunk) {
      const std::size_t n = std::min<std::size_t>(kChunk, ids.size() - begin);
      const ForwardSequence step{.tokens = ids.subspan(begin, n), .attention = &cache};
      ZEROC_RETURN_IF_ERROR(model.Forward({&step, 1}, nullptr));
    }
    if (progress != nullptr && !progress(static_cast<double>(w + 1) / static_cast<double>(windows.size()))) {
      return Cancelled("calibration was stopped");
    }
  }
  return statistics;
}

Result<Projection> LeadingEigenvectors(const std::vector<double>& matrix, int dim, int rank) {
  const RowMajor m = Eigen::Map<const RowMajor>(matrix.data(), dim, dim);
  if (!m.allFinite()) return DataLoss("a calibration moment holds NaN or infinity");
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(m);
  if (solver.info() != Eigen::Success) return Internal("the eigenvectors of a calibration moment were not found");
  Projection projection{dim, rank, std::vector<float>(static_cast<std::size_t>(dim * rank))};
  // Eigen sorts ascending.
  Eigen::Map<RowMajorFloat>(projection.basis.data(), dim, rank) =
      solver.eigenvectors().rightCols(rank).rowwise().reverse().cast<float>();
  return projection;
}

Result<PaluBases> SolvePalu(const CacheShape& shape, std::span<const LayerStatistics> statistics, double kv_bits) {
  PaluBases bases;
  bases.group = std::min(kPaluHeadGroup, shape.n_kv_heads);
  while (shape.n_kv_heads % bases.group != 0) --bases.group;
  const int width = bases.group * shape.head_dim;
  const double share = kv_bits / (8 * shape.exact_bytes);
  double dims = width * share;
  if (share < 0.5) {
    constexpr double kScaleBits = 32;
    for (bases.code_bits = 4; bases.code_bits >= 2; --bases.code_bits) {
      dims = (16 * share * width - kScaleBits) / bases.code_bits;
      if (dims >= 0.5 * width || bases.code_bits == 2) break;
    }
  }
  const int rank = Rank(dims, width);
  for (const LayerStatistics& s : statistics) {
    for (int begin = 0; begin < shape.kv_width(); begin += width) {
      ZEROC_ASSIGN_OR_RETURN(Projection k,
                             LeadingEigenvectors(Block(s.k_before_rope, shape.kv_width(), begin, width), width, rank));
      ZEROC_ASSIGN_OR_RETURN(Projection v,
                             LeadingEigenvectors(Block(s.v, shape.kv_width(), begin, width), width, rank));
      if (bases.code_bits != 0) {
        RotateLatents(&k);
        RotateLatents(&v);
      }
      bases.k.push_back(std::move(k));
      bases.v.push_back(std::move(v));
    }
  }
  return bases;
}

Result<PaperBases> SolvePaper(const Transformer& model, const CacheShape& shape,
                              std::span<const LayerStatistics> statistics, double kv_bits) {
  const int d = shape.head_dim;
  const auto size = static_cast<std::size_t>(d * d);
  const ModelConfig& config = model.config();
  PaperBases bases;
  // (1 - cold) p + cold p / 2 coordinates on average.
  const double dims = d * kv_bits / (8 * shape.exact_bytes) / (1 - kColdShare / 2);
  const int rank = Rank(dims, d);
  for (std::size_t layer = 0; layer < statistics.size(); ++layer) {
    const LayerStatistics& s = statistics[layer];
    ZEROC_ASSIGN_OR_RETURN(const TensorView w_o, OutputWeight(model.checkpoint(), static_cast<int>(layer)));
    for (int g = 0; g < shape.n_kv_heads; ++g) {
      std::vector<double> qk(size);
      for (std::size_t i = 0; i < size; ++i) {
        qk[i] = s.q[static_cast<std::size_t>(g) * size + i] + s.k[static_cast<std::size_t>(g) * size + i];
      }
      ZEROC_ASSIGN_OR_RETURN(Projection k, LeadingEigenvectors(qk, d, rank));
      // [V; W_O]: values as rows, then the group's output weights as rows in the head's coordinates.
      std::vector<double> vo = Block(s.v, shape.kv_width(), g * d, d);
      ZEROC_ASSIGN_OR_RETURN(const SecondMoment gram, OutputGram(w_o, GeometryOf(config), g));
      for (std::size_t i = 0; i < size; ++i) vo[i] += gram.values[i];
      ZEROC_ASSIGN_OR_RETURN(Projection v, LeadingEigenvectors(vo, d, rank));
      bases.k.push_back(std::move(k));
      bases.v.push_back(std::move(v));
    }
  }
  return bases;
}

}  // namespace zeroc
