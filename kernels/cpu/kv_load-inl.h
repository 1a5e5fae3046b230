// Blocks of any layout as floats, tokens in lanes: what packing starts from.
#include <cstddef>
#include <cstdint>

#if defined(ZEROC_KERNELS_CPU_KV_LOAD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ZEROC_KERNELS_CPU_KV_LOAD_INL_H_
#undef ZEROC_KERNELS_CPU_KV_LOAD_INL_H_
#else
#define ZEROC_KERNELS_CPU_KV_LOAD_INL_H_
#endif

#include "kernels/cpu/simd-inl.h"
#include "kernels/cpu/unpack-inl.h"
#include "kernels/tile_codec.h"

HWY_BEFORE_NAMESPACE();
namespace zeroc::kernels::cpu::HWY_NAMESPACE {

// Keys of token group `group` as x[coord][token].
HWY_INLINE void LoadExactKeys(const KvBlockLayout& layout, const std::uint8_t* head, int group, float* x) {
  const int bits = layout.k.runs[0].bits;
  const std::uint8_t* tiles = head + KTileOffset(layout, 0, group * kTileLanes, 0);
  if (bits == 32) {
    __builtin_memcpy(x, tiles, sizeof(float) * static_cast<std::size_t>(layout.head_dim * kTileLanes));
    return;
  }
  for (int pair = 0; pair < layout.head_dim / 2; ++pair) {
    for (std::size_t part = 0; part < kParts; ++part) {
      const VU words = LoadWords(tiles + 64 * pair + 4 * kLanes * part);
      hn::StoreU(EvenBf16(words), DF(), x + 32 * pair + kLanes * part);
      hn::StoreU(OddBf16(words), DF(), x + 32 * pair + 16 + kLanes * part);
    }
  }
}

// Exact tiles of values by any width, for the reference engine's 32 bits.
HWY_INLINE void LoadWideValues(const KvBlockLayout& layout, const std::uint8_t* head, int group, float* x) {
  for (int coord = 0; coord < layout.head_dim; ++coord) {
    const std::uint8_t* tile = head + VTileOffset(layout, 0, group * kTileDepth, coord);
    for (int t = 0; t < kTileDepth; ++t) x[16 * coord + t] = GetExact(tile, 32, coord % kTileLanes, t);
  }
}

// Sixteen bf16 tokens, eight at each address, as floats.
HWY_INLINE void StoreTokens(const std::uint32_t* low, const std::uint32_t* high, float* x) {
  const auto* first = reinterpret_cast<const std::uint16_t*>(low);
  const auto* second = reinterpret_cast<const std::uint16_t*>(high);
#if HWY_TARGET <= HWY_AVX3
  const hn::Half<DU16> dh;
  const auto both = hn::Combine(DU16(), hn::LoadU(dh, second), hn::LoadU(dh, first));
  hn::StoreU(hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(DU(), both))), DF(), x);
#else
  for (std::size_t at = 0; at < 8; at += kLanes) {
    hn::StoreU(LoadBf16(first + at), DF(), x + at);
    hn::StoreU(LoadBf16(second + at), DF(), x + 8 + at);
  }
#endif
}

// Values of token group `group`, transposed to x[coord][token]. A row of a tile has 16 coordinates of a token pair, so
// four rows interleaved are eight tokens of each coordinate.
HWY_INLINE void LoadExactValues(const KvBlockLayout& layout, const std::uint8_t* head, int group, float* x) {
  if (layout.v.runs[0].bits == 32) return LoadWideValues(layout, head, group, x);
  alignas(64) std::uint32_t pairs[2][4 * kTileLanes];  // tokens 0 to 7 and 8 to 15: [coord][4 token pairs]
  for (int coord = 0; coord < layout.head_dim; coord += kTileLanes) {
    const std::uint8_t* tile = head + VTileOffset(layout, 0, group * kTileDepth, coord);
    for (std::size_t half = 0; half < 2; ++half) {
      for (std::size_t part = 0; part < kParts; ++part) {
        const std::uint8_t* from = tile + 256 * half + 4 * kLanes * part;
        hn::StoreInterleaved4(LoadWords(from), LoadWords(from + 64), LoadWords(from + 128), LoadWords(from + 192), DU(),
                              pairs[half] + 4 * kLanes * part);
      }
    }
    for (std::size_t lane = 0; lane < kTileLanes; ++lane, x += 16)
      StoreTokens(pairs[0] + 4 * lane, pairs[1] + 4 * lane, x);
  }
}

// kLevels levels of the Hadamard butterfly on coordinates `stride` apart and further, scaled at the end.
template <int kLevels>
HWY_INLINE void Butterflies(float* x, std::size_t cell, std::size_t stride, VF norm) {
  constexpr std::size_t n = std::size_t{1} << kLevels;
  for (std::size_t block = 0; block < cell; block += n * stride) {
    for (std::size_t at = 16 * block; at < 16 * (block + stride); at += kLanes) {
      VF v[n];
      for (std::size_t k = 0; k < n; ++k) v[k] = hn::LoadU(DF(), x + at + 16 * k * stride);
      for (std::size_t bit = 1; bit < n; bit *= 2) {
        for (std::size_t k = 0; k < n; ++k) {
          if ((k & bit) != 0) continue;
          const VF a = v[k], b = v[k + bit];
          v[k] = hn::Add(a, b);
          v[k + bit] = hn::Sub(a, b);
        }
      }
      for (std::size_t k = 0; k < n; ++k) hn::StoreU(hn::Mul(norm, v[k]), DF(), x + at + 16 * k * stride);
    }
  }
}

