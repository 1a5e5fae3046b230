// bf16, small integers and log-sum-exp arithmetic inside kernels.
#pragma once

#include "kernels/cuda/device.h"
#include "kernels/ops.h"

namespace zeroc::kernels::cuda {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

ZEROC_DEVICE float FromBf16(Bf16 bits) { return BitsToFloat(static_cast<std::uint32_t>(bits) << 16); }

// Nearest, ties to even; as bf16.h has it, so that host and device write the same bytes.
ZEROC_DEVICE Bf16 ToBf16(float value) {
  const std::uint32_t bits = FloatToBits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<Bf16>((bits >> 16) | 0x40u);
  return static_cast<Bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Two of them in one register, `first` low.
ZEROC_DEVICE std::uint32_t PackBf16(float first, float second) {
  return static_cast<std::uint32_t>(ToBf16(first)) | static_cast<std::uint32_t>(ToBf16(second)) << 16;
}

// x = high + low to 17 bits: both factors of a product in two bf16 each give it to 2^-16.
struct SplitBf16 {
  Bf16 high, low;
};
ZEROC_DEVICE SplitBf16 Split(float x) {
  const Bf16 high = ToBf16(x);
  return {high, ToBf16(x - FromBf16(high))};
}

ZEROC_DEVICE float Max(float a, float b) { return a > b ? a : b; }
ZEROC_DEVICE float Min(float a, float b) { return a < b ? a : b; }
ZEROC_DEVICE int Min(int a, int b) { return a < b ? a : b; }
ZEROC_DEVICE int Max(int a, int b) { return a > b ? a : b; }

// exp(x - top) where top is the largest of what was seen; 0 where nothing was, and NaN stays NaN.
ZEROC_DEVICE float ExpBelow(float x, float top) { return x == -kInfinity ? 0.0f : Exp(x - top); }

}  // namespace zeroc::kernels::cuda
