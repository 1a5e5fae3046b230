// Queries and keys: RoPE and the profile's map, then queries in rows or keys and values into exact blocks.
#include "kernels/bf16.h"
#include "kernels/checks.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/map_amx.h"
#include "kernels/hadamard.h"
#include "kernels/tile_codec.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/kv.cc"
// clang-format off
#include "hwy/foreach_target.h"
#include "kernels/cpu/simd-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace zeroc::kernels::cpu::HWY_NAMESPACE {

constexpr int kRowsAtOnce = 8;        // accumulators of the map product; each loaded map vector serves all of them
constexpr int kBatch = kBlockTokens;  // rows turned and mapped together, so that the steps of AMX overlap

// out = rope(x); head_dim is a multiple of 16, half of it of 8, so half vectors may end in a scalar tail.
HWY_INLINE void TurnRow(const float* x, const float* cos, const float* sin, int head_dim, float* out) {
  const DF df;
  const auto d = static_cast<std::size_t>(head_dim);
  std::size_t i = 0;
  if (cos == nullptr) {
    for (; i < d; i += kLanes) hn::StoreU(hn::LoadU(df, x + i), df, out + i);
    return;
  }
  const std::size_t half = d / 2;
  for (; i + kLanes <= half; i += kLanes) {
    const VF a = hn::LoadU(df, x + i), b = hn::LoadU(df, x + i + half);
    const VF c = hn::LoadU(df, cos + i), s = hn::LoadU(df, sin + i);
    hn::StoreU(hn::NegMulAdd(b, s, hn::Mul(a, c)), df, out + i);
    hn::StoreU(hn::MulAdd(a, s, hn::Mul(b, c)), df, out + i + half);
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    out[i] = a * cos[i] - b * sin[i];
    out[i + half] = b * cos[i] + a * sin[i];
  }
}

