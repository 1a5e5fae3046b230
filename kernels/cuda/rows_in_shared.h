// 64 rows (tokens, or queries of one KV head) of one head in shared memory as f32, coordinate by coordinate, and what
// happens to them there: decoding, Hadamard rotation. For blocks of kKvThreads threads; every function is called by all
// of them, begins with what the others wrote before it visible, and ends with a barrier.
#pragma once

#include "kernels/cuda/kv_tiles.h"

namespace zeroc::kernels::cuda {

inline constexpr int kKvThreads = 128;
inline constexpr int kRows = kBlockTokens;
// From coordinate to coordinate: one more than the rows, so that neither direction meets a bank twice.
inline constexpr int kRowStride = kRows + 1;

constexpr int RowsBytes(int head_dim) { return head_dim * kRowStride * static_cast<int>(sizeof(float)); }

// HadamardRun of n_rows rows, in the reference's order of operations. x begins at the run; a coordinate is kCoordStride
// floats from the next, a row `row_stride`.
template <int kCoordStride>
ZEROC_DEVICE void HadamardRows(float* x, int width, int n_rows, int row_stride) {
  while (width > 0) {
    int cell = 16;
    while (2 * cell <= width) cell *= 2;
    const float norm = 1.0f / Sqrt(static_cast<float>(cell));
    for (int half = 1; half < cell; half *= 2) {
      for (int i = ThreadIdx(); i < cell / 2 * n_rows; i += kKvThreads) {
        const int pair = i / n_rows, row = i % n_rows;
        float* low = x + (2 * half * (pair / half) + pair % half) * kCoordStride + row * row_stride;
        float* high = low + half * kCoordStride;
        const float a = *low, b = *high;
        const bool last = 2 * half == cell;
        *low = last ? (a + b) * norm : a + b;
        *high = last ? (a - b) * norm : a - b;
      }
      Sync();
    }
    x += cell * kCoordStride;
    width -= cell;
  }
}

// The quantised runs of x[coordinate][row].
ZEROC_DEVICE void HadamardQuantised(float* x, const KvSideLayout& side) {
  for (int r = 0; r < side.n_runs; ++r) {
    if (!IsQuantised(side.runs[r].bits)) continue;
    HadamardRows<kRowStride>(x + side.first_coord[r] * kRowStride, side.runs[r].width, kRows, 1);
  }
}

// One side of a head of a 64-token block: x[coordinate][token] as DecodeKeyRow and DecodeValueRow give it.
template <bool kIsValue>
ZEROC_DEVICE void DecodeRows(const KvBlockLayout& layout, const std::uint8_t* head, float* x) {
  const KvSideLayout& side = kIsValue ? layout.v : layout.k;
  for (int r = 0; r < side.n_runs; ++r) {
    const int bits = side.runs[r].bits, n_coord_tiles = side.runs[r].width / 16;
    float* run = x + side.first_coord[r] * kRowStride;
    // A unit is a lane of a tile, four steps of depth.
    for (int i = ThreadIdx(); i < n_coord_tiles * (kRows / 16) * 64; i += kKvThreads) {
      const int tile = i / 64, lane = i % 16, s = i / 16 % 4;
      const int coord_tile = kIsValue ? tile / (kRows / 16) : tile % n_coord_tiles;
      const int group = kIsValue ? tile % (kRows / 16) : tile / n_coord_tiles;
      const std::uint8_t* from = head + side.codes_offset[r] + tile * TileBytes(bits);
      std::uint32_t quad = 0;
      if (IsQuantised(bits)) quad = CodeQuad(bits, lane, s, [from](int at) { return LoadWord(from + at); });
      for (int j = 0; j < 4; ++j) {
        const int depth = 4 * s + j;
        const int token = 16 * group + (kIsValue ? depth : lane), coord = 16 * coord_tile + (kIsValue ? lane : depth);
        float value = 0.0f;
        if (IsQuantised(bits)) {
          const TokenScale scale = ScaleOfToken(side, r, head, kRows, token);
          value = scale.base + scale.step * static_cast<float>(quad >> 8 * j & 255u);
        } else if (bits == 16) {
          const std::uint32_t pair = LoadWord(from + 64 * (depth / 2) + 4 * lane);
          value = FromBf16(static_cast<Bf16>(pair >> 16 * (depth % 2)));
        }
        run[coord * kRowStride + token] = value;
      }
    }
  }
  Sync();
  if (kIsValue && layout.rotate_v) HadamardQuantised(x, side);
}

}  // namespace zeroc::kernels::cuda
