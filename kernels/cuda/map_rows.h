// RoPE and a head's map over 64 rows in shared memory, on tensor cores. For blocks of kKvThreads threads.
#pragma once

#include "kernels/cuda/rows_in_shared.h"

namespace zeroc::kernels::cuda {

// A head of one row: its first number, and its row of the RoPE tables (null for models without).
struct HeadRow {
  const float* x;  // null: a row of zeros
  const float* cos;
  const float* sin;
};

// x[coordinate][row] = rope(row_of(row)), for rows 0..63.
template <typename RowOf>
ZEROC_DEVICE void LoadTurnedRows(const RowOf& row_of, int head_dim, float* x) {
  const int half = head_dim / 2;
  for (int i = ThreadIdx(); i < half * kRows; i += kKvThreads) {
    const int row = i / half, c = i % half;
    const HeadRow from = row_of(row);
    float low = 0.0f, high = 0.0f;
    if (from.x != nullptr) {
      low = from.x[c];
      high = from.x[c + half];
      if (from.cos != nullptr) {
        const float a = low, b = high;
        low = a * from.cos[c] - b * from.sin[c];
        high = b * from.cos[c] + a * from.sin[c];
      }
    }
    x[c * kRowStride + row] = low;
    x[(c + half) * kRowStride + row] = high;
  }
  Sync();
}

// Words of the fragments: pairs of bf16, high halves and low halves of two numbers.
struct SplitPair {
  std::uint32_t high, low;
};
ZEROC_DEVICE SplitPair SplitTwo(float first, float second) {
  const SplitBf16 a = Split(first), b = Split(second);
  return {static_cast<std::uint32_t>(a.high) | static_cast<std::uint32_t>(b.high) << 16,
          static_cast<std::uint32_t>(a.low) | static_cast<std::uint32_t>(b.low) << 16};
}

// x[.][row] = map^T x[.][row], in place: a warp owns 16 rows and holds them as fragments of both halves meanwhile. No
// lane writes before all have read: the products take the fragments of all of them.
// tiles: one head of SplitMaps. head_dim <= 16 * kStepsMax.
template <int kStepsMax>
ZEROC_DEVICE void MapRows(const std::uint8_t* tiles, int head_dim, float* x) {
  const int lane = ThreadIdx() % 32, g = lane / 4, q = lane % 4, n_steps = head_dim / 16;
  float* rows = x + ThreadIdx() / 32 * 16 + g;
  std::uint32_t high[kStepsMax][4], low[kStepsMax][4];
  ZEROC_UNROLL
  for (int k = 0; k < kStepsMax; ++k) {
    for (int r = 0; r < 4 && k < n_steps; ++r) {
      const float* at = rows + (16 * k + 2 * q + 8 * (r / 2)) * kRowStride + 8 * (r % 2);
      const SplitPair pair = SplitTwo(at[0], at[kRowStride]);
      high[k][r] = pair.high;
      low[k][r] = pair.low;
    }
  }
  const int low_offset = 2 * head_dim * head_dim;
  for (int column = 0; column < head_dim; column += 8) {
    float c[4] = {};
    ZEROC_UNROLL
    for (int k = 0; k < kStepsMax; ++k) {
      if (k >= n_steps) break;
      const std::uint8_t* at = tiles + (column / 16 * n_steps + k) * TileBytes(16) + 64 * q + 4 * (column % 16 + g);
      const auto word = [at](int offset) { return *reinterpret_cast<const std::uint32_t*>(at + offset); };
      MmaBf16(c, high[k], word(0), word(256));
      MmaBf16(c, low[k], word(0), word(256));
      MmaBf16(c, high[k], word(low_offset), word(low_offset + 256));
    }
    float* to = rows + (column + 2 * q) * kRowStride;
    to[0] = c[0];
    to[kRowStride] = c[1];
    to[8] = c[2];
    to[kRowStride + 8] = c[3];
  }
  Sync();
}

ZEROC_DEVICE void MapRowsOf(const std::uint8_t* tiles, int head_dim, float* x) {
  if (head_dim <= 64) return MapRows<4>(tiles, head_dim, x);
  if (head_dim <= 128) return MapRows<8>(tiles, head_dim, x);
  MapRows<16>(tiles, head_dim, x);
}

}  // namespace zeroc::kernels::cuda
