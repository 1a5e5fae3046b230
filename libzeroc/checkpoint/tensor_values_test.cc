#include "libzeroc/checkpoint/tensor_values.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

namespace zeroc {
namespace {

TEST(TensorValuesTest, HalfToFloatIsExact) {
  EXPECT_EQ(HalfToFloat(0x0000), 0.0F);
  EXPECT_TRUE(std::signbit(HalfToFloat(0x8000)));
  EXPECT_EQ(HalfToFloat(0x3c00), 1.0F);
  EXPECT_EQ(HalfToFloat(0xc000), -2.0F);
  EXPECT_EQ(HalfToFloat(0x7bff), 65504.0F);
  EXPECT_EQ(HalfToFloat(0x0400), std::ldexp(1.0F, -14));  // smallest normal
  EXPECT_EQ(HalfToFloat(0x0001), std::ldexp(1.0F, -24));  // smallest subnormal
  EXPECT_EQ(HalfToFloat(0x83ff), -1023 * std::ldexp(1.0F, -24));
  EXPECT_TRUE(std::isinf(HalfToFloat(0x7c00)));
  EXPECT_TRUE(std::isnan(HalfToFloat(0x7e00)));
}

TEST(TensorValuesTest, ReadsEveryDtypeAlsoUnaligned) {
  const std::uint16_t bf16[] = {0x3f80, 0xc000, 0x4040};  // 1, -2, 3
  const std::uint16_t f16[] = {0x3c00, 0xc000, 0x4200};
  const float f32[] = {1, -2, 3};
  const struct {
    DType dtype;
    const void* data;
    std::size_t bytes;
  } cases[] = {{DType::kBf16, bf16, 6}, {DType::kF16, f16, 6}, {DType::kF32, f32, 12}};
  for (const auto& c : cases) {
    std::vector<std::byte> unaligned(c.bytes + 1);
    std::memcpy(unaligned.data() + 1, c.data, c.bytes);
    const TensorView view{c.dtype, {3}, unaligned.data() + 1, c.bytes};
    float out[2] = {};
    ReadFloats(view, 1, 2, out);
    EXPECT_EQ(out[0], -2.0F);
    EXPECT_EQ(out[1], 3.0F);
  }
}

TEST(TensorValuesDeathTest, OutOfRangeIsABug) {
  const float f32[] = {1};
  const TensorView view{DType::kF32, {1}, reinterpret_cast<const std::byte*>(f32), 4};
  float out[2];
  EXPECT_DEATH(ReadFloats(view, 0, 2, out), "check failed");
}

}  // namespace
}  // namespace zeroc
