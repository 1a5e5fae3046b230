// Quantisation of blocks. Tokens are SIMD lanes: range, Hadamard rotation and scale search need no shuffles.
//
// A group of 16 tokens is laid out as x[coordinate][16]; a whole block side of one head is loaded at once, since shared
// scales are chosen for the block. The codes are the reference's on every instruction set.
#include "kernels/bf16.h"
#include "kernels/checks.h"
#include "kernels/cpu/cpu.h"
#include "kernels/tile_codec.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/kv_pack.cc"
// clang-format off
#include "hwy/foreach_target.h"
#include "kernels/cpu/kv_load-inl.h"
#include "kernels/cpu/scale-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace zeroc::kernels::cpu::HWY_NAMESPACE {

// ---- Tiles ---------------------------------------------------------------------------------------------------------

// Integer codes, in range even for NaN.
HWY_INLINE VI CodesOf(const float* x, const Scale& scale, VF top) {
  const VF y = hn::Mul(hn::Sub(hn::LoadU(DF(), x), scale.base), scale.inverse);
  return hn::NearestInt(hn::Min(hn::Max(y, hn::Zero(DF())), top));
}

// The four depth quads of a tile: byte 4 * lane + depth % 4 of quad depth / 4, for the lanes of one part.
struct Quads {
  VU q[4];
};

// K: lanes are tokens, four coordinates to a word. x points at the tile's first coordinate.
HWY_INLINE Quads KeyQuads(const float* x, const Scale& scale, VF top) {
  Quads quads;
  for (int s = 0; s < 4; ++s, x += 64) {
    const VU c0 = hn::BitCast(DU(), CodesOf(x, scale, top)), c1 = hn::BitCast(DU(), CodesOf(x + 16, scale, top));
    const VU c2 = hn::BitCast(DU(), CodesOf(x + 32, scale, top)), c3 = hn::BitCast(DU(), CodesOf(x + 48, scale, top));
    quads.q[s] = hn::Or(hn::Or(c0, hn::ShiftLeft<8>(c1)), hn::Or(hn::ShiftLeft<16>(c2), hn::ShiftLeft<24>(c3)));
  }
  return quads;
}

// V: lanes are coordinates, four tokens to a word. Bytes [coord][token] first.
HWY_INLINE void ValueBytes(const float* x, int width, const Scale* scales, VF top, std::uint8_t* bytes) {
  const hn::Rebind<std::uint8_t, DF> du8;
  for (std::size_t part = 0; part < kParts; ++part) {
    for (std::size_t at = kLanes * part; at < 16 * static_cast<std::size_t>(width); at += 16) {
      hn::StoreU(hn::DemoteTo(du8, CodesOf(x + at, scales[part], top)), du8, bytes + at);
    }
  }
}

HWY_INLINE Quads ValueQuads(const std::uint32_t* words, std::size_t part) {
  Quads quads;
  hn::LoadInterleaved4(DU(), words + 4 * kLanes * part, quads.q[0], quads.q[1], quads.q[2], quads.q[3]);
  return quads;
}

// Two bits of every code, and one.
HWY_INLINE VU Crumbs(const Quads& quads) {
  return hn::Or(hn::Or(quads.q[0], hn::ShiftLeft<2>(quads.q[1])),
                hn::Or(hn::ShiftLeft<4>(quads.q[2]), hn::ShiftLeft<6>(quads.q[3])));
}

HWY_INLINE Quads Masked(const Quads& quads, std::uint32_t mask, int shift) {
  Quads out;
  for (int s = 0; s < 4; ++s) out.q[s] = hn::And(hn::ShiftRightSame(quads.q[s], shift), hn::Set(DU(), mask));
  return out;
}

// Lanes 8 to 15 go beside lanes 0 to 7: 64 bytes of bits 2 s to 32 bytes of bits 2 s and 2 s + 1.
HWY_INLINE void FinishTile(int bits, const std::uint8_t* wide, std::uint8_t* tile) {
  if (bits != 1 && bits != 3) return;
  std::uint8_t* to = bits == 1 ? tile : tile + 64;
  for (int i = 0; i < 32; i += 8) {
    std::uint64_t low, high;
    __builtin_memcpy(&low, wide + i, 8);
    __builtin_memcpy(&high, wide + 32 + i, 8);
    low |= high << 1;
    __builtin_memcpy(to + i, &low, 8);
  }
}

// The lanes of one part into the tile (kv_block.h). The bits of 1-bit and 3-bit codes go to `wide`, for FinishTile.
HWY_INLINE void StoreQuads(const Quads& quads, int bits, std::size_t part, std::uint8_t* tile, std::uint8_t* wide) {
  const std::size_t at = 4 * kLanes * part;
  if (bits == 8) {
    for (std::size_t s = 0; s < 4; ++s) StoreWords(quads.q[s], tile + 64 * s + at);
  } else if (bits == 4) {
    StoreWords(hn::Or(quads.q[0], hn::ShiftLeft<4>(quads.q[1])), tile + at);
    StoreWords(hn::Or(quads.q[2], hn::ShiftLeft<4>(quads.q[3])), tile + 64 + at);
  } else if (bits == 3) {
    StoreWords(Crumbs(Masked(quads, 0x03030303u, 0)), tile + at);
    StoreWords(Crumbs(Masked(quads, 0x01010101u, 2)), wide + at);
  } else {
    StoreWords(Crumbs(quads), (bits == 2 ? tile : wide) + at);
  }
}

