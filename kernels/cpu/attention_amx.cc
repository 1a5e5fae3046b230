// Attention on AMX tiles, for prefill: the variant of attention.cc for many rows on processors that have them.
//
// Up to two blocks at a time, the span, are made B operands: exact tiles lie ready and are used in place, codes become
// bf16 in scratch (amx_unpack.h), once for all rows of the call. Then every 32 rows take three steps over the span:
// scores by tile products into a buffer of the first-level cache, softmax on vectors, sums by tile products again. The
// running maxima and sums of 16 rows are one vector.
#include <cstdint>

#include "kernels/checks.h"
#include "kernels/cpu/amx.h"
#include "kernels/cpu/attention_scratch.h"
#include "kernels/cpu/cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/amx_unpack.h"

namespace zeroc::kernels::cpu {
namespace {

constexpr int kSpanBlocks = 2;
constexpr int kSpanTokens = kSpanBlocks * kBlockTokens;
constexpr int kColumnsMax = 2 * kMaxHeadDim / kTileDepth + 1;  // of 16 coordinates; 8-bit runs take two

// Which tiles of a layout the products use: kept coordinates only, in the order of the runs.
struct Operand {
  int n_tiles;             // K: columns of the A operand; V: tiles of output coordinates
  int n_low;               // tiles behind those, with the remainders of 8-bit runs
  int coord[kColumnsMax];  // first coordinate of each tile
  int low[kColumnsMax];    // its remainders' tile, or -1
  bool in_place;           // one exact run: its tiles are an operand as they lie
};

Operand MakeOperand(const KvSideLayout& side) {
  Operand out = {};
  for (int r = 0; r < side.n_runs; ++r) {
    if (side.runs[r].bits == 0) continue;
    for (int i = 0; i < side.runs[r].width; i += kTileDepth) {
      out.low[out.n_tiles] = side.runs[r].bits == 8 ? out.n_low++ : -1;
      out.coord[out.n_tiles++] = side.first_coord[r] + i;
    }
  }
  for (int i = 0; i < out.n_tiles; ++i) {
    if (out.low[i] >= 0) out.low[i] += out.n_tiles;
  }
  out.in_place = side.n_runs == 1 && side.runs[0].bits == 16;
  return out;
}

// True if one A operand of q serves both.
bool HasSameColumns(const Operand& a, const Operand& b) {
  if (a.n_tiles != b.n_tiles || a.n_low != b.n_low) return false;
  for (int i = 0; i < a.n_tiles; ++i) {
    if (a.coord[i] != b.coord[i] || a.low[i] != b.low[i]) return false;
  }
  return true;
}

// What one call keeps over its blocks.
struct Call {
  const AttentionArgs* args;
  AttentionScratch scratch;
  float* row_max;  // [padded rows] of scores in units of ln 2, and sums
  float* row_sum;
  TokenSpan* seen;  // [padded rows] what each row sees of the segment
  // Of the segment:
  const KvSegment* segment;
  Operand k, v;
  int k_steps;  // products of depth 32 for a score; q has 32 k_steps columns
  const float* mass;
};

struct Span {
  int first_token, end_token;  // of the segment
  int groups_per_block;
  const std::uint8_t* k_tiles[kSpanBlocks];  // [token group][column], kPairTileBytes each, columns in pairs
  const std::uint8_t* v_tiles[kSpanBlocks];  // [tile][token group], groups in pairs
  alignas(64) float mass[kSpanTokens];
};

// ---- Blocks to operands --------------------------------------------------------------------------------------------

int PairedGroups(const KvBlockLayout& layout) { return (layout.n_tokens / kTileLanes + 1) / 2 * 2; }

std::size_t KeyBytes(const Call& call) {
  return static_cast<std::size_t>(call.segment->layout->n_tokens / kTileLanes * 2 * call.k_steps * kPairTileBytes);
}
std::size_t ValueBytes(const Call& call) {
  return static_cast<std::size_t>((call.v.n_tiles + call.v.n_low) * PairedGroups(*call.segment->layout) *
                                  kPairTileBytes);
}

ZEROC_AMX_TARGET const std::uint8_t* PrepareKeys(const Call& call, const std::uint8_t* head, std::uint8_t* scratch) {
  const KvBlockLayout& layout = *call.segment->layout;
  if (call.k.in_place && call.k.n_tiles % 2 == 0) return head + layout.k.codes_offset[0];
  const ByteFloats bytes = MakeByteFloats();
  const int n_columns = 2 * call.k_steps;
  for (int g = 0; g < layout.n_tokens / kTileLanes; ++g) {
    std::uint8_t* group = scratch + g * n_columns * kPairTileBytes;
    int column = 0;
    for (int r = 0; r < layout.k.n_runs; ++r) {
      const int bits = layout.k.runs[r].bits, n_tiles = layout.k.runs[r].width / kTileDepth;
      if (bits == 0) continue;
      const std::uint8_t* codes = head + layout.k.codes_offset[r] + g * n_tiles * TileBytes(bits);
      const Scales scales = IsQuantised(bits) ? DecodeScales(layout.k, r, head, layout.n_tokens, g) : Scales{};
      for (int i = 0; i < n_tiles; ++i, ++column, codes += TileBytes(bits)) {
        std::uint8_t* to = group + column * kPairTileBytes;
        if (bits == 16) {
          __builtin_memcpy(to, codes, kPairTileBytes);
        } else {
          UnpackKeysOf(bits, codes, scales, bytes, to, group + call.k.low[column] * kPairTileBytes);
        }
      }
    }
    column += call.k.n_low;
    if (column < n_columns) __builtin_memset(group + column * kPairTileBytes, 0, kPairTileBytes);
  }
  return scratch;
}

// `seen` are the block's tokens that some row sees.
ZEROC_AMX_TARGET const std::uint8_t* PrepareValues(const Call& call, const std::uint8_t* head, TokenSpan seen,
                                                   std::uint8_t* scratch) {
  const KvBlockLayout& layout = *call.segment->layout;
  const int n_groups = layout.n_tokens / kTileLanes, slot_bytes = PairedGroups(layout) * kPairTileBytes;
  const bool partial = seen.begin > 0 || seen.end < layout.n_tokens;
  if (call.v.in_place && n_groups % 2 == 0 && !partial) return head + layout.v.codes_offset[0];
  const ByteFloats bytes = MakeByteFloats();
  int slot = 0;
  for (int r = 0; r < layout.v.n_runs; ++r) {
    const int bits = layout.v.runs[r].bits, n_tiles = layout.v.runs[r].width / kTileLanes;
    if (bits == 0) continue;
    const std::uint8_t* codes = head + layout.v.codes_offset[r];
    for (int g = 0; g < n_groups; ++g) {
      const Scales scales = bits == 16 ? Scales{} : DecodeScales(layout.v, r, head, layout.n_tokens, g);
      const ValueTables tables = bits <= 4 ? MakeValueTables(scales) : ValueTables{};
      for (int i = 0; i < n_tiles; ++i) {
        const std::uint8_t* tile = codes + (i * n_groups + g) * TileBytes(bits);
        std::uint8_t* to = scratch + (slot + i) * slot_bytes + g * kPairTileBytes;
        if (bits == 16) {
          CopySeenValues(tile, seen.begin - 16 * g, seen.end - 16 * g, to);
        } else if (bits == 8) {
          UnpackWideValues(tile, scales, bytes, to, scratch + call.v.low[slot + i] * slot_bytes + g * kPairTileBytes);
        } else {
          UnpackValuesOf(bits, tile, tables, to);
        }
      }
    }
    slot += n_tiles;
  }
  for (int i = 0; n_groups % 2 != 0 && i < call.v.n_tiles + call.v.n_low; ++i) {
    __builtin_memset(scratch + i * slot_bytes + n_groups * kPairTileBytes, 0, kPairTileBytes);
  }
  return scratch;
}

// ---- 32 rows -------------------------------------------------------------------------------------------------------

// Rows of q as A operands: column c holds coordinates k.coord[c] .. + 15, then once more those with remainders.
ZEROC_AMX_TARGET void PrepareQueries(const Call& call) {
  const AttentionArgs& args = *call.args;
  const std::int64_t stride = 32 * std::int64_t{call.k_steps};
  Bf16* out = call.scratch.queries;
  __builtin_memset(out, 0, PaddedRows(args.n_rows) * static_cast<std::size_t>(stride) * sizeof(Bf16));
  for (int row = 0; row < args.n_rows; ++row, out += stride) {
    const float* q = args.q + std::int64_t{row} * args.head_dim;
    for (int c = 0; c < call.k.n_tiles; ++c) {
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(q + call.k.coord[c]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * c), rounded);
      if (call.k.low[c] >= 0) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * call.k.low[c]), rounded);
    }
  }
}

