#include "services/router/estimates.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace zeroc {
namespace {

Estimates::Transfer Moved(const std::string& prefill, const std::string& decode, std::uint64_t bytes, double seconds) {
  return {prefill, decode, /*n_tokens=*/1000, /*prefill_seconds=*/0.5, bytes, seconds, /*hidden_seconds=*/0.1};
}

TEST(LineEstimate, FindsLatencyAndBandwidth) {
  LineEstimate line(LineEstimate::Flat::kProportional);
  for (int i = 1; i <= 40; ++i) line.Add(i * 1e6, 0.01 + i * 1e6 / 1e8);
  EXPECT_NEAR(line.Fit().base, 0.01, 1e-6);
  EXPECT_NEAR(line.Fit().slope, 1e-8, 1e-12);
}

TEST(LineEstimate, SaysWhatItWasToldToWhenAllPointsAreAlike) {
  LineEstimate proportional(LineEstimate::Flat::kProportional), constant(LineEstimate::Flat::kConstant);
  for (int i = 0; i < 5; ++i) {
    proportional.Add(100, 2);
    constant.Add(100, 2);
  }
  EXPECT_NEAR(proportional.Fit().slope, 0.02, 1e-12);
  EXPECT_EQ(proportional.Fit().base, 0);
  EXPECT_EQ(constant.Fit().slope, 0);
  EXPECT_NEAR(constant.Fit().base, 2, 1e-12);
}

TEST(LineEstimate, NeitherPartIsNegativeAndNonsenseIsIgnored) {
  LineEstimate falling(LineEstimate::Flat::kProportional);
  for (int i = 1; i <= 10; ++i) falling.Add(i, 20 - i);
  EXPECT_EQ(falling.Fit().slope, 0);
  LineEstimate below(LineEstimate::Flat::kProportional);
  for (int i = 10; i <= 20; ++i) below.Add(i, i - 9);
  EXPECT_EQ(below.Fit().base, 0);
  EXPECT_GT(below.Fit().slope, 0);
  LineEstimate nonsense(LineEstimate::Flat::kProportional);
  nonsense.Add(std::nan(""), 1);
  nonsense.Add(1, std::numeric_limits<double>::infinity());
  nonsense.Add(1, -1);
  EXPECT_EQ(nonsense.n(), 0);
}

TEST(LineEstimate, ForgetsTheOldInFavourOfTheNew) {
  LineEstimate line(LineEstimate::Flat::kProportional);
  for (int i = 0; i < 100; ++i) line.Add(100, 1);
  for (int i = 0; i < 100; ++i) line.Add(100, 5);
  EXPECT_NEAR(line.Fit().At(100), 5, 0.1);
}

TEST(Estimates, NothingIsAssumedBeforeItWasMeasured) {
  Estimates estimates;
  EXPECT_FALSE(estimates.Link("p", "d").has_value());
  EXPECT_FALSE(estimates.PrefillSeconds("p").has_value());
  EXPECT_FALSE(estimates.TokenSeconds("d").has_value());
  EXPECT_FALSE(estimates.RequestDecodeSeconds("d").has_value());
  EXPECT_EQ(estimates.ExpectedOutput(77), 77);
  for (int i = 0; i < Estimates::kPointsMin - 1; ++i) estimates.AddTransfer(Moved("p", "d", 1 << 20, 0.2));
  EXPECT_FALSE(estimates.Link("p", "d").has_value());
  estimates.AddTransfer(Moved("p", "d", 1 << 20, 0.2));
  ASSERT_TRUE(estimates.Link("p", "d").has_value());
  EXPECT_NEAR(estimates.Link("p", "d")->seconds.At(1 << 20), 0.2, 1e-9);
  EXPECT_NEAR(estimates.Link("p", "d")->hidden_share, 0.5, 1e-9) << "0.1 of the 0.2 s that prefill could hide";
  EXPECT_NEAR(estimates.PrefillSeconds("p")->At(2000), 1.0, 1e-9);
}

TEST(Estimates, SmallTransfersSayNothingAboutALink) {
  Estimates estimates;
  for (int i = 0; i < 10; ++i) estimates.AddTransfer(Moved("p", "d", 1000, 0.2));
  EXPECT_FALSE(estimates.Link("p", "d").has_value());
  EXPECT_TRUE(estimates.PrefillSeconds("p").has_value());
}

TEST(Estimates, PairsAreToldApartAndAStrangerIsLikeTheRest) {
  Estimates estimates;
  for (int i = 0; i < 30; ++i) {
    estimates.AddTransfer(Moved("p", "near", 1 << 20, 0.01));
    estimates.AddTransfer(Moved("p", "far", 1 << 20, 1.0));
  }
  const double near = estimates.Link("p", "near")->seconds.At(1 << 20);
  const double far = estimates.Link("p", "far")->seconds.At(1 << 20);
  const double stranger = estimates.Link("p", "new")->seconds.At(1 << 20);
  EXPECT_NEAR(near, 0.01, 1e-6);
  EXPECT_NEAR(far, 1.0, 1e-6);
  EXPECT_GT(stranger, near);
  EXPECT_LT(stranger, far);
}

TEST(Estimates, AGroupIsMeasuredApartFromItsLeader) {
  Estimates estimates;
  const auto add = [&](const std::string& worker, std::uint64_t n_tokens, double seconds, std::uint32_t n_ranks) {
    for (int i = 0; i < Estimates::kPointsMin; ++i) {
      estimates.AddTransfer({worker, "d", n_tokens, seconds, 1 << 20, seconds, 0, n_ranks});
    }
  };
  add("p", 1000, 0.5, 1);
  EXPECT_NEAR(estimates.PrefillSeconds("p", 4)->At(8000), 1.0, 1e-9) << "never measured: four ranks share the work";
  add("p", 8000, 1.6, 4);
  EXPECT_NEAR(estimates.PrefillSeconds("p", 4)->At(8000), 1.6, 1e-9);
  EXPECT_NEAR(estimates.PrefillSeconds("p")->At(1000), 0.5, 1e-9);
  EXPECT_NEAR(estimates.Link("p", "d", 4)->seconds.At(1 << 20), 1.6, 1e-9);
  EXPECT_NEAR(estimates.Link("p", "d")->seconds.At(1 << 20), 0.5, 1e-9);
  add("q", 4000, 3.0, 2);
  EXPECT_NEAR(estimates.PrefillSeconds("q", 1)->At(2000), 3.0, 1e-9) << "a rank's 2000 tokens took as long";
  EXPECT_TRUE(estimates.PrefillSeconds("r", 3).has_value()) << "a stranger is like the rest";
}

TEST(Estimates, DecodeCostsByBytesOnceTheyDiffer) {
  Estimates estimates;
  for (int i = 0; i < 5; ++i) estimates.AddDecode("d", 100, 2.0, 1'000'000);
  EXPECT_EQ(estimates.TokenSeconds("d")->slope, 0) << "one size tells nothing about others";
  EXPECT_NEAR(estimates.TokenSeconds("d")->base, 0.02, 1e-9);
  for (int i = 0; i < 20; ++i) estimates.AddDecode("d", 100, 4.0, 3'000'000);
  EXPECT_NEAR(estimates.TokenSeconds("d")->slope, 1e-8, 1e-10);
  EXPECT_GT(*estimates.RequestDecodeSeconds("d"), 2.0);
  estimates.AddDecode("d", 0, 1e9, 1);  // no tokens: no cost
  EXPECT_LT(*estimates.RequestDecodeSeconds("d"), 5.0);
  for (int i = 0; i < 50; ++i) estimates.AddOutputLength(30);
  EXPECT_NEAR(estimates.ExpectedOutput(100), 30, 1e-6);
  EXPECT_EQ(estimates.ExpectedOutput(8), 8);
}

TEST(Estimates, WorkersThatComeAndGoDoNotPileUp) {
  Estimates estimates;
  for (int i = 0; i < 1500; ++i) {
    const std::string prefill = std::string("p").append(std::to_string(i));
    for (int j = 0; j < 3; ++j) estimates.AddTransfer(Moved(prefill, "d", 1 << 20, 1.0 + i));
  }
  EXPECT_NEAR(estimates.Link("p1499", "d")->seconds.At(1 << 20), 1500.0, 1e-3);
  EXPECT_GT(estimates.Link("p0", "d")->seconds.At(1 << 20), 100.0) << "forgotten: taken to be like the recent ones";
}

}  // namespace
}  // namespace zeroc
