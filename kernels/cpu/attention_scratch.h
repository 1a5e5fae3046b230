// How one attention call divides its scratch memory: one block of unpacked codes and a few floats per row, no history.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kv_block.h"
#include "kernels/ops.h"

namespace zeroc::kernels::cpu {

// Sizes in bytes, each a multiple of 64.
constexpr std::size_t kSideBytes = std::size_t{4} * kBlockTokens * kMaxHeadDim;  // one side of a block as f32

struct AttentionScratch {
  std::uint8_t* k_codes;  // unpacked K codes of one block, one byte each (or bf16 pairs for AMX)
  std::uint8_t* v_codes;  // the same for V; also the copy of a partly visible exact V block
  float* rotated;         // [n_rows, head_dim] sums of V in rotated coordinates
  float* q_sums;          // [n_rows, kMaxRuns] sum of q over each K run
  float* v_bases;         // [n_rows, kMaxRuns] sum of probability * base of each V run

  AttentionScratch(void* memory, int n_rows, int head_dim) {
    auto* bytes = static_cast<std::uint8_t*>(memory);
    k_codes = bytes;
    v_codes = k_codes + kSideBytes;
    rotated = reinterpret_cast<float*>(v_codes + kSideBytes);
    q_sums = rotated + std::size_t(n_rows) * std::size_t(head_dim);
    v_bases = q_sums + std::size_t(n_rows) * kMaxRuns;
  }
};

}  // namespace zeroc::kernels::cpu
