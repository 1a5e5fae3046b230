#include "libzeroc/baselines/quantizers.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace zeroc {
namespace {

TEST(RoundToHalf, NearestEvenSubnormalsAndLimit) {
  EXPECT_EQ(RoundToHalf(0.0f), 0.0f);
  EXPECT_EQ(RoundToHalf(1.0f), 1.0f);
  EXPECT_EQ(RoundToHalf(1.0f + 0x1p-11f), 1.0f);                // tie to even
  EXPECT_EQ(RoundToHalf(1.0f + 3 * 0x1p-11f), 1.0f + 0x1p-9f);  // tie to even
  EXPECT_EQ(RoundToHalf(-1.0f - 0x1.8p-11f), -1.0f - 0x1p-10f);
  EXPECT_EQ(RoundToHalf(0x1.4p-24f), 0x1p-24f);
  EXPECT_EQ(RoundToHalf(0x1p-26f), 0.0f);
  EXPECT_EQ(RoundToHalf(70000.0f), 65504.0f);
  EXPECT_EQ(RoundToHalf(2047.5f), 2048.0f);
}

TEST(RoundToE4m3, NearestEvenSubnormalsAndLimit) {
  EXPECT_EQ(RoundToE4m3(1.0f), 1.0f);
  EXPECT_EQ(RoundToE4m3(1.0625f), 1.0f);   // tie to even between 1 and 1.125
  EXPECT_EQ(RoundToE4m3(1.1875f), 1.25f);  // tie to even between 1.125 and 1.25
  EXPECT_EQ(RoundToE4m3(-300.0f), -288.0f);
  EXPECT_EQ(RoundToE4m3(1e6f), 448.0f);
  EXPECT_EQ(RoundToE4m3(-1e6f), -448.0f);
  EXPECT_EQ(RoundToE4m3(0x1p-9f), 0x1p-9f);  // the smallest subnormal
  EXPECT_EQ(RoundToE4m3(0x1p-11f), 0.0f);
  EXPECT_EQ(RoundToE4m3(15.9f), 16.0f);
}

TEST(QuantizeSymmetric8, HandWritten) {
  // scale = 127 / 127 = 1
  std::vector<float> x = {127.0f, -3.4f, 0.5f, 1.5f, -126.6f};
  QuantizeSymmetric8(x);
  EXPECT_EQ(x, (std::vector<float>{127.0f, -3.0f, 0.0f, 2.0f, -127.0f}));
  std::vector<float> zeros(4, 0.0f);
  QuantizeSymmetric8(zeros);
  EXPECT_EQ(zeros, std::vector<float>(4, 0.0f));
}

TEST(QuantizeSymmetric8, ErrorIsHalfAStep) {
  std::mt19937 rng(1);
  std::normal_distribution<float> normal(0, 3);
  for (int trial = 0; trial < 50; ++trial) {
    std::vector<float> x(1 + trial), y;
    float max = 0;
    for (float& value : x) max = std::max(max, std::fabs(value = normal(rng)));
    y = x;
    QuantizeSymmetric8(y);
    // Half a step, and what the scale's own rounding (2^-11) takes from 127 steps.
    for (std::size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(y[i], x[i], max / 127 * (0.5 + 127 * 0x1p-11 + 1e-3));
  }
}

TEST(QuantizeAffine, HandWritten) {
  // Every second number: zero 1, scale (7 - 1) / 3 = 2.
  std::vector<float> x = {1.0f, 99.0f, 2.9f, 99.0f, 4.1f, 99.0f, 7.0f, 99.0f};
  QuantizeAffine({x.data(), 4, 2}, 2);
  EXPECT_EQ(x, (std::vector<float>{1.0f, 99.0f, 3.0f, 99.0f, 5.0f, 99.0f, 7.0f, 99.0f}));
  std::vector<float> flat(5, 0.25f);
  QuantizeAffine({flat.data(), 5, 1}, 4);
  EXPECT_EQ(flat, std::vector<float>(5, 0.25f));
}

TEST(QuantizeAffine, ErrorBoundAndCodeCount) {
  std::mt19937 rng(2);
  std::normal_distribution<float> normal(0.5f, 2);
  for (const int bits : {1, 2, 4, 8}) {
    std::vector<float> x(32);
    for (float& value : x) value = normal(rng);
    std::vector<float> y = x;
    const AffineCode affine = AffineOf({x.data(), 32, 1}, bits, true);
    EXPECT_EQ(affine.scale, RoundToHalf(affine.scale));
    EXPECT_EQ(affine.zero, RoundToHalf(affine.zero));
    QuantizeAffine({y.data(), 32, 1}, bits);
    const double levels = (1 << bits) - 1;
    for (std::size_t i = 0; i < x.size(); ++i) {
      EXPECT_NEAR(y[i], x[i], affine.scale * (0.5 + levels * 0x1p-10) + std::fabs(affine.zero) * 0x1p-10);
      const int code = EncodeAffine(affine, bits, x[i]);
      EXPECT_GE(code, 0);
      EXPECT_LE(code, static_cast<int>(levels));
      EXPECT_EQ(y[i], affine.zero + affine.scale * static_cast<float>(code));
    }
  }
}

}  // namespace
}  // namespace zeroc