// out[r, :] = scale * x[r, :] * map for kRows rows of x and of out, rows apart by x_stride and out_stride.
template <int kRows>
HWY_INLINE void MapRows(const float* x, std::size_t x_stride, const float* map, float scale, std::size_t d, float* out,
                        std::size_t out_stride) {
  const DF df;
  for (std::size_t j = 0; j < d; j += kLanes) {
    VF sums[kRows];
    for (VF& sum : sums) sum = hn::Zero(df);
    for (std::size_t i = 0; i < d; ++i) {
      const VF column = hn::LoadU(df, map + i * d + j);
      for (int r = 0; r < kRows; ++r) {
        sums[r] = hn::MulAdd(hn::Set(df, x[static_cast<std::size_t>(r) * x_stride + i]), column, sums[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      hn::StoreU(hn::Mul(hn::Set(df, scale), sums[r]), df, out + static_cast<std::size_t>(r) * out_stride + j);
    }
  }
}

// out = scale * x * map for up to kBatch rows of x; a null map is the identity.
class RowMap {
 public:
  // For n_rows rows in all.
  RowMap(const float* map, float scale, int head_dim, std::int64_t n_rows)
      : map_(map), scale_(scale), head_dim_(head_dim), amx_(map, scale, head_dim, n_rows) {}

  void Apply(const float* x, int n_rows, float* out) const {
    if (amx_.active()) return amx_.Multiply(x, n_rows, out);
    const DF df;
    const auto d = static_cast<std::size_t>(head_dim_);
    if (map_ == nullptr) {
      for (std::size_t i = 0; i < d * static_cast<std::size_t>(n_rows); i += kLanes) {
        hn::StoreU(hn::Mul(hn::Set(df, scale_), hn::LoadU(df, x + i)), df, out + i);
      }
      return;
    }
    int r = 0;
    for (; r + kRowsAtOnce <= n_rows; r += kRowsAtOnce) MapSome<kRowsAtOnce>(x, r, out);
    for (; r + 4 <= n_rows; r += 4) MapSome<4>(x, r, out);
    for (; r < n_rows; ++r) MapSome<1>(x, r, out);
  }

 private:
  template <int kRows>
  void MapSome(const float* x, int first, float* out) const {
    const auto d = static_cast<std::size_t>(head_dim_);
    const std::size_t at = static_cast<std::size_t>(first) * d;
    MapRows<kRows>(x + at, d, map_, scale_, d, out + at, d);
  }

  const float* map_;
  float scale_;
  int head_dim_;
  MapAmx amx_;
};

HWY_INLINE const float* RowOf(const float* table, std::int64_t t, std::int64_t width) {
  return table == nullptr ? nullptr : table + t * width;
}

void PrepareQueries(const QueryPrepArgs& args) {
  const std::int64_t d = args.head_dim;
  const int group = args.n_heads / args.n_kv_heads;
  alignas(64) float turned[kBatch * kMaxHeadDim];
  for (std::int64_t g = args.kv_head_begin; g < args.kv_head_end; ++g) {
    float* out = args.out + g * args.n_tokens * group * d;
    const std::int64_t n_rows = std::int64_t{args.n_tokens} * group;
    const RowMap map(RowOf(args.q_map, g, d * d), args.scale, args.head_dim, n_rows);
    for (std::int64_t row = 0; row < n_rows; row += kBatch) {
      const int rows = n_rows - row < kBatch ? static_cast<int>(n_rows - row) : kBatch;
      for (int r = 0; r < rows; ++r) {
        const std::int64_t t = (row + r) / group;
        const std::int64_t head = g * group + (row + r) % group;
        TurnRow(args.q + t * args.q_stride + head * d, RowOf(args.rope.cos, t, d / 2), RowOf(args.rope.sin, t, d / 2),
                args.head_dim, turned + r * d);
      }
      map.Apply(turned, rows, out + row * d);
      for (int r = 0; r < rows; ++r) HadamardRuns(out + (row + r) * d, args.rotation);
    }
  }
}

// One key into its lane of the tiles: pairs of coordinates are the 4-byte groups of a tile row.
HWY_INLINE void StoreKey(const KvBlockLayout& layout, const float* key, int row, std::uint8_t* head) {
  const DF df;
  const int bits = layout.k.runs[0].bits;
  const int lane = row % kTileLanes;
  if (bits == 32) {
    for (int i = 0; i < layout.head_dim; ++i) {
      SetExact(head + KTileOffset(layout, 0, row, i), bits, lane, i % kTileDepth, key[i]);
    }
    return;
  }
  alignas(64) std::uint16_t rounded[kMaxHeadDim];
  for (std::size_t i = 0; i < static_cast<std::size_t>(layout.head_dim); i += kLanes) {
    StoreBf16(hn::LoadU(df, key + i), rounded + i);
  }
  std::uint8_t* tiles = head + KTileOffset(layout, 0, row, 0) + 4 * lane;  // the tiles of one token group are adjacent
  for (int pair = 0; pair < layout.head_dim / 2; ++pair) __builtin_memcpy(tiles + 64 * pair, rounded + 2 * pair, 4);
}

// One value into its depth step: every other bf16 of a tile row, whose other half belongs to the neighbour token.
HWY_INLINE void StoreValue(const KvBlockLayout& layout, const float* value, int row, std::uint8_t* head) {
  const DF df;
  const DU du;
  const int bits = layout.v.runs[0].bits;
  if (bits == 32) {
    for (int i = 0; i < layout.head_dim; ++i) {
      SetExact(head + VTileOffset(layout, 0, row, i), bits, i % kTileLanes, row % kTileDepth, value[i]);
    }
    return;
  }
  const int depth = row % kTileDepth;
  const bool odd = depth % 2 != 0;
  for (int i = 0; i < layout.head_dim; i += static_cast<int>(kLanes)) {
    std::uint8_t* to = head + VTileOffset(layout, 0, row, i) + 64 * (depth / 2) + 4 * (i % kTileLanes);
    const VU fresh = RoundToBf16(hn::LoadU(df, value + i));
    const VU kept = hn::And(LoadWords(to), hn::Set(du, odd ? 0x0000ffffu : 0xffff0000u));
    StoreWords(hn::Or(kept, odd ? hn::ShiftLeft<16>(fresh) : fresh), to);
  }
}

// Sixteen keys, a whole token group, into 16-bit tiles: pairs of coordinates, transposed four at a time.
void StoreKeyGroup(const KvBlockLayout& layout, const float* keys, int first_row, std::uint8_t* head) {
  const int d = layout.head_dim;
  alignas(64) std::uint32_t pairs[kMaxHeadDim / 8][kTileLanes][4];
  alignas(64) std::uint16_t rounded[kMaxHeadDim];
  for (int t = 0; t < kTileLanes; ++t) {
    for (int i = 0; i < d; i += static_cast<int>(kLanes)) StoreBf16(hn::LoadU(DF(), keys + t * d + i), rounded + i);
    for (int i = 0; i < d / 8; ++i) __builtin_memcpy(pairs[i][t], rounded + 8 * i, 16);
  }
  std::uint8_t* tiles = head + KTileOffset(layout, 0, first_row, 0);  // the tiles of one token group are adjacent
  for (int i = 0; i < d / 8; ++i, tiles += 256) {
    for (std::size_t at = 0; at < kTileLanes; at += kLanes) {
      VU q0, q1, q2, q3;
      hn::LoadInterleaved4(DU(), pairs[i][at], q0, q1, q2, q3);
      StoreWords(q0, tiles + 4 * at);
      StoreWords(q1, tiles + 4 * at + 64);
      StoreWords(q2, tiles + 4 * at + 128);
      StoreWords(q3, tiles + 4 * at + 192);
    }
  }
}

// Two values that share the words of a tile row.
HWY_INLINE void StoreValuePair(const KvBlockLayout& layout, const float* even, const float* odd, int row,
                               std::uint8_t* head) {
  for (int i = 0; i < layout.head_dim; i += static_cast<int>(kLanes)) {
    std::uint8_t* to = head + VTileOffset(layout, 0, row, i) + 64 * (row % kTileDepth / 2) + 4 * (i % kTileLanes);
    const VU high = hn::ShiftLeft<16>(RoundToBf16(hn::LoadU(DF(), odd + i)));
    StoreWords(hn::Or(RoundToBf16(hn::LoadU(DF(), even + i)), high), to);
  }
}

// Up to one token group of one head: `keys` mapped, [n][head_dim]; `values` with the caller's stride.
void StoreGroup(const KvBlockLayout& layout, const float* keys, const float* values, std::int64_t stride, int first_row,
                int n, std::uint8_t* head) {
  const bool whole = n == kTileLanes && layout.k.runs[0].bits == 16;
  if (whole) StoreKeyGroup(layout, keys, first_row, head);
  for (int r = 0; r < n; r += whole ? 2 : 1) {
    if (whole) {
      StoreValuePair(layout, values + r * stride, values + (r + 1) * stride, first_row + r, head);
    } else {
      StoreKey(layout, keys + r * layout.head_dim, first_row + r, head);
      StoreValue(layout, values + r * stride, first_row + r, head);
    }
  }
}

void WriteKeysAndValues(const KvWriteArgs& args) {
  const KvBlockLayout& layout = *args.layout;
  const std::int64_t d = layout.head_dim;
  alignas(64) float turned[kBatch * kMaxHeadDim];
  alignas(64) float keys[kBatch * kMaxHeadDim];
  for (std::int64_t g = args.kv_head_begin; g < args.kv_head_end; ++g) {
    const RowMap map(RowOf(args.k_map, g, d * d), 1.0f, layout.head_dim, args.n_tokens);
    for (std::int64_t first = 0; first < args.n_tokens;) {
      const std::int64_t pos = args.first_pos + first;
      const std::int64_t room = kBatch - pos % kBatch;  // a batch stays in its block
      const int rows = static_cast<int>(args.n_tokens - first < room ? args.n_tokens - first : room);
      for (int r = 0; r < rows; ++r) {
        const std::int64_t t = first + r;
        TurnRow(args.k + t * args.kv_stride + g * d, RowOf(args.rope.cos, t, d / 2), RowOf(args.rope.sin, t, d / 2),
                layout.head_dim, turned + r * d);
      }
      map.Apply(turned, rows, keys);
      for (int r = 0; r < rows; ++r) HadamardRuns(keys + r * d, args.rotation);
      std::uint8_t* head = args.blocks[pos / kBlockTokens - args.first_pos / kBlockTokens] + g * layout.head_bytes;
      const float* values = args.v + first * args.kv_stride + g * d;
      for (int r = 0, n = 0; r < rows; r += n) {
        const int row = static_cast<int>(pos % kBlockTokens) + r;
        n = kTileLanes - row % kTileLanes < rows - r ? kTileLanes - row % kTileLanes : rows - r;
        StoreGroup(layout, keys + r * d, values + r * args.kv_stride, args.kv_stride, row, n, head);
      }
      first += rows;
    }
  }
}

}  // namespace zeroc::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace zeroc::kernels::cpu {

HWY_EXPORT(PrepareQueries);
HWY_EXPORT(WriteKeysAndValues);

KernelStatus QueryPrep(const QueryPrepArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  HWY_DYNAMIC_DISPATCH(PrepareQueries)(args);
  return KernelStatus::kOk;
}

KernelStatus KvWrite(const KvWriteArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  HWY_DYNAMIC_DISPATCH(WriteKeysAndValues)(args);
  return KernelStatus::kOk;
}

}  // namespace zeroc::kernels::cpu
#endif
