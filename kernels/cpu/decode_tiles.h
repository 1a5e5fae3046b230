// The products of decode attention on AMX tiles, which cost the same for one row and for eight: the 16 rows of an A
// operand are the high and the low bytes (for exact runs: the rounded numbers and their remainders) of up to eight
// rows. For attention_vnni.cc only, while the tiles are configured for 16 rows.
//
// Packed tiles of 8 bits already are B operands; smaller codes become bytes in scratch, one span at a time.
#pragma once

#include "kernels/cpu/decode_span.h"

namespace zeroc::kernels::cpu {

static_assert(2 * kDecodeRowsMax == 16, "one tile of rows");

// Fewer rows are faster with VNNI on codes: unpacking to memory and back costs more than the products.
inline constexpr int kTileRowsMin = 5;

// What the tiles take of a layout: whole blocks, and exact runs in whole pairs of tiles, since behind a run may lie
// what was never written. V must be seen whole for the same reason.
inline bool TilesTakeKeys(const KvBlockLayout& layout, int n_rows, int r) {
  const KvRun& run = layout.k.runs[r];
  if (layout.n_tokens != kBlockTokens) return false;
  return IsQuantised(run.bits) ? n_rows >= kTileRowsMin : run.width % 32 == 0;
}
inline bool TilesTakeValues(const DecodeSpan& span, int n_rows, int r) {
  if (span.layout->n_tokens != kBlockTokens) return false;
  if (IsQuantised(span.layout->v.runs[r].bits)) return n_rows >= kTileRowsMin;
  return span.begin == 0 && span.end == span.n_blocks * kBlockTokens;
}

// 16 numbers as bf16, and the remainders eight rows below.
ZEROC_AMX_TARGET inline void StoreSplit(__m512 number, std::int64_t stride, std::uint16_t* to) {
  const __m256i high = (__m256i)_mm512_cvtneps_pbh(number);
  const __m512 held = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), high);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kDecodeRowsMax * stride),
                      (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(number, held)));
}

ZEROC_AMX_TARGET inline void SplitQueries(DecodeCall* call) {
  const AttentionArgs& args = *call->args;
  std::memset(call->q_split, 0, sizeof(call->q_split));
  for (int row = 0; row < args.n_rows; ++row) {
    for (int i = 0; i < args.head_dim; i += 16) {
      StoreSplit(_mm512_loadu_ps(args.q + std::int64_t{row} * args.head_dim + i), kMaxHeadDim, &call->q_split[row][i]);
    }
  }
}

