// Packed tiles to AMX B operands: what attention_amx.cc does once per block. For that file only.
//
// The bytes of a block already are the lane and depth order of an AMX B operand. Exact tiles are used in place. Codes
// of up to 4 bits become bf16 by a shift, an AND and an OR: in the top bits of the mantissa under the exponent of
// 2^bits they read 2^bits + code, and the 2^bits leaves through the base. 8-bit codes are converted; each is exact
// in bf16. A word of four codes gives the pairs (0, 2) and (1, 3), so the A operand stores its depth in that order.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/amx.h"
#include "kernels/tile_codec.h"

namespace zeroc::kernels::cpu {

inline constexpr int kPairTileBytes = 512;  // 16 lanes x 16 depth steps in bf16

ZEROC_AMX_TARGET inline __m512i LoadTileRow(const std::uint8_t* from) { return _mm512_loadu_si512(from); }

// Depth steps 0 1 2 3 of every four as 0 2 1 3, the order of unpacked codes.
ZEROC_AMX_TARGET inline __m512 CodeOrder(__m512 v) { return _mm512_shuffle_ps(v, v, 0xd8); }

// What a B tile holds beside the code.
constexpr float CodeBias(int bits) { return bits <= 4 ? static_cast<float>(1 << bits) : 0.0f; }

// Two rows of a B tile: codes (0, 2) of each word, shifted to bits 7 - kBits and up of their 16-bit half, and (1, 3).
template <int kBits>
ZEROC_AMX_TARGET inline void StoreSmallCodes(__m512i even, __m512i odd, std::uint8_t* to) {
  const __m512i mask = _mm512_set1_epi32((((1 << kBits) - 1) << (7 - kBits)) * 0x10001);
  const __m512i exponent = _mm512_set1_epi32(((127 + kBits) << 7) * 0x10001);
  // 0xea: (a & b) | c.
  _mm512_storeu_si512(to, _mm512_ternarylogic_epi32(even, mask, exponent, 0xea));
  _mm512_storeu_si512(to + 64, _mm512_ternarylogic_epi32(odd, mask, exponent, 0xea));
}

ZEROC_AMX_TARGET inline void UnpackTile4(const std::uint8_t* tile, std::uint8_t* to) {
  for (int half = 0; half < 2; ++half) {
    const __m512i v = LoadTileRow(tile + 64 * half);
    StoreSmallCodes<4>(_mm512_slli_epi32(v, 3), _mm512_srli_epi32(v, 5), to + 256 * half);
    StoreSmallCodes<4>(_mm512_srli_epi32(v, 1), _mm512_srli_epi32(v, 9), to + 256 * half + 128);
  }
}

ZEROC_AMX_TARGET inline void UnpackTile2(const std::uint8_t* tile, std::uint8_t* to) {
  const __m512i v = LoadTileRow(tile);
  StoreSmallCodes<2>(_mm512_slli_epi32(v, 5), _mm512_srli_epi32(v, 3), to);
  StoreSmallCodes<2>(_mm512_slli_epi32(v, 3), _mm512_srli_epi32(v, 5), to + 128);
  StoreSmallCodes<2>(_mm512_slli_epi32(v, 1), _mm512_srli_epi32(v, 7), to + 256);
  StoreSmallCodes<2>(_mm512_srli_epi32(v, 1), _mm512_srli_epi32(v, 9), to + 384);
}

// The 32 bytes of 1-bit codes so that lanes 0 to 15 all find the code of depth quad s at bit 2 s of their bytes.
ZEROC_AMX_TARGET inline __m512i SpreadBits(const std::uint8_t* bits) {
  const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits)));
  return _mm512_mask_srli_epi32(both, 0xff00, both, 1);
}

ZEROC_AMX_TARGET inline void UnpackTile1(const std::uint8_t* tile, std::uint8_t* to) {
  const __m512i v = SpreadBits(tile);
  StoreSmallCodes<1>(_mm512_slli_epi32(v, 6), _mm512_srli_epi32(v, 2), to);
  StoreSmallCodes<1>(_mm512_slli_epi32(v, 4), _mm512_srli_epi32(v, 4), to + 128);
  StoreSmallCodes<1>(_mm512_slli_epi32(v, 2), _mm512_srli_epi32(v, 6), to + 256);
  StoreSmallCodes<1>(v, _mm512_srli_epi32(v, 8), to + 384);
}

