// Attention on AMX tiles: the variant of attention.cc for processors that have them.
//
// The bytes of a block already are the lane and depth order of an AMX B operand: exact tiles are used in place, codes
// become bf16 in a scratch of one block (amx_unpack.h).
//
// q and the probabilities are rounded to bf16. With at most 8 rows (decode) the 16 rows of a tile hold both the rounded
// numbers and their remainders, which makes the products as good as float32 at no cost; a prefill rounds once.
#include <cstdint>

#include "kernels/checks.h"
#include "kernels/cpu/amx.h"
#include "kernels/cpu/attention_scratch.h"
#include "kernels/cpu/cpu.h"
#include "kernels/hadamard.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/amx_unpack.h"

namespace zeroc::kernels::cpu {
namespace {

constexpr int kTileRows = 16;
constexpr float kNone = -__builtin_huge_valf();

constexpr int PaddedWidth(int width) { return (width + 31) / 32 * 32; }

// 16 f32 as bf16: nearest even, NaN quiet, denormals flushed (their products are far below the sums' rounding).
ZEROC_AMX_TARGET inline __m256i Round(__m512 value) { return (__m256i)_mm512_cvtneps_pbh(value); }

ZEROC_AMX_TARGET inline __m512 FromRounded(__m256i rounded) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
}

// e^x for x <= 0 as 2^n 2^f: f in [-0.5, 0.5] by one fused step from x, 2^f by a polynomial (relative error 3e-7 with
// the rounding of log2 e at |x| < 10), 2^n by the scaling instruction, which makes 0 of minus infinity and keeps NaN.
ZEROC_AMX_TARGET inline __m512 ExpOfNegative(__m512 x) {
  const __m512 log2_e = _mm512_set1_ps(1.44269504f);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, log2_e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_fmsub_ps(x, log2_e, n);
  __m512 p = _mm512_set1_ps(1.54035304e-4f);  // (ln 2)^i / i!
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.33335581e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.61812911e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.55041087e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40226507e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93147181e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// ---- One block -----------------------------------------------------------------------------------------------------

struct Side {
  const std::uint8_t* tiles[kMaxRuns];  // B tiles, 1024 bytes per 32 depth steps
  alignas(64) float step[kMaxRuns][kBlockTokens];
  alignas(64) float base[kMaxRuns][kBlockTokens];
};

struct Block {
  const KvBlockLayout* layout;
  TokenSpan seen;   // tokens that some row sees
  int n_groups;     // token groups of 16
  int group_pairs;  // depth blocks of 32 tokens for V
  Side k, v;
};

// K: [group][depth block], a zero tile behind an odd number of coordinate tiles.
ZEROC_AMX_TARGET void PrepareKeys(const std::uint8_t* head, std::uint8_t* scratch, Block* block) {
  const KvBlockLayout& layout = *block->layout;
  for (int r = 0; r < layout.k.n_runs; ++r) {
    const KvRun& run = layout.k.runs[r];
    if (run.bits == 0) continue;
    const std::uint8_t* codes = head + layout.k.codes_offset[r];
    const int n_tiles = run.width / kTileDepth;
    if (run.bits == 16 && n_tiles % 2 == 0) {
      block->k.tiles[r] = codes;
      continue;
    }
    block->k.tiles[r] = scratch;
    for (int g = 0; g < block->n_groups; ++g) {
      for (int i = 0; i < n_tiles; ++i, codes += TileBytes(run.bits), scratch += kPairTileBytes) {
        UnpackTile(codes, run.bits, scratch);
      }
      if (n_tiles % 2 != 0) {
        __builtin_memset(scratch, 0, kPairTileBytes);
        scratch += kPairTileBytes;
      }
      if (run.bits == 16) continue;
      const std::uint8_t* meta = head + layout.k.meta_offset[r] + 16 * g;
      DecodeScales(meta, meta + layout.n_tokens, run.bits, false, block->k.step[r] + 16 * g, block->k.base[r] + 16 * g);
    }
  }
}

// V: [coordinate tile][group], a zero tile behind the single group of a sink block.
ZEROC_AMX_TARGET void PrepareValues(const std::uint8_t* head, std::uint8_t* scratch, Block* block) {
  const KvBlockLayout& layout = *block->layout;
  const bool partial = block->seen.begin > 0 || block->seen.end < layout.n_tokens;
  for (int r = 0; r < layout.v.n_runs; ++r) {
    const KvRun& run = layout.v.runs[r];
    if (run.bits == 0) continue;
    const std::uint8_t* codes = head + layout.v.codes_offset[r];
    if (run.bits == 16 && block->n_groups % 2 == 0 && !partial) {
      block->v.tiles[r] = codes;
      continue;
    }
    block->v.tiles[r] = scratch;
    for (int i = 0; i < run.width / kTileLanes; ++i) {
      for (int g = 0; g < block->n_groups; ++g, codes += TileBytes(run.bits), scratch += kPairTileBytes) {
        UnpackTile(codes, run.bits, scratch);
        if (run.bits == 16 && partial) ClearDepth(scratch, block->seen.begin - 16 * g, block->seen.end - 16 * g);
      }
      if (block->n_groups % 2 != 0) {
        __builtin_memset(scratch, 0, kPairTileBytes);
        scratch += kPairTileBytes;
      }
    }
    for (int g = 0; g < block->n_groups && run.bits != 16; ++g) {
      const std::uint8_t* meta = head + layout.v.meta_offset[r] + 16 * g;
      DecodeScales(meta, meta + layout.n_tokens, run.bits, true, block->v.step[r] + 16 * g, block->v.base[r] + 16 * g);
    }
    if (block->n_groups % 2 != 0) {
      _mm512_store_ps(block->v.step[r] + 16 * block->n_groups, _mm512_setzero_ps());
      _mm512_store_ps(block->v.base[r] + 16 * block->n_groups, _mm512_setzero_ps());
    }
  }
}

// ---- One tile of query rows ----------------------------------------------------------------------------------------

// What one call keeps over its blocks. Tile row i of row tile T is query row 16 T + i, or, when split (one row tile of
// n <= 8 rows), row i for i < 8 and the remainders of row i - 8 above.
struct Call {
  const AttentionArgs* args;
  const KvSegment* segment;
  AttentionScratch scratch;
  bool split;
  int q_stride;  // bf16 elements per row of the A operand of q
  int q_column[kMaxRuns];
};

ZEROC_AMX_TARGET inline __m512 RowSum(const float* row, int n) {
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < n; i += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(row + i));
  return sum;
}

// 16 values as bf16 into row `row` of an A operand, with their remainders 8 rows below when split.
ZEROC_AMX_TARGET inline __m512 StoreOperand(__m512 value, bool split, int row, std::int64_t stride, Bf16* to) {
  const __m256i high = Round(value);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + row * stride), high);
  if (!split) return FromRounded(high);
  const __m256i low = Round(_mm512_sub_ps(value, FromRounded(high)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (row + 8) * stride), low);
  return _mm512_add_ps(FromRounded(high), FromRounded(low));
}

