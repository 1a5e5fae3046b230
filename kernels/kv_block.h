// The bytes of one KV block: 64 tokens (16 for the sink block) of one layer, all KV heads together.
//
// The same bytes lie in memory, travel on the wire and are attended to in place; docs/kv_format.md is the full text and
// tests/golden pins it. Everything is built from one unit, the *code tile*: 16 lanes x 16 depth steps, 256 codes,
// 32 * bits bytes. Depth is the direction that attention contracts (coordinates for K, tokens for V), lanes are the
// direction it keeps (tokens for K, coordinates for V), so that one SIMD lane, one AVX-512 VNNI quad and one AMX B tile
// all read codes where they lie. Plain data: no ownership, no thread-safety concerns.
#pragma once

#include <cstdint>

namespace zeroc::kernels {

inline constexpr int kBlockTokens = 64;  // tokens of a packed or exact block
inline constexpr int kSinkTokens = 16;   // tokens of the sink block; also the granule of every token count
inline constexpr int kTileLanes = 16;    // one AVX-512 register of f32, one AMX tile row of 4-byte groups
inline constexpr int kTileDepth = 16;
inline constexpr int kMaxRuns = 6;
inline constexpr int kMaxHeadDim = 256;

// Code widths: 32 (f32, reference engine only, never on the wire), 16 (bf16), and quantised 8, 4, 3, 2, 1.
// 0 bits: the coordinates are dropped and occupy nothing.
constexpr bool IsValidBits(int bits) { return bits == 32 || bits == 16 || bits == 8 || (bits >= 0 && bits <= 4); }
constexpr bool IsQuantised(int bits) { return bits >= 1 && bits <= 8; }
constexpr int TileBytes(int bits) { return 32 * bits; }

// Code (lane, depth) of a tile, with e = 4 * lane + depth % 4 and s = depth / 4:
//   8 bits  byte[64 s + e]
//   4 bits  byte[64 (s / 2) + e], low nibble for even s
//   3 bits  the two low bits as for 2 bits (64 bytes), then the high bit as for 1 bit (32 bytes)
//   2 bits  byte[e], bits 2s and 2s + 1
//   1 bit   byte[e % 32], bit 2s + e / 32
//   16 bits u16[32 (depth / 2) + 2 lane + depth % 2]      (pairs along depth: the B operand of a bf16 dot product)
//   32 bits f32[16 depth + lane]

// How a quantised run states the scale of a token (the formulas are at the end of this file).
enum class KvScaleKind : std::int32_t {
  kAffine = 0,  // two bytes per token: half range and centre
  kShared = 1,  // symmetric: half a byte per token under one byte per run and block
};

// A contiguous run of coordinates at one width.
struct KvRun {
  std::int32_t bits = 0;
  std::int32_t width = 0;                    // coordinates, a multiple of 16
  KvScaleKind scale = KvScaleKind::kAffine;  // kAffine where there is no scale (32, 16 and 0 bits)

  bool operator==(const KvRun&) const = default;
};

// Where K (or V) of one head lies inside that head's part of a block. Offsets are bytes from the head's start; a head
// with shared scales may start at any byte, so nothing but the bytes' order may be assumed of an address.
//   K codes of run r: tiles [token group (n_tokens / 16)][coordinate tile (width / 16)], lanes = tokens
//   V codes of run r: tiles [coordinate tile][token group],                              lanes = coordinates
//   meta of an affine run: scale_code u8 [n_tokens], then center_code i8 [n_tokens]
//   meta of a shared run: nibbles u8 [n_tokens / 2]; token t of 16-token group g is in byte 8 g + t % 8, in the low
//     nibble for t % 16 < 8 and in the high one otherwise. Its base_code u8 is apart, at base_offset.
// Order of a head: K codes, K meta, V codes, V meta, base codes of K runs, base codes of V runs.
struct KvSideLayout {
  std::int32_t n_runs = 0;
  KvRun runs[kMaxRuns];
  std::int32_t first_coord[kMaxRuns] = {};
  std::int32_t codes_offset[kMaxRuns] = {};
  std::int32_t meta_offset[kMaxRuns] = {};  // -1 where the run has none
  std::int32_t base_offset[kMaxRuns] = {};  // one byte, -1 unless the run's scale is shared

  bool operator==(const KvSideLayout&) const = default;
};

// Heads lie one after the other: head g starts at g * head_bytes.
struct KvBlockLayout {
  std::int32_t n_kv_heads = 0;
  std::int32_t head_dim = 0;
  std::int32_t n_tokens = 0;  // 64, or 16 for the sink block
  std::int32_t head_bytes = 0;
  std::int32_t block_bytes = 0;  // the heads, padded to a multiple of 16; of 64 where no run has shared scales
  bool rotate_v = false;         // quantised V runs hold Hadamard-rotated coordinates (see hadamard.h)
  KvSideLayout k;
  KvSideLayout v;

  bool operator==(const KvBlockLayout&) const = default;
};

// Fills every derived field. False if a field is out of range: bits, widths not multiples of 16 or not summing to
// head_dim, a scale kind that is unknown or stated for a run without scale, more than kMaxRuns runs, n_tokens not 16 or
// 64, head_dim over kMaxHeadDim.
bool MakeKvBlockLayout(int n_kv_heads, int head_dim, int n_tokens, const KvRun* k_runs, int n_k_runs,
                       const KvRun* v_runs, int n_v_runs, bool rotate_v, KvBlockLayout* layout);

// Scale of one token and run. Reconstruction: value = base + step * code with
//   half = scale_code == 0 ? 0 : 2^((scale_code - 160) / 8)
//   step = 2 half / (2^bits - 1),  base = center - half
//   affine: scale_code as stored,  center = half * center_code / 64
//   shared: scale_code = base_code == 0 ? 0 : min(base_code + 2 nibble, 255),  center = 0
// A logarithmic 8-bit half range (9 % steps, 2^-20 to 2^12). Affine adds an 8-bit centre in units of it: two bytes per
// token, head and run. Shared has no centre and no zero code: its values are +-half/(2^bits - 1) times odd numbers. Its
// nibbles are steps of 19 % up from the base; tokens more than 3.75 octaves below the block's largest share nibble 0.
inline constexpr int kScaleBias = 160;
inline constexpr int kScaleStepsPerOctave = 8;
inline constexpr int kCenterSteps = 64;
inline constexpr int kMaxScaleCode = 255;
inline constexpr int kNibbleStep = 2;   // scale codes per nibble step
inline constexpr int kNibbleSpan = 30;  // largest minus smallest scale code of a shared run

}  // namespace zeroc::kernels
