// The baselines under a real forward pass: the control equals the engine, each method stays near it, errors are named.
#include "libzeroc/baselines/methods.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "libzeroc/baselines/cache_attention.h"
#include "libzeroc/baselines/low_rank_caches.h"
#include "libzeroc/kv/owned_pool.h"
#include "libzeroc/model/tiny_model_testing.h"

namespace zeroc {
namespace {

using testing::TinyModel;
using testing::TinyShape;

constexpr int kPrompt = 150, kTokens = 180;

class MethodsTest : public ::testing::Test {
 protected:
  explicit MethodsTest(const kernels::Ops& ops = kernels::ReferenceOps()) : tiny_(TinyShape{}), threads_(2) {
    auto opened = Transformer::Open(tiny_.Open(), nullptr, ops, threads_);
    EXPECT_TRUE(opened.ok()) << opened.status().ToString();
    model_ = std::move(opened).value();
    ids_ = tiny_.RandomIds(kTokens, 5);
  }

  std::size_t vocab() const { return static_cast<std::size_t>(model_->config().vocab_size); }

  // Logits of every token: the prompt in two chunks, then one by one.
  std::vector<float> Run(const std::function<ForwardSequence(std::span<const std::int32_t>)>& step,
                         const std::function<void()>& end_prompt) {
    std::vector<float> logits(kTokens * vocab());
    const std::span<const std::int32_t> ids(ids_);
    const auto feed = [&](int begin, int n) {
      ForwardSequence sequence = step(ids.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(n)));
      sequence.n_logits = n;
      const Status status = model_->Forward({&sequence, 1}, logits.data() + static_cast<std::size_t>(begin) * vocab());
      ASSERT_TRUE(status.ok()) << status.ToString();
    };
    feed(0, 100);
    feed(100, kPrompt - 100);
    end_prompt();
    for (int t = kPrompt; t < kTokens; ++t) feed(t, 1);
    return logits;
  }

  std::vector<float> RunEngine() {
    const auto format = *model_->Format("none");
    const auto pool = std::move(OwnedPool::Create(*format, 1, kTokens, kPrompt)).value();
    const auto kv = std::move(SequenceKv::Create(pool->pool(), format, kTokens, kPrompt)).value();
    return Run([&](auto tokens) { return ForwardSequence{.kv = kv.get(), .tokens = tokens}; }, [] {});
  }

  std::vector<float> RunBaseline(const std::string& name, double bits, std::uint64_t* bytes = nullptr) {
    BaselineOptions options{.name = name, .kv_bits = bits};
    if (NeedsCalibration(name)) options.calibration = {tiny_.RandomIds(300, 6), tiny_.RandomIds(300, 7)};
    const auto method = MakeBaseline(*model_, options);
    EXPECT_TRUE(method.ok()) << method.status().ToString();
    const auto cache = std::move((*method)->NewSequence(kTokens)).value();
    std::vector<float> logits =
        Run([&](auto tokens) { return ForwardSequence{.tokens = tokens, .attention = cache.get()}; },
            [&] { cache->EndPrompt(); });
    if (bytes != nullptr) *bytes = cache->HeldBytes();
    return logits;
  }

  double LargestDifference(const std::vector<float>& a, const std::vector<float>& b, int first_token) const {
    double largest = 0;
    for (std::size_t i = static_cast<std::size_t>(first_token) * vocab(); i < a.size(); ++i) {
      const double difference = std::fabs(a[i] - b[i]);
      largest = std::isnan(difference) ? std::numeric_limits<double>::infinity() : std::max(largest, difference);
    }
    return largest;
  }

  std::uint64_t ExactBytes() const {
    const ModelConfig& c = model_->config();
    return static_cast<std::uint64_t>(kTokens * 2 * c.n_layers * c.n_kv_heads * c.head_dim * 4);
  }