// q of every row as A operands: runs of the segment padded to 32, codes' order where the run is quantised; and the sums
// over each run of what the tiles really hold.
ZEROC_AMX_TARGET void PrepareQueries(Call* call) {
  const AttentionArgs& args = *call->args;
  const KvSideLayout& k = call->segment->layout->k;
  call->q_stride = 0;
  for (int r = 0; r < k.n_runs; ++r) {
    call->q_column[r] = call->q_stride;
    if (k.runs[r].bits != 0) call->q_stride += PaddedWidth(k.runs[r].width);
  }
  auto* out = call->scratch.queries;
  const std::size_t rows = static_cast<std::size_t>((args.n_rows + 15) / 16 * 16);
  __builtin_memset(out, 0, rows * static_cast<std::size_t>(call->q_stride) * sizeof(Bf16));
  for (int row = 0; row < args.n_rows; ++row) {
    const float* q = args.q + std::int64_t{row} * args.head_dim;
    for (int r = 0; r < k.n_runs; ++r) {
      if (k.runs[r].bits == 0) continue;
      __m512 sum = _mm512_setzero_ps();
      for (int i = 0; i < k.runs[r].width; i += 16) {
        __m512 value = _mm512_loadu_ps(q + k.first_coord[r] + i);
        if (k.runs[r].bits != 16) value = CodeOrder(value);
        sum = _mm512_add_ps(sum, StoreOperand(value, call->split, row, call->q_stride, out + call->q_column[r] + i));
      }
      call->scratch.q_sums[row * kMaxRuns + r] = _mm512_reduce_add_ps(sum);
    }
  }
}