ZEROC_AMX_TARGET inline void UnpackTile3(const std::uint8_t* tile, std::uint8_t* to) {
  const __m512i low = LoadTileRow(tile), high = SpreadBits(tile + 64);
  const __m512i low_mask = _mm512_set1_epi8(3), high_mask = _mm512_set1_epi8(4);
  for (int s = 0; s < 4; ++s) {
    const __m128i shift = _mm_cvtsi32_si128(2 * s);
    // The high bit sits at 2 s; two further left is bit 2 of a code.
    const __m512i high_bit = _mm512_and_si512(_mm512_slli_epi32(_mm512_srl_epi32(high, shift), 2), high_mask);
    const __m512i codes = _mm512_ternarylogic_epi32(_mm512_srl_epi32(low, shift), low_mask, high_bit, 0xea);
    StoreSmallCodes<3>(_mm512_slli_epi32(codes, 4), _mm512_srli_epi32(codes, 4), to + 128 * s);
  }
}

// Two codes of a word (16 bits apart) as two bf16.
ZEROC_AMX_TARGET inline __m512i ConvertPair(__m512i word) {
  const __m512i low = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_and_si512(word, _mm512_set1_epi32(0xff))));
  const __m512i high =
      _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(0xff))));
  return _mm512_or_si512(_mm512_srli_epi32(low, 16), high);  // integers up to 255 leave the low half empty
}

ZEROC_AMX_TARGET inline void UnpackTile8(const std::uint8_t* tile, std::uint8_t* to) {
  for (int s = 0; s < 4; ++s) {
    const __m512i v = LoadTileRow(tile + 64 * s);
    _mm512_storeu_si512(to + 128 * s, ConvertPair(v));
    _mm512_storeu_si512(to + 128 * s + 64, ConvertPair(_mm512_srli_epi32(v, 8)));
  }
}

ZEROC_AMX_TARGET inline void UnpackTile(const std::uint8_t* tile, int bits, std::uint8_t* to) {
  switch (bits) {
    case 8:
      return UnpackTile8(tile, to);
    case 4:
      return UnpackTile4(tile, to);
    case 3:
      return UnpackTile3(tile, to);
    case 2:
      return UnpackTile2(tile, to);
    case 1:
      return UnpackTile1(tile, to);
    default:
      __builtin_memcpy(to, tile, kPairTileBytes);
  }
}

// Depth steps of a 16-bit V tile that are not in [begin, end) become zeros: rows never written may hold NaN.
inline void ClearDepth(std::uint8_t* tile, int begin, int end) {
  for (int depth = 0; depth < kTileDepth; ++depth) {
    if (begin <= depth && depth < end) continue;
    for (int lane = 0; lane < kTileLanes; ++lane) SetExact(tile, 16, lane, depth, 0.0f);
  }
}

// step and base of 16 tokens, the base without the bias of small codes. The floats of DecodeScale. In code order for V,
// whose depth the tokens are.
ZEROC_AMX_TARGET inline void DecodeScales(const std::uint8_t* scale_codes, const std::uint8_t* centers, int bits,
                                          bool code_order, float* step, float* base) {
  const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale_codes)));
  const __m512 center =
      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(centers))));
  const __m512 eighths = _mm512_broadcast_f32x8(_mm256_loadu_ps(kHalfOfScaleCode.data() + kScaleBias));
  const __m512i mantissa = _mm512_castps_si512(_mm512_permutexvar_ps(code, eighths));  // by the low bits; 8 repeat
  const __m512i octave = _mm512_sub_epi32(_mm512_srli_epi32(code, 3), _mm512_set1_epi32(kScaleBias / 8));
  const __m512 half =
      _mm512_maskz_mov_ps(_mm512_test_epi32_mask(code, code),
                          _mm512_castsi512_ps(_mm512_add_epi32(mantissa, _mm512_slli_epi32(octave, 23))));
  const __m512 steps = _mm512_mul_ps(half, _mm512_set1_ps(2.0f / static_cast<float>((1 << bits) - 1)));
  const __m512 middle = _mm512_mul_ps(half, _mm512_mul_ps(center, _mm512_set1_ps(1.0f / kCenterSteps)));
  const __m512 bases = _mm512_fnmadd_ps(_mm512_set1_ps(CodeBias(bits)), steps, _mm512_sub_ps(middle, half));
  _mm512_storeu_ps(step, code_order ? CodeOrder(steps) : steps);
  _mm512_storeu_ps(base, code_order ? CodeOrder(bases) : bases);
}

}  // namespace zeroc::kernels::cpu
