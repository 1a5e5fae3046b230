// Codes and scales of KV blocks inside kernels: kv_block.h in words of four codes. The scalar judge is tile_codec.h.
#pragma once

#include "kernels/cuda/numbers.h"
#include "kernels/kv_block.h"

namespace zeroc::kernels::cuda {

// A head with shared scales may begin at any byte.
ZEROC_DEVICE std::uint32_t LoadWord(const std::uint8_t* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % 4 == 0) return *reinterpret_cast<const std::uint32_t*>(from);
  return from[0] | static_cast<std::uint32_t>(from[1]) << 8 | static_cast<std::uint32_t>(from[2]) << 16 |
         static_cast<std::uint32_t>(from[3]) << 24;
}
ZEROC_DEVICE void StoreWord(std::uint8_t* to, std::uint32_t word) {
  if (reinterpret_cast<std::uintptr_t>(to) % 4 == 0) {
    *reinterpret_cast<std::uint32_t*>(to) = word;
  } else {
    for (int i = 0; i < 4; ++i) to[i] = static_cast<std::uint8_t>(word >> 8 * i);
  }
}

// The same from shared memory that was copied from an address of the same remainder modulo 4: two aligned words and a
// shift. The word behind is read too.
ZEROC_DEVICE std::uint32_t LoadSharedWord(const std::uint8_t* from) {
  const auto address = reinterpret_cast<std::uintptr_t>(from);
  const auto* words = reinterpret_cast<const std::uint32_t*>(from - address % 4);
  return FunnelShiftRight(words[0], words[1], 8 * static_cast<int>(address % 4));
}

// Codes of `lane` at depth 4 s .. 4 s + 3 of a tile, one in each byte. load(offset) gives a word of the tile.
template <typename Load>
ZEROC_DEVICE std::uint32_t CodeQuad(int bits, int lane, int s, const Load& load) {
  switch (bits) {
    case 8:
      return load(64 * s + 4 * lane);
    case 4:
      return load(64 * (s / 2) + 4 * lane) >> 4 * (s % 2) & 0x0f0f0f0fu;
    case 3:
      return (load(4 * lane) >> 2 * s & 0x03030303u) | (load(64 + 4 * (lane % 8)) >> (2 * s + lane / 8) & 0x01010101u)
                                                           << 2;
    case 2:
      return load(4 * lane) >> 2 * s & 0x03030303u;
    default:
      return load(4 * (lane % 8)) >> (2 * s + lane / 8) & 0x01010101u;
  }
}

// half = 2^((scale_code - 160) / 8), 0 for code 0; the floats of kHalfOfScaleCode. The eighths of an octave share their
// exponent, so that a code is a mantissa and a number to add to the exponent.
ZEROC_DEVICE float HalfOfScaleCode(int scale_code) {
  constexpr std::uint32_t kMantissas[8] = {0x3f800000u, 0x3f8b95c2u, 0x3f9837f0u, 0x3fa5fed7u,
                                           0x3fb504f3u, 0x3fc5672au, 0x3fd744fdu, 0x3feac0c7u};
  if (scale_code == 0) return 0.0f;
  const int octave = scale_code / kScaleStepsPerOctave - kScaleBias / kScaleStepsPerOctave;
  return BitsToFloat(kMantissas[scale_code % kScaleStepsPerOctave] + static_cast<std::uint32_t>(octave) * 0x800000u);
}

// value = base + step * code.
struct TokenScale {
  float step, base;
};
ZEROC_DEVICE TokenScale DecodeTokenScale(int bits, int scale_code, int center_code) {
  const float half = HalfOfScaleCode(scale_code);
  const float center = half * (static_cast<float>(center_code) * (1.0f / kCenterSteps));
  return {half * (2.0f / static_cast<float>((1 << bits) - 1)), center - half};
}

ZEROC_DEVICE int SharedCodeOf(int base_code, int nibble) {
  const int code = base_code == 0 ? 0 : base_code + kNibbleStep * nibble;
  return code < kMaxScaleCode ? code : kMaxScaleCode;
}

// Scale code of a token of quantised run r, from the head's first byte.
ZEROC_DEVICE int ScaleCodeOf(const KvSideLayout& side, int r, const std::uint8_t* head, int token) {
  const std::uint8_t* meta = head + side.meta_offset[r];
  if (side.runs[r].scale == KvScaleKind::kAffine) return meta[token];
  const int nibbles = meta[8 * (token / 16) + token % 8];
  return SharedCodeOf(head[side.base_offset[r]], token % 16 < 8 ? nibbles & 15 : nibbles >> 4);
}
ZEROC_DEVICE int CenterCodeOf(const KvSideLayout& side, int r, const std::uint8_t* head, int n_tokens, int token) {
  if (side.runs[r].scale != KvScaleKind::kAffine) return 0;
  return static_cast<std::int8_t>(head[side.meta_offset[r] + n_tokens + token]);
}
ZEROC_DEVICE TokenScale ScaleOfToken(const KvSideLayout& side, int r, const std::uint8_t* head, int n_tokens,
                                     int token) {
  return DecodeTokenScale(side.runs[r].bits, ScaleCodeOf(side, r, head, token),
                          CenterCodeOf(side, r, head, n_tokens, token));
}

}  // namespace zeroc::kernels::cuda
