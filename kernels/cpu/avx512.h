// What the AVX-512 variants of attention share: codes as bytes, scales, e^x, the Hadamard rotation, reductions.
//
// For the attention files of AMX and VNNI only, which run after AmxReady() or VnniReady() said yes. Pure functions
// on the caller's memory; any thread.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "kernels/cpu/amx.h"
#include "kernels/kv_block.h"
#include "kernels/tile_codec.h"

namespace zeroc::kernels::cpu {

inline constexpr float kNoScore = -__builtin_huge_valf();
inline constexpr float kLog2E = 1.44269504f;

// 2^y for y <= 0 (and a little above), relative error 2e-7; 0 for minus infinity, NaN for NaN. 2^(y - floor y) by a
// polynomial through the Chebyshev nodes of [0, 1], the rest by the scaling instruction, which takes the floor itself.
ZEROC_AVX512_TARGET inline __m512 Exp2(__m512 y) {
  const __m512 f = _mm512_reduce_ps(y, 0x09);  // y - floor(y)
  __m512 p = _mm512_set1_ps(1.893754058e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.949590423e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.586033708e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.401418178e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931544897e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.999998984e-1f));
  return _mm512_scalef_ps(p, y);
}

struct Larger {
  ZEROC_AVX512_TARGET __m512 operator()(__m512 a, __m512 b) const { return _mm512_max_ps(a, b); }
};
struct Plus {
  ZEROC_AVX512_TARGET __m512 operator()(__m512 a, __m512 b) const { return _mm512_add_ps(a, b); }
};

