// Scalar access to the codes, exact values and scales of a KV block (kv_block.h has the formulas).
//
// The reference ops and the tests read and write blocks through these functions only, so that the format is written
// down in code exactly once. Pure functions on the caller's bytes; any thread; indexes are not checked.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>

#include "kernels/bf16.h"
#include "kernels/kv_block.h"

namespace zeroc::kernels {

namespace codec_internal {

// Writes `value` into `width` bits of *byte from bit `shift` on.
inline void PutBits(std::uint8_t* byte, int shift, int width, std::uint32_t value) {
  const std::uint32_t mask = ((1u << width) - 1u) << shift;
  *byte = static_cast<std::uint8_t>((*byte & ~mask) | ((value << shift) & mask));
}

inline std::uint32_t TakeBits(std::uint8_t byte, int shift, int width) {
  return (byte >> shift) & ((1u << width) - 1u);
}

}  // namespace codec_internal

// Code (lane, depth) of a quantised tile, bits in {8, 4, 3, 2, 1}.
inline std::uint32_t GetCode(const std::uint8_t* tile, int bits, int lane, int depth) {
  using codec_internal::TakeBits;
  const int e = 4 * lane + depth % 4;
  const int s = depth / 4;
  switch (bits) {
    case 8:
      return tile[64 * s + e];
    case 4:
      return TakeBits(tile[64 * (s / 2) + e], 4 * (s % 2), 4);
    case 3:
      return GetCode(tile, 2, lane, depth) | GetCode(tile + 64, 1, lane, depth) << 2;
    case 2:
      return TakeBits(tile[e], 2 * s, 2);
    default:
      return TakeBits(tile[e % 32], 2 * s + e / 32, 1);
  }
}

inline void SetCode(std::uint8_t* tile, int bits, int lane, int depth, std::uint32_t code) {
  using codec_internal::PutBits;
  const int e = 4 * lane + depth % 4;
  const int s = depth / 4;
  switch (bits) {
    case 8:
      tile[64 * s + e] = static_cast<std::uint8_t>(code);
      break;
    case 4:
      PutBits(&tile[64 * (s / 2) + e], 4 * (s % 2), 4, code);
      break;
    case 3:
      SetCode(tile, 2, lane, depth, code & 3u);
      SetCode(tile + 64, 1, lane, depth, code >> 2);
      break;
    case 2:
      PutBits(&tile[e], 2 * s, 2, code);
      break;
    default:
      PutBits(&tile[e % 32], 2 * s + e / 32, 1, code);
      break;
  }
}

// Value (lane, depth) of an exact tile, bits in {16, 32}.
inline float GetExact(const std::uint8_t* tile, int bits, int lane, int depth) {
  if (bits == 16) {
    std::uint16_t raw;
    std::memcpy(&raw, tile + 2 * (32 * (depth / 2) + 2 * lane + depth % 2), sizeof(raw));
    return Bf16ToFloat(raw);
  }
  float value;
  std::memcpy(&value, tile + 4 * (16 * depth + lane), sizeof(value));
  return value;
}

inline void SetExact(std::uint8_t* tile, int bits, int lane, int depth, float value) {
  if (bits == 16) {
    const std::uint16_t raw = FloatToBf16(value);
    std::memcpy(tile + 2 * (32 * (depth / 2) + 2 * lane + depth % 2), &raw, sizeof(raw));
  } else {
    std::memcpy(tile + 4 * (16 * depth + lane), &value, sizeof(value));
  }
}

// half = 2^((scale_code - 160) / 8), 0 for code 0. A table, so that every backend has the same floats.
namespace codec_internal {

constexpr std::array<float, 256> MakeHalfTable() {
  // 2^(j / 8) rounded to float32.
  constexpr float kEighths[8] = {1.0f,        1.09050775f, 1.18920708f, 1.29683959f,
                                 1.41421354f, 1.54221082f, 1.68179286f, 1.8340081f};
  std::array<float, 256> table = {};
  for (int code = 1; code < 256; ++code) {
    const int exponent = code / kScaleStepsPerOctave - kScaleBias / kScaleStepsPerOctave;
    const float octave = std::bit_cast<float>(static_cast<std::uint32_t>(127 + exponent) << 23);
    table[static_cast<std::size_t>(code)] = kEighths[code % kScaleStepsPerOctave] * octave;
  }
  return table;
}

}  // namespace codec_internal

inline constexpr std::array<float, 256> kHalfOfScaleCode = codec_internal::MakeHalfTable();

// Reconstruction of one token and run: value = base + step * code.
struct KvScale {
  float step;
  float base;
};

inline KvScale DecodeScale(int bits, std::uint8_t scale_code, std::int8_t center_code) {
  const float half = kHalfOfScaleCode[scale_code];
  const float center = half * (static_cast<float>(center_code) * (1.0f / kCenterSteps));
  return {half * (2.0f / static_cast<float>((1 << bits) - 1)), center - half};
}

// Nibble of `token` among a shared run's meta.
inline std::uint32_t GetNibble(const std::uint8_t* meta, int token) {
  return codec_internal::TakeBits(meta[8 * (token / 16) + token % 8], token % 16 < 8 ? 0 : 4, 4);
}

inline void SetNibble(std::uint8_t* meta, int token, std::uint32_t nibble) {
  codec_internal::PutBits(&meta[8 * (token / 16) + token % 8], token % 16 < 8 ? 0 : 4, 4, nibble);
}

// The scale code that a base code and a nibble stand for; any two bytes are safe.
inline std::uint8_t SharedScaleCode(std::uint8_t base_code, std::uint32_t nibble) {
  const std::uint32_t code = base_code == 0 ? 0 : base_code + kNibbleStep * nibble;
  return static_cast<std::uint8_t>(code < kMaxScaleCode ? code : kMaxScaleCode);
}

// Scale of one token of quantised run r of a side, from the head's first byte.
inline KvScale ScaleOf(const KvSideLayout& side, int r, const std::uint8_t* head, int n_tokens, int token) {
  const std::uint8_t* meta = head + side.meta_offset[r];
  const int bits = side.runs[r].bits;
  if (side.runs[r].scale == KvScaleKind::kAffine) {
    return DecodeScale(bits, meta[token], static_cast<std::int8_t>(meta[n_tokens + token]));
  }
  return DecodeScale(bits, SharedScaleCode(head[side.base_offset[r]], GetNibble(meta, token)), 0);
}

// Half range of the same, as the mass correction needs it.
inline float HalfOf(const KvSideLayout& side, int r, const std::uint8_t* head, int token) {
  const std::uint8_t* meta = head + side.meta_offset[r];
  if (side.runs[r].scale == KvScaleKind::kAffine) return kHalfOfScaleCode[meta[token]];
  return kHalfOfScaleCode[SharedScaleCode(head[side.base_offset[r]], GetNibble(meta, token))];
}

// Start of the tile of run r that holds `coord` (counted inside the run) of `token`, from the head's first byte.
inline std::int32_t KTileOffset(const KvBlockLayout& layout, int r, int token, int coord) {
  const KvRun& run = layout.k.runs[r];
  const int tile = (token / kTileLanes) * (run.width / kTileDepth) + coord / kTileDepth;
  return layout.k.codes_offset[r] + tile * TileBytes(run.bits);
}

inline std::int32_t VTileOffset(const KvBlockLayout& layout, int r, int token, int coord) {
  const KvRun& run = layout.v.runs[r];
  const int tile = (coord / kTileLanes) * (layout.n_tokens / kTileDepth) + token / kTileDepth;
  return layout.v.codes_offset[r] + tile * TileBytes(run.bits);
}

}  // namespace zeroc::kernels
