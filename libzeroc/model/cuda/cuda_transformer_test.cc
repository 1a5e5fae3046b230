// The forward pass on a device (or its emulation) against the CPU's and the reference's: the same models, plans and
// formats, the same steps. What is packed must be the reference's bytes; what is computed agrees to the roundings of
// bf16. How much that notices: cuda_faults_test.cc.
#include "libzeroc/model/cuda/cuda_transformer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iterator>

#include "kernels/cuda/runtime.h"
#include "libzeroc/kv/kv_snapshot.h"
#include "libzeroc/model/cuda/cuda_testing.h"
#include "libzeroc/model/model_kinds_testing.h"

namespace zeroc {
namespace {

using testing::Backends;
using testing::DeviceTestShape;
using testing::ExactRows;
using testing::ExactTolerance;
using testing::GoldenModel;
using testing::Lane;
using testing::MakePlan;
using testing::PackedTolerance;
using testing::PackWatcher;
using testing::RandomIds;
using testing::Rms;
using testing::RmsDifference;
using testing::RunChunks;
using testing::TinyModel;

class CudaTransformerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const char* why = kernels::cuda::WhyUnavailable()) GTEST_SKIP() << "no GPU: " << why;
  }
};

// Two sequences in uneven steps: prefill of one, of both, mixed with decode, and decode of both. All logits asked for,
// [rows, vocab]. Packs are watched where there is a place to count them. *exact: keys and values of the last tokens.
std::vector<float> TwoSequences(Transformer& model, const std::string& first, const std::string& second,
                                std::size_t* n_packs, std::vector<float>* exact) {
  struct Part {
    int n = 0, n_logits = 0;
  };
  std::vector<std::pair<Part, Part>> steps = {{{100, 0}, {}}, {{90, 1}, {70, 2}}, {{1, 1}, {1, 1}}, {{3, 3}, {61, 1}}};
  for (int i = 0; i < 4; ++i) steps.push_back({{1, 1}, {1, 1}});
  steps.push_back({{70, 70}, {1, 0}});
  const Lane lanes[] = {{model, first, RandomIds(268, model.config().vocab_size, 1)},
                        {model, second, RandomIds(137, model.config().vocab_size, 2)}};
  const auto vocab = static_cast<std::size_t>(model.config().vocab_size);
  std::vector<float> logits;
  for (const auto& step : steps) {
    std::vector<ForwardSequence> batch;
    int n_logits = 0;
    const Part parts[] = {step.first, step.second};
    for (std::size_t i = 0; i < 2; ++i) {
      if (parts[i].n == 0) continue;
      batch.push_back(lanes[i].Next(parts[i].n, parts[i].n_logits));
      n_logits += parts[i].n_logits;
    }
    std::vector<SequenceKv*> kvs;
    for (const ForwardSequence& sequence : batch) kvs.push_back(sequence.kv);
    PackWatcher watcher(kvs);
    logits.resize(logits.size() + static_cast<std::size_t>(n_logits) * vocab, std::nanf(""));
    float* out = logits.data() + (logits.size() - static_cast<std::size_t>(n_logits) * vocab);
    const Status status = model.Forward(batch, out, n_packs == nullptr ? nullptr : &watcher);
    EXPECT_TRUE(status.ok()) << status.ToString();
    if (n_packs == nullptr) continue;
    *n_packs += watcher.count();
    EXPECT_EQ(watcher.CountWrong(), 0) << first << ", " << second;
  }
  for (const Lane& lane : lanes) {
    if (exact == nullptr) break;
    const int n = lane.kv->n_tokens();
    const std::vector<float> rows = ExactRows(*lane.kv, n / 64 * 64, n);
    exact->insert(exact->end(), rows.begin(), rows.end());
  }
  return logits;
}

