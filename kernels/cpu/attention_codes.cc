// Attention of many rows to quantised runs on AVX-512 VNNI: prefill's packed history on processors without AMX.
//
// One segment at a time, for attention.cc, which keeps what the rows have summed so far. Up to two blocks, the span,
// are unpacked to bytes once for all rows of the call; then every eight rows take scores, softmax and sums of V over
// the span. Products are of integers, as in decode (attention_vnni.cc): codes by q and by probability times step, which
// are 16-bit integers in a high and a low byte. An instruction multiplies 64 codes where float32 multiplies 16 numbers.
//
// What a row gets does not depend on the rows beside it: units are a row's own, and spans lie where its position in the
// sequence puts them, so that a prompt comes out the same however it is cut into steps.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/checks.h"
#include "kernels/cpu/attention_scratch.h"
#include "kernels/cpu/cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/decode_span.h"

namespace zeroc::kernels::cpu {
namespace {

constexpr int kSpanBlocks = 2;
constexpr int kSpanTokens = kSpanBlocks * kBlockTokens;
constexpr int kSpanGroups = kSpanTokens / kTileLanes;
constexpr int kRowsAtOnce = 8;  // two sums of each fill half of the registers
constexpr int kByteTile = 256;  // a tile of codes as bytes

struct Call {
  const AttentionArgs* args;
  const KvSegment* segment;
  const KvBlockLayout* layout;
  std::int64_t dim;
  float* sums;          // [n_rows, head_dim] of V, rotated, in units of the rows' maxima
  float* bases;         // [n_rows, kMaxRuns] probability * centre of each V run, by its middle code
  std::int8_t* q_high;  // [n_rows, head_dim]
  std::int8_t* q_low;
  float* q_scale;  // [n_rows, kMaxRuns] of the integers
  float* q_sum;    // [n_rows, kMaxRuns]
  std::uint8_t* k_codes;
  std::uint8_t* v_codes;
  const float* mass;  // of the head, or null
  int n_key_tiles;    // of a token group
};

// Scales by token, of the span.
struct SideScales {
  alignas(64) float step[kMaxRuns][kSpanTokens];
  alignas(64) float base[kMaxRuns][kSpanTokens];  // V: of the middle code
};

struct Span {
  int n_tokens, first_token;  // of its blocks; of the segment
  SideScales k, v;
  alignas(64) float mass[kSpanTokens];
};

// What eight rows have of the span.
struct RowsOfSpan {
  int begin_group, end_group;                          // that some of them see
  alignas(64) float scores[kRowsAtOnce][kSpanTokens];  // then probabilities
  alignas(64) std::int8_t high[kRowsAtOnce][kSpanTokens], low[kRowsAtOnce][kSpanTokens];
};

// ---- Blocks to bytes -----------------------------------------------------------------------------------------------

// K: [token group][tile of coordinates], the quantised runs' tiles side by side; scales of every token.
ZEROC_VNNI_TARGET void PrepareKeys(const Call& call, const std::uint8_t* head, int block, Span* span) {
  const KvBlockLayout& layout = *call.layout;
  const int n_groups = layout.n_tokens / kTileLanes, first_group = block * n_groups;
  int column = 0;
  for (int r = 0; r < layout.k.n_runs; ++r) {
    const int bits = layout.k.runs[r].bits, of_run = layout.k.runs[r].width / kTileDepth;
    if (bits == 0) continue;
    for (int g = 0; g < n_groups; ++g) {
      UnpackBytesOf(bits, head + layout.k.codes_offset[r] + g * of_run * TileBytes(bits), of_run,
                    call.k_codes + ((first_group + g) * call.n_key_tiles + column) * kByteTile);
      const Scales scales = DecodeScales(layout.k, r, head, layout.n_tokens, g);
      _mm512_store_ps(span->k.step[r] + 16 * (first_group + g), scales.step);
      _mm512_store_ps(span->k.base[r] + 16 * (first_group + g), scales.base);
    }
    column += of_run;
  }
  if (call.mass != nullptr) {
    DecodeMass(layout, head, call.mass, span->mass + 16 * first_group);
  } else {
    std::memset(span->mass + 16 * first_group, 0, sizeof(float) * static_cast<std::size_t>(layout.n_tokens));
  }
}

// V: [tile of coordinates][token group of the span].
ZEROC_VNNI_TARGET void PrepareValues(const Call& call, const std::uint8_t* head, int block, Span* span) {
  const KvBlockLayout& layout = *call.layout;
  const int n_groups = layout.n_tokens / kTileLanes, first_group = block * n_groups;
  int tile = 0;
  for (int r = 0; r < layout.v.n_runs; ++r) {
    const int bits = layout.v.runs[r].bits, of_run = layout.v.runs[r].width / kTileLanes;
    if (bits == 0) continue;
    for (int i = 0; i < of_run; ++i, ++tile) {
      UnpackBytesOf(bits, head + layout.v.codes_offset[r] + i * n_groups * TileBytes(bits), n_groups,
                    call.v_codes + (tile * kSpanGroups + first_group) * kByteTile);
    }
    for (int g = 0; g < n_groups; ++g) {
      const Scales scales = DecodeScales(layout.v, r, head, layout.n_tokens, g);
      _mm512_store_ps(span->v.step[r] + 16 * (first_group + g), scales.step);
      _mm512_store_ps(span->v.base[r] + 16 * (first_group + g), _mm512_add_ps(scales.base, scales.half));
    }
  }
}

// ---- Eight rows ----------------------------------------------------------------------------------------------------

// scores[kRows][.] of the token groups that they see.
template <int kRows>
ZEROC_VNNI_TARGET void Scores(const Call& call, const Span& span, int row, RowsOfSpan* rows) {
  const KvSideLayout& k = call.layout->k;
  const std::int64_t dim = call.dim;
  for (int g = rows->begin_group; g < rows->end_group; ++g) {
    const __m512 mass = _mm512_load_ps(span.mass + 16 * g);
    for (int j = 0; j < kRows; ++j) _mm512_store_ps(rows->scores[j] + 16 * g, mass);
    const std::uint8_t* codes = call.k_codes + g * call.n_key_tiles * kByteTile;
    for (int r = 0; r < k.n_runs; ++r) {
      if (k.runs[r].bits == 0) continue;
      __m512i high[kRows], low[kRows];
      for (int j = 0; j < kRows; ++j) high[j] = low[j] = _mm512_setzero_si512();
      const std::int8_t* q_high = call.q_high + row * dim + k.first_coord[r];
      const std::int8_t* q_low = call.q_low + row * dim + k.first_coord[r];
      for (int i = 0; i < k.runs[r].width; i += 4, codes += 64) {
        const __m512i quad = _mm512_load_si512(codes);
        for (int j = 0; j < kRows; ++j) {
          high[j] = _mm512_dpbusd_epi32(high[j], quad, BroadcastWord(q_high + j * dim + i));
          low[j] = _mm512_dpbusd_epi32(low[j], quad, BroadcastWord(q_low + j * dim + i));
        }
      }
      const __m512 step = _mm512_load_ps(span.k.step[r] + 16 * g), base = _mm512_load_ps(span.k.base[r] + 16 * g);
      for (int j = 0; j < kRows; ++j) {
        const std::int64_t at = (row + j) * kMaxRuns + r;
        const __m512 product = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[j], 8), low[j]));
        float* score = rows->scores[j] + 16 * g;
        __m512 sum = _mm512_fmadd_ps(base, _mm512_set1_ps(call.q_sum[at]), _mm512_load_ps(score));
        sum = _mm512_fmadd_ps(product, _mm512_mul_ps(step, _mm512_set1_ps(call.q_scale[at])), sum);
        _mm512_store_ps(score, sum);
      }
    }
  }
}

