// The rule by which every kv_pack chooses a token's scale: shared by the reference and the CPU code.
//
// The half range with the least squared error is close to a known share of the largest magnitude (fine codes) or of
// the standard deviation (coarse ones, Max 1960; the Hadamard rotation makes a run's numbers nearly Gaussian): a closed
// form and at most two neighbours replace a search over all codes. docs/kv_format.md says what that costs in error.
// Every float operation below is rounded on its own, in this order, so that all instruction sets choose the same codes.
// Pure functions; any thread.
#pragma once

#include <bit>
#include <cstdint>
#include <span>

#include "kernels/kv_block.h"

namespace zeroc::kernels {

// Half range over standard deviation of the best uniform quantiser of a Gaussian, 2 bits and 1.
constexpr float BestHalfOverDeviation(int bits) { return bits == 2 ? 1.494f : 0.798f; }

// ---- Affine scales ----
//
//   mid = (lo + hi) / 2, mean = sum / width, between = (mid + mean) / 2
//   reach of a centre: |centre| * 64 / 127, the smallest half range in units of which it can be stated
//   cover: the smallest code whose half range is at least max((hi - lo) / 2 * 128 / 127, reach(mid)); a rounded centre
//     is off by up to half / 128, hence the factor
//   fit: the code nearest to max(min(max(hi - mean, mean - lo), c * deviation), reach(mid), reach(mean))
// Both are 0 only for a run of zeros, which ends as scale code 0, centre 0.

enum class ScaleStart { kCover, kFit };
enum class ScaleCenter { kMid, kMean, kBetween };

struct AffineCandidate {
  ScaleStart start;
  int shift;  // scale codes from the start; candidates below code 1 are code 1
  ScaleCenter center;
};

inline constexpr AffineCandidate kAffine8[] = {{ScaleStart::kCover, 0, ScaleCenter::kMid},
                                               {ScaleStart::kCover, -1, ScaleCenter::kMid}};
inline constexpr AffineCandidate kAffine4[] = {{ScaleStart::kCover, -1, ScaleCenter::kMid},
                                               {ScaleStart::kCover, -1, ScaleCenter::kBetween}};
inline constexpr AffineCandidate kAffine3[] = {{ScaleStart::kCover, -1, ScaleCenter::kMid},
                                               {ScaleStart::kCover, -3, ScaleCenter::kMid}};
inline constexpr AffineCandidate kAffine2[] = {{ScaleStart::kFit, -1, ScaleCenter::kBetween},
                                               {ScaleStart::kFit, 1, ScaleCenter::kBetween},
                                               {ScaleStart::kFit, 0, ScaleCenter::kMid}};
inline constexpr AffineCandidate kAffine1[] = {{ScaleStart::kFit, 0, ScaleCenter::kMean},
                                               {ScaleStart::kFit, 0, ScaleCenter::kBetween}};

constexpr std::span<const AffineCandidate> AffineCandidates(int bits) {
  if (bits == 8) return kAffine8;
  if (bits == 4) return kAffine4;
  if (bits == 3) return kAffine3;
  if (bits == 2) return kAffine2;
  return kAffine1;
}

// ---- Shared scales ----
//
//   8 bits: the smallest even code whose half range is at least the peak, the largest magnitude
//   4 and 3 bits: of the even codes from the one nearest to the peak downwards, the one with the least error
//   2 bits: fit = max(min(peak, c * rms), 2^-20), one step of Lloyd's iteration from it (Lloyd 1957; numbers of at
//     least step = fit * 2/3 belong to the outer level 3/2 step, the others to 1/2 step; with l = 3/2 or 1/2
//     fit' = 3/2 * sum |x| l / sum l^2), and the even code nearest to min(fit', peak)
//   1 bit: the even code nearest to the mean magnitude, which is the optimum itself
// A token's code is even, 2 to 254, or 0 where all its numbers are 0. base_code is the largest code of the block's
// tokens less 30, at least 2; a token's nibble is what its code lies above that, halved and cut to 0..15.

inline constexpr int kSharedCandidates4 = 2, kSharedCandidates3 = 3;
inline constexpr float kSmallestFit = 0x1p-20f;

namespace scale_internal {

// Covering codes by comparison: the eighths of tile_codec.h.
inline constexpr float kEighths[8] = {1.0f,        1.09050775f, 1.18920708f, 1.29683959f,
                                      1.41421354f, 1.54221082f, 1.68179286f, 1.8340081f};
// Midpoints, in the logarithm, of the steps of an octave, and where the quarter steps begin.
inline constexpr float kEighthMiddles[8] = {1.04427378f, 1.13878863f, 1.24185781f, 1.35425555f,
                                            1.47682615f, 1.61049033f, 1.75625216f, 1.91520656f};
inline constexpr float kQuarterMiddles[4] = {1.09050773f, 1.29683955f, 1.54221083f, 1.83400809f};
inline constexpr float kQuarters[4] = {1.0f, 1.18920708f, 1.41421354f, 1.68179286f};

// How many of the bounds, from the i-th on, lie below x. Bounds are template arguments and become literals: nvcc takes
// a loop over an array of the host in device code without a word and compiles it to nothing.
template <const auto& bounds, int n, int i = 0>
constexpr int CountBelow(float x) {
  if constexpr (i == n) {
    return 0;
  } else {
    constexpr float bound = bounds[i];
    return (x > bound ? 1 : 0) + CountBelow<bounds, n, i + 1>(x);
  }
}

// n floor(log2 x) + the number of bounds below x / 2^floor(log2 x); x >= 0. Zero and subnormals give about -127 n.
template <const auto& bounds>
constexpr int LogStep(float x) {
  constexpr int n = static_cast<int>(sizeof(bounds) / sizeof(bounds[0]));
  const auto raw = std::bit_cast<std::uint32_t>(x);
  const auto fraction = std::bit_cast<float>((raw & 0x7fffffu) | 0x3f800000u);
  return (static_cast<int>(raw >> 23 & 0xffu) - 127) * n + CountBelow<bounds, n>(fraction);
}

constexpr int Clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

}  // namespace scale_internal

inline constexpr int kSmallestEvenCode = 2, kLargestEvenCode = 254;

// The scale code nearest to a half range > 0, in the logarithm.
constexpr int NearestScaleCode(float half) {
  const int step = scale_internal::LogStep<scale_internal::kEighthMiddles>(half);
  return scale_internal::Clamp(step + kScaleBias, 1, kMaxScaleCode);
}

// Steps of two codes from code 160 to the one nearest to a half range > 0, and to the first that is not below it.
constexpr int NearestEvenStep(float half) { return scale_internal::LogStep<scale_internal::kQuarterMiddles>(half); }
constexpr int CoveringEvenStep(float half) { return scale_internal::LogStep<scale_internal::kQuarters>(half); }
constexpr int EvenCode(int step) {
  return scale_internal::Clamp(kScaleBias + kNibbleStep * step, kSmallestEvenCode, kLargestEvenCode);
}

// Of a block whose largest token code this is; 0 for 0.
constexpr int SharedBaseCode(int largest_code) {
  if (largest_code == 0) return 0;
  return scale_internal::Clamp(largest_code - kNibbleSpan, kSmallestEvenCode, kMaxScaleCode);
}

constexpr int NibbleOf(int code, int base_code) {
  return scale_internal::Clamp((code - base_code) / kNibbleStep, 0, kNibbleSpan / kNibbleStep);
}

}  // namespace zeroc::kernels