// products[16][64] = q of one row tile and run by the block's keys.
ZEROC_AMX_TARGET inline void MultiplyKeys(const Block& block, int run, const Bf16* q, std::int64_t q_stride,
                                          float* products) {
  const int steps = PaddedWidth(block.layout->k.runs[run].width) / 32;
  const std::uint8_t* tiles = block.k.tiles[run];
  const std::int64_t group_bytes = std::int64_t{1024} * steps;
  asm volatile("" : : : "memory");
  _tile_zero(0);
  if (block.n_groups == 1) {
    for (int s = 0; s < steps; ++s) {
      _tile_loadd(4, q + 32 * s, 2 * q_stride);
      _tile_loadd(6, tiles + 1024 * s, 64);
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, products, 256);
  } else {
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int s = 0; s < steps; ++s) {
      _tile_loadd(4, q + 32 * s, 2 * q_stride);
      _tile_loadd(6, tiles + 1024 * s, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, tiles + group_bytes + 1024 * s, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(6, tiles + 2 * group_bytes + 1024 * s, 64);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(7, tiles + 3 * group_bytes + 1024 * s, 64);
      _tile_dpbf16ps(3, 4, 7);
    }
    _tile_stored(0, products, 256);
    _tile_stored(1, products + 16, 256);
    _tile_stored(2, products + 32, 256);
    _tile_stored(3, products + 48, 256);
  }
  asm volatile("" : : : "memory");
}

// scores[rows][64] of the row tile that starts at `row`.
ZEROC_AMX_TARGET void Scores(const Call& call, const Block& block, int row, int rows, float* scores) {
  const KvSideLayout& k = block.layout->k;
  alignas(64) float products[kTileRows * kBlockTokens];
  bool is_first = true;
  for (int r = 0; r < k.n_runs; ++r) {
    if (k.runs[r].bits == 0) continue;
    const Bf16* q = call.scratch.queries + std::int64_t{row} * call.q_stride + call.q_column[r];
    MultiplyKeys(block, r, q, call.q_stride, products);
    for (int i = 0; i < rows; ++i) {
      const __m512 q_sum = _mm512_set1_ps(call.scratch.q_sums[(row + i) * kMaxRuns + r]);
      for (int t = 0; t < 16 * block.n_groups; t += 16) {
        __m512 sum = _mm512_load_ps(products + 64 * i + t);
        if (call.split) sum = _mm512_add_ps(sum, _mm512_load_ps(products + 64 * (i + 8) + t));
        if (k.runs[r].bits != 16) {
          const __m512 base = _mm512_mul_ps(q_sum, _mm512_load_ps(block.k.base[r] + t));
          sum = _mm512_fmadd_ps(sum, _mm512_load_ps(block.k.step[r] + t), base);
        }
        if (!is_first) sum = _mm512_add_ps(sum, _mm512_load_ps(scores + 64 * i + t));
        _mm512_store_ps(scores + 64 * i + t, sum);
      }
    }
    is_first = false;
  }
  if (is_first) __builtin_memset(scores, 0, sizeof(float) * static_cast<std::size_t>(64 * rows));
}

// Scores to probabilities in place; returns the factor for the row's earlier sums.
ZEROC_AMX_TARGET float SoftmaxRow(const Block& block, TokenSpan seen, float* scores, float* row_max, float* row_sum) {
  const int n = 16 * block.n_groups;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 none = _mm512_set1_ps(kNone);
  __m512 top = none;
  if (seen.begin > 0 || seen.end < n) {
    for (int t = 0; t < n; t += 16) {
      const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(t));
      const __mmask16 is_seen = _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(seen.begin)) &
                                _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(seen.end));
      _mm512_store_ps(scores + t, _mm512_mask_mov_ps(none, is_seen, _mm512_load_ps(scores + t)));
    }
  }
  for (int t = 0; t < n; t += 16) top = _mm512_max_ps(top, _mm512_load_ps(scores + t));
  const float block_max = _mm512_reduce_max_ps(top);
  const float before = *row_max;
  const float now = block_max > before ? block_max : before;
  float factor = 1.0f;
  if (before == kNone) {
    factor = 0.0f;
  } else if (now != before) {
    factor = _mm512_cvtss_f32(ExpOfNegative(_mm512_set1_ps(before - now)));
  }
  __m512 sum = _mm512_setzero_ps();
  for (int t = 0; t < n; t += 16) {
    const __m512 p = ExpOfNegative(_mm512_sub_ps(_mm512_load_ps(scores + t), _mm512_set1_ps(now)));
    _mm512_store_ps(scores + t, p);
    sum = _mm512_add_ps(sum, p);
  }
  *row_max = now;
  *row_sum = *row_sum * factor + _mm512_reduce_add_ps(sum);
  return factor;
}

