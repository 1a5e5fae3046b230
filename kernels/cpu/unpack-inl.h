// Packed tiles to one byte per code, scales to floats: what the attention kernels do once per block.
#include <cstddef>
#include <cstdint>

#if defined(ZEROC_KERNELS_CPU_UNPACK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ZEROC_KERNELS_CPU_UNPACK_INL_H_
#undef ZEROC_KERNELS_CPU_UNPACK_INL_H_
#else
#define ZEROC_KERNELS_CPU_UNPACK_INL_H_
#endif

#include "kernels/checks.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/tile_codec.h"

HWY_BEFORE_NAMESPACE();
namespace zeroc::kernels::cpu::HWY_NAMESPACE {

// Bytes 4 * lane + depth % 4 of depth quad kQuad (kv_block.h), for the lanes of one part.
template <int kBits, int kQuad>
HWY_INLINE VU QuadOf(const std::uint8_t* tile, std::size_t part) {
  const DU du;
  const std::uint8_t* from = tile + 4 * kLanes * part;
  if constexpr (kBits == 4) {
    return hn::And(hn::ShiftRight<4 * (kQuad % 2)>(LoadWords(from + 64 * (kQuad / 2))), hn::Set(du, 0x0f0f0f0fu));
  } else if constexpr (kBits == 2) {
    return hn::And(hn::ShiftRight<2 * kQuad>(LoadWords(from)), hn::Set(du, 0x03030303u));
  } else if constexpr (kBits == 1) {
    // Lanes 0 to 7 take bit 2 s of the 32 bytes, lanes 8 to 15 bit 2 s + 1.
    const VU ones = hn::Set(du, 0x01010101u);
#if HWY_TARGET <= HWY_AVX3
    const hn::Half<DBytes> dh;
    const VU both = hn::BitCast(du, hn::Combine(DBytes(), hn::LoadU(dh, tile), hn::LoadU(dh, tile)));
    const VU low = hn::ShiftRight<2 * kQuad>(both);
    return hn::And(hn::IfThenElse(hn::FirstN(du, 8), low, hn::ShiftRight<2 * kQuad + 1>(both)), ones);
#else
    const std::size_t byte = 4 * kLanes * part;
    const VU words = LoadWords(tile + byte % 32);
    return hn::And(byte < 32 ? hn::ShiftRight<2 * kQuad>(words) : hn::ShiftRight<2 * kQuad + 1>(words), ones);
#endif
  } else {
    static_assert(kBits == 3);
    return hn::Or(QuadOf<2, kQuad>(tile, part), hn::ShiftLeft<2>(QuadOf<1, kQuad>(tile + 64, part)));
  }
}

template <int kBits>
HWY_INLINE void UnpackTilesOf(const std::uint8_t* tiles, int n_tiles, std::uint8_t* out) {
  for (int i = 0; i < n_tiles; ++i, tiles += TileBytes(kBits), out += 256) {
    for (std::size_t part = 0; part < kParts; ++part) {
      std::uint8_t* to = out + 4 * kLanes * part;
      StoreWords(QuadOf<kBits, 0>(tiles, part), to);
      StoreWords(QuadOf<kBits, 1>(tiles, part), to + 64);
      StoreWords(QuadOf<kBits, 2>(tiles, part), to + 128);
      StoreWords(QuadOf<kBits, 3>(tiles, part), to + 192);
    }
  }
}

// Tiles of 4, 3, 2 or 1 bits as 8-bit tiles (256 bytes each).
HWY_INLINE void UnpackTiles(const std::uint8_t* tiles, int bits, int n_tiles, std::uint8_t* out) {
  if (bits == 4) return UnpackTilesOf<4>(tiles, n_tiles, out);
  if (bits == 3) return UnpackTilesOf<3>(tiles, n_tiles, out);
  if (bits == 2) return UnpackTilesOf<2>(tiles, n_tiles, out);
  UnpackTilesOf<1>(tiles, n_tiles, out);
}

// Exact V tiles (depth = tokens) with the depth steps outside `seen` as zeros. Tile i holds token group i % n_groups.
HWY_INLINE void CopyVisibleDepth(const std::uint8_t* tiles, int bits, int n_tiles, int n_groups, TokenSpan seen,
                                 std::uint8_t* out) {
  const int per_row = 32 / bits;  // tokens in a 64-byte row
  for (int i = 0; i < n_tiles; ++i) {
    for (int row = 0; row < kTileDepth / per_row; ++row, tiles += 64, out += 64) {
      const int token = 16 * (i % n_groups) + row * per_row;
      std::uint32_t mask = 0;
      if (seen.begin <= token && token < seen.end) mask |= per_row == 1 ? 0xffffffffu : 0x0000ffffu;
      if (per_row == 2 && seen.begin <= token + 1 && token + 1 < seen.end) mask |= 0xffff0000u;
      for (std::size_t part = 0; part < kParts; ++part) {
        const std::size_t at = 4 * kLanes * part;
        StoreWords(hn::And(LoadWords(tiles + at), hn::Set(DU(), mask)), out + at);
      }
    }
  }
}

// 2^((code - 160) / 8), 0 for code 0; the floats of kHalfOfScaleCode.
HWY_INLINE VF HalfOf(hn::Vec<DI> code) { return hn::GatherIndex(DF(), kHalfOfScaleCode.data(), code); }

// half[t], step[t] and base[t] of quantised run r (ScaleOf and HalfOf for every token).
HWY_INLINE void DecodeScales(const KvSideLayout& side, int r, const std::uint8_t* head, int n_tokens, float* half,
                             float* step, float* base) {
  const DF df;
  const DI di;
  const hn::Rebind<std::uint8_t, DF> du8;
  const hn::Rebind<std::int8_t, DF> di8;
  const std::uint8_t* meta = head + side.meta_offset[r];
  const VF per_half = hn::Set(df, 2.0f / static_cast<float>((1 << side.runs[r].bits) - 1));
  const bool shared = side.runs[r].scale == KvScaleKind::kShared;
  std::uint8_t codes[kBlockTokens];
  for (int t = 0; t < n_tokens && shared; ++t) {
    codes[t] = SharedScaleCode(head[side.base_offset[r]], GetNibble(meta, t));
  }
  for (std::size_t t = 0; t < static_cast<std::size_t>(n_tokens); t += kLanes) {
    const VF halves = HalfOf(hn::PromoteTo(di, hn::LoadU(du8, (shared ? codes : meta) + t)));
    VF center = hn::Zero(df);
    if (!shared) {
      const auto* centers = reinterpret_cast<const std::int8_t*>(meta) + n_tokens + t;
      center = hn::Mul(hn::ConvertTo(df, hn::PromoteTo(di, hn::LoadU(di8, centers))), hn::Set(df, 1.0f / kCenterSteps));
    }
    hn::StoreU(halves, df, half + t);
    hn::StoreU(hn::Mul(halves, per_half), df, step + t);
    hn::StoreU(hn::Sub(hn::Mul(halves, center), halves), df, base + t);
  }
}

}  // namespace zeroc::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