// Scores to probabilities against the row's new maximum; what was summed before is scaled to it.
ZEROC_VNNI_TARGET void Softmax(const Call& call, TokenSpan seen, int row, int j, RowsOfSpan* rows) {
  const AttentionArgs& args = *call.args;
  const int begin = 16 * rows->begin_group, end = 16 * rows->end_group;
  float* scores = rows->scores[j];
  __m512 top = _mm512_set1_ps(kNoScore);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const bool partial = seen.begin > begin || seen.end < end;
  for (int t = begin; t < end; t += 16) {
    __m512 score = _mm512_load_ps(scores + t);
    if (partial) {
      const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(t));
      const __mmask16 is_seen = _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(seen.begin)) &
                                _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(seen.end));
      score = _mm512_mask_mov_ps(_mm512_set1_ps(kNoScore), is_seen, score);
      _mm512_store_ps(scores + t, score);
    }
    top = _mm512_max_ps(top, score);
  }
  const float before = args.row_max[row], of_span = _mm512_reduce_max_ps(top);
  const float now = of_span > before ? of_span : before;
  const float offset = now == kNoScore ? 0.0f : now;  // inf - inf would be NaN
  if (now != before && before != kNoScore) {
    const float factor = _mm512_cvtss_f32(Exp2(_mm512_set1_ps((before - now) * kLog2E)));
    args.row_sum[row] *= factor;
    ScaleRow(args.out + row * call.dim, args.head_dim, factor);
    ScaleRow(call.sums + row * call.dim, args.head_dim, factor);
    for (int r = 0; r < kMaxRuns; ++r) call.bases[row * kMaxRuns + r] *= factor;
  }
  args.row_max[row] = now;
  __m512 sum = _mm512_setzero_ps();
  for (int t = begin; t < end; t += 16) {
    const __m512 below = _mm512_sub_ps(_mm512_load_ps(scores + t), _mm512_set1_ps(offset));
    const __m512 p = Exp2(_mm512_mul_ps(below, _mm512_set1_ps(kLog2E)));
    _mm512_store_ps(scores + t, p);
    sum = _mm512_add_ps(sum, p);
  }
  args.row_sum[row] += _mm512_reduce_add_ps(sum);
}

