#include "libzeroc/engine/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <set>

namespace zeroc {
namespace {

const std::vector<float> kLogits = {1.0f, 3.0f, 2.0f, -1.0f, 0.0f};

std::map<int, int> Draw(const SamplingParams& params, int n, const std::vector<float>& logits = kLogits) {
  const Sampler sampler(params, {});
  std::map<int, int> counts;
  for (int position = 0; position < n; ++position) ++counts[sampler.Sample(logits, position).id];
  return counts;
}

TEST(SamplerTest, TemperatureZeroIsGreedy) {
  SamplingParams params;
  params.temperature = 0;
  EXPECT_EQ(Draw(params, 50), (std::map<int, int>{{1, 50}}));
}

// Chi-square against softmax(logits / temperature): 4 degrees of freedom, 99.99 % quantile 23.5. Seeds are fixed.
TEST(SamplerTest, DrawsFromTheTemperedDistribution) {
  for (const float temperature : {0.5f, 1.0f, 2.0f}) {
    for (std::uint64_t seed = 0; seed < 3; ++seed) {
      SamplingParams params;
      params.temperature = temperature;
      params.seed = seed;
      const int n = 20000;
      auto counts = Draw(params, n);
      double total = 0, chi = 0;
      for (const float logit : kLogits) total += std::exp(logit / temperature);
      for (std::size_t i = 0; i < kLogits.size(); ++i) {
        const double expected = n * std::exp(kLogits[i] / temperature) / total;
        chi += std::pow(counts[static_cast<int>(i)] - expected, 2) / expected;
      }
      EXPECT_LT(chi, 23.5) << "temperature " << temperature << " seed " << seed;
    }
  }
}

std::set<int> Support(const SamplingParams& params) {
  std::set<int> ids;
  for (const auto& [id, count] : Draw(params, 5000)) ids.insert(id);
  return ids;
}

TEST(SamplerTest, TruncationsKeepTheRightTokens) {
  SamplingParams top_k;
  top_k.top_k = 2;
  EXPECT_EQ(Support(top_k), (std::set<int>{1, 2}));
  top_k.top_k = 100;
  EXPECT_EQ(Support(top_k).size(), 5u);

  // Probabilities are 0.636, 0.234, 0.086, 0.032, 0.012 for ids 1, 2, 0, 4, 3.
  SamplingParams top_p;
  top_p.top_p = 0.636f;
  EXPECT_EQ(Support(top_p), (std::set<int>{1}));
  top_p.top_p = 0.65f;
  EXPECT_EQ(Support(top_p), (std::set<int>{1, 2}));
  top_p.top_p = 1e-9f;
  EXPECT_EQ(Support(top_p), (std::set<int>{1}));

  SamplingParams min_p;
  min_p.min_p = 0.13f;  // e^-2 = 0.135 stays, e^-3 = 0.050 goes
  EXPECT_EQ(Support(min_p), (std::set<int>{0, 1, 2}));
  min_p.min_p = 1.0f;
  EXPECT_EQ(Support(min_p), (std::set<int>{1}));
}

TEST(SamplerTest, TheSameSeedAndPositionDrawTheSameToken) {
  SamplingParams params;
  params.seed = 42;
  params.temperature = 2;
  const Sampler a(params, {}), b(params, {});
  params.seed = 43;
  const Sampler other(params, {});
  int different = 0;
  for (int position = 999; position >= 0; --position) {
    EXPECT_EQ(a.Sample(kLogits, position).id, b.Sample(kLogits, position).id);
    different += a.Sample(kLogits, position).id != other.Sample(kLogits, position).id ? 1 : 0;
  }
  EXPECT_GT(different, 300);
}

TEST(SamplerTest, PenaltiesFollowTheirDefinitions) {
  SamplingParams params;
  params.temperature = 0;
  params.frequency_penalty = 1.0f;
  Sampler frequency(params, {});
  EXPECT_EQ(frequency.Sample(kLogits, 0).id, 1);
  frequency.Accept(1);
  frequency.Accept(1);  // 3 - 2 = 1 is below 2
  EXPECT_EQ(frequency.Sample(kLogits, 2).id, 2);

  params.frequency_penalty = 0;
  params.presence_penalty = 1.5f;
  Sampler presence(params, {});
  presence.Accept(1);
  presence.Accept(1);  // 3 - 1.5, however often
  EXPECT_EQ(presence.Sample(kLogits, 2).id, 2);

  params.presence_penalty = 0;
  params.repetition_penalty = 2.0f;
  const std::vector<std::int32_t> prompt = {1};
  EXPECT_EQ(Sampler(params, prompt).Sample(kLogits, 1).id, 2);  // 3 / 2 = 1.5 is below 2
  const std::vector<float> negative = {-1.0f, -1.5f};
  const std::vector<std::int32_t> first = {0};
  EXPECT_EQ(Sampler(params, first).Sample(negative, 1).id, 1);  // -1 * 2 = -2 is below -1.5

  params.repetition_penalty = 1.0f;
  params.logit_bias = {{3, 10.0f}};
  EXPECT_EQ(Sampler(params, {}).Sample(kLogits, 0).id, 3);
}

TEST(SamplerTest, LogprobsAreOfTheModelsDistribution) {
  SamplingParams params;
  params.temperature = 0;
  params.logprobs = 5;
  params.logit_bias = {{3, 10.0f}};  // chosen because of the bias, reported without it
  const SampledToken token = Sampler(params, {}).Sample(kLogits, 0);
  double total = 0;
  for (const float logit : kLogits) total += std::exp(logit);
  EXPECT_EQ(token.id, 3);
  EXPECT_NEAR(token.logprob, -1.0 - std::log(total), 1e-6);
  ASSERT_EQ(token.top.size(), 5u);
  double sum = 0;
  for (std::size_t i = 0; i < 5; ++i) {
    sum += std::exp(token.top[i].second);
    EXPECT_GE(token.top[i == 0 ? 0 : i - 1].second, token.top[i].second);
  }
  EXPECT_NEAR(sum, 1.0, 1e-6);
  EXPECT_EQ(token.top[0].first, 1);
}

TEST(SamplingParamsTest, RefusesWhatIsOutOfRange) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto refused = [](auto change, const char* field) {
    SamplingParams params;
    change(params);
    const Status status = params.Validate(100);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << field;
    EXPECT_NE(std::string(status.message()).find(field), std::string::npos) << status.ToString();
  };
  EXPECT_TRUE(SamplingParams().Validate(100).ok());
  refused([](auto& p) { p.max_tokens = 0; }, "max_tokens");
  refused([](auto& p) { p.temperature = -0.1f; }, "temperature");
  refused([&](auto& p) { p.temperature = nan; }, "temperature");
  refused([](auto& p) { p.top_p = 0; }, "top_p");
  refused([&](auto& p) { p.top_p = nan; }, "top_p");
  refused([](auto& p) { p.top_k = -1; }, "top_k");
  refused([](auto& p) { p.min_p = 1.1f; }, "min_p");
  refused([](auto& p) { p.repetition_penalty = 0; }, "repetition_penalty");
  refused([](auto& p) { p.presence_penalty = 3; }, "presence_penalty");
  refused([&](auto& p) { p.frequency_penalty = nan; }, "frequency_penalty");
  refused([](auto& p) { p.logprobs = 21; }, "logprobs");
  refused([](auto& p) { p.logit_bias = {{100, 1.0f}}; }, "logit_bias");
  refused([](auto& p) { p.logit_bias = {{1, 101.0f}}; }, "logit_bias");
  refused([](auto& p) { p.stop_ids = {-1}; }, "stop token");
}

TEST(SamplerTest, ForcedTokensAreGivenAndScored) {
  SamplingParams params;
  params.max_tokens = 5;
  params.temperature = 0;
  params.logprobs = 1;
  params.frequency_penalty = 2;
  params.forced_ids = {0, 2};
  params.forced_from = 10;
  ASSERT_TRUE(params.Validate(3).ok());
  Sampler sampler(params, {});
  const std::vector<float> logits = {0.0F, 1.0F, 0.5F};
  const SampledToken first = sampler.Sample(logits, 10);
  EXPECT_TRUE(first.forced);
  EXPECT_EQ(first.id, 0);
  EXPECT_NEAR(first.logprob, -std::log(1 + std::exp(1.0) + std::exp(0.5)), 1e-5);
  ASSERT_EQ(first.top.size(), 1U);
  EXPECT_EQ(first.top[0].first, 1) << "the best token is still told";
  sampler.Accept(first.id);
  sampler.Accept(sampler.Sample(logits, 11).id);
  const SampledToken drawn = sampler.Sample(logits, 12);
  EXPECT_FALSE(drawn.forced);
  EXPECT_EQ(drawn.id, 1);
  sampler.Accept(drawn.id);
  EXPECT_EQ(sampler.Sample(logits, 13).id, 2) << "the penalty counts what was drawn, not what was forced";
  params.forced_ids = {3};
  EXPECT_FALSE(params.Validate(3).ok());
  params.forced_ids.assign(6, 0);
  EXPECT_FALSE(params.Validate(3).ok()) << "more than max_tokens";
}

TEST(SamplerTest, SuppressedTokensAreNotDrawnBeforeTheirPosition) {
  SamplingParams params;
  params.temperature = 0;
  params.suppress_ids = {1};
  params.suppress_before = 7;
  const Sampler sampler(params, {});
  const std::vector<float> logits = {0.0F, 1.0F, 0.5F};
  EXPECT_EQ(sampler.Sample(logits, 6).id, 2);
  EXPECT_EQ(sampler.Sample(logits, 7).id, 1);
  params.temperature = 1;
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    params.seed = seed;
    EXPECT_NE(Sampler(params, {}).Sample(logits, 6).id, 1);
  }
}

}  // namespace
}  // namespace zeroc
