// Attention on packed blocks: float32 sums on SIMD lanes, for every processor. With AMX or AVX-512 VNNI the variants in
// attention_amx.cc (many rows) and attention_vnni.cc (decode) come first, and segments of codes go to
// attention_codes.cc (many rows without AMX).
//
// Both products are the same operation on tiles, C[row, lane] += sum_depth A[row, depth] * tile[depth, lane]:
//   scores   A = q, lanes = tokens, depth = coordinates
//   output   A = probabilities (times the step of the token), lanes = coordinates, depth = tokens
// Codes are widened to bytes once per block, then to floats in registers, where up to eight query rows share them.
#include <cmath>

#include "kernels/checks.h"
#include "kernels/cpu/attention_scratch.h"
#include "kernels/cpu/cpu.h"
#include "kernels/hadamard.h"
#include "kernels/tile_codec.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention.cc"
// clang-format off
#include "hwy/foreach_target.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/cpu/unpack-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace zeroc::kernels::cpu::HWY_NAMESPACE {

constexpr int kRowsAtOnce = 8;  // accumulators in registers on every target
constexpr float kNone = -HUGE_VALF;

// Tiles as the product reads them: 8 = a byte per code, 16 = bf16 pairs, 32 = float.
constexpr int FormOf(int bits) { return bits <= 8 ? 8 : bits; }