  TinyModel tiny_;
  ThreadPool threads_;
  std::unique_ptr<Transformer> model_;
  std::vector<std::int32_t> ids_;
};

TEST_F(MethodsTest, TheControlEqualsTheEngine) {
  std::uint64_t bytes = 0;
  // Both in float32 with sums in another order: logits of size 10 through two layers.
  EXPECT_LT(LargestDifference(RunBaseline("exact", 0, &bytes), RunEngine(), 0), 2e-4);
  EXPECT_EQ(bytes, ExactBytes());
}

class MethodsCpuTest : public MethodsTest {
 protected:
  MethodsCpuTest() : MethodsTest(kernels::CpuOps()) {}
};

TEST_F(MethodsCpuTest, TheControlEqualsTheEngineUpToItsBf16) {
  const std::vector<float> engine = RunEngine();
  double square = 0;
  for (const float x : engine) square += x * x;
  const double norm = std::sqrt(square / static_cast<double>(engine.size()));
  // Attention outputs are rounded to bf16 (2^-9 relative) on both sides and may fall to neighbouring values.
  EXPECT_LT(LargestDifference(RunBaseline("exact", 0), engine, 0), 0.05 * norm);
}

TEST_F(MethodsTest, EveryMethodRunsWithinItsBytes) {
  const std::vector<float> exact = RunEngine();
  struct Case {
    const char* name;
    double bits;
    double share_max;  // of the exact bytes
    bool exact_prompt;
  };
  // Head size 16 makes scales heavy: 4 bytes to 64.
  for (const Case& c :
       {Case{"fp8", 0, 0.25, true}, Case{"int8", 0, 0.29, true}, Case{"kivi4", 0, 0.8, true},
        Case{"kivi2", 0, 0.78, true}, Case{"hack", 0, 0.45, false}, Case{"h2o", 8, 0.53, true},
        Case{"snapkv", 8, 0.6, true}, Case{"palu", 8, 0.51, false}, Case{"zeroc-paper", 8, 0.56, false}}) {
    SCOPED_TRACE(c.name);
    std::uint64_t bytes = 0;
    // Bits count a 16-bit cache; the reference keeps 32.
    const std::vector<float> logits = RunBaseline(c.name, 2 * c.bits, &bytes);
    if (c.exact_prompt) {
      EXPECT_LT(LargestDifference({logits.begin(), logits.begin() + kPrompt * static_cast<std::ptrdiff_t>(vocab())},
                                  exact, 0),
                2e-4);
    }
    const double difference = LargestDifference(logits, exact, kPrompt);
    EXPECT_GT(difference, 1e-5);  // it does something
    EXPECT_LT(difference, 30);    // and is finite
    EXPECT_LE(static_cast<double>(bytes), c.share_max * static_cast<double>(ExactBytes()));
    EXPECT_GT(bytes, 0u);
  }
}

TEST_F(MethodsTest, MoreBitsAreCloser) {
  const std::vector<float> exact = RunEngine();
  EXPECT_LT(LargestDifference(RunBaseline("int8", 0), exact, kPrompt),
            LargestDifference(RunBaseline("hack", 0), exact, kPrompt));
  EXPECT_LT(LargestDifference(RunBaseline("kivi4", 0), exact, kPrompt),
            LargestDifference(RunBaseline("kivi2", 0), exact, kPrompt));
}

// At full rank the bases are complete: what is left is float32 rounding.
TEST_F(MethodsTest, FullSizeIsExact) {
  const std::vector<float> exact = RunEngine();
  EXPECT_LT(LargestDifference(RunBaseline("palu", 16 * 2), exact, 0), 2e-3);
  EXPECT_LT(LargestDifference(RunBaseline("h2o", 16 * 2), exact, 0), 2e-4);
  EXPECT_LT(LargestDifference(RunBaseline("snapkv", 16 * 2), exact, 0), 2e-4);
}

TEST_F(MethodsTest, PaluProjectsOntoTheLeadingDirections) {
  const std::vector<std::vector<std::int32_t>> windows = {tiny_.RandomIds(400, 8)};
  const auto statistics = GatherStatistics(*model_, windows);
  ASSERT_TRUE(statistics.ok()) << statistics.status().ToString();
  ASSERT_EQ(statistics->size(), 2u);
  EXPECT_EQ((*statistics)[1].n_tokens, 400);
  const int width = 32;
  const auto few = LeadingEigenvectors((*statistics)[1].v, width, 5);
  const auto all = LeadingEigenvectors((*statistics)[1].v, width, width);
  ASSERT_TRUE(few.ok() && all.ok());
  std::vector<double> energy(static_cast<std::size_t>(width));
  for (int j = 0; j < width; ++j) {
    for (int a = 0; a < width; ++a) {
      for (int b = 0; b < width; ++b) {
        energy[static_cast<std::size_t>(j)] += double{all->basis[static_cast<std::size_t>(a * width + j)]} *
                                               (*statistics)[1].v[static_cast<std::size_t>(a * width + b)] *
                                               all->basis[static_cast<std::size_t>(b * width + j)];
      }
    }
    if (j > 0) {
      EXPECT_LE(energy[static_cast<std::size_t>(j)], energy[static_cast<std::size_t>(j - 1)] * 1.000001);
    }
  }
  for (int a = 0; a < width; ++a) {
    for (int j = 0; j < 5; ++j) {
      EXPECT_EQ(few->basis[static_cast<std::size_t>(a * 5 + j)], all->basis[static_cast<std::size_t>(a * width + j)]);
    }
  }
}

// Ranks and code bits of Palu at a size: 16-bit latents from half the size on, then 4, 3 and 2 bits.
TEST_F(MethodsTest, PaluSpendsItsBits) {
  const CacheShape shape = CacheShape::Of(*model_);  // 2 KV heads of 16: groups of 32
  const std::vector<std::vector<std::int32_t>> windows = {tiny_.RandomIds(200, 9)};
  const auto statistics = GatherStatistics(*model_, windows);
  ASSERT_TRUE(statistics.ok());
  struct Case {
    double share;  // of the exact size
    int code_bits, rank;
  };
  // Codes: (16 share * 32 - 32 bits of scale and zero) / bits.
  for (const Case& c : {Case{1, 0, 32}, Case{0.75, 0, 24}, Case{0.5, 0, 16}, Case{0.49, 4, 32}, Case{0.25, 4, 24},
                        Case{0.1876, 4, 16}, Case{0.17, 3, 18}, Case{0.13, 2, 17}, Case{0.05, 2, 1}}) {
    const auto bases = SolvePalu(shape, *statistics, c.share * 8 * shape.exact_bytes);
    ASSERT_TRUE(bases.ok());
    EXPECT_EQ(bases->group, 2);
    EXPECT_EQ(bases->code_bits, c.code_bits) << c.share;
    ASSERT_EQ(bases->k.size(), 2u);
    EXPECT_EQ(bases->k[1].rank, c.rank) << c.share;
    EXPECT_EQ(bases->v[0].rank, c.rank) << c.share;
    // Rotated or not, the columns are orthonormal.
    for (int a = 0; a < c.rank; ++a) {
      double dot = 0, norm = 0;
      for (int i = 0; i < 32; ++i) {
        const float* row = bases->k[1].basis.data() + i * c.rank;
        norm += double{row[a]} * row[a];
        dot += a > 0 ? double{row[a]} * row[a - 1] : 0;
      }
      EXPECT_NEAR(norm, 1, 1e-5);
      EXPECT_NEAR(dot, 0, 1e-5);
    }
  }
}

TEST_F(MethodsTest, WritesItsOwnCalibrationText) {
  const auto a = SampleWindows(*model_, 1, 3, 40, 7), b = SampleWindows(*model_, 1, 3, 40, 7);
  const auto c = SampleWindows(*model_, 1, 3, 40, 8);
  ASSERT_TRUE(a.ok() && b.ok() && c.ok());
  EXPECT_EQ(*a, *b);
  EXPECT_NE(*a, *c);
  ASSERT_EQ(a->size(), 3u);
  EXPECT_NE((*a)[0], (*a)[1]);
  for (const auto& window : *a) {
    ASSERT_EQ(window.size(), 40u);
    EXPECT_EQ(window[0], 1);
  }
}

TEST_F(MethodsTest, RefusesWhatItCannotDo) {
  const auto code = [&](const BaselineOptions& options) { return MakeBaseline(*model_, options).status().code(); };
  EXPECT_EQ(code({.name = "gear"}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.name = "none"}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.name = "kivi4", .kv_bits = 4}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.name = "h2o", .kv_bits = 40}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.name = "h2o", .kv_bits = -1}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.name = "h2o", .kv_bits = std::nan("")}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.name = "palu", .kv_bits = 8}), StatusCode::kInvalidArgument);  // no text
  EXPECT_EQ(MakeBaseline(*model_, {.name = "int8"}).value()->NewSequence(0).status().code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(LeadingEigenvectors({1, std::nan(""), std::nan(""), 1}, 2, 1).status().code(), StatusCode::kDataLoss);
}

TEST_F(MethodsTest, CalibrationCanBeStopped) {
  BaselineOptions options{
      .name = "palu", .calibration = {tiny_.RandomIds(64, 1)}, .progress = [](double) { return false; }};
  EXPECT_EQ(MakeBaseline(*model_, options).status().code(), StatusCode::kCancelled);
}

}  // namespace
}  // namespace zeroc