// Probability times step as bytes, for one run of V, and what the bytes rounded off, times the middle code, into the
// bases: as QuantiseWeights of decode. Returns the unit of the row's integers.
ZEROC_VNNI_TARGET float QuantiseRow(const Call& call, const Span& span, int row, int j, int r, RowsOfSpan* rows) {
  const int begin = 16 * rows->begin_group, end = 16 * rows->end_group;
  __m512 largest = _mm512_setzero_ps();
  for (int t = begin; t < end; t += 16) {
    largest =
        _mm512_max_ps(largest, _mm512_mul_ps(_mm512_load_ps(rows->scores[j] + t), _mm512_load_ps(span.v.step[r] + t)));
  }
  const float unit = _mm512_reduce_max_ps(largest);
  const __m512 inverse = _mm512_set1_ps(unit > 0.0f ? kLargest / unit : 0.0f);
  __m512 sum = _mm512_setzero_ps();
  __m512i numbers = _mm512_setzero_si512();
  for (int t = begin; t < end; t += 16) {
    const __m512 p = _mm512_load_ps(rows->scores[j] + t);
    const __m512 number = _mm512_mul_ps(_mm512_mul_ps(p, _mm512_load_ps(span.v.step[r] + t)), inverse);
    numbers = _mm512_add_epi32(
        numbers, StoreBytes(_mm512_min_ps(number, _mm512_set1_ps(kLargest)), rows->high[j] + t, rows->low[j] + t));
    sum = _mm512_fmadd_ps(p, _mm512_load_ps(span.v.base[r] + t), sum);
  }
  const float middle = 0.5f * static_cast<float>((1 << call.layout->v.runs[r].bits) - 1);
  const float of_unit = unit * (1.0f / kLargest);
  const __m512 of_middle = _mm512_set1_ps(-middle * of_unit);
  call.bases[row * kMaxRuns + r] += _mm512_reduce_add_ps(_mm512_fmadd_ps(_mm512_cvtepi32_ps(numbers), of_middle, sum));
  return of_unit;
}

template <int kRows>
ZEROC_VNNI_TARGET void AddValues(const Call& call, const Span& span, int row, RowsOfSpan* rows) {
  const KvSideLayout& v = call.layout->v;
  int first_tile = 0;
  for (int r = 0; r < v.n_runs; ++r) {
    if (v.runs[r].bits == 0) continue;
    float units[kRows];
    for (int j = 0; j < kRows; ++j) units[j] = QuantiseRow(call, span, row + j, j, r, rows);
    for (int tile = 0; tile < v.runs[r].width / kTileLanes; ++tile) {
      const std::uint8_t* codes = call.v_codes + ((first_tile + tile) * kSpanGroups + rows->begin_group) * kByteTile;
      __m512i high[kRows], low[kRows];
      for (int j = 0; j < kRows; ++j) high[j] = low[j] = _mm512_setzero_si512();
      for (int t = 16 * rows->begin_group; t < 16 * rows->end_group; t += 4, codes += 64) {
        const __m512i quad = _mm512_load_si512(codes);
        for (int j = 0; j < kRows; ++j) {
          high[j] = _mm512_dpbusd_epi32(high[j], quad, BroadcastWord(rows->high[j] + t));
          low[j] = _mm512_dpbusd_epi32(low[j], quad, BroadcastWord(rows->low[j] + t));
        }
      }
      for (int j = 0; j < kRows; ++j) {
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[j], 8), low[j]));
        float* to = call.sums + (row + j) * call.dim + v.first_coord[r] + 16 * tile;
        _mm512_storeu_ps(to, _mm512_fmadd_ps(sum, _mm512_set1_ps(units[j]), _mm512_loadu_ps(to)));
      }
    }
    first_tile += v.runs[r].width / kTileLanes;
  }
}