// Tokens that `want` chooses by more than the margin must be chosen by `got` too. Returns how many there were.
int CheckGreedy(const std::vector<float>& got, const std::vector<float>& want, std::size_t vocab, double margin) {
  int n_sure = 0;
  for (std::size_t row = 0; row < want.size() / vocab; ++row) {
    const float* w = want.data() + row * vocab;
    const float* g = got.data() + row * vocab;
    const auto best = std::max_element(w, w + vocab) - w;
    float second = -INFINITY;
    for (std::ptrdiff_t i = 0; i < std::ssize(std::span(w, vocab)); ++i) {
      if (i != best) second = std::max(second, w[i]);
    }
    if (w[best] - second <= margin) continue;
    ++n_sure;
    EXPECT_EQ(std::max_element(g, g + vocab) - g, best) << "row " << row;
  }
  return n_sure;
}

double WorstDifference(const std::vector<float>& a, const std::vector<float>& b) {
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = std::fabs(double{a[i]} - b[i]);
    worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
  }
  return worst;
}

TEST_F(CudaTransformerTest, TwoSequencesAreThoseOfTheCpu) {
  const TinyModel tiny(DeviceTestShape(), 3);
  const Backends models(tiny.dir());
  struct Pair {
    const char *first, *second;
    int bits;  // the fewest of a code
  };
#ifdef __SANITIZE_ADDRESS__
  const std::vector<Pair> pairs = {{"z70", "z0", 2}};  // a fiber costs the sanitizer much; all in the other builds
#else
  const std::vector<Pair> pairs = {{"bf16", "bf16", 16}, {"q4", "q3", 3}, {"z0", "q4", 2}, {"z70", "z0", 2}};
#endif
  for (const auto& [first, second, bits] : pairs) {
    std::size_t n_packs = 0;
    std::vector<float> got_exact, cpu_exact;
    const auto got = TwoSequences(*models.device, first, second, &n_packs, &got_exact);
    const auto want = TwoSequences(*models.ref, first, second, nullptr, nullptr);
    const auto cpu = TwoSequences(*models.cpu, first, second, nullptr, &cpu_exact);
    const int n_layers = static_cast<int>(models.ref->config().n_layers);
    const double tolerance = bits == 16 ? ExactTolerance(n_layers) : PackedTolerance(n_layers, bits);
    const double scale = Rms(want), error = RmsDifference(got, want) / scale;
    // A row's worst logit is far above the mean of all: sixteen times here or there decides no token.
    const int n_sure =
        CheckGreedy(got, want, static_cast<std::size_t>(models.ref->config().vocab_size), 16 * tolerance * scale);
    std::printf("[ tolerance ] %s, %s: %.2f of the bound used, by the CPU %.2f; %zu packs, %d tokens sure\n", first,
                second, error / tolerance, RmsDifference(cpu, want) / scale / tolerance, n_packs, n_sure);
    EXPECT_LT(error, tolerance);
    EXPECT_LT(RmsDifference(got_exact, cpu_exact), tolerance * Rms(cpu_exact));
    EXPECT_GT(n_sure, 0);
    EXPECT_EQ(n_packs == 0, bits == 16);
  }
}

// Every kind of model that the configuration tells apart: biases, QK-norm, learned positions, LayerNorm, ReLU. With a
// plan those without RoPE have their maps in the weights and a rotation at run time.
TEST_F(CudaTransformerTest, EveryKindOfModel) {
#ifdef __SANITIZE_ADDRESS__
  const std::vector<const char*> kinds = {"qwen3", "opt"};  // the same of fewer
#else
  const std::vector<const char*> kinds(std::begin(testing::kModelKinds), std::end(testing::kModelKinds));
#endif
  for (const char* kind : kinds) {
    const GoldenModel golden(kind);
    const Backends models(golden.dir(), /*has_plan=*/std::string_view(kind) == "opt");
    const std::vector<std::int32_t> ids(golden.ids().begin(), golden.ids().begin() + 70);
    const std::string profile = models.ref->plan() != nullptr ? "q8now" : "none";
    const auto want = RunChunks(*models.ref, profile, ids, {66, 1});
    const auto got = RunChunks(*models.device, profile, ids, {66, 1});
    double largest = 0;
    for (const float logit : want) largest = std::max<double>(largest, std::fabs(logit));
    std::printf("[ tolerance ] %s: %.3g of the largest logit\n", kind, WorstDifference(got, want) / largest);
    // As for the CPU's table (model_kinds_test.cc): 2^-8 through a dozen roundings of values as large as the logits.
    EXPECT_LT(WorstDifference(got, want), largest * 12 * 0x1p-8) << kind;
  }
}

