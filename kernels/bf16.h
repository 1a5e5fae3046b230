// bfloat16 as raw bits: the upper half of an IEEE float32. Pure functions, any thread.
#pragma once

#include <bit>
#include <cstdint>

namespace zeroc::kernels {

inline float Bf16ToFloat(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

// Nearest, ties to even. A NaN stays a (quiet) NaN; values beyond the largest bf16 become infinite.
inline std::uint16_t FloatToBf16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace zeroc::kernels
