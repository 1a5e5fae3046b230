// How one attention call divides its scratch memory: a few unpacked blocks and a few floats per row, no history.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kv_block.h"
#include "kernels/ops.h"

namespace zeroc::kernels::cpu {

// One side of a block as f32, or of two blocks as bf16.
constexpr std::size_t kSideBytes = std::size_t{4} * kBlockTokens * kMaxHeadDim;

// Rows computed together on AMX tiles.
inline constexpr int kRowTile = 32;
constexpr std::size_t PaddedRows(int n_rows) {
  return static_cast<std::size_t>((n_rows + kRowTile - 1) / kRowTile * kRowTile);
}

// Asks for [bytes, bytes + n) into the second-level cache.
inline void PrefetchBytes(const std::uint8_t* bytes, int n) {
  for (int i = 0; i < n; i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

struct AttentionScratch {
  std::uint8_t* k_codes;   // unpacked K of one or two blocks: a byte each, or bf16 pairs for AMX
  std::uint8_t* v_codes;   // the same for V; also the copy of a partly visible exact V block
  float* sums;             // [padded rows, head_dim] sums of V, in rotated coordinates while a packed segment is read
  float* q_sums;           // [padded rows, kMaxRuns] sum of q over each K run; AMX: running maxima and sums
  float* v_bases;          // [padded rows, kMaxRuns] sum of probability * base of each V run
  std::uint16_t* queries;  // [padded rows, 2 * head_dim + 32] operands made of q (AMX, VNNI)

  AttentionScratch(void* memory, int n_rows, int head_dim) {
    const std::size_t rows = PaddedRows(n_rows);
    auto* bytes = static_cast<std::uint8_t*>(memory);
    k_codes = bytes;
    v_codes = k_codes + kSideBytes;
    sums = reinterpret_cast<float*>(v_codes + kSideBytes);
    q_sums = sums + rows * static_cast<std::size_t>(head_dim);
    v_bases = q_sums + rows * kMaxRuns;
    queries = reinterpret_cast<std::uint16_t*>(v_bases + rows * kMaxRuns);
  }

  static constexpr std::size_t Bytes(int n_rows, int head_dim) {
    const auto dim = static_cast<std::size_t>(head_dim);
    return 2 * kSideBytes + PaddedRows(n_rows) * (4 * (dim + 2 * kMaxRuns) + 2 * (2 * dim + 32));
  }
};

}  // namespace zeroc::kernels::cpu