// Lane i: all lanes of vector i of 16 (at rows + i * stride, 64-byte aligned) reduced by `op`.
template <typename Op>
ZEROC_AVX512_TARGET inline __m512 ReduceRows(const float* rows, std::int64_t stride, Op op) {
  __m512 quarter[4];
  for (int i = 0; i < 4; ++i) {
    const float* from = rows + 4 * i * stride;
    const __m512 a = _mm512_load_ps(from), b = _mm512_load_ps(from + stride);
    const __m512 c = _mm512_load_ps(from + 2 * stride), d = _mm512_load_ps(from + 3 * stride);
    const __m512 ab = op(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = op(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    quarter[i] = op(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  }
  const __m512 low =
      op(_mm512_shuffle_f32x4(quarter[0], quarter[1], 0x88), _mm512_shuffle_f32x4(quarter[0], quarter[1], 0xdd));
  const __m512 high =
      op(_mm512_shuffle_f32x4(quarter[2], quarter[3], 0x88), _mm512_shuffle_f32x4(quarter[2], quarter[3], 0xdd));
  return op(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

// ---- Codes ---------------------------------------------------------------------------------------------------------

ZEROC_AVX512_TARGET inline __m512i LoadTileRow(const std::uint8_t* from) { return _mm512_loadu_si512(from); }

// Bits 2 s of the result's bytes are the 1-bit codes of depth quad s, in the byte order of the other widths.
ZEROC_AVX512_TARGET inline __m512i SpreadBits(const std::uint8_t* bits) {
  const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits)));
  return _mm512_mask_srli_epi32(both, 0xff00, both, 1);
}

// Codes of the four depth quads of a tile as bytes: byte 4 * lane + depth % 4 of quad depth / 4.
template <int kBits>
ZEROC_AVX512_TARGET inline void Quads(const std::uint8_t* tile, __m512i quads[4]) {
  if constexpr (kBits == 8) {
    for (int s = 0; s < 4; ++s) quads[s] = LoadTileRow(tile + 64 * s);
  } else if constexpr (kBits == 4) {
    const __m512i mask = _mm512_set1_epi8(15), a = LoadTileRow(tile), b = LoadTileRow(tile + 64);
    quads[0] = _mm512_and_si512(a, mask);
    quads[1] = _mm512_and_si512(_mm512_srli_epi32(a, 4), mask);
    quads[2] = _mm512_and_si512(b, mask);
    quads[3] = _mm512_and_si512(_mm512_srli_epi32(b, 4), mask);
  } else if constexpr (kBits == 3) {
    const __m512i mask = _mm512_set1_epi8(3), bit = _mm512_set1_epi8(4);
    const __m512i low = LoadTileRow(tile), high = SpreadBits(tile + 64);
    // 0xf8: a | (b & c).
    quads[0] = _mm512_ternarylogic_epi32(_mm512_and_si512(low, mask), _mm512_slli_epi32(high, 2), bit, 0xf8);
    quads[1] = _mm512_ternarylogic_epi32(_mm512_and_si512(_mm512_srli_epi32(low, 2), mask), high, bit, 0xf8);
    quads[2] = _mm512_ternarylogic_epi32(_mm512_and_si512(_mm512_srli_epi32(low, 4), mask), _mm512_srli_epi32(high, 2),
                                         bit, 0xf8);
    quads[3] = _mm512_ternarylogic_epi32(_mm512_and_si512(_mm512_srli_epi32(low, 6), mask), _mm512_srli_epi32(high, 4),
                                         bit, 0xf8);
  } else {
    const __m512i mask = _mm512_set1_epi8(kBits == 2 ? 3 : 1);
    const __m512i v = kBits == 2 ? LoadTileRow(tile) : SpreadBits(tile);
    quads[0] = _mm512_and_si512(v, mask);
    quads[1] = _mm512_and_si512(_mm512_srli_epi32(v, 2), mask);
    quads[2] = _mm512_and_si512(_mm512_srli_epi32(v, 4), mask);
    quads[3] = _mm512_and_si512(_mm512_srli_epi32(v, 6), mask);
  }
}

// `n_tiles` tiles as bytes, 256 each.
template <int kBits>
ZEROC_AVX512_TARGET inline void UnpackBytes(const std::uint8_t* tiles, int n_tiles, std::uint8_t* to) {
  for (int i = 0; i < n_tiles; ++i, tiles += TileBytes(kBits), to += 256) {
    __m512i quads[4];
    Quads<kBits>(tiles, quads);
    for (int s = 0; s < 4; ++s) _mm512_storeu_si512(to + 64 * s, quads[s]);
  }
}
ZEROC_AVX512_TARGET inline void UnpackBytesOf(int bits, const std::uint8_t* tiles, int n_tiles, std::uint8_t* to) {
  switch (bits) {
    case 8:
      return UnpackBytes<8>(tiles, n_tiles, to);
    case 4:
      return UnpackBytes<4>(tiles, n_tiles, to);
    case 3:
      return UnpackBytes<3>(tiles, n_tiles, to);
    case 2:
      return UnpackBytes<2>(tiles, n_tiles, to);
    default:
      return UnpackBytes<1>(tiles, n_tiles, to);
  }
}

// ---- Scales --------------------------------------------------------------------------------------------------------

struct Scales {
  __m512 half, step, base;
};

// Scales of the 16 tokens of group g of quantised run r: the floats of ScaleOf.
ZEROC_AVX512_TARGET inline Scales DecodeScales(const KvSideLayout& side, int r, const std::uint8_t* head, int n_tokens,
                                               int g) {
  const std::uint8_t* meta = head + side.meta_offset[r];
  __m512i code;
  __m512 center = _mm512_setzero_ps();
  if (side.runs[r].scale == KvScaleKind::kAffine) {
    code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(meta + 16 * g)));
    const __m128i centers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(meta + n_tokens + 16 * g));
    center = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(centers)), _mm512_set1_ps(1.0f / kCenterSteps));
  } else {
    const int base_code = head[side.base_offset[r]];
    const __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(meta + 8 * g));
    const __m128i nibbles = _mm_and_si128(_mm_unpacklo_epi64(both, _mm_srli_epi16(both, 4)), _mm_set1_epi8(15));
    code = _mm512_add_epi32(_mm512_set1_epi32(base_code),
                            _mm512_mullo_epi32(_mm512_cvtepu8_epi32(nibbles), _mm512_set1_epi32(kNibbleStep)));
    code = _mm512_min_epi32(code, _mm512_set1_epi32(base_code == 0 ? 0 : kMaxScaleCode));
  }
  // 2^(j / 8) of the low bits by a table (8 entries, which the permutation repeats), the octave into the exponent.
  const __m512 eighths = _mm512_broadcast_f32x8(_mm256_loadu_ps(kHalfOfScaleCode.data() + kScaleBias));
  const __m512i mantissa = _mm512_castps_si512(_mm512_permutexvar_ps(code, eighths));
  const __m512i octave = _mm512_sub_epi32(_mm512_srli_epi32(code, 3), _mm512_set1_epi32(kScaleBias / 8));
  const __m512 half =
      _mm512_maskz_mov_ps(_mm512_test_epi32_mask(code, code),
                          _mm512_castsi512_ps(_mm512_add_epi32(mantissa, _mm512_slli_epi32(octave, 23))));
  const float per_half = 2.0f / static_cast<float>((1 << side.runs[r].bits) - 1);
  return {half, _mm512_mul_ps(half, _mm512_set1_ps(per_half)), _mm512_fmsub_ps(half, center, half)};
}