template <int kRows>
ZEROC_VNNI_TARGET void AttendRows(const Call& call, const Span& span, int row, const TokenSpan* seen) {
  RowsOfSpan rows;
  // Neither end of what a row sees moves back, so the first and the last row tell what all of them see.
  const int begin = std::max(seen[0].begin - span.first_token, 0);
  const int end = std::min(seen[kRows - 1].end - span.first_token, span.n_tokens);
  if (begin >= end) return;
  rows.begin_group = begin / kTileLanes;
  rows.end_group = (end + kTileLanes - 1) / kTileLanes;
  Scores<kRows>(call, span, row, &rows);
  for (int j = 0; j < kRows; ++j) {
    Softmax(call, {seen[j].begin - span.first_token, seen[j].end - span.first_token}, row + j, j, &rows);
  }
  AddValues<kRows>(call, span, row, &rows);
}

ZEROC_VNNI_TARGET void AttendSomeRows(const Call& call, const Span& span, int row, int n_rows, const TokenSpan* seen) {
  switch (n_rows) {
    case 1:
      return AttendRows<1>(call, span, row, seen);
    case 2:
      return AttendRows<2>(call, span, row, seen);
    case 3:
      return AttendRows<3>(call, span, row, seen);
    case 4:
      return AttendRows<4>(call, span, row, seen);
    case 5:
      return AttendRows<5>(call, span, row, seen);
    case 6:
      return AttendRows<6>(call, span, row, seen);
    case 7:
      return AttendRows<7>(call, span, row, seen);
    default:
      return AttendRows<kRowsAtOnce>(call, span, row, seen);
  }
}

// ---- The segment ---------------------------------------------------------------------------------------------------

// Every row of q as 16-bit integers, with one scale for each quantised run.
ZEROC_VNNI_TARGET void QuantiseQueries(const Call& call) {
  const KvSideLayout& k = call.layout->k;
  for (int row = 0; row < call.args->n_rows; ++row) {
    const std::int64_t at = row * call.dim;
    for (int r = 0; r < k.n_runs; ++r) {
      if (k.runs[r].bits == 0) continue;
      const std::int64_t first = at + k.first_coord[r], end = first + k.runs[r].width;
      const float largest = LargestOf(call.args->q + first, k.runs[r].width);
      const __m512 inverse = _mm512_set1_ps(largest > 0.0f ? kLargest / largest : 0.0f);
      __m512i sum = _mm512_setzero_si512();
      for (std::int64_t i = first; i < end; i += 16) {
        const __m512 number = _mm512_mul_ps(_mm512_loadu_ps(call.args->q + i), inverse);
        sum = _mm512_add_epi32(sum, StoreBytes(number, call.q_high + i, call.q_low + i));
      }
      const float scale = largest * (1.0f / kLargest);
      call.q_scale[row * kMaxRuns + r] = scale;
      call.q_sum[row * kMaxRuns + r] = scale * static_cast<float>(_mm512_reduce_add_epi32(sum));
    }
  }
}

ZEROC_VNNI_TARGET void EndSegment(const Call& call) {
  const AttentionArgs& args = *call.args;
  const KvSideLayout& v = call.layout->v;
  for (int row = 0; row < args.n_rows; ++row) {
    float* sums = call.sums + row * call.dim;
    for (int r = 0; r < v.n_runs; ++r) {
      const __m512 base = _mm512_set1_ps(call.bases[row * kMaxRuns + r]);
      for (int i = v.first_coord[r]; v.runs[r].bits != 0 && i < v.first_coord[r] + v.runs[r].width; i += 16) {
        _mm512_storeu_ps(sums + i, _mm512_add_ps(_mm512_loadu_ps(sums + i), base));
      }
    }
    RotateValues(*call.layout, sums);
    float* out = args.out + row * call.dim;
    for (std::int64_t i = 0; i < call.dim; i += 16) {
      _mm512_storeu_ps(out + i, _mm512_add_ps(_mm512_loadu_ps(out + i), _mm512_loadu_ps(sums + i)));
    }
  }
}

