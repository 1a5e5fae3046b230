// The number formats of the baselines, as quantise-dequantise on float32: what their decoders would give back.
//
// Pure functions, any thread. Scales and zero points are rounded to half precision, as the methods store them.
#pragma once

#include <cstdint>
#include <span>

namespace zeroc {

// Nearest, ties to even, with subnormals; beyond 65504: 65504.
float RoundToHalf(float x);

// FP8 E4M3 (OCP 8-bit floating point; no infinities): nearest, ties to even, saturating at 448.
float RoundToE4m3(float x);

// x = scale * code, scale = max|x| / 127 in half precision, code in [-127, 127].
void QuantizeSymmetric8(std::span<float> x);

// Values of a group that lies at data[i * stride], i < n.
struct StridedGroup {
  float* data;
  int n;
  std::int64_t stride;
};

// x = zero + scale * code, zero = min x, scale = (max x - min x) / (2^bits - 1), code in [0, 2^bits).
// half: zero and scale in half precision, else float32 (numbers that are never stored).
struct AffineCode {
  float scale = 0, zero = 0;
};
AffineCode AffineOf(const StridedGroup& group, int bits, bool half);
int EncodeAffine(const AffineCode& affine, int bits, float x);
void QuantizeAffine(const StridedGroup& group, int bits, bool half = true);

}  // namespace zeroc
