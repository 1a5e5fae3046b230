// Attention on AVX-512 VNNI, for decode: the variant of attention.cc for at most kDecodeRowsMax rows.
//
// The products are of integers: codes as they lie, unpacked in registers, by q (for scores) or by the probability times
// the step of the token (for sums of V), which are 16-bit integers in two bytes, each with one scale per row and run.
// Runs of 16 bits take float32 products. Nothing is written back per block but scores: up to four blocks, the span,
// share one softmax and one set of integer sums. With AMX, exact runs, and codes for many rows, go to decode_tiles.h.
#include <cstdint>
#include <cstring>

#include "kernels/checks.h"
#include "kernels/cpu/amx.h"
#include "kernels/cpu/attention_scratch.h"
#include "kernels/cpu/cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/decode_span.h"
#include "kernels/cpu/decode_tiles.h"

namespace zeroc::kernels::cpu {
namespace {

constexpr int kRowsAtOnce = 4;  // as many sums as the registers hold

// ---- Scores --------------------------------------------------------------------------------------------------------

// products[r][16] of one token group and run.
template <int kBits, int kRows>
ZEROC_VNNI_TARGET inline void CodeProducts(const std::uint8_t* tiles, int n_tiles, const std::int8_t* q_high,
                                           const std::int8_t* q_low, __m512* products) {
  __m512i high[kRows], low[kRows];
  for (int r = 0; r < kRows; ++r) high[r] = low[r] = _mm512_setzero_si512();
  for (int i = 0; i < n_tiles; ++i, tiles += TileBytes(kBits), q_high += 16, q_low += 16) {
    __m512i quads[4];
    Quads<kBits>(tiles, quads);
    for (int s = 0; s < 4; ++s) {
      for (int r = 0; r < kRows; ++r) {
        high[r] = _mm512_dpbusd_epi32(high[r], quads[s], BroadcastWord(q_high + r * kQueryBytes + 4 * s));
        low[r] = _mm512_dpbusd_epi32(low[r], quads[s], BroadcastWord(q_low + r * kQueryBytes + 4 * s));
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    products[r] = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[r], 8), low[r]));
  }
}

template <int kRows>
ZEROC_VNNI_TARGET inline void ExactProducts(const std::uint8_t* tiles, int n_tiles, const float* q, std::int64_t dim,
                                            __m512* products) {
  __m512 even[kRows], odd[kRows];
  for (int r = 0; r < kRows; ++r) even[r] = odd[r] = _mm512_setzero_ps();
  const __m512i upper = _mm512_set1_epi32(INT32_MIN >> 15);
  for (int depth = 0; depth < 16 * n_tiles; depth += 2, tiles += 64) {
    const __m512i pair = LoadTileRow(tiles);
    const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
    const __m512 second = _mm512_castsi512_ps(_mm512_and_si512(pair, upper));
    for (int r = 0; r < kRows; ++r) {
      even[r] = _mm512_fmadd_ps(first, _mm512_set1_ps(q[r * dim + depth]), even[r]);
      odd[r] = _mm512_fmadd_ps(second, _mm512_set1_ps(q[r * dim + depth + 1]), odd[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) products[r] = _mm512_add_ps(even[r], odd[r]);
}

template <int kBits, int kRows>
ZEROC_VNNI_TARGET void ScoresOfRun(const DecodeCall& call, int row, int r, int i, DecodeSpan* span) {
  const KvSideLayout& k = span->layout->k;
  const int n_tiles = k.runs[r].width / kTileDepth, first = k.first_coord[r];
  const GroupRange groups = GroupsOf(*span, i);
  const std::uint8_t* tiles = span->heads[i] + k.codes_offset[r];
  for (int g = groups.begin; g < groups.end; ++g) {
    const int t = i * span->layout->n_tokens + 16 * g;
    __m512 products[kRows];
    const std::uint8_t* from = tiles + g * n_tiles * TileBytes(kBits);
    if constexpr (kBits == 16) {
      const std::int64_t dim = call.args->head_dim;
      ExactProducts<kRows>(from, n_tiles, call.args->q + row * dim + first, dim, products);
    } else {
      const int column = call.q_column[r];
      CodeProducts<kBits, kRows>(from, n_tiles, call.q_bytes[row] + column, call.q_bytes[row + kDecodeRowsMax] + column,
                                 products);
      const Scales scales = DecodeScales(k, r, span->heads[i], span->layout->n_tokens, g);
      for (int j = 0; j < kRows; ++j) {
        const __m512 step = _mm512_mul_ps(scales.step, _mm512_set1_ps(call.q_scale[row + j][r]));
        const __m512 base = _mm512_mul_ps(scales.base, _mm512_set1_ps(call.q_sum[row + j][r]));
        products[j] = _mm512_fmadd_ps(products[j], step, base);
      }
    }
    for (int j = 0; j < kRows; ++j) {
      float* score = span->scores[row + j] + t;
      _mm512_store_ps(score, _mm512_add_ps(_mm512_load_ps(score), products[j]));
    }
  }
}

// ---- Sums of V -----------------------------------------------------------------------------------------------------

template <int kBits, int kRows>
ZEROC_VNNI_TARGET inline void CodeSums(const DecodeSpan& span, int row, int r, int tile, const __m512* units,
                                       float* sums, std::int64_t dim) {
  const KvSideLayout& v = span.layout->v;
  const int n_groups = span.layout->n_tokens / kTileLanes;
  __m512i high[kRows], low[kRows];
  for (int j = 0; j < kRows; ++j) high[j] = low[j] = _mm512_setzero_si512();
  for (int i = 0; i < span.n_blocks; ++i) {
    const GroupRange groups = GroupsOf(span, i);
    const std::uint8_t* tiles = span.heads[i] + v.codes_offset[r] + tile * n_groups * TileBytes(kBits);
    for (int g = groups.begin; g < groups.end; ++g) {
      const int t = i * span.layout->n_tokens + 16 * g;
      __m512i quads[4];
      Quads<kBits>(tiles + g * TileBytes(kBits), quads);
      for (int s = 0; s < 4; ++s) {
        for (int j = 0; j < kRows; ++j) {
          high[j] = _mm512_dpbusd_epi32(high[j], quads[s], BroadcastWord(span.weights[row + j] + t + 4 * s));
          low[j] =
              _mm512_dpbusd_epi32(low[j], quads[s], BroadcastWord(span.weights[row + j + kDecodeRowsMax] + t + 4 * s));
        }
      }
    }
  }
  for (int j = 0; j < kRows; ++j) {
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[j], 8), low[j]));
    _mm512_storeu_ps(sums + j * dim, _mm512_fmadd_ps(sum, units[j], _mm512_loadu_ps(sums + j * dim)));
  }
}

template <int kRows>
ZEROC_VNNI_TARGET inline void ExactSums(const DecodeSpan& span, int row, int r, int tile, float* sums,
                                        std::int64_t dim) {
  const KvSideLayout& v = span.layout->v;
  const int n_tokens = span.layout->n_tokens;
  const __m512i upper = _mm512_set1_epi32(INT32_MIN >> 15), lower = _mm512_set1_epi32(0xffff);
  __m512 even[kRows], odd[kRows];
  for (int j = 0; j < kRows; ++j) {
    even[j] = _mm512_loadu_ps(sums + j * dim);
    odd[j] = _mm512_setzero_ps();
  }
  for (int i = 0; i < span.n_blocks; ++i) {
    const std::uint8_t* pairs = span.heads[i] + v.codes_offset[r] + tile * n_tokens * 32;
    const int first = i * n_tokens;
    const int end = span.end < first + n_tokens ? span.end : first + n_tokens;
    for (int t = span.begin > first ? span.begin / 2 * 2 : first; t < end; t += 2) {
      __m512i pair = LoadTileRow(pairs + 32 * (t - first));
      // Rows that were never written may hold NaN, and 0 * NaN is NaN.
      if (t < span.begin) pair = _mm512_and_si512(pair, upper);
      if (t + 1 >= span.end) pair = _mm512_and_si512(pair, lower);
      const __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
      const __m512 b = _mm512_castsi512_ps(_mm512_and_si512(pair, upper));
      for (int j = 0; j < kRows; ++j) {
        even[j] = _mm512_fmadd_ps(a, _mm512_set1_ps(span.scores[row + j][t]), even[j]);
        odd[j] = _mm512_fmadd_ps(b, _mm512_set1_ps(span.scores[row + j][t + 1]), odd[j]);
      }
    }
  }
  for (int j = 0; j < kRows; ++j) _mm512_storeu_ps(sums + j * dim, _mm512_add_ps(even[j], odd[j]));
}

template <int kBits, int kRows>
ZEROC_VNNI_TARGET void SumsOfRun(const DecodeCall& call, const DecodeSpan& span, int row, int r, float largest_step) {
  const KvSideLayout& v = span.layout->v;
  const std::int64_t dim = call.args->head_dim;
  __m512 units[kRows];
  for (int j = 0; j < kRows; ++j) {
    units[j] = _mm512_set1_ps(largest_step * span.largest[row + j] * (1.0f / kLargest));
  }
  for (int tile = 0; tile < v.runs[r].width / kTileLanes; ++tile) {
    float* sums = call.sums + row * dim + v.first_coord[r] + 16 * tile;
    if constexpr (kBits == 16) {
      ExactSums<kRows>(span, row, r, tile, sums, dim);
    } else {
      CodeSums<kBits, kRows>(span, row, r, tile, units, sums, dim);
    }
  }
}

// ---- Dispatch over widths and rows ---------------------------------------------------------------------------------

// fn.template operator()<kBits, kRows>(row) for all rows of the call, at most kRowsAtOnce together.
template <int kBits, typename Fn>
ZEROC_VNNI_TARGET inline void ForRows(int n_rows, const Fn& fn) {
  for (int row = 0; row < n_rows; row += kRowsAtOnce) {
    switch (n_rows - row) {
      case 1:
        fn.template Run<kBits, 1>(row);
        break;
      case 2:
        fn.template Run<kBits, 2>(row);
        break;
      case 3:
        fn.template Run<kBits, 3>(row);
        break;
      default:
        fn.template Run<kBits, kRowsAtOnce>(row);
    }
  }
}

template <typename Fn>
ZEROC_VNNI_TARGET inline void ForBitsAndRows(int bits, int n_rows, const Fn& fn) {
  switch (bits) {
    case 16:
      return ForRows<16>(n_rows, fn);
    case 8:
      return ForRows<8>(n_rows, fn);
    case 4:
      return ForRows<4>(n_rows, fn);
    case 3:
      return ForRows<3>(n_rows, fn);
    case 2:
      return ForRows<2>(n_rows, fn);
    default:
      return ForRows<1>(n_rows, fn);
  }
}

struct ScoresFn {
  const DecodeCall& call;
  DecodeSpan* span;
  int run, block;
  template <int kBits, int kRows>
  ZEROC_VNNI_TARGET void Run(int row) const {
    ScoresOfRun<kBits, kRows>(call, row, run, block, span);
  }
};

struct SumsFn {
  const DecodeCall& call;
  const DecodeSpan& span;
  int run;
  float largest_step;
  template <int kBits, int kRows>
  ZEROC_VNNI_TARGET void Run(int row) const {
    SumsOfRun<kBits, kRows>(call, span, row, run, largest_step);
  }
};

// ---- Segments ------------------------------------------------------------------------------------------------------

ZEROC_VNNI_TARGET void AttendSpan(DecodeCall* call, int first_block, int end_block, int prefetch_end, TokenSpan seen) {
  const AttentionArgs& args = *call->args;
  const KvBlockLayout& layout = *call->segment->layout;
  const std::int64_t head_offset = std::int64_t{args.kv_head} * layout.head_bytes;
  DecodeSpan span;
  span.layout = &layout;
  span.n_blocks = end_block - first_block;
  span.first_token = first_block * layout.n_tokens;
  span.begin = seen.begin > span.first_token ? seen.begin - span.first_token : 0;
  span.end = (seen.end < end_block * layout.n_tokens ? seen.end : end_block * layout.n_tokens) - span.first_token;
  for (int i = 0; i < span.n_blocks; ++i) span.heads[i] = call->segment->blocks[first_block + i] + head_offset;
  StartScores(*call, &span);
  for (int i = 0; i < span.n_blocks; ++i) {
    // The next span's bytes travel while this one is computed: blocks lie anywhere, the hardware cannot foresee them.
    const int next = first_block + i + kDecodeSpanBlocks;
    if (next < prefetch_end) PrefetchBytes(call->segment->blocks[next] + head_offset, layout.head_bytes);
  }
  for (int r = 0; r < layout.k.n_runs; ++r) {
    const int bits = layout.k.runs[r].bits;
    if (bits == 0) continue;
    if (call->k_codes != nullptr && TilesTakeKeys(layout, args.n_rows, r)) {
      TileScores(*call, r, call->k_codes, &span);
      continue;
    }
    for (int i = 0; i < span.n_blocks; ++i) ForBitsAndRows(bits, args.n_rows, ScoresFn{*call, &span, r, i});
  }
  for (int row = 0; row < args.n_rows; ++row) Softmax(call, &span, row);
  for (int r = 0; r < layout.v.n_runs; ++r) {
    const int bits = layout.v.runs[r].bits;
    if (bits == 0) continue;
    const float largest_step = IsQuantised(bits) ? QuantiseWeights(call, &span, r) : 0.0f;
    if (call->v_codes != nullptr && TilesTakeValues(span, args.n_rows, r)) {
      TileSums(*call, span, r, largest_step, call->v_codes);
    } else {
      ForBitsAndRows(bits, args.n_rows, SumsFn{*call, span, r, largest_step});
    }
  }
}

ZEROC_VNNI_TARGET void AttendSegment(DecodeCall* call, const KvSegment& segment) {
  const AttentionArgs& args = *call->args;
  const KvBlockLayout& layout = *segment.layout;
  const TokenSpan seen = RowsSpan(args, segment);
  if (seen.begin >= seen.end) return;
  call->segment = &segment;
  call->mass = segment.mass != nullptr ? segment.mass + std::int64_t{args.kv_head} * (1 + kMaxRuns) : nullptr;
  std::memset(call->bases, 0, sizeof(call->bases));
  QuantiseQueries(call);
  for (int row = 0; row < args.n_rows; ++row) {
    call->rows[row] = RowSpan(args, segment, row);
    RotateValues(layout, call->sums + std::int64_t{row} * args.head_dim);
  }
  const int end_block = (seen.end + layout.n_tokens - 1) / layout.n_tokens;
  for (int b = seen.begin / layout.n_tokens; b < end_block; b += kDecodeSpanBlocks) {
    AttendSpan(call, b, b + kDecodeSpanBlocks < end_block ? b + kDecodeSpanBlocks : end_block, end_block, seen);
  }
  for (int row = 0; row < args.n_rows; ++row) {
    float* sums = call->sums + std::int64_t{row} * args.head_dim;
    for (int r = 0; r < layout.v.n_runs; ++r) {
      if (!IsQuantised(layout.v.runs[r].bits)) continue;
      const __m512 base = _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_load_ps(call->bases[row][r])));
      for (int i = layout.v.first_coord[r]; i < layout.v.first_coord[r] + layout.v.runs[r].width; i += 16) {
        _mm512_storeu_ps(sums + i, _mm512_add_ps(_mm512_loadu_ps(sums + i), base));
      }
    }
    RotateValues(layout, sums);
  }
}

}  // namespace