ZEROC_AMX_TARGET void ScaleRow(float* row, int n, float factor) {
  for (int i = 0; i < n; i += 16) {
    _mm512_storeu_ps(row + i, _mm512_mul_ps(_mm512_set1_ps(factor), _mm512_loadu_ps(row + i)));
  }
}

// sums[16][head_dim] of one run += probabilities [16][64] by the block's values.
ZEROC_AMX_TARGET inline void MultiplyValues(const Block& block, int run, const Bf16* p, float* sums, std::int64_t dim) {
  asm volatile("" : : : "memory");
  const std::int64_t stride = 4 * dim;
  const std::uint8_t* tiles = block.v.tiles[run];
  const int n_tiles = block.layout->v.runs[run].width / kTileLanes;
  _tile_loadd(4, p, 128);
  if (block.group_pairs == 1) {
    for (int i = 0; i < n_tiles; ++i, tiles += 1024) {
      _tile_loadd(0, sums + 16 * i, stride);
      _tile_loadd(6, tiles, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_stored(0, sums + 16 * i, stride);
    }
  } else {
    _tile_loadd(5, p + 32, 128);
    int i = 0;
    for (; i + 2 <= n_tiles; i += 2, tiles += 4096) {
      _tile_loadd(0, sums + 16 * i, stride);
      _tile_loadd(6, tiles, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(1, sums + 16 * i + 16, stride);
      _tile_loadd(7, tiles + 2048, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(6, tiles + 1024, 64);
      _tile_dpbf16ps(0, 5, 6);
      _tile_loadd(7, tiles + 3072, 64);
      _tile_dpbf16ps(1, 5, 7);
      _tile_stored(0, sums + 16 * i, stride);
      _tile_stored(1, sums + 16 * i + 16, stride);
    }
    for (; i < n_tiles; ++i, tiles += 2048) {
      _tile_loadd(0, sums + 16 * i, stride);
      _tile_loadd(6, tiles, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, tiles + 1024, 64);
      _tile_dpbf16ps(0, 5, 7);
      _tile_stored(0, sums + 16 * i, stride);
    }
  }
  asm volatile("" : : : "memory");
}

// 32 depth steps of row `row` as bf16, in one store: a tile load of a line that came in two halves waits for the cache.
struct Pair {
  __m512 first, second;
};
ZEROC_AMX_TARGET inline Pair StoreWeights(const Pair& value, bool split, int row, Bf16* to) {
  const __m512i high = (__m512i)_mm512_cvtne2ps_pbh(value.second, value.first);
  _mm512_store_si512(to + row * kBlockTokens, high);
  const Pair held = {FromRounded(_mm512_castsi512_si256(high)), FromRounded(_mm512_extracti64x4_epi64(high, 1))};
  if (!split) return held;
  const __m512i low =
      (__m512i)_mm512_cvtne2ps_pbh(_mm512_sub_ps(value.second, held.second), _mm512_sub_ps(value.first, held.first));
  _mm512_store_si512(to + (row + 8) * kBlockTokens, low);
  return {_mm512_add_ps(held.first, FromRounded(_mm512_castsi512_si256(low))),
          _mm512_add_ps(held.second, FromRounded(_mm512_extracti64x4_epi64(low, 1)))};
}

// The A operand of one quantised run from a row's probabilities; returns the row's sum of the bases.
ZEROC_AMX_TARGET inline float ScaleWeights(const Block& block, int run, const float* p, bool split, int row,
                                           Bf16* operand) {
  const int bits = block.layout->v.runs[run].bits;
  const __m512 middle = _mm512_set1_ps(CodeBias(bits) + static_cast<float>(1 << (bits - 1)));
  const float* step = block.v.step[run];
  const float* base = block.v.base[run];
  __m512 bases = _mm512_setzero_ps();
  for (int t = 0; t < 32 * block.group_pairs; t += 32) {
    const Pair weight = {CodeOrder(_mm512_load_ps(p + t)), CodeOrder(_mm512_load_ps(p + t + 16))};
    const Pair scaled = {_mm512_mul_ps(weight.first, _mm512_load_ps(step + t)),
                         _mm512_mul_ps(weight.second, _mm512_load_ps(step + t + 16))};
    const Pair held = StoreWeights(scaled, split, row, operand + t);
    // A weight's rounding is multiplied by what the tile holds; taking it off times the tile's middle leaves the
    // rounding times (code - middle), as if codes were signed.
    const __m512 rounding =
        _mm512_add_ps(_mm512_sub_ps(held.first, scaled.first), _mm512_sub_ps(held.second, scaled.second));
    bases = _mm512_fmadd_ps(weight.first, _mm512_load_ps(base + t), bases);
    bases = _mm512_fmadd_ps(weight.second, _mm512_load_ps(base + t + 16), bases);
    bases = _mm512_fnmadd_ps(middle, rounding, bases);
  }
  return _mm512_reduce_add_ps(bases);
}

// The segment's sums of the row tile at `row` += probabilities * V. p [rows][64] is zero beyond the block's tokens.
ZEROC_AMX_TARGET void AddValues(const Call& call, const Block& block, int row, int rows, const float* p) {
  const KvSideLayout& v = block.layout->v;
  const std::int64_t dim = call.args->head_dim;
  alignas(64) Bf16 operand[kTileRows * kBlockTokens];
  // Rows beyond the last must be finite: their products land in rows nobody reads.
  if (rows < (call.split ? 8 : kTileRows)) __builtin_memset(operand, 0, sizeof(operand));
  for (int r = 0; r < v.n_runs; ++r) {
    if (v.runs[r].bits == 0) continue;
    for (int i = 0; i < rows; ++i) {
      const float* weights = p + kBlockTokens * i;
      if (v.runs[r].bits != 16) {
        call.scratch.v_bases[(row + i) * kMaxRuns + r] += ScaleWeights(block, r, weights, call.split, i, operand);
        continue;
      }
      for (int t = 0; t < 32 * block.group_pairs; t += 32) {
        StoreWeights({_mm512_load_ps(weights + t), _mm512_load_ps(weights + t + 16)}, call.split, i, operand + t);
      }
    }
    MultiplyValues(block, r, operand, call.scratch.rotated + row * dim + v.first_coord[r], dim);
  }
}

ZEROC_AMX_TARGET void AttendRowTile(const Call& call, const Block& block, int first_token, int row, int first_row) {
  const AttentionArgs& args = *call.args;
  const std::int64_t dim = args.head_dim;
  const int rows = args.n_rows - row < kTileRows ? args.n_rows - row : kTileRows;
  alignas(64) float scores[kTileRows * kBlockTokens];
  Scores(call, block, row, rows, scores);
  // Tokens of this block up to and with the first query's position.
  const std::int64_t after_first_query = std::int64_t{args.first_query_pos} + 1 - call.segment->first_pos - first_token;
  for (int i = 0; i < rows; ++i) {
    float* p = scores + 64 * i;
    if (row + i < first_row) {  // sees nothing of this block
      __builtin_memset(p, 0, sizeof(float) * kBlockTokens);
      continue;
    }
    if (block.n_groups % 2 != 0) _mm512_store_ps(p + 16 * block.n_groups, _mm512_setzero_ps());
    const std::int64_t causal = after_first_query + (row + i) / args.group;
    const TokenSpan seen = {block.seen.begin,
                            causal < block.seen.end ? static_cast<std::int32_t>(causal) : block.seen.end};
    const float factor = SoftmaxRow(block, seen, p, args.row_max + row + i, args.row_sum + row + i);
    if (factor == 1.0f) continue;
    ScaleRow(args.out + (row + i) * dim, args.head_dim, factor);
    ScaleRow(call.scratch.rotated + (row + i) * dim, args.head_dim, factor);
    if (call.split) ScaleRow(call.scratch.rotated + (row + i + 8) * dim, args.head_dim, factor);
    for (int r = 0; r < kMaxRuns; ++r) call.scratch.v_bases[(row + i) * kMaxRuns + r] *= factor;
  }
  AddValues(call, block, row, rows, scores);
}

void AttendBlock(const Call& call, int index, TokenSpan span) {
  const AttentionArgs& args = *call.args;
  const KvBlockLayout& layout = *call.segment->layout;
  const int first_token = index * layout.n_tokens;
  Block block;
  block.layout = &layout;
  block.seen.begin = span.begin > first_token ? span.begin - first_token : 0;
  block.seen.end = span.end - first_token < layout.n_tokens ? span.end - first_token : layout.n_tokens;
  block.n_groups = layout.n_tokens / kTileLanes;
  block.group_pairs = (block.n_groups + 1) / 2;
  const std::int64_t head_offset = std::int64_t{args.kv_head} * layout.head_bytes;
  const std::uint8_t* head = call.segment->blocks[index] + head_offset;
  // The next block's bytes travel while this one is computed: blocks lie anywhere, so the hardware cannot foresee them.
  const bool has_next = first_token + layout.n_tokens < span.end;
  const std::uint8_t* next = has_next ? call.segment->blocks[index + 1] + head_offset : head;
  const int middle = layout.v.codes_offset[0];
  PrefetchBytes(next, has_next ? middle : 0);
  PrepareKeys(head, call.scratch.k_codes, &block);
  PrefetchBytes(next + middle, has_next ? layout.head_bytes - middle : 0);
  PrepareValues(head, call.scratch.v_codes, &block);
  const std::int64_t first_pos = std::int64_t{call.segment->first_pos} + first_token + block.seen.begin;
  const std::int64_t first_row = first_pos > args.first_query_pos ? (first_pos - args.first_query_pos) * args.group : 0;
  for (std::int64_t row = first_row / kTileRows * kTileRows; row < args.n_rows; row += kTileRows) {
    AttendRowTile(call, block, first_token, static_cast<int>(row), static_cast<int>(first_row));
  }
}

// Remainders, bases and the inverse rotation of V, once per row.
void EndSegment(const Call& call) {
  const AttentionArgs& args = *call.args;
  const KvBlockLayout& layout = *call.segment->layout;
  const std::int64_t dim = args.head_dim;
  for (int row = 0; row < args.n_rows; ++row) {
    float* sums = call.scratch.rotated + row * dim;
    float* out = args.out + row * dim;
    for (int i = 0; call.split && i < args.head_dim; ++i) sums[i] += sums[8 * dim + i];
    for (int r = 0; r < layout.v.n_runs; ++r) {
      const KvRun& run = layout.v.runs[r];
      float* part = sums + layout.v.first_coord[r];
      if (IsQuantised(run.bits)) {
        for (int i = 0; i < run.width; ++i) part[i] += call.scratch.v_bases[row * kMaxRuns + r];
        if (layout.rotate_v) HadamardRun(part, run.width);
      }
    }
    for (int i = 0; i < args.head_dim; ++i) out[i] += sums[i];
  }
}

bool HasFloatRuns(const KvBlockLayout& layout) {
  for (int r = 0; r < layout.k.n_runs; ++r) {
    if (layout.k.runs[r].bits == 32) return true;
  }
  for (int r = 0; r < layout.v.n_runs; ++r) {
    if (layout.v.runs[r].bits == 32) return true;
  }
  return false;
}

void AttendSegment(const AttentionArgs& args, const KvSegment& segment) {
  const TokenSpan span = RowSpan(args, segment, args.n_rows - 1);  // the last row sees most
  if (span.begin >= span.end) return;
  Call call = {&args, &segment, AttentionScratch(args.scratch, args.n_rows, args.head_dim), args.n_rows <= 8, 0, {}};
  PrepareQueries(&call);
  const std::size_t rows = static_cast<std::size_t>((args.n_rows + 15) / 16 * 16);
  __builtin_memset(call.scratch.rotated, 0, rows * static_cast<std::size_t>(args.head_dim) * sizeof(float));
  __builtin_memset(call.scratch.v_bases, 0, rows * kMaxRuns * sizeof(float));
  const int n_tokens = segment.layout->n_tokens;
  for (int b = span.begin / n_tokens; b * n_tokens < span.end; ++b) AttendBlock(call, b, span);
  EndSegment(call);
}

}  // namespace

bool AttentionAmx(const AttentionArgs& args) {
  if (!AmxReady()) return false;
  for (int i = 0; i < args.n_segments; ++i) {
    if (HasFloatRuns(*args.segments[i].layout)) return false;
  }
  for (int r = 0; r < args.n_rows; ++r) {
    args.row_max[r] = kNone;
    args.row_sum[r] = 0.0f;
  }
  __builtin_memset(args.out, 0, sizeof(float) * static_cast<std::size_t>(args.n_rows * args.head_dim));
  ConfigureTiles(kTileRows);
  for (int i = 0; i < args.n_segments; ++i) AttendSegment(args, args.segments[i]);
  ReleaseTiles();
  return true;
}

}  // namespace zeroc::kernels::cpu

#else

namespace zeroc::kernels::cpu {
bool AttentionAmx(const AttentionArgs&) { return false; }
}  // namespace zeroc::kernels::cpu

#endif