// HadamardRun (kernels/hadamard.h) on all 16 tokens at once, three levels in registers at a time.
HWY_INLINE void RotateTokens(float* x, int width) {
  while (width > 0) {
    std::size_t cell = kTileDepth;
    while (2 * cell <= static_cast<std::size_t>(width)) cell *= 2;
    const VF one = hn::Set(DF(), 1.0f), norm = hn::Set(DF(), 1.0f / __builtin_sqrtf(static_cast<float>(cell)));
    std::size_t stride = 1;
    for (; 8 * stride < cell; stride *= 8) Butterflies<3>(x, cell, stride, one);
    if (8 * stride == cell) Butterflies<3>(x, cell, stride, norm);
    if (4 * stride == cell) Butterflies<2>(x, cell, stride, norm);
    if (2 * stride == cell) Butterflies<1>(x, cell, stride, norm);
    x += 16 * cell;
    width -= static_cast<int>(cell);
  }
}

// The codes of one tile as bytes (kv_block.h's order of 8-bit tiles), in `wide` unless they are so already.
HWY_INLINE const std::uint8_t* WideCodes(const std::uint8_t* tile, int bits, std::uint8_t* wide) {
  if (bits == 8) return tile;
  UnpackTiles(tile, bits, 1, wide);
  return wide;
}

// base + step * code as the reference computes it: not fused.
HWY_INLINE VF Value(hn::Vec<DI> codes, VF step, VF base) {
  return hn::Add(base, hn::Mul(step, hn::ConvertTo(DF(), codes)));
}

// A quantised run of 16 tokens to x[coord][token], in the coordinates in which it lies.
HWY_INLINE void LoadPackedRun(const KvBlockLayout& layout, bool is_value, int r, const std::uint8_t* head, int group,
                              float* x) {
  const DI di;
  const KvSideLayout& side = is_value ? layout.v : layout.k;
  const KvRun& run = side.runs[r];
  alignas(64) float step[16], base[16];
  for (int t = 0; t < 16; ++t) {
    const KvScale scale = ScaleOf(side, r, head, layout.n_tokens, 16 * group + t);
    step[t] = scale.step;
    base[t] = scale.base;
  }
  alignas(64) std::uint8_t wide[256];
  const hn::Rebind<std::uint8_t, DF> du8;
  for (int i = 0; i < run.width; i += kTileDepth, x += 256) {
    const int tile = is_value ? VTileOffset(layout, r, 16 * group, i) : KTileOffset(layout, r, 16 * group, i);
    const std::uint8_t* codes = WideCodes(head + tile, run.bits, wide);
    for (std::size_t part = 0; part < kParts; ++part) {
      const std::size_t at = kLanes * part;
      const VF steps = hn::LoadU(DF(), step + at), bases = hn::LoadU(DF(), base + at);
      if (!is_value) {  // a row holds four coordinates of every token
        for (std::size_t s = 0; s < 4; ++s) {
          VU words = LoadWords(codes + 64 * s + 4 * at);
          for (std::size_t j = 0; j < 4; ++j, words = hn::ShiftRight<8>(words)) {
            const auto low = hn::BitCast(di, hn::And(words, hn::Set(DU(), 0xffu)));
            hn::StoreU(Value(low, steps, bases), DF(), x + 16 * (4 * s + j) + at);
          }
        }
        continue;
      }
      for (std::size_t lane = 0; lane < 16; ++lane) {  // a row holds four tokens of every coordinate
        alignas(16) std::uint8_t tokens[16];
        for (std::size_t s = 0; s < 4; ++s) __builtin_memcpy(tokens + 4 * s, codes + 64 * s + 4 * lane, 4);
        hn::StoreU(Value(hn::PromoteTo(di, hn::LoadU(du8, tokens + at)), steps, bases), DF(), x + 16 * lane + at);
      }
    }
  }
}

// One side of 16 tokens of a head as x[coord][token], V without its rotation: the floats of the reference's
// DecodeKeyRow and DecodeValueRow.
HWY_INLINE void LoadGroup(const KvBlockLayout& layout, bool is_value, const std::uint8_t* head, int group, float* x) {
  const KvSideLayout& side = is_value ? layout.v : layout.k;
  if (side.n_runs == 1 && side.runs[0].bits >= 16) {
    return is_value ? LoadExactValues(layout, head, group, x) : LoadExactKeys(layout, head, group, x);
  }
  for (int r = 0; r < side.n_runs; ++r) {
    const KvRun& run = side.runs[r];
    float* to = x + 16 * side.first_coord[r];
    if (IsQuantised(run.bits)) {
      LoadPackedRun(layout, is_value, r, head, group, to);
      if (is_value && layout.rotate_v) RotateTokens(to, run.width);  // the rotation undoes itself
      continue;
    }
    for (int i = 0; i < run.width; ++i) {
      for (int t = 0; t < 16; ++t) {
        const int token = 16 * group + t;
        const int tile = is_value ? VTileOffset(layout, r, token, i) : KTileOffset(layout, r, token, i);
        const int lane = is_value ? i % kTileLanes : t, depth = is_value ? t : i % kTileDepth;
        to[16 * i + t] = run.bits == 0 ? 0.0f : GetExact(head + tile, run.bits, lane, depth);
      }
    }
  }
}

}  // namespace zeroc::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
