// What decode attention does around its two integer products: the state of a call, q and probabilities as integers, and
// softmax. For attention_vnni.cc and decode_tiles.h; the integers are attention_codes.cc's too.
//
// A number is a 16-bit integer times a scale of its row and run, in a high and a low byte, so that products of bytes
// (VNNI, AMX) lose nothing but that rounding.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/checks.h"
#include "kernels/cpu/avx512.h"
#include "kernels/ops.h"

namespace zeroc::kernels::cpu {

inline constexpr int kDecodeSpanBlocks = 4;
inline constexpr int kDecodeSpanTokens = kDecodeSpanBlocks * kBlockTokens;
// Runs of q start at multiples of 64 bytes, the depth of a tile.
inline constexpr int kQueryBytes = kMaxHeadDim + 64 * kMaxRuns;
// 127 * 256: the high byte of a rounded number stays within a signed byte, and sums over 256 products within 32 bits.
inline constexpr float kLargest = 32512.0f;

// Numbers as 16-bit integers, in a high and a low byte: number = 256 high + low.
ZEROC_AVX512_TARGET inline __m512i StoreBytes(__m512 number, std::int8_t* high, std::int8_t* low) {
  const __m512i whole = _mm512_cvtps_epi32(number);
  const __m512i top = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(top));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(whole));
  return whole;
}

// Four bytes, in every lane.
ZEROC_AVX512_TARGET inline __m512i BroadcastWord(const std::int8_t* bytes) {
  std::int32_t word;
  std::memcpy(&word, bytes, sizeof(word));
  return _mm512_set1_epi32(word);
}

// Largest absolute value; NaN if one is.
ZEROC_AVX512_TARGET inline float LargestOf(const float* x, int n) {
  __m512 top = _mm512_setzero_ps();
  __mmask16 is_nan = 0;
  for (int i = 0; i < n; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    top = _mm512_max_ps(top, _mm512_abs_ps(v));
    is_nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  }
  return is_nan != 0 ? __builtin_nanf("") : _mm512_reduce_max_ps(top);
}

// What one call keeps over its blocks.
struct DecodeCall {
  const AttentionArgs* args;
  float* sums;                                            // [n_rows, head_dim], rotated within a packed segment
  alignas(64) float row_sums[kDecodeRowsMax][16];         // in lanes
  float row_max[kDecodeRowsMax];                          // in units of ln 2
  alignas(64) float bases[kDecodeRowsMax][kMaxRuns][16];  // probability * base of each V run, in lanes
  // q of the segment's quantised runs, from q_column[run] on; rows from kDecodeRowsMax on are the low bytes.
  alignas(64) std::int8_t q_bytes[2 * kDecodeRowsMax][kQueryBytes];
  int q_column[kMaxRuns];
  alignas(64) std::uint16_t q_split[2 * kDecodeRowsMax][kMaxHeadDim];  // all of q: bf16, then remainders (tiles)
  float q_scale[kDecodeRowsMax][kMaxRuns];
  float q_sum[kDecodeRowsMax][kMaxRuns];
  std::uint8_t* k_codes;  // scratch for unpacked codes of a span, null without tiles
  std::uint8_t* v_codes;
  const KvSegment* segment;
  const float* mass;
  TokenSpan rows[kDecodeRowsMax];  // what each row sees of the segment
};

struct DecodeSpan {
  const KvBlockLayout* layout;
  int n_blocks, first_token;
  int begin, end;  // tokens that some row sees, from the span's first
  const std::uint8_t* heads[kDecodeSpanBlocks];
  alignas(64) float scores[kDecodeRowsMax][kDecodeSpanTokens];             // then probabilities
  alignas(64) float steps[kDecodeSpanTokens];                              // of one V run
  alignas(64) std::int8_t weights[2 * kDecodeRowsMax][kDecodeSpanTokens];  // of one V run, as q_bytes
  float largest[kDecodeRowsMax];                                           // probability
};

