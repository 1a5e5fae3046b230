// How one attention call divides its scratch memory: one block of unpacked codes and a few floats per row, no history.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kv_block.h"
#include "kernels/ops.h"

namespace zeroc::kernels::cpu {

// One side of a block as f32, the widest form that it takes here.
constexpr std::size_t kSideBytes = std::size_t{4} * kBlockTokens * kMaxHeadDim;

// Rows come in whole AMX tiles of 16.
constexpr std::size_t PaddedRows(int n_rows) { return static_cast<std::size_t>((n_rows + 15) / 16 * 16); }

// Asks for [bytes, bytes + n) into the second-level cache.
inline void PrefetchBytes(const std::uint8_t* bytes, int n) {
  for (int i = 0; i < n; i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

struct AttentionScratch {
  std::uint8_t* k_codes;   // unpacked K codes of one block: a byte each, or bf16 pairs for AMX
  std::uint8_t* v_codes;   // the same for V; also the copy of a partly visible exact V block
  float* rotated;          // [padded rows, head_dim] sums of V in rotated coordinates
  float* q_sums;           // [padded rows, kMaxRuns] sum of q over each K run
  float* v_bases;          // [padded rows, kMaxRuns] sum of probability * base of each V run
  std::uint16_t* queries;  // [padded rows, head_dim + 16 * kMaxRuns] q in bf16, runs padded to 32 (AMX)

  AttentionScratch(void* memory, int n_rows, int head_dim) {
    auto* bytes = static_cast<std::uint8_t*>(memory);
    k_codes = bytes;
    v_codes = k_codes + kSideBytes;
    rotated = reinterpret_cast<float*>(v_codes + kSideBytes);
    q_sums = rotated + PaddedRows(n_rows) * static_cast<std::size_t>(head_dim);
    v_bases = q_sums + PaddedRows(n_rows) * kMaxRuns;
    queries = reinterpret_cast<std::uint16_t*>(v_bases + PaddedRows(n_rows) * kMaxRuns);
  }

  static constexpr std::size_t Bytes(int n_rows, int head_dim) {
    const auto dim = static_cast<std::size_t>(head_dim);
    return 2 * kSideBytes + PaddedRows(n_rows) * (4 * (dim + 2 * kMaxRuns) + 2 * (dim + 16 * kMaxRuns));
  }
};

}  // namespace zeroc::kernels::cpu
