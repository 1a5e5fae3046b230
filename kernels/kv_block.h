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

// A contiguous run of coordinates at one width.
struct KvRun {
  std::int32_t bits = 0;
  std::int32_t width = 0;  // coordinates, a multiple of 16
};

// Where K (or V) of one head lies inside that head's part of a block. Offsets are bytes from the head's start.
//   K codes of run r: tiles [token group (n_tokens / 16)][coordinate tile (width / 16)], lanes = tokens
//   V codes of run r: tiles [coordinate tile][token group],                              lanes = coordinates
//   meta of a quantised run: scale_code u8 [n_tokens], then center_code i8 [n_tokens]
struct KvSideLayout {
  std::int32_t n_runs = 0;
  KvRun runs[kMaxRuns];
  std::int32_t first_coord[kMaxRuns] = {};
  std::int32_t codes_offset[kMaxRuns] = {};
  std::int32_t meta_offset[kMaxRuns] = {};  // -1 where the run has none
};

// Heads lie one after the other: head g starts at g * head_bytes.
struct KvBlockLayout {
  std::int32_t n_kv_heads = 0;
  std::int32_t head_dim = 0;
  std::int32_t n_tokens = 0;  // 64, or 16 for the sink block
  std::int32_t head_bytes = 0;
  std::int32_t block_bytes = 0;  // a multiple of 64
  bool rotate_v = false;         // quantised V runs hold Hadamard-rotated coordinates (see hadamard.h)
  KvSideLayout k;
  KvSideLayout v;
};

// Fills every derived field. False if a field is out of range: bits, widths not multiples of 16 or not summing to
// head_dim, more than kMaxRuns runs, n_tokens not 16 or 64, head_dim over kMaxHeadDim.
bool MakeKvBlockLayout(int n_kv_heads, int head_dim, int n_tokens, const KvRun* k_runs, int n_k_runs,
                       const KvRun* v_runs, int n_v_runs, bool rotate_v, KvBlockLayout* layout);

// Scale of one token and run. Reconstruction: value = base + step * code with
//   half = scale_code == 0 ? 0 : 2^((scale_code - 160) / 8),   center = half * center_code / 64
//   step = 2 half / (2^bits - 1),                              base = center - half
// A logarithmic 8-bit half range (9 % steps, 2^-20 to 2^12) and an 8-bit centre in units of it: two bytes per token,
// head and run. The search for the clip point runs over scale codes, so the coarse grid costs next to nothing.
inline constexpr int kScaleBias = 160;
inline constexpr int kScaleStepsPerOctave = 8;
inline constexpr int kCenterSteps = 64;

}  // namespace zeroc::kernels