// One tile of rows by two token groups; kRowTiles = 2 shares the B tiles between 32 rows.
template <int kRowTiles>
ZEROC_AMX_TARGET inline void MultiplyKeys(const Bf16* q, int steps, const std::uint8_t* k0, const std::uint8_t* k1,
                                          const float* mass, float* scores) {
  const std::int64_t q_bytes = 64 * std::int64_t{steps};
  constexpr std::int64_t kRowBytes = sizeof(float) * kSpanTokens;
  asm volatile("" : : : "memory");
  if (mass == nullptr) {
    _tile_zero(0);
    _tile_zero(1);
    if (kRowTiles == 2) _tile_zero(2);
    if (kRowTiles == 2) _tile_zero(3);
  } else {  // stride 0: the same numbers in every row
    _tile_loadd(0, mass, 0);
    _tile_loadd(1, mass + 16, 0);
    if (kRowTiles == 2) _tile_loadd(2, mass, 0);
    if (kRowTiles == 2) _tile_loadd(3, mass + 16, 0);
  }
  for (int s = 0; s < steps; ++s) {
    _tile_loadd(4, q + 32 * s, q_bytes);
    _tile_loadd(6, k0 + 1024 * s, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, k1 + 1024 * s, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (kRowTiles == 2) {
      _tile_loadd(5, q + 16 * 32 * steps + 32 * s, q_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, scores, kRowBytes);
  _tile_stored(1, scores + 16, kRowBytes);
  if (kRowTiles == 2) {
    _tile_stored(2, scores + 16 * kSpanTokens, kRowBytes);
    _tile_stored(3, scores + 16 * kSpanTokens + 16, kRowBytes);
  }
  asm volatile("" : : : "memory");
}

// scores[32][kSpanTokens] for tokens [begin, end) of the span, multiples of 32.
template <int kRowTiles>
ZEROC_AMX_TARGET void Scores(const Call& call, const Span& span, int row, int begin, int end, float* scores) {
  const Bf16* q = call.scratch.queries + std::int64_t{row} * 32 * call.k_steps;
  const int group_bytes = 1024 * call.k_steps;
  for (int t = begin; t < end; t += 32) {
    const int group = t / kTileLanes;
    const std::uint8_t* k0 = span.k_tiles[group / span.groups_per_block] + group % span.groups_per_block * group_bytes;
    // A sink block has one group; the second half of its scores is masked.
    const std::uint8_t* k1 = span.groups_per_block == 1 ? k0 : k0 + group_bytes;
    MultiplyKeys<kRowTiles>(q, call.k_steps, k0, k1, call.mass != nullptr ? span.mass + t : nullptr, scores + t);
  }
}

// Scores that a row does not see become minus infinity.
ZEROC_AMX_TARGET void MaskRow(TokenSpan seen, int begin, int end, float* scores) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int t = begin; t < end; t += 16) {
    const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(t));
    const __mmask16 is_seen = _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(seen.begin)) &
                              _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(seen.end));
    _mm512_store_ps(scores + t, _mm512_mask_mov_ps(_mm512_set1_ps(kNoScore), is_seen, _mm512_load_ps(scores + t)));
  }
}

