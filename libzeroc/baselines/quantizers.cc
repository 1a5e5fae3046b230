#include "libzeroc/baselines/quantizers.h"

#include <algorithm>
#include <cmath>

namespace zeroc {
namespace {

// To a binary format with `mantissa_bits` after the point and the given exponent of the smallest normal number.
float RoundToFormat(float x, int mantissa_bits, int min_exponent, float max) {
  const float magnitude = std::fabs(x);
  if (magnitude == 0 || std::isnan(x)) return x;
  if (magnitude >= max) return std::copysign(max, x);
  const int exponent = std::max(std::ilogb(magnitude), min_exponent);
  const float rounded =
      std::ldexp(std::nearbyint(std::ldexp(magnitude, mantissa_bits - exponent)), exponent - mantissa_bits);
  return std::copysign(std::min(rounded, max), x);
}

}  // namespace

float RoundToHalf(float x) { return RoundToFormat(x, 10, -14, 65504.0f); }

float RoundToE4m3(float x) { return RoundToFormat(x, 3, -6, 448.0f); }

void QuantizeSymmetric8(std::span<float> x) {
  float max = 0;
  for (const float value : x) max = std::max(max, std::fabs(value));
  const float scale = RoundToHalf(max / 127);
  if (scale == 0) {
    std::fill(x.begin(), x.end(), 0.0f);
    return;
  }
  for (float& value : x) value = scale * std::clamp(std::nearbyint(value / scale), -127.0f, 127.0f);
}

AffineCode AffineOf(const StridedGroup& group, int bits, bool half) {
  float low = group.data[0], high = group.data[0];
  for (int i = 1; i < group.n; ++i) {
    low = std::min(low, group.data[i * group.stride]);
    high = std::max(high, group.data[i * group.stride]);
  }
  const float scale = (high - low) / static_cast<float>((1 << bits) - 1);
  if (half) return {RoundToHalf(scale), RoundToHalf(low)};
  return {scale, low};
}

int EncodeAffine(const AffineCode& affine, int bits, float x) {
  if (affine.scale == 0) return 0;
  const float top = static_cast<float>((1 << bits) - 1);
  return static_cast<int>(std::clamp(std::nearbyint((x - affine.zero) / affine.scale), 0.0f, top));
}

void QuantizeAffine(const StridedGroup& group, int bits, bool half) {
  const AffineCode affine = AffineOf(group, bits, half);
  for (int i = 0; i < group.n; ++i) {
    float& x = group.data[i * group.stride];
    x = affine.zero + affine.scale * static_cast<float>(EncodeAffine(affine, bits, x));
  }
}

}  // namespace zeroc