// Token groups of block i that some row sees.
struct GroupRange {
  int begin, end;
};
inline GroupRange GroupsOf(const DecodeSpan& span, int i) {
  const int n_tokens = span.layout->n_tokens, first = i * n_tokens;
  const int begin = span.begin > first ? span.begin - first : 0;
  const int end = span.end - first < n_tokens ? span.end - first : n_tokens;
  return {begin / kTileLanes, end <= begin ? begin / kTileLanes : (end + kTileLanes - 1) / kTileLanes};
}

ZEROC_AVX512_TARGET inline void QuantiseQueries(DecodeCall* call) {
  const AttentionArgs& args = *call->args;
  const KvSideLayout& k = call->segment->layout->k;
  std::memset(call->q_bytes, 0, sizeof(call->q_bytes));
  int column = 0;
  for (int r = 0; r < k.n_runs; ++r) {
    call->q_column[r] = column;
    column += (k.runs[r].width + 63) / 64 * 64;
  }
  for (int row = 0; row < args.n_rows; ++row) {
    const float* q = args.q + std::int64_t{row} * args.head_dim;
    for (int r = 0; r < k.n_runs; ++r) {
      const int first = k.first_coord[r], width = k.runs[r].width;
      if (!IsQuantised(k.runs[r].bits)) continue;
      const float largest = LargestOf(q + first, width);
      const __m512 inverse = _mm512_set1_ps(largest > 0.0f ? kLargest / largest : 0.0f);
      __m512i sum = _mm512_setzero_si512();
      for (int i = first; i < first + width; i += 16) {
        const __m512 number = _mm512_mul_ps(_mm512_loadu_ps(q + i), inverse);
        const int at = call->q_column[r] + i - first;
        sum = _mm512_add_epi32(sum,
                               StoreBytes(number, call->q_bytes[row] + at, call->q_bytes[row + kDecodeRowsMax] + at));
      }
      call->q_scale[row][r] = largest * (1.0f / kLargest);
      call->q_sum[row][r] = call->q_scale[row][r] * static_cast<float>(_mm512_reduce_add_epi32(sum));
    }
  }
}

ZEROC_AVX512_TARGET inline void StartScores(const DecodeCall& call, DecodeSpan* span) {
  const int n_tokens = span->layout->n_tokens;
  if (call.mass == nullptr) {
    for (int row = 0; row < call.args->n_rows; ++row) {
      std::memset(span->scores[row], 0, sizeof(float) * static_cast<std::size_t>(n_tokens * span->n_blocks));
    }
    return;
  }
  for (int i = 0; i < span->n_blocks; ++i) {
    DecodeMass(*span->layout, span->heads[i], call.mass, span->scores[0] + i * n_tokens);
  }
  for (int row = 1; row < call.args->n_rows; ++row) {
    std::memcpy(span->scores[row], span->scores[0],
                sizeof(float) * static_cast<std::size_t>(n_tokens * span->n_blocks));
  }
}

// ---- Softmax -------------------------------------------------------------------------------------------------------

