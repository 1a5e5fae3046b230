// Queries and keys: RoPE and the profile's map, then queries in rows or keys and values into exact blocks.
#include "kernels/bf16.h"
#include "kernels/checks.h"
#include "kernels/cpu/cpu.h"
#include "kernels/tile_codec.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/kv.cc"
// clang-format off
#include "hwy/foreach_target.h"
#include "kernels/cpu/simd-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace zeroc::kernels::cpu::HWY_NAMESPACE {

constexpr int kRowsAtOnce = 8;  // accumulators of the map product; each loaded map vector serves all of them

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

// As above for up to kRowsAtOnce rows; a null map is the identity.
HWY_INLINE void MapSomeRows(const float* x, const float* map, float scale, int head_dim, int n_rows, float* out) {
  const DF df;
  const auto d = static_cast<std::size_t>(head_dim);
  if (map == nullptr) {
    for (std::size_t i = 0; i < d * static_cast<std::size_t>(n_rows); i += kLanes) {
      hn::StoreU(hn::Mul(hn::Set(df, scale), hn::LoadU(df, x + i)), df, out + i);
    }
    return;
  }
  if (n_rows == kRowsAtOnce) return MapRows<kRowsAtOnce>(x, d, map, scale, d, out, d);
  int r = 0;
  for (; r + 4 <= n_rows; r += 4) MapRows<4>(x + r * head_dim, d, map, scale, d, out + r * head_dim, d);
  for (; r < n_rows; ++r) MapRows<1>(x + r * head_dim, d, map, scale, d, out + r * head_dim, d);
}

void PrepareQueries(const QueryPrepArgs& args) {
  const std::int64_t d = args.head_dim;
  const int group = args.n_heads / args.n_kv_heads;
  alignas(64) float turned[kRowsAtOnce * kMaxHeadDim];
  for (std::int64_t g = args.kv_head_begin; g < args.kv_head_end; ++g) {
    const float* map = args.q_map == nullptr ? nullptr : args.q_map + g * d * d;
    float* out = args.out + g * args.n_tokens * group * d;
    const std::int64_t n_rows = std::int64_t{args.n_tokens} * group;
    for (std::int64_t row = 0; row < n_rows; row += kRowsAtOnce) {
      const int rows = n_rows - row < kRowsAtOnce ? static_cast<int>(n_rows - row) : kRowsAtOnce;
      for (int r = 0; r < rows; ++r) {
        const std::int64_t t = (row + r) / group;
        const std::int64_t head = g * group + (row + r) % group;
        const float* cos = args.rope.cos == nullptr ? nullptr : args.rope.cos + t * (d / 2);
        const float* sin = args.rope.sin == nullptr ? nullptr : args.rope.sin + t * (d / 2);
        TurnRow(args.q + t * args.q_stride + head * d, cos, sin, args.head_dim, turned + r * d);
      }
      MapSomeRows(turned, map, args.scale, args.head_dim, rows, out + row * d);
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

void WriteKeysAndValues(const KvWriteArgs& args) {
  const KvBlockLayout& layout = *args.layout;
  const std::int64_t d = layout.head_dim;
  alignas(64) float turned[kRowsAtOnce * kMaxHeadDim];
  alignas(64) float keys[kRowsAtOnce * kMaxHeadDim];
  for (std::int64_t g = args.kv_head_begin; g < args.kv_head_end; ++g) {
    const float* map = args.k_map == nullptr ? nullptr : args.k_map + g * d * d;
    for (std::int64_t first = 0; first < args.n_tokens; first += kRowsAtOnce) {
      const int rows = args.n_tokens - first < kRowsAtOnce ? static_cast<int>(args.n_tokens - first) : kRowsAtOnce;
      for (int r = 0; r < rows; ++r) {
        const std::int64_t t = first + r;
        const float* cos = args.rope.cos == nullptr ? nullptr : args.rope.cos + t * (d / 2);
        const float* sin = args.rope.sin == nullptr ? nullptr : args.rope.sin + t * (d / 2);
        TurnRow(args.k + t * args.kv_stride + g * d, cos, sin, layout.head_dim, turned + r * d);
      }
      MapSomeRows(turned, map, 1.0f, layout.head_dim, rows, keys);
      for (int r = 0; r < rows; ++r) {
        const std::int64_t pos = args.first_pos + first + r;
        std::uint8_t* head = args.blocks[pos / kBlockTokens - args.first_pos / kBlockTokens] + g * layout.head_bytes;
        StoreKey(layout, keys + r * d, static_cast<int>(pos % kBlockTokens), head);
        StoreValue(layout, args.v + (first + r) * args.kv_stride + g * d, static_cast<int>(pos % kBlockTokens), head);
      }
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