ZEROC_VNNI_TARGET bool AttentionVnni(const AttentionArgs& args) {
  if (args.n_rows > kDecodeRowsMax || !VnniReady()) return false;
  for (int i = 0; i < args.n_segments; ++i) {
    if (HasFloatRuns(*args.segments[i].layout)) return false;
  }
  DecodeCall call;
  call.args = &args;
  call.sums = args.out;
  std::memset(args.out, 0, sizeof(float) * static_cast<std::size_t>(args.n_rows * args.head_dim));
  std::memset(call.row_sums, 0, sizeof(call.row_sums));
  for (float& top : call.row_max) top = kNoScore;
  const bool has_tiles = AmxReady();
  const AttentionScratch scratch(args.scratch, args.n_rows, args.head_dim);
  call.k_codes = has_tiles ? scratch.k_codes : nullptr;
  call.v_codes = has_tiles ? scratch.v_codes : nullptr;
  if (has_tiles) {
    SplitQueries(&call);
    ConfigureTiles(16);
  }
  for (int i = 0; i < args.n_segments; ++i) AttendSegment(&call, args.segments[i]);
  if (has_tiles) ReleaseTiles();
  for (int row = 0; row < args.n_rows; ++row) {
    args.row_max[row] = call.row_max[row] * (1.0f / kLog2E);
    args.row_sum[row] = _mm512_reduce_add_ps(_mm512_load_ps(call.row_sums[row]));
  }
  return true;
}

}  // namespace zeroc::kernels::cpu

#else

namespace zeroc::kernels::cpu {
bool AttentionVnni(const AttentionArgs&) { return false; }
}  // namespace zeroc::kernels::cpu

#endif