// Every run is quantised or left out.
bool HasOnlyCodes(const KvBlockLayout& layout) {
  for (const KvSideLayout* side : {&layout.k, &layout.v}) {
    for (int r = 0; r < side->n_runs; ++r) {
      if (side->runs[r].bits != 0 && !IsQuantised(side->runs[r].bits)) return false;
    }
  }
  return true;
}

int CountTiles(const KvSideLayout& side) {
  int n = 0;
  for (int r = 0; r < side.n_runs; ++r) n += side.runs[r].bits != 0 ? side.runs[r].width / kTileDepth : 0;
  return n;
}

}  // namespace

ZEROC_VNNI_TARGET bool AttendCodesVnni(const AttentionArgs& args, const KvSegment& segment) {
  const KvBlockLayout& layout = *segment.layout;
  if (args.n_rows < kRowsAtOnce || !VnniReady() || !HasOnlyCodes(layout)) return false;
  const AttentionScratch scratch(args.scratch, args.n_rows, args.head_dim);
  const auto n_rows = static_cast<std::size_t>(args.n_rows), dim = static_cast<std::size_t>(args.head_dim);
  auto* bytes = reinterpret_cast<std::int8_t*>(scratch.queries);
  const Call call = {&args,
                     &segment,
                     &layout,
                     args.head_dim,
                     scratch.sums,
                     scratch.v_bases,
                     bytes,
                     bytes + n_rows * dim,
                     reinterpret_cast<float*>(bytes + 2 * n_rows * dim),
                     scratch.q_sums,
                     scratch.k_codes,
                     scratch.v_codes,
                     segment.mass != nullptr ? segment.mass + std::int64_t{args.kv_head} * (1 + kMaxRuns) : nullptr,
                     CountTiles(layout.k)};
  const TokenSpan all = RowsSpan(args, segment);
  if (all.begin >= all.end) return true;
  std::memset(call.sums, 0, n_rows * dim * sizeof(float));
  std::memset(call.bases, 0, n_rows * kMaxRuns * sizeof(float));
  QuantiseQueries(call);
  TokenSpan seen[kAttentionRowsMax];
  for (int row = 0; row < args.n_rows; ++row) {
    seen[row] = row % args.group == 0 ? RowSpan(args, segment, row) : seen[row - 1];
  }
  const std::int64_t head_offset = std::int64_t{args.kv_head} * layout.head_bytes;
  const int end_block = (all.end + layout.n_tokens - 1) / layout.n_tokens;
  Span span;
  const int blocks_before = segment.first_pos / layout.n_tokens;
  for (int first = all.begin / layout.n_tokens, n_blocks = 0; first < end_block; first += n_blocks) {
    n_blocks = std::min(kSpanBlocks - (blocks_before + first) % kSpanBlocks, end_block - first);
    span.first_token = first * layout.n_tokens;
    span.n_tokens = n_blocks * layout.n_tokens;
    for (int i = 0; i < n_blocks; ++i) {
      const std::uint8_t* head = segment.blocks[first + i] + head_offset;
      PrepareKeys(call, head, i, &span);
      PrepareValues(call, head, i, &span);
      // The next span's bytes travel while this one is computed: blocks lie anywhere, the hardware cannot foresee them.
      const int next = first + n_blocks + i;
      if (next < end_block) PrefetchBytes(segment.blocks[next] + head_offset, layout.head_bytes);
    }
    for (int row = 0; row < args.n_rows; row += kRowsAtOnce) {
      AttendSomeRows(call, span, row, std::min(kRowsAtOnce, args.n_rows - row), seen + row);
    }
  }
  EndSegment(call);
  return true;
}

}  // namespace zeroc::kernels::cpu

#else

namespace zeroc::kernels::cpu {
bool AttendCodesVnni(const AttentionArgs&, const KvSegment&) { return false; }
}  // namespace zeroc::kernels::cpu

#endif