// Softmax of 16 rows over tokens [begin, end): scores to probabilities [16][kSpanTokens] in bf16 against the new
// running maxima; earlier sums are scaled to them.
ZEROC_AMX_TARGET void Softmax(const Call& call, int row, int begin, int end, const float* scores, Bf16* weights) {
  alignas(64) float parts[16 * 16];
  alignas(64) float offsets[16], factors[16];
  for (int i = 0; i < 16; ++i) {
    const float* from = scores + i * kSpanTokens;
    __m512 top = _mm512_load_ps(from + begin);
    for (int t = begin + 16; t < end; t += 16) top = _mm512_max_ps(top, _mm512_load_ps(from + t));
    _mm512_store_ps(parts + 16 * i, top);
  }
  const __m512 before = _mm512_load_ps(call.row_max + row);
  const __m512 block = _mm512_mul_ps(ReduceRows(parts, 16, Larger()), _mm512_set1_ps(kLog2E));
  const __m512 now = _mm512_max_ps(before, block);
  // Against zero where a row has seen nothing: inf - inf would be NaN.
  const __mmask16 sees_nothing = _mm512_cmp_ps_mask(now, _mm512_set1_ps(kNoScore), _CMP_EQ_OQ);
  _mm512_store_ps(offsets, _mm512_maskz_mov_ps(~sees_nothing, now));
  const __m512 factor = Exp2(_mm512_sub_ps(before, now));
  const __mmask16 moves =
      _mm512_cmp_ps_mask(before, now, _CMP_NEQ_UQ) & _mm512_cmp_ps_mask(before, _mm512_set1_ps(kNoScore), _CMP_NEQ_UQ);
  _mm512_store_ps(factors, factor);
  _mm512_store_ps(call.row_max + row, now);
  for (int i = 0; i < 16; ++i) {
    const __m512 offset = _mm512_set1_ps(offsets[i]), log2_e = _mm512_set1_ps(kLog2E);
    const float* from = scores + i * kSpanTokens;
    __m512 sum = _mm512_setzero_ps();
    for (int t = begin; t < end; t += 32) {
      const __m512 first = Exp2(_mm512_fmsub_ps(_mm512_load_ps(from + t), log2_e, offset));
      const __m512 second = Exp2(_mm512_fmsub_ps(_mm512_load_ps(from + t + 16), log2_e, offset));
      _mm512_store_si512(weights + i * kSpanTokens + t, (__m512i)_mm512_cvtne2ps_pbh(second, first));
      sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));
    }
    _mm512_store_ps(parts + 16 * i, sum);
  }
  const __m512 earlier = _mm512_load_ps(call.row_sum + row);
  const __m512 scaled = _mm512_mask_mul_ps(earlier, moves, earlier, factor);
  _mm512_store_ps(call.row_sum + row, _mm512_add_ps(scaled, ReduceRows(parts, 16, Plus())));
  for (unsigned left = moves; left != 0; left &= left - 1) {
    const int i = __builtin_ctz(left);
    ScaleRow(call.scratch.sums + std::int64_t{row + i} * call.args->head_dim, call.args->head_dim, factors[i]);
  }
}