// mass[0..n_tokens) of the score correction (KvSegment::mass) from the row of the head.
ZEROC_AVX512_TARGET inline void DecodeMass(const KvBlockLayout& layout, const std::uint8_t* head, const float* of_head,
                                           float* mass) {
  for (int g = 0; g < layout.n_tokens / kTileLanes; ++g) {
    __m512 sum = _mm512_set1_ps(of_head[0]);
    for (int r = 0; r < layout.k.n_runs; ++r) {
      if (!IsQuantised(layout.k.runs[r].bits)) continue;
      const __m512 half = DecodeScales(layout.k, r, head, layout.n_tokens, g).half;
      sum = _mm512_fmadd_ps(_mm512_mul_ps(half, half), _mm512_set1_ps(of_head[1 + r]), sum);
    }
    _mm512_storeu_ps(mass + 16 * g, sum);
  }
}

// ---- Rows ----------------------------------------------------------------------------------------------------------

ZEROC_AVX512_TARGET inline void ScaleRow(float* row, int n, float factor) {
  for (int i = 0; i < n; i += 16) {
    _mm512_storeu_ps(row + i, _mm512_mul_ps(_mm512_set1_ps(factor), _mm512_loadu_ps(row + i)));
  }
}

// One cell of HadamardRun (hadamard.h), 16 kVectors wide, in registers.
template <int kVectors>
ZEROC_AVX512_TARGET inline void HadamardCell(float* x) {
  const __m512 sign1 = _mm512_castsi512_ps(_mm512_maskz_set1_epi32(0xaaaa, INT32_MIN));
  const __m512 sign2 = _mm512_castsi512_ps(_mm512_maskz_set1_epi32(0xcccc, INT32_MIN));
  const __m512 sign4 = _mm512_castsi512_ps(_mm512_maskz_set1_epi32(0xf0f0, INT32_MIN));
  const __m512 sign8 = _mm512_castsi512_ps(_mm512_maskz_set1_epi32(0xff00, INT32_MIN));
  const __m512 norm = _mm512_set1_ps(1.0f / std::sqrt(16.0f * kVectors));
  __m512 v[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    v[i] = _mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), norm);
    v[i] = _mm512_add_ps(_mm512_xor_ps(v[i], sign1), _mm512_permute_ps(v[i], 0xb1));
    v[i] = _mm512_add_ps(_mm512_xor_ps(v[i], sign2), _mm512_permute_ps(v[i], 0x4e));
    v[i] = _mm512_add_ps(_mm512_xor_ps(v[i], sign4), _mm512_shuffle_f32x4(v[i], v[i], 0xb1));
    v[i] = _mm512_add_ps(_mm512_xor_ps(v[i], sign8), _mm512_shuffle_f32x4(v[i], v[i], 0x4e));
  }
  for (int half = 1; half < kVectors; half *= 2) {
    for (int i = 0; i < kVectors; ++i) {
      if ((i & half) != 0) continue;
      const __m512 a = v[i], b = v[i + half];
      v[i] = _mm512_add_ps(a, b);
      v[i + half] = _mm512_sub_ps(a, b);
    }
  }
  for (int i = 0; i < kVectors; ++i) _mm512_storeu_ps(x + 16 * i, v[i]);
}

// HadamardRun on vectors; kMaxHeadDim is the widest cell.
ZEROC_AVX512_TARGET inline void HadamardRunOnVectors(float* x, int width) {
  while (width > 0) {
    const int cell = 1 << (31 - __builtin_clz(static_cast<unsigned>(width)));
    if (cell == 256) HadamardCell<16>(x);
    if (cell == 128) HadamardCell<8>(x);
    if (cell == 64) HadamardCell<4>(x);
    if (cell == 32) HadamardCell<2>(x);
    if (cell == 16) HadamardCell<1>(x);
    x += cell;
    width -= cell;
  }
}

// Quantised V runs of one row, between plain and packed coordinates (the rotation is its own inverse).
ZEROC_AVX512_TARGET inline void RotateValues(const KvBlockLayout& layout, float* row) {
  if (!layout.rotate_v) return;
  for (int r = 0; r < layout.v.n_runs; ++r) {
    if (IsQuantised(layout.v.runs[r].bits)) {
      HadamardRunOnVectors(row + layout.v.first_coord[r], layout.v.runs[r].width);
    }
  }
}

}  // namespace zeroc::kernels::cpu