// Layers in two calls, as scoring shares them, and a sequence that begins with the blocks of another, are the same
// kernels on the same numbers.
TEST_F(CudaTransformerTest, PartsOfTheLayersAndSharedBeginnings) {
  const TinyModel tiny(DeviceTestShape(), 4);
  const Backends models(tiny.dir());
  Transformer& model = *models.device;
  const auto vocab = static_cast<std::size_t>(model.config().vocab_size);
  const auto hidden = static_cast<std::size_t>(model.config().hidden_size);
  const auto ids = RandomIds(130, model.config().vocab_size, 5);
  const Lane whole(model, "z0", ids), trunk(model, "z0", ids), rest(model, "z0", ids);
  std::vector<float> want(2 * vocab), got(2 * vocab), between(128 * hidden);
  ForwardSequence step = whole.Next(128, 2);
  ASSERT_TRUE(model.Forward({&step, 1}, want.data()).ok());
  step = trunk.Next(128, 0);
  LayerRange layers;
  layers.end = 1;
  layers.output = between.data();
  ASSERT_TRUE(model.Forward({&step, 1}, nullptr, nullptr, layers).ok());
  step = rest.Next(128, 2);
  layers = {};
  layers.begin = 1;
  layers.input = between.data();
  ASSERT_TRUE(model.Forward({&step, 1}, got.data(), nullptr, layers).ok());
  EXPECT_EQ(got, want);

  const auto format = whole.kv->shared_format();
  // In the pool of the first, which has room for two.
  KvBeginning beginning{format->LastingBlocksAt(128), 128, {}};
  for (int layer = 0; layer < format->n_layers; ++layer) beginning.layers.push_back(whole.kv->BlocksAt(layer, 128));
  const auto continued = SequenceKv::CreateFrom(whole.pool->pool(), format, 130, 130, beginning).value();
  const auto snapshot = KvSnapshot::Take(*whole.kv).value();
  const Lane again(model, "z0", ids);
  ASSERT_TRUE(snapshot.Restore(*again.kv).ok());
  std::vector<float> first(2 * vocab), second(2 * vocab), third(2 * vocab);
  step = whole.Next(2, 2);
  ASSERT_TRUE(model.Forward({&step, 1}, first.data()).ok());
  step = again.Next(2, 2);
  ASSERT_TRUE(model.Forward({&step, 1}, second.data()).ok());
  EXPECT_EQ(first, second);
  step.kv = continued.get();
  ASSERT_TRUE(model.Forward({&step, 1}, third.data()).ok());
  EXPECT_EQ(first, third);
}

TEST_F(CudaTransformerTest, WhatItDoesNotTakeIsAnError) {
  const TinyModel tiny({}), other({}, 2);
  const Backends models(tiny.dir(), /*has_plan=*/false);
  Transformer& model = *models.device;
  class Curious : public ForwardObserver {
    bool WantsProjections() const override { return true; }
  };
  Curious curious;
  const Lane run(model, "none", {1, 2, 97});
  const ForwardSequence good = run.Next(2, 0), bad = run.Next(3, 0);
  EXPECT_EQ(model.Forward({&good, 1}, nullptr, &curious).code(), StatusCode::kUnimplemented);
  EXPECT_EQ(model.Forward({&bad, 1}, nullptr).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(run.kv->n_tokens(), 0);
  ThreadPool threads(1);
  const auto plan = MakePlan(*models.ref);
  EXPECT_EQ(OpenCudaTransformer(other.Open(), plan).status().code(), StatusCode::kFailedPrecondition);
}
}  // namespace
}  // namespace zeroc