// sums[16 kRowTiles][16 kTiles] += weights * V over the pairs of token groups in [begin, end).
template <int kRowTiles, int kTiles>
ZEROC_AMX_TARGET inline void MultiplyValues(const Call& call, const Span& span, int tile, int begin, int end,
                                            const Bf16* weights, float* sums) {
  const std::int64_t dim = call.args->head_dim, stride = 4 * dim;
  const int slot_bytes = (span.groups_per_block + 1) / 2 * 1024;
  constexpr std::int64_t kRowBytes = sizeof(Bf16) * kSpanTokens;
  float* to0 = sums + call.v.coord[tile];
  float* to1 = sums + call.v.coord[tile + kTiles - 1];
  asm volatile("" : : : "memory");
  _tile_loadd(0, to0, stride);
  if (kTiles == 2) _tile_loadd(1, to1, stride);
  if (kRowTiles == 2) _tile_loadd(2, to0 + 16 * dim, stride);
  if (kRowTiles == 2 && kTiles == 2) _tile_loadd(3, to1 + 16 * dim, stride);
  const bool has_low = call.v.low[tile] >= 0 || call.v.low[tile + kTiles - 1] >= 0;
  for (int t = begin; t < end; t += 32) {
    const int group = t / kTileLanes;
    const int block = span.groups_per_block == 1 ? 0 : group / span.groups_per_block;
    const std::uint8_t* pair = span.v_tiles[block] + (group - block * span.groups_per_block) / 2 * 1024;
    _tile_loadd(4, weights + t, kRowBytes);
    if (kRowTiles == 2) _tile_loadd(5, weights + 16 * kSpanTokens + t, kRowBytes);
    _tile_loadd(6, pair + tile * slot_bytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (kRowTiles == 2) _tile_dpbf16ps(2, 5, 6);
    if (kTiles == 2) {
      _tile_loadd(7, pair + (tile + 1) * slot_bytes, 64);
      _tile_dpbf16ps(1, 4, 7);
      if (kRowTiles == 2) _tile_dpbf16ps(3, 5, 7);
    }
    if (!has_low) continue;
    if (call.v.low[tile] >= 0) {
      _tile_loadd(6, pair + call.v.low[tile] * slot_bytes, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (kRowTiles == 2) _tile_dpbf16ps(2, 5, 6);
    }
    if (kTiles == 2 && call.v.low[tile + 1] >= 0) {
      _tile_loadd(7, pair + call.v.low[tile + 1] * slot_bytes, 64);
      _tile_dpbf16ps(1, 4, 7);
      if (kRowTiles == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, to0, stride);
  if (kTiles == 2) _tile_stored(1, to1, stride);
  if (kRowTiles == 2) _tile_stored(2, to0 + 16 * dim, stride);
  if (kRowTiles == 2 && kTiles == 2) _tile_stored(3, to1 + 16 * dim, stride);
  asm volatile("" : : : "memory");
}

template <int kRowTiles>
ZEROC_AMX_TARGET void AddValues(const Call& call, const Span& span, int row, int begin, int end, const Bf16* weights) {
  float* sums = call.scratch.sums + std::int64_t{row} * call.args->head_dim;
  int tile = 0;
  for (; tile + 2 <= call.v.n_tiles; tile += 2) {
    MultiplyValues<kRowTiles, 2>(call, span, tile, begin, end, weights, sums);
  }
  if (tile < call.v.n_tiles) MultiplyValues<kRowTiles, 1>(call, span, tile, begin, end, weights, sums);
}

template <int kRowTiles>
ZEROC_AMX_TARGET void AttendRows(const Call& call, const Span& span, int row) {
  alignas(64) float scores[16 * kRowTiles * kSpanTokens];
  alignas(64) Bf16 weights[16 * kRowTiles * kSpanTokens];
  TokenSpan seen[16 * kRowTiles];
  int begin = kSpanTokens, end = 0;
  for (int i = 0; i < 16 * kRowTiles; ++i) {
    seen[i] = {0, 0};
    const TokenSpan of_row = call.seen[row + i];
    seen[i].begin = (of_row.begin > span.first_token ? of_row.begin : span.first_token) - span.first_token;
    seen[i].end = (of_row.end < span.end_token ? of_row.end : span.end_token) - span.first_token;
    if (seen[i].begin >= seen[i].end) continue;
    begin = seen[i].begin < begin ? seen[i].begin : begin;
    end = seen[i].end > end ? seen[i].end : end;
  }
  if (begin >= end) return;
  begin = begin / 32 * 32;
  end = (end + 31) / 32 * 32;
  Scores<kRowTiles>(call, span, row, begin, end, scores);
  for (int i = 0; i < 16 * kRowTiles; ++i) {
    if (seen[i].begin > begin || seen[i].end < end) MaskRow(seen[i], begin, end, scores + i * kSpanTokens);
  }
  for (int i = 0; i < 16 * kRowTiles; i += 16) {
    Softmax(call, row + i, begin, end, scores + i * kSpanTokens, weights + i * kSpanTokens);
  }
  AddValues<kRowTiles>(call, span, row, begin, end, weights);
}

// ---- Segments ------------------------------------------------------------------------------------------------------

void AttendSpan(const Call& call, int first_block, int end_block, TokenSpan seen) {
  const AttentionArgs& args = *call.args;
  const KvBlockLayout& layout = *call.segment->layout;
  const std::int64_t head_offset = std::int64_t{args.kv_head} * layout.head_bytes;
  Span span;
  span.first_token = first_block * layout.n_tokens;
  span.end_token = end_block * layout.n_tokens;
  span.groups_per_block = layout.n_tokens / kTileLanes;
  for (int b = first_block; b < end_block; ++b) {
    const int i = b - first_block, first_token = b * layout.n_tokens;
    const std::uint8_t* head = call.segment->blocks[b] + head_offset;
    span.k_tiles[i] = PrepareKeys(call, head, call.scratch.k_codes + static_cast<std::size_t>(i) * KeyBytes(call));
    span.v_tiles[i] = PrepareValues(call, head, {seen.begin - first_token, seen.end - first_token},
                                    call.scratch.v_codes + static_cast<std::size_t>(i) * ValueBytes(call));
    if (call.mass != nullptr) DecodeMass(layout, head, call.mass, span.mass + i * layout.n_tokens);
  }
  for (int row = 0; row < args.n_rows; row += kRowTile) {
    if (args.n_rows - row > 16) {
      AttendRows<2>(call, span, row);
    } else {
      AttendRows<1>(call, span, row);
    }
  }
}

void RotateRows(const Call& call) {
  for (int row = 0; row < call.args->n_rows; ++row) {
    RotateValues(*call.segment->layout, call.scratch.sums + std::int64_t{row} * call.args->head_dim);
  }
}

void AttendSegment(const KvSegment& segment, bool has_sums, Call* call) {
  const AttentionArgs& args = *call->args;
  const KvBlockLayout& layout = *segment.layout;
  const TokenSpan seen = RowsSpan(args, segment);
  const Operand k = MakeOperand(layout.k);
  const bool has_queries = call->segment != nullptr && HasSameColumns(k, call->k);
  call->segment = &segment;
  call->k = k;
  call->v = MakeOperand(layout.v);
  call->k_steps = (k.n_tiles + k.n_low + 1) / 2;
  if (!has_queries) PrepareQueries(*call);
  call->mass = segment.mass != nullptr ? segment.mass + std::int64_t{args.kv_head} * (1 + kMaxRuns) : nullptr;
  TokenSpan of_token = {0, 0};
  for (int row = 0; row < static_cast<int>(PaddedRows(args.n_rows)); ++row) {
    if (row % args.group == 0) of_token = RowSpan(args, segment, row);
    call->seen[row] = row < args.n_rows ? of_token : TokenSpan{0, 0};
  }
  if (has_sums) RotateRows(*call);
  const bool fits_twice = 2 * KeyBytes(*call) <= kSideBytes && 2 * ValueBytes(*call) <= kSideBytes;
  const int n_blocks = layout.n_tokens == kBlockTokens && fits_twice ? kSpanBlocks : 1;
  const int end_block = (seen.end + layout.n_tokens - 1) / layout.n_tokens;
  for (int b = seen.begin / layout.n_tokens; b < end_block; b += n_blocks) {
    AttendSpan(*call, b, b + n_blocks < end_block ? b + n_blocks : end_block, seen);
  }
  RotateRows(*call);
}

}  // namespace

bool AttentionAmx(const AttentionArgs& args) {
  if (!AmxReady()) return false;
  for (int i = 0; i < args.n_segments; ++i) {
    if (HasFloatRuns(*args.segments[i].layout)) return false;
  }
  const std::size_t rows = PaddedRows(args.n_rows);
  Call call = {
      &args,  AttentionScratch(args.scratch, args.n_rows, args.head_dim), nullptr, nullptr, nullptr, nullptr, {}, {}, 0,
      nullptr};
  call.row_max = call.scratch.q_sums;
  call.row_sum = call.row_max + rows;
  call.seen = reinterpret_cast<TokenSpan*>(call.scratch.v_bases);
  for (std::size_t r = 0; r < rows; ++r) {
    call.row_max[r] = kNoScore;
    call.row_sum[r] = 0.0f;
  }
  __builtin_memset(call.scratch.sums, 0, sizeof(float) * rows * static_cast<std::size_t>(args.head_dim));
  ConfigureTiles(16);
  bool has_sums = false;
  for (int i = 0; i < args.n_segments; ++i) {
    const TokenSpan seen = RowsSpan(args, args.segments[i]);
    if (seen.begin >= seen.end) continue;
    AttendSegment(args.segments[i], has_sums, &call);
    has_sums = true;
  }
  ReleaseTiles();
  const auto n_rows = static_cast<std::size_t>(args.n_rows);
  __builtin_memcpy(args.out, call.scratch.sums, sizeof(float) * n_rows * static_cast<std::size_t>(args.head_dim));
  __builtin_memcpy(args.row_sum, call.row_sum, sizeof(float) * n_rows);
  for (std::size_t r = 0; r < n_rows; ++r) args.row_max[r] = call.row_max[r] * (1.0f / kLog2E);
  return true;
}

}  // namespace zeroc::kernels::cpu

#else

namespace zeroc::kernels::cpu {
bool AttentionAmx(const AttentionArgs&) { return false; }
}  // namespace zeroc::kernels::cpu

#endif
