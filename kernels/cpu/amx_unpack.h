// Packed tiles to AMX B operands: what attention_amx.cc does once per block and call. For that file only.
//
// Codes become the bf16 numbers that they stand for, scale and base applied, in the place of an exact tile: K and V of
// any width then run through the same products. Rounding a number to bf16 costs far less than its code of at most 4
// bits did; 8-bit codes become the sum of two bf16, in two tiles.
#pragma once

#include "kernels/cpu/avx512.h"

namespace zeroc::kernels::cpu {

inline constexpr int kPairTileBytes = 512;  // 16 lanes x 16 depth steps in bf16

// Values of depth steps 2 j (even) and 2 j + 1 (odd) as pairs of bf16, rounded half away from zero. Finite values.
ZEROC_AMX_TARGET inline __m512i RoundPairs(__m512 even, __m512 odd) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_add_epi32(_mm512_castps_si512(even), half);
  const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
  // 0xe4: a where c is set, else b.
  return _mm512_ternarylogic_epi32(high, _mm512_srli_epi32(low, 16), _mm512_set1_epi32(INT32_MIN >> 15), 0xe4);
}

// Bytes 0 to 3 of every word under the exponent of 2: 2 + code / 64, codes of at most 6 bits.
struct ByteFloats {
  __m512i index[4];
  __m512i two;
};
ZEROC_AMX_TARGET inline ByteFloats MakeByteFloats() {
  ByteFloats out;
  for (int i = 0; i < 4; ++i) {
    const __m128i bytes = _mm_add_epi8(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12),
                                       _mm_set1_epi8(static_cast<char>(i)));
    out.index[i] = _mm512_broadcast_i32x4(bytes);
  }
  out.two = _mm512_set1_epi32(0x40000000);
  return out;
}
ZEROC_AMX_TARGET inline __m512 SmallCode(const ByteFloats& bytes, __m512i quad, int i) {
  return _mm512_castsi512_ps(_mm512_mask_shuffle_epi8(bytes.two, 0x4444444444444444, quad, bytes.index[i]));
}
ZEROC_AMX_TARGET inline __m512 WideCode(const ByteFloats& bytes, __m512i quad, int i) {
  return _mm512_cvtepi32_ps(_mm512_maskz_shuffle_epi8(0x1111111111111111, quad, bytes.index[i]));
}

// Two rows of a tile from the four values of a quad; `low` takes what `to` rounded off, or is null.
ZEROC_AMX_TARGET inline void StoreQuad(const __m512 value[4], std::uint8_t* to, std::uint8_t* low) {
  for (int i = 0; i < 4; i += 2) {
    const __m512i pairs = RoundPairs(value[i], value[i + 1]);
    _mm512_storeu_si512(to + 32 * i, pairs);
    if (low == nullptr) continue;
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(INT32_MIN >> 15)));
    _mm512_storeu_si512(low + 32 * i, RoundPairs(_mm512_sub_ps(value[i], even), _mm512_sub_ps(value[i + 1], odd)));
  }
}

// A K tile: lanes are tokens, so every lane has its own step and base. `low` is used for 8 bits only.
template <int kBits>
ZEROC_AMX_TARGET inline void UnpackKeys(const std::uint8_t* tile, const Scales& scales, const ByteFloats& bytes,
                                        std::uint8_t* to, std::uint8_t* low) {
  // 2 + code / 64 instead of the code, where that is how codes come.
  const __m512 step = kBits == 8 ? scales.step : _mm512_mul_ps(scales.step, _mm512_set1_ps(64.0f));
  const __m512 base = kBits == 8 ? scales.base : _mm512_fnmadd_ps(step, _mm512_set1_ps(2.0f), scales.base);
  __m512i quads[4];
  Quads<kBits>(tile, quads);
  for (int s = 0; s < 4; ++s) {
    __m512 value[4];
    for (int i = 0; i < 4; ++i) {
      const __m512 code = kBits == 8 ? WideCode(bytes, quads[s], i) : SmallCode(bytes, quads[s], i);
      value[i] = _mm512_fmadd_ps(code, step, base);
    }
    StoreQuad(value, to + 128 * s, kBits == 8 ? low + 128 * s : nullptr);
  }
}

