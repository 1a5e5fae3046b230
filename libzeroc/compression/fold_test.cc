#include "libzeroc/compression/fold.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <limits>

#include "kernels/bf16.h"
#include "libzeroc/checkpoint/checkpoint.h"
#include "libzeroc/compression/test_moments.h"

namespace zeroc {
namespace {

using Eigen::MatrixXd;
using kernels::Bf16ToFloat;
using kernels::FloatToBf16;
using testing::HeadMatrixOf;
using testing::RandomMatrix;

constexpr ModelGeometry kGeometry = {.n_layers = 1, .n_heads = 6, .n_kv_heads = 2, .head_dim = 16, .hidden = 40};
constexpr int kDim = 16, kHidden = 40, kQWidth = 96, kKvWidth = 32;

// A row-major weight with its own bytes, one byte off alignment where elements are wider than that.
struct Weight {
  std::vector<std::byte> bytes;
  TensorView view;
  MatrixXd values;  // what the stored elements stand for
};

Weight MakeWeight(const MatrixXd& values, DType dtype) {
  Weight w;
  const std::size_t element = DTypeBytes(dtype);
  w.bytes.resize(1 + static_cast<std::size_t>(values.size()) * element);
  w.values.resize(values.rows(), values.cols());
  std::byte* out = w.bytes.data() + 1;
  for (Eigen::Index r = 0; r < values.rows(); ++r) {
    for (Eigen::Index c = 0; c < values.cols(); ++c, out += element) {
      const auto x = static_cast<float>(values(r, c));
      if (dtype == DType::kF32) {
        std::memcpy(out, &x, 4);
        w.values(r, c) = static_cast<double>(x);
      } else {
        const std::uint16_t bits = dtype == DType::kBf16 ? FloatToBf16(x) : Eigen::half(x).x;
        std::memcpy(out, &bits, 2);
        w.values(r, c) = dtype == DType::kBf16 ? Bf16ToFloat(bits) : static_cast<float>(Eigen::half(x));
      }
    }
  }
  w.view = TensorView{dtype, {values.rows(), values.cols()}, w.bytes.data() + 1, w.bytes.size() - 1};
  return w;
}

struct Layer {
  Weight w_v, w_o;
  MomentAccumulator moments{kGeometry};
};

// Random weights and moments of random activations: v = W_V x.
Layer MakeLayer(DType dtype, unsigned seed) {
  std::mt19937 rng(seed);
  Layer layer;
  layer.w_v = MakeWeight(RandomMatrix(kKvWidth, kHidden, rng) * 0.2, dtype);
  layer.w_o = MakeWeight(RandomMatrix(kHidden, kQWidth, rng) * 0.05, dtype);
  const int n_tokens = 300;
  using RowMajorF = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const RowMajorF x = (RandomMatrix(n_tokens, kHidden, rng) * RandomMatrix(kHidden, kHidden, rng)).cast<float>();
  const RowMajorF v = x * layer.w_v.values.cast<float>().transpose();
  const RowMajorF q = RandomMatrix(n_tokens, kQWidth, rng).cast<float>();
  layer.moments.Add(0, 0, n_tokens, {q.data(), kQWidth, 3 * kDim}, {v.data(), kKvWidth, kDim},
                    {v.data(), kKvWidth, kDim});
  return layer;
}

TEST(OutputGram, SumsTheHeadsOfTheGroup) {
  const Layer layer = MakeLayer(DType::kF32, 1);
  for (int g = 0; g < 2; ++g) {
    MatrixXd expected = MatrixXd::Zero(kDim, kDim);
    for (int h = 3 * g; h < 3 * g + 3; ++h) {
      const MatrixXd part = layer.w_o.values.middleCols(h * kDim, kDim);
      expected += part.transpose() * part;
    }
    const Result<SecondMoment> gram = OutputGram(layer.w_o.view, kGeometry, g);
    ASSERT_TRUE(gram.ok()) << gram.status().ToString();
    EXPECT_LT((testing::MatrixOf(gram->values, kDim) - expected).cwiseAbs().maxCoeff(), 1e-12);
    EXPECT_EQ(gram->n_samples, SecondMoment::kExact);
  }
}

TEST(ValueFold, IsExactAtFullWidthInFloat64) {
  const Layer layer = MakeLayer(DType::kF32, 2);
  for (int g = 0; g < 2; ++g) {
    const Result<SecondMoment> gram = OutputGram(layer.w_o.view, kGeometry, g);
    ASSERT_TRUE(gram.ok());
    const Result<BalancedBasis> basis = SolveBalancedBasis(*gram, layer.moments.Values(0, g));
    ASSERT_TRUE(basis.ok()) << basis.status().ToString();
    const MatrixXd m = testing::MatrixOf(basis->b, kDim);
    const MatrixXd n = testing::MatrixOf(basis->a, kDim);
    const MatrixXd w_v = layer.w_v.values.middleRows(g * kDim, kDim);
    for (int h = 3 * g; h < 3 * g + 3; ++h) {
      const MatrixXd w_o = layer.w_o.values.middleCols(h * kDim, kDim);
      const MatrixXd exact = w_o * w_v;
      const MatrixXd folded = (w_o * n) * (m.transpose() * w_v);
      EXPECT_LT((folded - exact).cwiseAbs().maxCoeff(), 1e-12 * exact.cwiseAbs().maxCoeff() * kDim);
    }
  }
}

// |got - exact| <= bf16 half an ulp of the result + the float32 sum's error.
void ExpectFolded(std::uint16_t got, double exact, double absolute_sum) {
  const double bound = std::abs(exact) / 256 + absolute_sum * (kDim + 2) * std::numeric_limits<float>::epsilon();
  ASSERT_LE(std::abs(Bf16ToFloat(got) - exact), bound) << "exact " << exact;
}

class FoldTest : public ::testing::TestWithParam<DType> {};

TEST_P(FoldTest, RoundsOnceAndKeepsTheLayersOutput) {
  const Layer layer = MakeLayer(GetParam(), 3);
  std::mt19937 rng(4);
  const Weight bias = MakeWeight(RandomMatrix(kKvWidth, 1, rng), GetParam());
  TensorView bias_view = bias.view;
  bias_view.shape = {kKvWidth};
  const Result<LayerMaps> maps = SolveLayer(layer.moments, 0, layer.w_o.view);
  ASSERT_TRUE(maps.ok()) << maps.status().ToString();
  const Result<FoldedValueOutput> folded =
      FoldValueOutput(layer.w_v.view, layer.w_o.view, &bias_view, kGeometry, maps->m, maps->n);
  ASSERT_TRUE(folded.ok()) << folded.status().ToString();
  ASSERT_EQ(folded->w_v.size(), static_cast<std::size_t>(kKvWidth * kHidden));
  ASSERT_EQ(folded->w_o.size(), static_cast<std::size_t>(kHidden * kQWidth));
  ASSERT_EQ(folded->v_bias.size(), static_cast<std::size_t>(kKvWidth));

  for (int g = 0; g < 2; ++g) {
    const MatrixXd mt = HeadMatrixOf(maps->m, g, kDim).transpose();
    const MatrixXd n = HeadMatrixOf(maps->n, g, kDim);
    const MatrixXd w_v = layer.w_v.values.middleRows(g * kDim, kDim);
    const MatrixXd exact_v = mt * w_v;
    const MatrixXd sum_v = mt.cwiseAbs() * w_v.cwiseAbs();
    const MatrixXd exact_bias = mt * bias.values.middleRows(g * kDim, kDim);
    MatrixXd got_v(kDim, kHidden);
    for (int r = 0; r < kDim; ++r) {
      EXPECT_NEAR(folded->v_bias[static_cast<std::size_t>(g * kDim + r)], exact_bias(r, 0), 1e-5);
      for (int c = 0; c < kHidden; ++c) {
        const std::uint16_t got = folded->w_v[static_cast<std::size_t>((g * kDim + r) * kHidden + c)];
        ExpectFolded(got, exact_v(r, c), sum_v(r, c));
        got_v(r, c) = Bf16ToFloat(got);
      }
    }
    for (int h = 3 * g; h < 3 * g + 3; ++h) {
      const MatrixXd w_o = layer.w_o.values.middleCols(h * kDim, kDim);
      const MatrixXd exact_o = w_o * n;
      const MatrixXd sum_o = w_o.cwiseAbs() * n.cwiseAbs();
      MatrixXd got_o(kHidden, kDim);
      for (int r = 0; r < kHidden; ++r) {
        for (int c = 0; c < kDim; ++c) {
          const std::uint16_t got = folded->w_o[static_cast<std::size_t>(r * kQWidth + h * kDim + c)];
          ExpectFolded(got, exact_o(r, c), sum_o(r, c));
          got_o(r, c) = Bf16ToFloat(got);
        }
      }
      // Two bf16 roundings of relative size 2^-9 each, spread over independent terms.
      const double error = (got_o * got_v - w_o * w_v).norm() / (w_o * w_v).norm();
      EXPECT_LT(error, 8e-3) << "head " << h;
    }
  }
}

// Queries of a group and their keys, with biases: every score is as before, up to the two roundings.
TEST_P(FoldTest, FoldedQueriesAndKeysKeepTheScores) {
  const Layer layer = MakeLayer(GetParam(), 11);
  std::mt19937 rng(12);
  const Weight w_q = MakeWeight(RandomMatrix(kQWidth, kHidden, rng), GetParam());
  const Weight w_k = MakeWeight(RandomMatrix(kKvWidth, kHidden, rng), GetParam());
  const Weight b_q = MakeWeight(RandomMatrix(kQWidth, 1, rng), GetParam());
  const Weight b_k = MakeWeight(RandomMatrix(kKvWidth, 1, rng), GetParam());
  TensorView q_bias = b_q.view, k_bias = b_k.view;
  q_bias.shape = {kQWidth};
  k_bias.shape = {kKvWidth};
  const Result<LayerMaps> maps = SolveLayer(layer.moments, 0, layer.w_o.view);
  ASSERT_TRUE(maps.ok()) << maps.status().ToString();
  const Result<FoldedHeads> q = FoldHeads("W_Q", w_q.view, &q_bias, kGeometry.n_heads, kGeometry, maps->a);
  const Result<FoldedHeads> k = FoldHeads("W_K", w_k.view, &k_bias, kGeometry.n_kv_heads, kGeometry, maps->b);
  ASSERT_TRUE(q.ok() && k.ok()) << q.status().ToString() << k.status().ToString();
  const auto project = [](const FoldedHeads& folded, int head, const MatrixXd& x) {
    MatrixXd out(kDim, 1);
    for (int r = 0; r < kDim; ++r) {
      out(r, 0) = folded.bias[static_cast<std::size_t>(head * kDim + r)];
      for (int c = 0; c < kHidden; ++c) {
        out(r, 0) += Bf16ToFloat(folded.w[static_cast<std::size_t>((head * kDim + r) * kHidden + c)]) * x(c, 0);
      }
    }
    return out;
  };
  const MatrixXd x = RandomMatrix(kHidden, 1, rng), y = RandomMatrix(kHidden, 1, rng);
  for (int h = 0; h < kGeometry.n_heads; ++h) {
    const int g = h / 3;
    const MatrixXd exact_q = w_q.values.middleRows(h * kDim, kDim) * x + b_q.values.middleRows(h * kDim, kDim);
    const MatrixXd exact_k = w_k.values.middleRows(g * kDim, kDim) * y + b_k.values.middleRows(g * kDim, kDim);
    const MatrixXd got_q = project(*q, h, x), got_k = project(*k, g, y);
    // 2^-9 of each weight, spread over independent terms, on both sides.
    const double error = std::abs((got_q.transpose() * got_k)(0, 0) - (exact_q.transpose() * exact_k)(0, 0));
    EXPECT_LT(error, 8e-3 * got_q.norm() * got_k.norm()) << "head " << h;
    EXPECT_GT((got_q - exact_q).norm(), 0.01 * exact_q.norm()) << "the maps are not the identity";
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, FoldTest, ::testing::Values(DType::kBf16, DType::kF16, DType::kF32));

TEST(ValueFold, RefusesWrongTensors) {
  const Layer layer = MakeLayer(DType::kBf16, 5);
  const Result<LayerMaps> maps = SolveLayer(layer.moments, 0, layer.w_o.view);
  ASSERT_TRUE(maps.ok());
  const auto fold = [&](const TensorView& w_v, const TensorView& w_o, const TensorView* bias = nullptr) {
    return FoldValueOutput(w_v, w_o, bias, kGeometry, maps->m, maps->n).status().code();
  };
  EXPECT_EQ(fold(layer.w_v.view, layer.w_o.view), StatusCode::kOk);
  EXPECT_EQ(fold(layer.w_o.view, layer.w_o.view), StatusCode::kInvalidArgument);
  EXPECT_EQ(fold(layer.w_v.view, layer.w_v.view), StatusCode::kInvalidArgument);
  EXPECT_EQ(fold(layer.w_v.view, layer.w_o.view, &layer.w_v.view), StatusCode::kInvalidArgument);
  TensorView bytes = layer.w_v.view;
  bytes.dtype = DType::kI16;
  EXPECT_EQ(fold(bytes, layer.w_o.view), StatusCode::kInvalidArgument);
  TensorView transposed = layer.w_o.view;
  transposed.shape = {kQWidth, kHidden};
  EXPECT_EQ(OutputGram(transposed, kGeometry, 0).status().code(), StatusCode::kInvalidArgument);

  std::mt19937 rng(6);
  MatrixXd values = RandomMatrix(kKvWidth, kHidden, rng);
  values(17, 3) = std::numeric_limits<double>::infinity();
  EXPECT_EQ(fold(MakeWeight(values, DType::kF32).view, layer.w_o.view), StatusCode::kOutOfRange);
}

TEST(SolveLayer, NamesTheHeadWhoseMomentsAreNotFinite) {
  const Layer layer = MakeLayer(DType::kF32, 7);
  MomentAccumulator moments = layer.moments;
  const int skip = moments.skip_tokens();
  std::vector<float> q(static_cast<std::size_t>(kQWidth), 1.0F), k(static_cast<std::size_t>(kKvWidth), 1.0F);
  std::vector<float> v = k;
  v[static_cast<std::size_t>(kDim)] = std::numeric_limits<float>::quiet_NaN();  // of KV head 1
  moments.Add(0, skip, 1, {q.data(), kQWidth, 3 * kDim}, {k.data(), kKvWidth, kDim}, {v.data(), kKvWidth, kDim});
  const Status status = SolveLayer(moments, 0, layer.w_o.view).status();
  EXPECT_EQ(status.code(), StatusCode::kDataLoss);
  EXPECT_NE(status.message().find("layer 0, KV head 1: values: second moment C_k holds NaN or infinity"),
            std::string::npos)
      << status.ToString();
}

TEST(SolveLayer, NamesTheHeadThatFails) {
  const Layer layer = MakeLayer(DType::kF32, 7);
  const MomentAccumulator empty(kGeometry);
  const Status status = SolveLayer(empty, 0, layer.w_o.view).status();
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("layer 0, KV head 0: keys: second moment C_q: 0 samples"), std::string::npos)
      << status.ToString();
}

// With identity maps the fold must give back a real checkpoint's own bits.
TEST(ValueFold, IdentityMapsLeaveTheDemoModelUnchanged) {
  const Result<std::unique_ptr<Checkpoint>> checkpoint = Checkpoint::Open("models/zeroc-demo");
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  const ModelGeometry geometry = GeometryOf((*checkpoint)->config());
  const Result<TensorView> w_v = (*checkpoint)->Tensor("model.layers.0.self_attn.v_proj.weight", {128, 384});
  const Result<TensorView> w_o = (*checkpoint)->Tensor("model.layers.0.self_attn.o_proj.weight", {384, 384});
  ASSERT_TRUE(w_v.ok() && w_o.ok());
  std::vector<float> identity;
  for (int i = 0; i < 2 * 64 * 64; ++i) identity.push_back(i % (64 * 64) % 65 == 0 ? 1.0F : 0.0F);
  const Result<FoldedValueOutput> folded = FoldValueOutput(*w_v, *w_o, nullptr, geometry, identity, identity);
  ASSERT_TRUE(folded.ok()) << folded.status().ToString();
  EXPECT_TRUE(folded->v_bias.empty());
  const auto equal_values = [](const std::vector<std::uint16_t>& got, const TensorView& view) {
    for (std::size_t i = 0; i < got.size(); ++i) {
      std::uint16_t bits;
      std::memcpy(&bits, view.data + 2 * i, 2);
      if (Bf16ToFloat(got[i]) != Bf16ToFloat(bits)) return false;  // as values: -0 may become 0
    }
    return got.size() * 2 == view.bytes;
  };
  EXPECT_TRUE(equal_values(folded->w_v, *w_v));
  EXPECT_TRUE(equal_values(folded->w_o, *w_o));
}

}  // namespace
}  // namespace zeroc