// products[16][64] of one block: A rows of `depth` bytes, B tiles of 1,024 bytes, `group_bytes` from group to group.
template <bool kCodes>
ZEROC_AMX_TARGET inline void BlockProducts(const void* a, std::int64_t a_stride, int depth, const std::uint8_t* tiles,
                                           int group_bytes, void* products, std::int64_t stride) {
  const auto* from = static_cast<const std::uint8_t*>(a);
  auto* to = static_cast<std::uint8_t*>(products);
  asm volatile("" : : : "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int i = 0; i < depth; i += 64, tiles += 1024) {
    _tile_loadd(4, from + i, a_stride);
    _tile_loadd(6, tiles, 64);
    _tile_loadd(7, tiles + group_bytes, 64);
    if constexpr (kCodes) {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_loadd(6, tiles + 2 * group_bytes, 64);
    _tile_loadd(7, tiles + 3 * group_bytes, 64);
    if constexpr (kCodes) {
      _tile_dpbsud(2, 4, 6);
      _tile_dpbsud(3, 4, 7);
    } else {
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, to, stride);
  _tile_stored(1, to + 64, stride);
  _tile_stored(2, to + 128, stride);
  _tile_stored(3, to + 192, stride);
  asm volatile("" : : : "memory");
}

// scores += q . k of one run, for all tokens of the span. scratch: kSideBytes.
ZEROC_AMX_TARGET inline void TileScores(const DecodeCall& call, int r, std::uint8_t* scratch, DecodeSpan* span) {
  constexpr std::int64_t kRowBytes = 4 * kDecodeSpanTokens;
  alignas(64) std::int32_t products[2 * kDecodeRowsMax][kDecodeSpanTokens];
  const KvSideLayout& k = span->layout->k;
  const int bits = k.runs[r].bits, width = k.runs[r].width, n_tiles = width / kTileDepth;
  const bool in_place = bits == 16 || (bits == 8 && width % 64 == 0);
  const std::uint8_t* blocks[kDecodeSpanBlocks];
  for (int i = 0; i < span->n_blocks; ++i) {  // all before the first product: a tile waits for stores to leave for L1
    blocks[i] = span->heads[i] + k.codes_offset[r];
    if (in_place) continue;
    // Behind a run that is not a multiple of 64 wide the products read other bytes, times zeros.
    std::uint8_t* to = scratch + i * 4 * n_tiles * 256;
    UnpackBytesOf(bits, blocks[i], 4 * n_tiles, to);
    blocks[i] = to;
  }
  for (int i = 0; i < span->n_blocks; ++i) {
    const std::uint8_t* tiles = blocks[i];
    if (bits == 16) {
      BlockProducts<false>(&call.q_split[0][k.first_coord[r]], 2 * kMaxHeadDim, 2 * width, tiles, 512 * n_tiles,
                           &products[0][kBlockTokens * i], kRowBytes);
    } else {
      BlockProducts<true>(&call.q_bytes[0][call.q_column[r]], kQueryBytes, width, tiles, 256 * n_tiles,
                          &products[0][kBlockTokens * i], kRowBytes);
    }
  }
  for (int t = 0; t < span->n_blocks * kBlockTokens; t += 16) {
    Scales scales = {};
    if (bits != 16) {
      scales = DecodeScales(k, r, span->heads[t / kBlockTokens], kBlockTokens, t % kBlockTokens / kTileLanes);
    }
    for (int row = 0; row < call.args->n_rows; ++row) {
      const __m512i high = _mm512_load_si512(&products[row][t]);
      const __m512i low = _mm512_load_si512(&products[row + kDecodeRowsMax][t]);
      __m512 product;
      if (bits == 16) {
        product = _mm512_add_ps(_mm512_castsi512_ps(high), _mm512_castsi512_ps(low));
      } else {
        product = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
        const __m512 base = _mm512_mul_ps(scales.base, _mm512_set1_ps(call.q_sum[row][r]));
        const __m512 step = _mm512_mul_ps(scales.step, _mm512_set1_ps(call.q_scale[row][r]));
        product = _mm512_fmadd_ps(product, step, base);
      }
      float* score = span->scores[row] + t;
      _mm512_store_ps(score, _mm512_add_ps(_mm512_load_ps(score), product));
    }
  }
}

// products[16][16] of one tile of coordinates, summed over the span's blocks; for up to four tiles.
template <bool kCodes>
ZEROC_AMX_TARGET inline void SpanProducts(const void* a, std::int64_t a_stride, const std::uint8_t* const* blocks,
                                          int n_blocks, int n_tiles, std::int32_t (*products)[64]) {
  constexpr int kTileOfBlock = kCodes ? 1024 : 2048;  // 64 tokens
  asm volatile("" : : : "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int i = 0; i < n_blocks; ++i) {
    for (int half = 0; half < kTileOfBlock / 1024; ++half) {
      const std::uint8_t* tiles = blocks[i] + 1024 * half;
      _tile_loadd(4, static_cast<const std::uint8_t*>(a) + (i * kTileOfBlock / 1024 + half) * 64, a_stride);
      _tile_loadd(6, tiles, 64);
      if constexpr (kCodes) _tile_dpbsud(0, 4, 6);
      if constexpr (!kCodes) _tile_dpbf16ps(0, 4, 6);
      if (n_tiles > 1) {
        _tile_loadd(7, tiles + kTileOfBlock, 64);
        if constexpr (kCodes) _tile_dpbsud(1, 4, 7);
        if constexpr (!kCodes) _tile_dpbf16ps(1, 4, 7);
      }
      if (n_tiles > 2) {
        _tile_loadd(6, tiles + 2 * kTileOfBlock, 64);
        if constexpr (kCodes) _tile_dpbsud(2, 4, 6);
        if constexpr (!kCodes) _tile_dpbf16ps(2, 4, 6);
      }
      if (n_tiles > 3) {
        _tile_loadd(7, tiles + 3 * kTileOfBlock, 64);
        if constexpr (kCodes) _tile_dpbsud(3, 4, 7);
        if constexpr (!kCodes) _tile_dpbf16ps(3, 4, 7);
      }
    }
  }
  _tile_stored(0, &products[0][0], 256);
  _tile_stored(1, &products[0][16], 256);
  _tile_stored(2, &products[0][32], 256);
  _tile_stored(3, &products[0][48], 256);
  asm volatile("" : : : "memory");
}

// sums += probabilities . V of one run, over the span. scratch: kSideBytes.
ZEROC_AMX_TARGET inline void TileSums(const DecodeCall& call, const DecodeSpan& span, int r, float largest_step,
                                      std::uint8_t* scratch) {
  alignas(64) std::int32_t products[2 * kDecodeRowsMax][64];
  alignas(64) std::uint16_t split[2 * kDecodeRowsMax][kDecodeSpanTokens];
  const KvSideLayout& v = span.layout->v;
  const int bits = v.runs[r].bits, n_tiles = v.runs[r].width / kTileLanes;
  const std::uint8_t* blocks[kDecodeSpanBlocks];
  for (int i = 0; i < span.n_blocks; ++i) {
    blocks[i] = span.heads[i] + v.codes_offset[r];
    if (bits >= 8) continue;
    std::uint8_t* to = scratch + i * n_tiles * 1024;
    UnpackBytesOf(bits, blocks[i], 4 * n_tiles, to);
    blocks[i] = to;
  }
  for (int row = 0; row < call.args->n_rows && bits == 16; ++row) {
    for (int t = 0; t < span.n_blocks * kBlockTokens; t += 16) {
      StoreSplit(_mm512_load_ps(span.scores[row] + t), kDecodeSpanTokens, &split[row][t]);
    }
  }
  for (int tile = 0; tile < n_tiles; tile += 4) {
    const int n = n_tiles - tile < 4 ? n_tiles - tile : 4;
    if (bits == 16) {
      SpanProducts<false>(split, 2 * kDecodeSpanTokens, blocks, span.n_blocks, n, products);
    } else {
      SpanProducts<true>(span.weights, kDecodeSpanTokens, blocks, span.n_blocks, n, products);
    }
    for (int i = 0; i < span.n_blocks; ++i) blocks[i] += n * (bits == 16 ? 2048 : 1024);
    for (int row = 0; row < call.args->n_rows; ++row) {
      const __m512 unit = _mm512_set1_ps(largest_step * span.largest[row] * (1.0f / kLargest));
      float* sums = call.sums + std::int64_t{row} * call.args->head_dim + v.first_coord[r] + 16 * tile;
      for (int i = 0; i < 16 * n; i += 16) {
        const __m512i high = _mm512_load_si512(&products[row][i]);
        const __m512i low = _mm512_load_si512(&products[row + kDecodeRowsMax][i]);
        const __m512 sum = bits == 16 ? _mm512_add_ps(_mm512_castsi512_ps(high), _mm512_castsi512_ps(low))
                                      : _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
        const __m512 before = _mm512_loadu_ps(sums + i);
        _mm512_storeu_ps(sums + i, bits == 16 ? _mm512_add_ps(before, sum) : _mm512_fmadd_ps(sum, unit, before));
      }
    }
  }
}

}  // namespace zeroc::kernels::cpu