ZEROC_AMX_TARGET inline void UnpackKeysOf(int bits, const std::uint8_t* tile, const Scales& scales,
                                          const ByteFloats& bytes, std::uint8_t* to, std::uint8_t* low) {
  switch (bits) {
    case 8:
      return UnpackKeys<8>(tile, scales, bytes, to, low);
    case 4:
      return UnpackKeys<4>(tile, scales, bytes, to, low);
    case 3:
      return UnpackKeys<3>(tile, scales, bytes, to, low);
    case 2:
      return UnpackKeys<2>(tile, scales, bytes, to, low);
    default:
      return UnpackKeys<1>(tile, scales, bytes, to, low);
  }
}

// The values of 16 tokens' codes: depth steps 2 j and 2 j + 1 of a V tile take entries 0 to 15 and 16 to 31 of table j.
struct ValueTables {
  __m512i pair[8];
};
ZEROC_AMX_TARGET inline ValueTables MakeValueTables(const Scales& scales) {
  alignas(64) float step[16], base[16];
  _mm512_store_ps(step, scales.step);
  _mm512_store_ps(base, scales.base);
  const __m512 code = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  ValueTables out;
  for (int j = 0; j < 8; ++j) {
    const __m512 even = _mm512_fmadd_ps(code, _mm512_set1_ps(step[2 * j]), _mm512_set1_ps(base[2 * j]));
    const __m512 odd = _mm512_fmadd_ps(code, _mm512_set1_ps(step[2 * j + 1]), _mm512_set1_ps(base[2 * j + 1]));
    out.pair[j] = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  }
  return out;
}

// A V tile of at most 4 bits: depth is tokens, so a code looks its value up.
template <int kBits>
ZEROC_AMX_TARGET inline void UnpackValues(const std::uint8_t* tile, const ValueTables& tables, std::uint8_t* to) {
  const __m512i odd_entries = _mm512_set1_epi32(0x10001000);  // bytes 1 and 3
  const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13));
  const __m512i second = _mm512_broadcast_i32x4(_mm_setr_epi8(2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15));
  __m512i quads[4];
  Quads<kBits>(tile, quads);
  for (int s = 0; s < 4; ++s) {
    const __m512i entry = _mm512_or_si512(quads[s], odd_entries);
    // The table look-up reads the low five bits of a word; the byte above may be anything.
    const __m512i even = _mm512_shuffle_epi8(entry, first), odd = _mm512_shuffle_epi8(entry, second);
    _mm512_storeu_si512(to + 128 * s, _mm512_permutexvar_epi16(even, tables.pair[2 * s]));
    _mm512_storeu_si512(to + 128 * s + 64, _mm512_permutexvar_epi16(odd, tables.pair[2 * s + 1]));
  }
}

ZEROC_AMX_TARGET inline void UnpackValuesOf(int bits, const std::uint8_t* tile, const ValueTables& tables,
                                            std::uint8_t* to) {
  switch (bits) {
    case 4:
      return UnpackValues<4>(tile, tables, to);
    case 3:
      return UnpackValues<3>(tile, tables, to);
    case 2:
      return UnpackValues<2>(tile, tables, to);
    default:
      return UnpackValues<1>(tile, tables, to);
  }
}

// A V tile of 8 bits.
ZEROC_AMX_TARGET inline void UnpackWideValues(const std::uint8_t* tile, const Scales& scales, const ByteFloats& bytes,
                                              std::uint8_t* to, std::uint8_t* low) {
  alignas(64) float step[16], base[16];
  _mm512_store_ps(step, scales.step);
  _mm512_store_ps(base, scales.base);
  for (int s = 0; s < 4; ++s) {
    const __m512i quad = LoadTileRow(tile + 64 * s);
    __m512 value[4];
    for (int i = 0; i < 4; ++i) {
      value[i] =
          _mm512_fmadd_ps(WideCode(bytes, quad, i), _mm512_set1_ps(step[4 * s + i]), _mm512_set1_ps(base[4 * s + i]));
    }
    StoreQuad(value, to + 128 * s, low + 128 * s);
  }
}

// Copies a 16-bit V tile with the depth steps that are not in [begin, end) as zeros: rows never written may hold NaN,
// and 0 * NaN is NaN.
ZEROC_AMX_TARGET inline void CopySeenValues(const std::uint8_t* tile, int begin, int end, std::uint8_t* to) {
  for (int depth = 0; depth < kTileDepth; depth += 2) {
    const std::uint32_t even = begin <= depth && depth < end ? 0xffffu : 0u;
    const std::uint32_t odd = begin <= depth + 1 && depth + 1 < end ? 0xffff0000u : 0u;
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(even | odd));
    _mm512_storeu_si512(to + 32 * depth, _mm512_and_si512(LoadTileRow(tile + 32 * depth), mask));
  }
}

}  // namespace zeroc::kernels::cpu
