// Quantisation of exact blocks. Tokens are SIMD lanes: range, Hadamard rotation and scale search need no shuffles.
//
// A group of 16 tokens is laid out as x[coordinate][16]; the search follows scale_search.h and reference/kv_pack.cc.
#include "kernels/bf16.h"
#include "kernels/checks.h"
#include "kernels/cpu/cpu.h"
#include "kernels/scale_search.h"
#include "kernels/tile_codec.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/kv_pack.cc"
// clang-format off
#include "hwy/foreach_target.h"
#include "kernels/cpu/simd-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace zeroc::kernels::cpu::HWY_NAMESPACE {

// Keys of token group `group` as x[coord][token].
void LoadKeys(const KvBlockLayout& layout, const std::uint8_t* head, int group, float* x) {
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

// Values of token group `group`, transposed to x[coord][token].
void LoadValues(const KvBlockLayout& layout, const std::uint8_t* head, int group, float* x) {
  const int bits = layout.v.runs[0].bits;
  for (int coord = 0; coord < layout.head_dim; ++coord) {
    const std::uint8_t* tile = head + VTileOffset(layout, 0, group * kTileDepth, coord);
    const int lane = coord % kTileLanes;
    for (int t = 0; t < kTileDepth; ++t) x[16 * coord + t] = GetExact(tile, bits, lane, t);
  }
}

// HadamardRun (kernels/hadamard.h) on all 16 tokens at once.
void RotateTokens(float* x, int width) {
  const DF df;
  while (width > 0) {
    int cell = kTileDepth;
    while (2 * cell <= width) cell *= 2;
    const std::size_t floats = 16 * static_cast<std::size_t>(cell);
    for (std::size_t half = 16; half < floats; half *= 2) {
      for (std::size_t start = 0; start < floats; start += 2 * half) {
        for (std::size_t i = start; i < start + half; i += kLanes) {
          const VF a = hn::LoadU(df, x + i), b = hn::LoadU(df, x + i + half);
          hn::StoreU(hn::Add(a, b), df, x + i);
          hn::StoreU(hn::Sub(a, b), df, x + i + half);
        }
      }
    }
    const VF norm = hn::Set(df, 1.0f / __builtin_sqrtf(static_cast<float>(cell)));
    for (std::size_t i = 0; i < floats; i += kLanes) hn::StoreU(hn::Mul(norm, hn::LoadU(df, x + i)), df, x + i);
    x += floats;
    width -= cell;
  }
}

struct Scale {
  VF scale_code, center_code;
  VF base, step, inverse;  // inverse = 1 / step, 0 for a zero step
};

// Smallest scale code whose half range is at least `half` (> 0): eight per octave, by comparison with 2^(j / 8).
HWY_INLINE VF SmallestCode(VF half) {
  const DF df;
  const DI di;
  const auto bits = hn::BitCast(di, half);
  const VF exponent = hn::ConvertTo(df, hn::Sub(hn::ShiftRight<23>(bits), hn::Set(di, 127)));
  const VF fraction = hn::BitCast(df, hn::Or(hn::And(bits, hn::Set(di, 0x7fffff)), hn::Set(di, 0x3f800000)));
  VF code = hn::MulAdd(exponent, hn::Set(df, 8.0f), hn::Set(df, 160.0f));
  for (int j = 0; j < kScaleStepsPerOctave; ++j) {
    const VF eighth = hn::Set(df, kHalfOfScaleCode[static_cast<std::size_t>(kScaleBias + j)]);
    code = hn::Add(code, hn::IfThenElseZero(hn::Gt(fraction, eighth), hn::Set(df, 1.0f)));
  }
  // In this order a NaN ends as 1, not as an index out of the table.
  return hn::Max(hn::Min(code, hn::Set(df, 255.0f)), hn::Set(df, 1.0f));
}

// scale_code holds integers 0 to 255.
HWY_INLINE Scale MakeScale(VF scale_code, VF center, int bits) {
  const DF df;
  const DI di;
  const VF zero = hn::Zero(df);
  const VF half = hn::GatherIndex(df, kHalfOfScaleCode.data(), hn::ConvertTo(di, scale_code));
  const auto empty = hn::Eq(half, zero);
  const VF inverse_half = hn::Div(hn::Set(df, 1.0f), half);
  VF code = hn::Round(hn::Mul(center, hn::Mul(hn::Set(df, static_cast<float>(kCenterSteps)), inverse_half)));
  code = hn::Max(hn::Min(code, hn::Set(df, 127.0f)), hn::Set(df, -128.0f));
  code = hn::IfThenElse(hn::Or(empty, hn::IsNaN(code)), zero, code);
  const float top = static_cast<float>((1 << bits) - 1);
  Scale scale;
  scale.scale_code = scale_code;
  scale.center_code = code;
  scale.base = hn::Sub(hn::Mul(half, hn::Mul(code, hn::Set(df, 1.0f / kCenterSteps))), half);
  scale.step = hn::Mul(half, hn::Set(df, 2.0f / top));
  scale.inverse = hn::IfThenElse(empty, zero, hn::Mul(inverse_half, hn::Set(df, 0.5f * top)));
  return scale;
}

// Code of x as a float integer, in range even for NaN.
HWY_INLINE VF Quantise(VF x, const Scale& scale, VF top) {
  const VF code = hn::Round(hn::Mul(hn::Sub(x, scale.base), scale.inverse));
  return hn::Max(hn::Min(code, top), hn::Zero(DF()));
}

HWY_INLINE VF SquaredError(const float* x, int width, const Scale& scale, VF top) {
  const DF df;
  // In units of the step; two sums for latency.
  VF sums[2] = {hn::Zero(df), hn::Zero(df)};
  for (int i = 0; i < width; i += 2) {
    for (int j = 0; j < 2; ++j) {
      const VF y = hn::Mul(hn::Sub(hn::LoadU(df, x + 16 * (i + j)), scale.base), scale.inverse);
      const VF error = hn::Sub(y, hn::Max(hn::Min(hn::Round(y), top), hn::Zero(df)));
      sums[j] = hn::MulAdd(error, error, sums[j]);
    }
  }
  return hn::Mul(hn::Add(sums[0], sums[1]), hn::Mul(scale.step, scale.step));
}

HWY_INLINE Scale Better(const Scale& a, const Scale& b, hn::Mask<DF> take_b) {
  return {hn::IfThenElse(take_b, b.scale_code, a.scale_code), hn::IfThenElse(take_b, b.center_code, a.center_code),
          hn::IfThenElse(take_b, b.base, a.base), hn::IfThenElse(take_b, b.step, a.step),
          hn::IfThenElse(take_b, b.inverse, a.inverse)};
}

// The best scale of kLanes tokens; x is [width][16], of which the first kLanes columns are looked at.
HWY_INLINE Scale ChooseScale(const float* x, int width, int bits) {
  const DF df;
  VF lo = hn::LoadU(df, x), hi = lo, sum = hn::Zero(df);
  for (int i = 0; i < width; ++i) {
    const VF value = hn::LoadU(df, x + 16 * i);
    lo = hn::Min(lo, value);
    hi = hn::Max(hi, value);
    sum = hn::Add(sum, value);
  }
  const VF mid = hn::Mul(hn::Set(df, 0.5f), hn::Add(lo, hi));
  const VF mean = hn::Div(sum, hn::Set(df, static_cast<float>(width)));
  const VF radius = hn::Mul(hn::Mul(hn::Set(df, 0.5f), hn::Sub(hi, lo)), hn::Set(df, 128.0f / 127.0f));
  const VF reach = hn::Max(radius, hn::Mul(hn::Abs(mid), hn::Set(df, kCenterSteps / 127.0f)));
  const VF cover = hn::IfThenZeroElse(hn::Eq(reach, hn::Zero(df)), SmallestCode(reach));
  const VF top = hn::Set(df, static_cast<float>((1 << bits) - 1));
  Scale best = MakeScale(cover, mid, bits);
  VF best_error = SquaredError(x, width, best, top);
  for (int j = 0; j < ScaleCandidates(bits); ++j) {
    const VF code = hn::Sub(cover, hn::Set(df, static_cast<float>(j)));
    const auto valid = hn::Ge(code, hn::Set(df, 1.0f));
    const VF safe = hn::IfThenElseZero(valid, code);
    for (int c = j == 0 ? 1 : 0; c < (TriesMean(bits) ? 2 : 1); ++c) {
      const Scale scale = MakeScale(safe, c == 0 ? mid : mean, bits);
      const VF error = SquaredError(x, width, scale, top);
      const auto better = hn::And(hn::Lt(error, best_error), valid);
      best = Better(best, scale, better);
      best_error = hn::IfThenElse(better, error, best_error);
    }
  }
  return best;
}

// Codes of one tile from its four rows of quads (64 bytes each; byte 4 * lane + depth % 4, one row per depth / 4).
void PackTile(const std::uint8_t* quads, int bits, std::uint8_t* tile) {
  if (bits == 8) {
    __builtin_memcpy(tile, quads, 256);
    return;
  }
  if (bits == 3) {
    alignas(64) std::uint8_t low[256], high[256];
    for (int i = 0; i < 256; ++i) {
      low[i] = quads[i] & 3;
      high[i] = static_cast<std::uint8_t>(quads[i] >> 2);
    }
    PackTile(low, 2, tile);
    PackTile(high, 1, tile + 64);
    return;
  }
  for (int e = 0; e < 64; ++e) {
    const unsigned q0 = quads[e], q1 = quads[64 + e], q2 = quads[128 + e], q3 = quads[192 + e];
    if (bits == 4) {
      tile[e] = static_cast<std::uint8_t>(q0 | q1 << 4);
      tile[64 + e] = static_cast<std::uint8_t>(q2 | q3 << 4);
    } else if (bits == 2) {
      tile[e] = static_cast<std::uint8_t>(q0 | q1 << 2 | q2 << 4 | q3 << 6);
    } else if (e < 32) {
      const unsigned low = q0 | q1 << 2 | q2 << 4 | q3 << 6;
      const unsigned high =
          static_cast<unsigned>(quads[e + 32]) | quads[e + 96] << 2 | quads[e + 160] << 4 | quads[e + 224] << 6;
      tile[e] = static_cast<std::uint8_t>(low | high << 1);
    }
  }
}

HWY_INLINE VU CodesOf(const float* x, const Scale& scale, VF top) {
  return hn::BitCast(DU(), hn::ConvertTo(DI(), Quantise(hn::LoadU(DF(), x), scale, top)));
}

// Quads of one tile. K: lanes are tokens, four coordinates to a word. x points at the tile's first coordinate.
void QuantiseKeyTile(const float* x, const Scale* scales, int bits, std::uint8_t* quads) {
  const VF top = hn::Set(DF(), static_cast<float>((1 << bits) - 1));
  for (std::size_t part = 0; part < kParts; ++part) {
    for (std::size_t s = 0; s < 4; ++s) {
      const float* row = x + 64 * s + kLanes * part;
      VU word = CodesOf(row, scales[part], top);
      word = hn::Or(word, hn::ShiftLeft<8>(CodesOf(row + 16, scales[part], top)));
      word = hn::Or(word, hn::ShiftLeft<16>(CodesOf(row + 32, scales[part], top)));
      word = hn::Or(word, hn::ShiftLeft<24>(CodesOf(row + 48, scales[part], top)));
      StoreWords(word, quads + 64 * s + 4 * kLanes * part);
    }
  }
}

// V: lanes are coordinates, four tokens to a word.
void QuantiseValueTile(const float* x, const Scale* scales, int bits, std::uint8_t* quads) {
  const VF top = hn::Set(DF(), static_cast<float>((1 << bits) - 1));
  alignas(64) std::uint32_t codes[16];
  for (int lane = 0; lane < kTileLanes; ++lane) {
    for (std::size_t part = 0; part < kParts; ++part) {
      hn::StoreU(CodesOf(x + 16 * lane + kLanes * part, scales[part], top), DU(), codes + kLanes * part);
    }
    for (int t = 0; t < kTileDepth; ++t) quads[64 * (t / 4) + 4 * lane + t % 4] = static_cast<std::uint8_t>(codes[t]);
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

void PackRun(const KvBlockLayout& layout, bool is_value, int r, int group, float* x, std::uint8_t* head) {
  const KvSideLayout& side = is_value ? layout.v : layout.k;
  const KvRun& run = side.runs[r];
  if (run.bits == 0) return;
  if (!IsQuantised(run.bits)) return CopyExactRun(layout, is_value, r, group, x, head);
  if (is_value && layout.rotate_v) RotateTokens(x, run.width);
  Scale scales[kParts];
  for (std::size_t part = 0; part < kParts; ++part) {
    scales[part] = ChooseScale(x + kLanes * part, run.width, run.bits);
    alignas(64) std::int32_t codes[2][16];
    hn::StoreU(hn::ConvertTo(DI(), scales[part].scale_code), DI(), codes[0]);
    hn::StoreU(hn::ConvertTo(DI(), scales[part].center_code), DI(), codes[1]);
    std::uint8_t* meta = head + side.meta_offset[r] + group * kTileLanes + static_cast<int>(kLanes * part);
    for (std::size_t t = 0; t < kLanes; ++t) {
      meta[t] = static_cast<std::uint8_t>(codes[0][t]);
      meta[static_cast<std::size_t>(layout.n_tokens) + t] = static_cast<std::uint8_t>(codes[1][t]);
    }
  }
  alignas(64) std::uint8_t quads[256];
  for (int i = 0; i < run.width; i += kTileDepth) {
    const int token = group * kTileLanes;
    if (is_value) {
      QuantiseValueTile(x + 16 * i, scales, run.bits, quads);
      PackTile(quads, run.bits, head + VTileOffset(layout, r, token, i));
    } else {
      QuantiseKeyTile(x + 16 * i, scales, run.bits, quads);
      PackTile(quads, run.bits, head + KTileOffset(layout, r, token, i));
    }
  }
}

void PackBlocks(const KvPackArgs& args) {
  const KvBlockLayout& from = *args.exact_layout;
  const KvBlockLayout& to = *args.packed_layout;
  alignas(64) float x[kMaxHeadDim * kTileLanes];
  for (int g = args.kv_head_begin; g < args.kv_head_end; ++g) {
    const std::uint8_t* exact = args.exact + std::int64_t{g} * from.head_bytes;
    std::uint8_t* head = args.packed + std::int64_t{g} * to.head_bytes;
    for (int group = 0; group < to.n_tokens / kTileLanes; ++group) {
      LoadKeys(from, exact, group, x);
      for (int r = 0; r < to.k.n_runs; ++r) PackRun(to, false, r, group, x + 16 * to.k.first_coord[r], head);
      LoadValues(from, exact, group, x);
      for (int r = 0; r < to.v.n_runs; ++r) PackRun(to, true, r, group, x + 16 * to.v.first_coord[r], head);
    }
  }
}

}  // namespace zeroc::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace zeroc::kernels::cpu {

HWY_EXPORT(PackBlocks);

KernelStatus KvPack(const KvPackArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  HWY_DYNAMIC_DISPATCH(PackBlocks)(args);
  return KernelStatus::kOk;
}

}  // namespace zeroc::kernels::cpu
#endif
