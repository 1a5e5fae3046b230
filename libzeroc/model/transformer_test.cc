#include "libzeroc/model/transformer.h"

#include <gtest/gtest.h>

#include <cmath>

#include "libzeroc/model/forward_testing.h"
#include "libzeroc/model/tiny_model_testing.h"

namespace zeroc {
namespace {

using testing::MakePlan;
using testing::RmsDifference;
using testing::RunChunks;
using testing::TinyModel;
using testing::TinyShape;

std::unique_ptr<Transformer> Open(const TinyModel& tiny, std::shared_ptr<const Plan> plan, const kernels::Ops& ops,
                                  ThreadPool& threads) {
  auto model = Transformer::Open(tiny.Open(), std::move(plan), ops, threads);
  EXPECT_TRUE(model.ok()) << model.status().ToString();
  return std::move(model).value();
}

double WorstDifference(const std::vector<float>& got, const std::vector<std::vector<double>>& want) {
  double worst = 0;
  for (std::size_t t = 0; t < want.size(); ++t) {
    for (std::size_t i = 0; i < want[t].size(); ++i) {
      const double difference = std::fabs(got[t * want[t].size() + i] - want[t][i]);
      worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
    }
  }
  return worst;
}

TEST(TransformerTest, MatchesThePlainForwardPass) {
  std::vector<TinyShape> shapes(7);
  shapes[1].tied = true;
  shapes[2].bias = true;
  shapes[3].n_kv_heads = 4;                           // MHA
  shapes[4].n_kv_heads = 1, shapes[4].head_dim = 48;  // MQA, head_dim that is no power of two
  shapes[5].dtype = DType::kF16;
  shapes[6].rope_scaling =
      R"({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64})";
  TinyShape f32;
  f32.dtype = DType::kF32;
  shapes.push_back(f32);
  ThreadPool threads(2);
  for (std::size_t s = 0; s < shapes.size(); ++s) {
    const TinyModel tiny(shapes[s], static_cast<unsigned>(s + 1));
    const auto ids = tiny.RandomIds(150, 7);
    const auto want = tiny.Forward(ids);
    const auto ref = Open(tiny, nullptr, kernels::ReferenceOps(), threads);
    EXPECT_LT(WorstDifference(RunChunks(*ref, "none", ids, {64}), want), 2e-4) << "shape " << s;
    // bf16 activations and KV: 8 bits of mantissa through a dozen roundings of values of the order of the logits.
    const auto cpu = Open(tiny, nullptr, kernels::CpuOps(), threads);
    double scale = 0;
    for (const auto& row : want) {
      for (const double v : row) scale = std::max(scale, std::fabs(v));
    }
    EXPECT_LT(WorstDifference(RunChunks(*cpu, "none", ids, {64}), want), scale * 12 * 0x1p-8) << "shape " << s;
  }
}

TEST(TransformerTest, ResultsDoNotDependOnChunks) {
  const TinyModel tiny({});
  ThreadPool threads(2);
  const auto plain = Open(tiny, nullptr, kernels::ReferenceOps(), threads);
  const auto plan = MakePlan(*plain);
  const auto folded = Open(tiny, plan, kernels::ReferenceOps(), threads);
  const auto ids = tiny.RandomIds(420, 3);
  for (const std::string profile : {"bf16", "q8", "q4", "q3", "q2"}) {
    const auto whole = RunChunks(*folded, profile, ids, {420});
    for (const std::vector<int>& chunks : {std::vector<int>{1}, {7}, {64}, {100}, {300, 1, 63, 1}}) {
      const auto parts = RunChunks(*folded, profile, ids, chunks);
      // The same sums in the same order for every query, whatever the step: float32 noise of the tile shapes at most.
      EXPECT_LT(RmsDifference(whole, parts), 1e-5) << profile << " chunks " << chunks[0];
    }
  }
}

TEST(TransformerTest, FoldedModelIsTheSameModel) {
  for (const bool bias : {false, true}) {
    TinyShape shape;
    shape.bias = bias;
    const TinyModel tiny(shape, 5);
    ThreadPool threads(2);
    const auto plain = Open(tiny, nullptr, kernels::ReferenceOps(), threads);
    const auto folded = Open(tiny, MakePlan(*plain), kernels::ReferenceOps(), threads);
    const auto ids = tiny.RandomIds(200, 9);
    const auto want = RunChunks(*plain, "none", ids, {200});
    double scale = 0;
    for (const float v : want) scale += v * v;
    scale = std::sqrt(scale / static_cast<double>(want.size()));
    // The folded weights are rounded to bf16 once more: two matrices of relative error 2^-9 per entry.
    EXPECT_LT(RmsDifference(want, RunChunks(*folded, "bf16", ids, {200})), scale * 0x1p-7);
    // Fewer bits, more error, and all of it far from noise only where the codes are coarse.
    double previous = 0;
    for (const std::string profile : {"q8", "q4", "q3", "q2"}) {
      const double error = RmsDifference(want, RunChunks(*folded, profile, ids, {200}));
      EXPECT_GT(error, previous) << profile;
      EXPECT_LT(error, scale * 0.2) << profile;
      previous = error;
    }
  }
}

TEST(TransformerTest, BatchEqualsOneByOne) {
  const TinyModel tiny({});
  ThreadPool threads(3);
  const auto plain = Open(tiny, nullptr, kernels::ReferenceOps(), threads);
  const auto model = Open(tiny, MakePlan(*plain), kernels::ReferenceOps(), threads);
  const std::string profiles[] = {"bf16", "q4", "q2", "q4"};
  const int lengths[] = {1, 300, 257, 64};
  const auto vocab = static_cast<std::size_t>(model->config().vocab_size);
  std::vector<std::vector<std::int32_t>> ids;
  std::vector<std::unique_ptr<OwnedPool>> pools;
  std::vector<std::unique_ptr<SequenceKv>> caches;
  std::vector<ForwardSequence> batch;
  for (unsigned s = 0; s < 4; ++s) ids.push_back(tiny.RandomIds(lengths[s] + 1, s));
  for (std::size_t s = 0; s < 4; ++s) {
    const auto format = model->Format(profiles[s]).value();
    pools.push_back(OwnedPool::Create(*format, 1, 400, 400).value());
    caches.push_back(SequenceKv::Create(pools[s]->pool(), format, 400, 400).value());
    batch.push_back({caches[s].get(), std::span(ids[s]).first(static_cast<std::size_t>(lengths[s])), s == 2 ? 0 : 1});
  }
  std::vector<float> logits(4 * vocab);
  ASSERT_TRUE(model->Forward(batch, logits.data()).ok());
  for (std::size_t s = 0; s < 4; ++s) batch[s] = {caches[s].get(), {&ids[s].back(), 1}, 1};
  ASSERT_TRUE(model->Forward(batch, logits.data()).ok());
  for (std::size_t s = 0; s < 4; ++s) {
    const auto alone = RunChunks(*model, profiles[s], ids[s], {lengths[s], 1});
    for (std::size_t i = 0; i < vocab; ++i) {
      EXPECT_NEAR(logits[s * vocab + i], alone[static_cast<std::size_t>(lengths[s]) * vocab + i], 1e-5) << s;
    }
  }
}

TEST(TransformerTest, BadInputIsRefusedBeforeAnythingChanges) {
  const TinyModel tiny({});
  ThreadPool threads(1);
  const auto model = Open(tiny, nullptr, kernels::ReferenceOps(), threads);
  const auto format = model->Format("none").value();
  const auto pool = OwnedPool::Create(*format, 1, 10, 10).value();
  const auto kv = SequenceKv::Create(pool->pool(), format, 10, 10).value();
  const std::vector<std::int32_t> bad = {1, 97};
  const ForwardSequence sequence{kv.get(), bad, 0};
  const Status status = model->Forward({&sequence, 1}, nullptr);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("97"), std::string::npos);
  EXPECT_EQ(kv->n_tokens(), 0);
  EXPECT_EQ(model->Format("q3").status().code(), StatusCode::kNotFound);
}

TEST(TransformerTest, PlanOfAnotherModelIsRefused) {
  const TinyModel tiny({}, 1), other({}, 2);
  ThreadPool threads(1);
  const auto model = Open(tiny, nullptr, kernels::ReferenceOps(), threads);
  const auto plan = MakePlan(*model);
  const auto refused = Transformer::Open(other.Open(), plan, kernels::ReferenceOps(), threads);
  EXPECT_EQ(refused.status().code(), StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace zeroc