// c[r, 0..16) = (kAdd ? c : 0) + sum over n_tiles * 16 depth steps of a[r, depth] * tile[depth, lane].
template <int kForm, int kRows, bool kAdd>
HWY_INLINE void TileProduct(const float* a, std::size_t a_stride, const std::uint8_t* tiles, int n_tiles, float* c,
                            std::size_t c_stride) {
  const DF df;
  const DU du;
  for (std::size_t part = 0; part < kParts; ++part) {
    float* out = c + kLanes * part;
    VF sums[kRows];
    for (int r = 0; r < kRows; ++r) {
      sums[r] = kAdd ? hn::LoadU(df, out + static_cast<std::size_t>(r) * c_stride) : hn::Zero(df);
    }
    const std::uint8_t* from = tiles + 4 * kLanes * part;
    constexpr int kDepthPerWord = 32 / kForm;
    for (int depth = 0; depth < 16 * n_tiles; depth += kDepthPerWord, from += 64) {
      const VU words = LoadWords(from);
      VF values[kDepthPerWord];
      if constexpr (kForm == 8) {
        const VU mask = hn::Set(du, 0xffu);
        const auto to_float = [](VU codes) { return hn::ConvertTo(DF(), hn::BitCast(DI(), codes)); };
        values[0] = to_float(hn::And(words, mask));
        values[1] = to_float(hn::And(hn::ShiftRight<8>(words), mask));
        values[2] = to_float(hn::And(hn::ShiftRight<16>(words), mask));
        values[3] = to_float(hn::ShiftRight<24>(words));
      } else if constexpr (kForm == 16) {
        values[0] = EvenBf16(words);
        values[1] = OddBf16(words);
      } else {
        values[0] = hn::BitCast(df, words);
      }
      for (int i = 0; i < kDepthPerWord; ++i) {
        for (int r = 0; r < kRows; ++r) {
          sums[r] = hn::MulAdd(hn::Set(df, a[static_cast<std::size_t>(r) * a_stride + depth + i]), values[i], sums[r]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) hn::StoreU(sums[r], df, out + static_cast<std::size_t>(r) * c_stride);
  }
}

template <int kRows, bool kAdd>
HWY_INLINE void TileProductOf(int form, const float* a, std::size_t a_stride, const std::uint8_t* tiles, int n_tiles,
                              float* c, std::size_t c_stride) {
  if (form == 8) return TileProduct<8, kRows, kAdd>(a, a_stride, tiles, n_tiles, c, c_stride);
  if (form == 16) return TileProduct<16, kRows, kAdd>(a, a_stride, tiles, n_tiles, c, c_stride);
  return TileProduct<32, kRows, kAdd>(a, a_stride, tiles, n_tiles, c, c_stride);
}

// One side of a block, ready for the products.
struct Side {
  const std::uint8_t* tiles[kMaxRuns];  // in the run's own tile order, FormOf(bits) wide
  int tile_bytes[kMaxRuns];
  alignas(64) float half[kMaxRuns][kBlockTokens];
  alignas(64) float step[kMaxRuns][kBlockTokens];
  alignas(64) float base[kMaxRuns][kBlockTokens];
};

struct Block {
  const KvBlockLayout* layout;
  int first_group, end_group;            // token groups that some row sees
  alignas(64) float mass[kBlockTokens];  // added to every score
  Side k, v;
};

// Unpacks the runs of one side; `seen` are the block's tokens that some row sees, the rest is not read as numbers.
void PrepareSide(const KvBlockLayout& layout, bool is_value, const std::uint8_t* head, TokenSpan seen,
                 std::uint8_t* scratch, Side* side) {
  const KvSideLayout& from = is_value ? layout.v : layout.k;
  const int n_groups = layout.n_tokens / kTileLanes;
  const bool partial = seen.begin > 0 || seen.end < layout.n_tokens;
  for (int r = 0; r < from.n_runs; ++r) {
    const KvRun& run = from.runs[r];
    if (run.bits == 0) continue;
    const std::uint8_t* codes = head + from.codes_offset[r];
    const int n_tiles = n_groups * (run.width / kTileDepth);
    side->tiles[r] = codes;
    side->tile_bytes[r] = TileBytes(FormOf(run.bits));
    if (run.bits < 8) {
      UnpackTiles(codes, run.bits, n_tiles, scratch);
      side->tiles[r] = scratch;
      scratch += 256 * n_tiles;
    } else if (run.bits >= 16 && is_value && partial) {
      // Rows that were never written may hold NaN, and 0 * NaN is NaN: they are copied as zeros.
      CopyVisibleDepth(codes, run.bits, n_tiles, n_groups, seen, scratch);
      side->tiles[r] = scratch;
      scratch += TileBytes(run.bits) * n_tiles;
    }
    if (IsQuantised(run.bits)) {
      DecodeScales(from, r, head, layout.n_tokens, side->half[r], side->step[r], side->base[r]);
    }
  }
}

// KvSegment::mass of every token, from the halves of the keys.
void PrepareMass(const KvBlockLayout& layout, const float* of_head, const Side& keys, float* mass) {
  const DF df;
  for (std::size_t t = 0; t < static_cast<std::size_t>(layout.n_tokens); t += kLanes) {
    VF sum = hn::Set(df, of_head == nullptr ? 0.0f : of_head[0]);
    for (int r = 0; r < layout.k.n_runs && of_head != nullptr; ++r) {
      if (!IsQuantised(layout.k.runs[r].bits)) continue;
      const VF half = hn::LoadU(df, keys.half[r] + t);
      sum = hn::MulAdd(hn::Mul(half, half), hn::Set(df, of_head[1 + r]), sum);
    }
    hn::StoreU(sum, df, mass + t);
  }
}

// scores[r, t] for the token groups of the block.
template <int kRows>
HWY_INLINE void Scores(const Block& block, const float* q, std::size_t head_dim, const float* q_sums, float* scores) {
  const DF df;
  const KvSideLayout& k = block.layout->k;
  alignas(64) float product[kRows * 16];
  for (int g = block.first_group; g < block.end_group; ++g) {
    const auto begin = static_cast<std::size_t>(16 * g);
    for (int row = 0; row < kRows; ++row) {
      for (std::size_t t = begin; t < begin + 16; t += kLanes) {
        hn::StoreU(hn::LoadU(df, block.mass + t), df, scores + static_cast<std::size_t>(row * kBlockTokens) + t);
      }
    }
    for (int r = 0; r < k.n_runs; ++r) {
      if (k.runs[r].bits == 0) continue;
      const int n_tiles = k.runs[r].width / kTileDepth;
      const std::uint8_t* tiles = block.k.tiles[r] + g * n_tiles * block.k.tile_bytes[r];
      TileProductOf<kRows, false>(FormOf(k.runs[r].bits), q + k.first_coord[r], head_dim, tiles, n_tiles, product, 16);
      for (int row = 0; row < kRows; ++row) {
        for (std::size_t i = 0; i < 16; i += kLanes) {
          const std::size_t t = begin + i;
          float* score = scores + static_cast<std::size_t>(row * kBlockTokens) + t;
          VF sum = hn::LoadU(df, product + static_cast<std::size_t>(16 * row) + i);
          if (IsQuantised(k.runs[r].bits)) {
            const VF base = hn::Mul(hn::LoadU(df, block.k.base[r] + t), hn::Set(df, q_sums[row * kMaxRuns + r]));
            sum = hn::MulAdd(hn::LoadU(df, block.k.step[r] + t), sum, base);
          }
          hn::StoreU(hn::Add(sum, hn::LoadU(df, score)), df, score);
        }
      }
    }
  }
}

// One row's scores to probabilities against the running maximum. Returns the factor for the row's earlier sums.
HWY_INLINE float SoftmaxRow(const Block& block, TokenSpan seen, float* scores, float* row_max, float* row_sum) {
  const DF df;
  const auto begin = static_cast<std::size_t>(16 * block.first_group);
  const auto end = static_cast<std::size_t>(16 * block.end_group);
  VF top = hn::Set(df, kNone);
  for (std::size_t i = begin; i < end; i += kLanes) {
    const VF index = hn::Iota(df, static_cast<float>(i));
    const auto is_seen = hn::And(hn::Ge(index, hn::Set(df, static_cast<float>(seen.begin))),
                                 hn::Lt(index, hn::Set(df, static_cast<float>(seen.end))));
    const VF score = hn::IfThenElse(is_seen, hn::LoadU(df, scores + i), hn::Set(df, kNone));
    hn::StoreU(score, df, scores + i);
    top = hn::Max(top, score);
  }
  const float block_max = hn::GetLane(hn::MaxOfLanes(df, top));
  const float before = *row_max;
  const float now = block_max > before ? block_max : before;
  const float factor = before == kNone ? 0.0f : (before == now ? 1.0f : ExpOfNegative(before - now));
  const VF offset = hn::Set(df, now == kNone ? 0.0f : now);  // inf - inf would be NaN
  VF sum = hn::Zero(df);
  for (std::size_t i = begin; i < end; i += kLanes) {
    const VF p = ExpOfNegative(hn::Sub(hn::LoadU(df, scores + i), offset));
    hn::StoreU(p, df, scores + i);
    sum = hn::Add(sum, p);
  }
  *row_max = now;
  *row_sum = *row_sum * factor + Sum(sum);
  return factor;
}

HWY_INLINE void ScaleRow(float* row, std::size_t n, float factor) {
  const DF df;
  for (std::size_t i = 0; i < n; i += kLanes)
    hn::StoreU(hn::Mul(hn::Set(df, factor), hn::LoadU(df, row + i)), df, row + i);
}

// out (or rotated) += probabilities * V for kRows rows.
template <int kRows>
HWY_INLINE void AddValues(const Block& block, const float* p, std::size_t head_dim, float* out, float* rotated,
                          float* v_bases) {
  const DF df;
  const KvBlockLayout& layout = *block.layout;
  const int n_groups = layout.n_tokens / kTileLanes;
  const auto begin = static_cast<std::size_t>(16 * block.first_group);
  const auto end = static_cast<std::size_t>(16 * block.end_group);
  alignas(64) float scaled[kRows * kBlockTokens];
  for (int r = 0; r < layout.v.n_runs; ++r) {
    const KvRun& run = layout.v.runs[r];
    if (run.bits == 0) continue;
    const bool quantised = IsQuantised(run.bits);
    for (int row = 0; row < kRows && quantised; ++row) {
      VF base = hn::Zero(df);
      for (std::size_t t = begin; t < end; t += kLanes) {
        const VF weight = hn::LoadU(df, p + static_cast<std::size_t>(row * kBlockTokens) + t);
        hn::StoreU(hn::Mul(weight, hn::LoadU(df, block.v.step[r] + t)), df,
                   scaled + static_cast<std::size_t>(row * kBlockTokens) + t);
        base = hn::MulAdd(weight, hn::LoadU(df, block.v.base[r] + t), base);
      }
      v_bases[row * kMaxRuns + r] += Sum(base);
    }
    float* sums = (quantised && layout.rotate_v ? rotated : out) + layout.v.first_coord[r];
    for (int tile = 0; tile < run.width / kTileLanes; ++tile) {
      const std::uint8_t* tiles = block.v.tiles[r] + (tile * n_groups + block.first_group) * block.v.tile_bytes[r];
      TileProductOf<kRows, true>(FormOf(run.bits), (quantised ? scaled : p) + begin, kBlockTokens, tiles,
                                 block.end_group - block.first_group, sums + 16 * tile, head_dim);
    }
  }
}

// What stays the same over the blocks of one segment.
struct Segment {
  const AttentionArgs* args;
  const KvSegment* segment;
  AttentionScratch scratch;
};

template <int kRows>
void AttendRows(const Segment& s, const Block& block, int first_token, int row) {
  const AttentionArgs& args = *s.args;
  const auto d = static_cast<std::size_t>(args.head_dim);
  const std::size_t at = static_cast<std::size_t>(row) * d;
  alignas(64) float scores[kRows * kBlockTokens];
  Scores<kRows>(block, args.q + at, d, s.scratch.q_sums + row * kMaxRuns, scores);
  for (int r = 0; r < kRows; ++r) {
    const TokenSpan span = RowSpan(args, *s.segment, row + r);
    const TokenSpan seen = {span.begin - first_token, span.end - first_token};
    const float factor =
        SoftmaxRow(block, seen, scores + r * kBlockTokens, args.row_max + row + r, args.row_sum + row + r);
    if (factor == 1.0f) continue;
    ScaleRow(args.out + at + static_cast<std::size_t>(r) * d, d, factor);
    ScaleRow(s.scratch.sums + at + static_cast<std::size_t>(r) * d, d, factor);
    for (int i = 0; i < kMaxRuns; ++i) s.scratch.v_bases[(row + r) * kMaxRuns + i] *= factor;
  }
  AddValues<kRows>(block, scores, d, args.out + at, s.scratch.sums + at, s.scratch.v_bases + row * kMaxRuns);
}

void AttendSomeRows(const Segment& s, const Block& block, int first_token, int row, int n_rows) {
  switch (n_rows) {
    case 1:
      return AttendRows<1>(s, block, first_token, row);
    case 2:
      return AttendRows<2>(s, block, first_token, row);
    case 3:
      return AttendRows<3>(s, block, first_token, row);
    case 4:
      return AttendRows<4>(s, block, first_token, row);
    case 5:
      return AttendRows<5>(s, block, first_token, row);
    case 6:
      return AttendRows<6>(s, block, first_token, row);
    case 7:
      return AttendRows<7>(s, block, first_token, row);
    default:
      return AttendRows<8>(s, block, first_token, row);
  }
}

// Sums of q over each quantised K run, for the base of the scores; and empty sums for V.
void BeginSegment(const Segment& s) {
  const AttentionArgs& args = *s.args;
  const KvSideLayout& k = s.segment->layout->k;
  for (int row = 0; row < args.n_rows; ++row) {
    const float* q = args.q + std::int64_t{row} * args.head_dim;
    for (int r = 0; r < k.n_runs; ++r) {
      VF sum = hn::Zero(DF());
      for (int i = 0; i < k.runs[r].width; i += static_cast<int>(kLanes)) {
        sum = hn::Add(sum, hn::LoadU(DF(), q + k.first_coord[r] + i));
      }
      s.scratch.q_sums[row * kMaxRuns + r] = Sum(sum);
    }
    for (int i = 0; i < kMaxRuns; ++i) s.scratch.v_bases[row * kMaxRuns + i] = 0.0f;
  }
  for (std::int64_t i = 0; i < std::int64_t{args.n_rows} * args.head_dim; ++i) s.scratch.sums[i] = 0.0f;
}

// Bases and the inverse rotation of V, once per row.
void EndSegment(const Segment& s) {
  const AttentionArgs& args = *s.args;
  const KvBlockLayout& layout = *s.segment->layout;
  for (int row = 0; row < args.n_rows; ++row) {
    for (int r = 0; r < layout.v.n_runs; ++r) {
      if (!IsQuantised(layout.v.runs[r].bits)) continue;
      const std::int64_t at = std::int64_t{row} * args.head_dim + layout.v.first_coord[r];
      const float base = s.scratch.v_bases[row * kMaxRuns + r];
      float* rotated = s.scratch.sums + at;  // all zero where V is not rotated
      for (int i = 0; i < layout.v.runs[r].width; ++i) rotated[i] += base;
      if (layout.rotate_v) HadamardRun(rotated, layout.v.runs[r].width);
      for (int i = 0; i < layout.v.runs[r].width; ++i) args.out[at + i] += rotated[i];
    }
  }
}

void AttendBlock(const Segment& s, int index, TokenSpan span) {
  const AttentionArgs& args = *s.args;
  const KvBlockLayout& layout = *s.segment->layout;
  const int first_token = index * layout.n_tokens;
  const TokenSpan seen = {span.begin > first_token ? span.begin - first_token : 0,
                          span.end - first_token < layout.n_tokens ? span.end - first_token : layout.n_tokens};
  const std::int64_t head_offset = std::int64_t{args.kv_head} * layout.head_bytes;
  const std::uint8_t* head = s.segment->blocks[index] + head_offset;
  // The next block's bytes travel while this one is computed: blocks lie anywhere, so the hardware cannot foresee them.
  if (first_token + layout.n_tokens < span.end) {
    PrefetchBytes(s.segment->blocks[index + 1] + head_offset, layout.head_bytes);
  }
  Block block;
  block.layout = &layout;
  block.first_group = seen.begin / kTileLanes;
  block.end_group = (seen.end + kTileLanes - 1) / kTileLanes;
  PrepareSide(layout, false, head, seen, s.scratch.k_codes, &block.k);
  PrepareSide(layout, true, head, seen, s.scratch.v_codes, &block.v);
  const float* mass = s.segment->mass;
  PrepareMass(layout, mass != nullptr ? mass + std::int64_t{args.kv_head} * (1 + kMaxRuns) : nullptr, block.k,
              block.mass);
  for (int row = 0; row < args.n_rows; row += kRowsAtOnce) {
    const int n_rows = args.n_rows - row < kRowsAtOnce ? args.n_rows - row : kRowsAtOnce;
    // Neither end of what a row sees moves back, so the first and the last row tell what all of them see.
    const bool some_see = RowSpan(args, *s.segment, row).begin < first_token + layout.n_tokens &&
                          RowSpan(args, *s.segment, row + n_rows - 1).end > first_token;
    if (some_see) AttendSomeRows(s, block, first_token, row, n_rows);
  }
}

void AttendSegments(const AttentionArgs& args) {
  for (int r = 0; r < args.n_rows; ++r) {
    args.row_max[r] = kNone;
    args.row_sum[r] = 0.0f;
  }
  for (std::int64_t i = 0; i < std::int64_t{args.n_rows} * args.head_dim; ++i) args.out[i] = 0.0f;
  for (int i = 0; i < args.n_segments; ++i) {
    const Segment s = {&args, &args.segments[i], AttentionScratch(args.scratch, args.n_rows, args.head_dim)};
    const TokenSpan span = RowsSpan(args, args.segments[i]);
    if (span.begin >= span.end || AttendCodesVnni(args, *s.segment)) continue;
    BeginSegment(s);
    const int n_tokens = args.segments[i].layout->n_tokens;
    for (int b = span.begin / n_tokens; b * n_tokens < span.end; ++b) AttendBlock(s, b, span);
    EndSegment(s);
  }
}

}  // namespace zeroc::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace zeroc::kernels {

std::size_t AttentionScratchBytes(int n_rows, int head_dim) { return cpu::AttentionScratch::Bytes(n_rows, head_dim); }

namespace cpu {

HWY_EXPORT(AttendSegments);

KernelStatus Attention(const AttentionArgs& args) {
  if (!IsGood(args) || args.scratch == nullptr) return KernelStatus::kBadShape;
  if (AttentionVnni(args) || AttentionAmx(args)) return KernelStatus::kOk;
  HWY_DYNAMIC_DISPATCH(AttendSegments)(args);
  return KernelStatus::kOk;
}

}  // namespace cpu
}  // namespace zeroc::kernels
#endif
