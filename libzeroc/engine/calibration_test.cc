// Calibration from one end to the other for every kind of model, and what it refuses.
#include "libzeroc/engine/calibration.h"

#include <gtest/gtest.h>

#include "libzeroc/engine/ladder_probe.h"
#include "libzeroc/engine/local_generator.h"
#include "libzeroc/model/model_kinds_testing.h"

namespace zeroc {
namespace {

using testing::GoldenModel;

constexpr int kContext = 256;

// What the model itself writes, so that its perplexity on it means something.
CalibrationSource Write(Transformer& model, const std::string& name, int n_windows, std::uint64_t seed) {
  CalibrationSource source;
  source.name = name;
  source.hash = HashText(name);
  SamplingParams sampling;
  sampling.max_tokens = kContext - 1;
  sampling.temperature = 1;
  sampling.ignore_eos = true;
  const auto format = model.Format("none").value();
  const std::vector<std::int32_t> prompt = {1};
  for (int w = 0; w < n_windows; ++w) {
    sampling.seed = seed + static_cast<std::uint64_t>(w);
    const auto written = GenerateLocally(model, format, prompt, sampling);
    EXPECT_TRUE(written.ok()) << written.status().ToString();
    source.tokens.insert(source.tokens.end(), written->ids.begin(), written->ids.end());
  }
  source.token_bytes.assign(source.tokens.size(), 1);
  return source;
}

// A short search: two rungs and few probes.
CalibrationOptions Short() {
  CalibrationOptions options;
  options.context = kContext;
  options.max_windows = 6;
  options.probe_windows = 1;
  options.score = {.context = kContext, .stride = 64, .max_windows = 2};
  options.ladder.rungs = {4, 2};
  options.ladder.first_probes = 2;
  options.ladder.second_probes = 1;
  options.ladder.windows = {{64, {}}};
  options.ladder.sinks = {};
  return options;
}

Result<Plan> CalibrateModel(const GoldenModel& golden, const CalibrationOptions& options, ThreadPool& threads) {
  const auto checkpoint = golden.Open();
  const auto model = Transformer::Open(checkpoint, nullptr, kernels::CpuOps(), threads).value();
  const CalibrationSource text = Write(*model, "text", 6, 1), heldout = Write(*model, "heldout", 2, 100);
  return Calibrate(checkpoint, kernels::CpuOps(), threads, {&text, 1}, heldout, {}, 1, options);
}

class CalibrationTest : public ::testing::TestWithParam<const char*> {};

TEST_P(CalibrationTest, MakesAPlanThatTheModelServes) {
  const GoldenModel golden(GetParam());
  ThreadPool threads(2);
  auto made = CalibrateModel(golden, Short(), threads);
  ASSERT_TRUE(made.ok()) << made.status().ToString();
  const auto plan = std::make_shared<const Plan>(std::move(made).value());
  EXPECT_EQ(plan->calibration().n_windows, 6);
  EXPECT_GT(plan->ppl_base(), 1);
  const Profile& exact = *plan->FindProfile("bf16");
  const Profile& fine = *plan->FindProfile("q8");
  const Profile& coarse = *plan->FindProfile("q2");
  std::printf("[ calibration ] %s: perplexity %.3f, bf16 %+.4f, q8 %+.4f, q2 %+.4f\n", GetParam(), plan->ppl_base(),
              exact.cost.ppl_increase, fine.cost.ppl_increase, coarse.cost.ppl_increase);
  ASSERT_TRUE(exact.cost.measured && fine.cost.measured && coarse.cost.measured);
  EXPECT_LT(fine.cost.kl, 0.02);
  EXPECT_LT(fine.cost.kl, coarse.cost.kl);
  EXPECT_GT(plan->ladder().size(), 5u) << "the standard profiles and the searched ones";

  const auto model = Transformer::Open(golden.Open(), plan, kernels::CpuOps(), threads);
  ASSERT_TRUE(model.ok()) << model.status().ToString();
  for (const Profile& profile : plan->ladder()) {
    EXPECT_TRUE((*model)->Format(profile.name).ok()) << profile.name;
  }

  // Layers that a profile shares with another may be computed with that one, and nothing changes to the bit.
  Profile behind = fine;
  behind.layers.back() = coarse.layers.back();
  const std::vector<Profile> profiles = {fine, behind};
  const auto made_formats = FormatsOf(**model, *plan, profiles);
  ASSERT_TRUE(made_formats.ok()) << made_formats.status().ToString();
  const auto& formats = *made_formats;
  const ScoredMethod trunk{model->get(), formats[0]}, method{model->get(), formats[1]};
  std::vector<std::int32_t> tokens(3 * kContext), bytes(tokens.size(), 1);
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<std::int32_t>(3 + i * i % 58);
  ScoreOptions score{.context = kContext, .stride = 100, .through_decode = false, .batch_windows = 3};
  const auto scored = ScoreText(tokens, bytes, 1, trunk, {&method, 1}, score);
  ASSERT_TRUE(scored.ok()) << scored.status().ToString();
  const std::vector<TextScore>& alone = *scored;
  score.trunk = trunk;
  for (score.trunk_layers = 1; score.trunk_layers < static_cast<int>(fine.layers.size()); ++score.trunk_layers) {
    const auto shared = ScoreText(tokens, bytes, 1, trunk, {&method, 1}, score).value();
    EXPECT_EQ(shared[1].token_nll, alone[1].token_nll);
    EXPECT_EQ(shared[1].token_kl, alone[1].token_kl);
  }
  EXPECT_GT(alone[1].kl, 0);
}

INSTANTIATE_TEST_SUITE_P(Kinds, CalibrationTest, ::testing::ValuesIn(testing::kModelKinds),
                         [](const auto& kind) { return std::string(kind.param); });

TEST(Calibration, RefusesBrokenWeightsNamingTheTensor) {
  ThreadPool threads(1);
  const std::pair<std::uint16_t, const char*> broken[] = {{0x7fc0, "holds NaN at value 9"},
                                                          {0xff80, "holds infinity at value 9"}};
  for (const auto& [bits, cause] : broken) {
    const GoldenModel golden("opt", [&](GoldenModel::Json&, GoldenModel::Tensors& tensors) {
      tensors.at("model.decoder.layers.1.fc1.weight")[9] = bits;
    });
    const CalibrationSource text{.name = "text", .hash = "0", .tokens = std::vector<std::int32_t>(600, 3)};
    const Status status =
        Calibrate(golden.Open(), kernels::CpuOps(), threads, {&text, 1}, text, {}, 1, Short()).status();
    EXPECT_EQ(status.code(), StatusCode::kDataLoss) << status.ToString();
    EXPECT_NE(status.message().find("\"model.decoder.layers.1.fc1.weight\" " + std::string(cause)), std::string::npos)
        << status.message();
  }
}

// Finite weights whose products are not: the moments say in which layer.
TEST(Calibration, RefusesBrokenMomentsNamingTheLayer) {
  ThreadPool threads(1);
  const GoldenModel golden("llama_mha", [](GoldenModel::Json&, GoldenModel::Tensors& tensors) {
    for (std::uint16_t& value : tensors.at("model.layers.1.self_attn.k_proj.weight")) {
      value = static_cast<std::uint16_t>((value & 0x807f) | 0x7f00);  // 2^127 and up, still finite
    }
  });
  const CalibrationSource text{.name = "text", .hash = "0", .tokens = std::vector<std::int32_t>(600, 3)};
  const Status status = Calibrate(golden.Open(), kernels::CpuOps(), threads, {&text, 1}, text, {}, 1, Short()).status();
  EXPECT_EQ(status.code(), StatusCode::kDataLoss) << status.ToString();
  EXPECT_NE(status.message().find("layer 1, KV head 0: keys: second moment C_"), std::string::npos) << status.message();
  EXPECT_NE(status.message().find("holds NaN or infinity"), std::string::npos) << status.message();
}

}  // namespace
}  // namespace zeroc