// Scores to probabilities against the row's new maximum; earlier sums are scaled to it.
ZEROC_AVX512_TARGET inline void Softmax(DecodeCall* call, DecodeSpan* span, int row) {
  const int begin = span->begin / 16 * 16, end = (span->end + 15) / 16 * 16;
  float* scores = span->scores[row];
  const int seen_begin = call->rows[row].begin - span->first_token, seen_end = call->rows[row].end - span->first_token;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512 top = _mm512_set1_ps(kNoScore);
  const bool partial = seen_begin > begin || seen_end < end;
  for (int t = begin; t < end; t += 16) {
    __m512 score = _mm512_mul_ps(_mm512_load_ps(scores + t), _mm512_set1_ps(kLog2E));
    if (partial) {
      const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(t));
      const __mmask16 is_seen = _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(seen_begin)) &
                                _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(seen_end));
      score = _mm512_mask_mov_ps(_mm512_set1_ps(kNoScore), is_seen, score);
    }
    _mm512_store_ps(scores + t, score);
    top = _mm512_max_ps(top, score);
  }
  const float before = call->row_max[row], of_span = _mm512_reduce_max_ps(top);
  const float now = of_span > before ? of_span : before;
  const float offset = now == kNoScore ? 0.0f : now;
  span->largest[row] = _mm512_cvtss_f32(Exp2(_mm512_set1_ps(of_span - offset)));
  __m512 sum = _mm512_load_ps(call->row_sums[row]);
  if (now != before && before != kNoScore) {
    const float factor = _mm512_cvtss_f32(Exp2(_mm512_set1_ps(before - now)));
    sum = _mm512_mul_ps(sum, _mm512_set1_ps(factor));
    ScaleRow(call->sums + std::int64_t{row} * call->args->head_dim, call->args->head_dim, factor);
    ScaleRow(call->bases[row][0], 16 * kMaxRuns, factor);
  }
  for (int t = begin; t < end; t += 16) {
    const __m512 p = Exp2(_mm512_sub_ps(_mm512_load_ps(scores + t), _mm512_set1_ps(offset)));
    _mm512_store_ps(scores + t, p);
    sum = _mm512_add_ps(sum, p);
  }
  _mm512_store_ps(call->row_sums[row], sum);
  call->row_max[row] = now;
}

// Probability times step as bytes, for one quantised run of V. Returns the largest step; a row's unit is that times
// span->largest / kLargest. What the bytes rounded off is multiplied by the code, whose mean over coordinates would
// turn into one coordinate by the rotation: the bases take it back times the middle code, as if codes were signed.
ZEROC_AVX512_TARGET inline float QuantiseWeights(DecodeCall* call, DecodeSpan* span, int r) {
  alignas(64) float centers[kDecodeSpanTokens];
  const int n_tokens = span->layout->n_tokens;
  const int begin = span->begin / 16 * 16, end = (span->end + 15) / 16 * 16;
  __m512 top = _mm512_setzero_ps();
  for (int t = begin; t < end; t += 16) {
    const Scales scales =
        DecodeScales(span->layout->v, r, span->heads[t / n_tokens], n_tokens, t % n_tokens / kTileLanes);
    _mm512_store_ps(span->steps + t, scales.step);
    _mm512_store_ps(centers + t, _mm512_add_ps(scales.base, scales.half));
    top = _mm512_max_ps(top, scales.step);
  }
  const float largest = _mm512_reduce_max_ps(top);
  const float middle = 0.5f * static_cast<float>((1 << span->layout->v.runs[r].bits) - 1);
  for (int row = 0; row < call->args->n_rows; ++row) {
    const float unit = largest * span->largest[row];
    const __m512 inverse = _mm512_set1_ps(unit > 0.0f ? kLargest / unit : 0.0f);
    __m512 sum = _mm512_load_ps(call->bases[row][r]);
    __m512i numbers = _mm512_setzero_si512();
    // Tiles read whole blocks.
    for (int half = row; half < 2 * kDecodeRowsMax; half += kDecodeRowsMax) {
      std::memset(span->weights[half], 0, static_cast<std::size_t>(begin));
      std::memset(span->weights[half] + end, 0, static_cast<std::size_t>(span->n_blocks * n_tokens - end));
    }
    for (int t = begin; t < end; t += 16) {
      const __m512 p = _mm512_load_ps(span->scores[row] + t);
      const __m512 number = _mm512_mul_ps(_mm512_mul_ps(p, _mm512_load_ps(span->steps + t)), inverse);
      numbers = _mm512_add_epi32(numbers, StoreBytes(_mm512_min_ps(number, _mm512_set1_ps(kLargest)),
                                                     span->weights[row] + t, span->weights[row + kDecodeRowsMax] + t));
      sum = _mm512_fmadd_ps(p, _mm512_load_ps(centers + t), sum);
    }
    const __m512 of_middle = _mm512_set1_ps(-middle * unit * (1.0f / kLargest));
    _mm512_store_ps(call->bases[row][r], _mm512_fmadd_ps(_mm512_cvtepi32_ps(numbers), of_middle, sum));
  }
  return largest;
}

}  // namespace zeroc::kernels::cpu