// Codes of one token group into the tiles of run r.
void PackKeyTiles(const KvBlockLayout& layout, int r, int group, const float* x, const Scale* scales,
                  std::uint8_t* head) {
  const KvRun& run = layout.k.runs[r];
  const VF top = Floats(static_cast<float>((1 << run.bits) - 1));
  alignas(64) std::uint8_t wide[64];
  for (int i = 0; i < run.width; i += kTileDepth, x += 256) {
    std::uint8_t* tile = head + KTileOffset(layout, r, 16 * group, i);
    for (std::size_t part = 0; part < kParts; ++part) {
      StoreQuads(KeyQuads(x + kLanes * part, scales[part], top), run.bits, part, tile, wide);
    }
    FinishTile(run.bits, wide, tile);
  }
}

// All bytes first: reading them back at once would wait for the narrower stores.
void PackValueTiles(const KvBlockLayout& layout, int r, int group, const float* x, const Scale* scales,
                    std::uint8_t* head) {
  const KvRun& run = layout.v.runs[r];
  const VF top = Floats(static_cast<float>((1 << run.bits) - 1));
  alignas(64) std::uint32_t words[kMaxHeadDim * 4];  // [coord][16 tokens] bytes
  alignas(64) std::uint8_t wide[64];
  ValueBytes(x, run.width, scales, top, reinterpret_cast<std::uint8_t*>(words));
  for (int i = 0; i < run.width; i += kTileLanes) {
    std::uint8_t* tile = head + VTileOffset(layout, r, 16 * group, i);
    for (std::size_t part = 0; part < kParts; ++part) {
      StoreQuads(ValueQuads(words + 4 * i, part), run.bits, part, tile, wide);
    }
    FinishTile(run.bits, wide, tile);
  }
}

// A 16-bit or 32-bit run: the same values, maybe in other tiles.
void CopyExactRun(const KvBlockLayout& layout, bool is_value, int r, int group, const float* x, std::uint8_t* head) {
  const KvRun& run = is_value ? layout.v.runs[r] : layout.k.runs[r];
  for (int i = 0; i < run.width; ++i) {
    for (int t = 0; t < kTileLanes; ++t) {
      const int token = group * kTileLanes + t;
      if (is_value) {
        SetExact(head + VTileOffset(layout, r, token, i), run.bits, i % kTileLanes, t, x[16 * i + t]);
      } else {
        SetExact(head + KTileOffset(layout, r, token, i), run.bits, t, i % kTileDepth, x[16 * i + t]);
      }
    }
  }
}

// x is [group][stride] with a group as [width][16].
void PackRun(const KvBlockLayout& layout, bool is_value, int r, float* x, std::size_t stride, std::uint8_t* head) {
  const KvSideLayout& side = is_value ? layout.v : layout.k;
  const KvRun& run = side.runs[r];
  if (run.bits == 0) return;
  const int n_groups = layout.n_tokens / kTileLanes;
  if (!IsQuantised(run.bits)) {
    for (int g = 0; g < n_groups; ++g, x += stride) CopyExactRun(layout, is_value, r, g, x, head);
    return;
  }
  if (is_value && layout.rotate_v) {
    for (int g = 0; g < n_groups; ++g) RotateTokens(x + static_cast<std::size_t>(g) * stride, run.width);
  }
  Scale scales[kBlockTokens / kLanes];
  std::uint8_t* meta = head + side.meta_offset[r];
  if (run.scale == KvScaleKind::kShared) {
    ChooseSharedScales(x, stride, run, n_groups, head + side.base_offset[r], meta, scales);
  } else {
    ChooseAffineScales(x, stride, run, n_groups, meta, scales);
  }
  const auto pack_tiles = is_value ? PackValueTiles : PackKeyTiles;
  for (int g = 0; g < n_groups; ++g, x += stride) {
    pack_tiles(layout, r, g, x, scales + static_cast<std::size_t>(g) * kParts, head);
  }
}

bool KeepsNothing(const KvSideLayout& side) {
  for (int r = 0; r < side.n_runs; ++r) {
    if (side.runs[r].bits > 0) return false;
  }
  return true;
}

// x holds one side of one head.
void PackSide(const KvPackArgs& args, bool is_value, int head, float* x) {
  const KvBlockLayout& from = *args.source_layout;
  const KvBlockLayout& to = *args.packed_layout;
  const KvSideLayout& side = is_value ? to.v : to.k;
  if (KeepsNothing(side)) return;
  const std::uint8_t* source = args.source + std::int64_t{head} * from.head_bytes;
  std::uint8_t* packed = args.packed + std::int64_t{head} * to.head_bytes;
  const auto stride = static_cast<std::size_t>(16 * to.head_dim);
  for (int g = 0; g < to.n_tokens / kTileLanes; ++g) {
    LoadGroup(from, is_value, source, g, x + static_cast<std::size_t>(g) * stride);
  }
  for (int r = 0; r < side.n_runs; ++r) PackRun(to, is_value, r, x + 16 * side.first_coord[r], stride, packed);
}

void PackBlocks(const KvPackArgs& args) {
  alignas(64) float x[kMaxHeadDim * kBlockTokens];
  for (int head = args.kv_head_begin; head < args.kv_head_end; ++head) {
    PackSide(args, false, head, x);
    PackSide(args, true, head, x);
  }
}

}  // namespace zeroc::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace zeroc::kernels::cpu {

HWY_EXPORT(PackBlocks);

KernelStatus KvPack(const KvPackArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  if (*args.source_layout == *args.packed_layout) return CopyHeads(args);
  HWY_DYNAMIC_DISPATCH(PackBlocks)(args);
  return KernelStatus::kOk;
}

}  // namespace zeroc::kernels::cpu
#endif
