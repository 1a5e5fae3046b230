#include "libzeroc/checkpoint/rope.h"

#include <gtest/gtest.h>

#include <cmath>
#include <utility>

namespace zeroc {
namespace {

ModelConfig LlamaShape() {
  ModelConfig config;
  config.head_dim = 128;
  config.rope_theta = 500000.0;
  return config;
}

TEST(RopeTest, PlainFrequenciesFallGeometrically) {
  const std::vector<double> f = RopeInverseFrequencies(LlamaShape());
  ASSERT_EQ(f.size(), 64U);
  EXPECT_EQ(f[0], 1.0);
  const double ratio = std::pow(500000.0, -2.0 / 128);
  for (std::size_t i = 1; i < f.size(); ++i) EXPECT_NEAR(f[i] / f[i - 1], ratio, 1e-6) << i;
}

TEST(RopeTest, LinearDividesEveryFrequency) {
  ModelConfig config = LlamaShape();
  const std::vector<double> plain = RopeInverseFrequencies(config);
  config.rope_scaling = {.kind = RopeScaling::Kind::kLinear, .factor = 4.0};
  const std::vector<double> linear = RopeInverseFrequencies(config);
  for (std::size_t i = 0; i < plain.size(); ++i) EXPECT_DOUBLE_EQ(linear[i], plain[i] / 4.0) << i;
}

// Values of Llama-3.1 (theta 5e5, head_dim 128, factor 8, low 1, high 4, original 8192), computed apart from this code
// in the published form (wavelength thresholds, then a smooth factor).
TEST(RopeTest, Llama3MatchesPublishedScaling) {
  ModelConfig config = LlamaShape();
  config.rope_scaling = {.kind = RopeScaling::Kind::kLlama3,
                         .factor = 8.0,
                         .low_freq_factor = 1.0,
                         .high_freq_factor = 4.0,
                         .original_max_positions = 8192};
  const std::vector<double> f = RopeInverseFrequencies(config);
  const std::pair<std::size_t, double> expected[] = {
      {0, 1.000000000e+00},  {1, 8.146172339e-01},  {20, 1.656044008e-02}, {28, 3.211445995e-03}, {29, 2.166570764e-03},
      {30, 1.371893568e-03}, {31, 8.567514129e-04}, {32, 5.248461610e-04}, {33, 3.126937504e-04}, {34, 1.785078128e-04},
      {35, 9.556212354e-05}, {36, 7.784655274e-05}, {40, 3.428102196e-05}, {63, 3.068925989e-07}};
  for (const auto& [i, value] : expected) EXPECT_NEAR(f[i], value, 1e-6 * value) << i;
}

}  // namespace
}  // namespace zeroc
