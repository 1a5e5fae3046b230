// What both attention kernels need: a block's bytes and scales in shared memory, and who sees what. For thread blocks
// of 128 threads.
#pragma once

#include <algorithm>

#include "kernels/checks.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/rows_in_shared.h"
#include "kernels/visibility.h"

namespace zeroc::kernels::cuda {

// kBadShape for too many layouts or layouts of other heads, kUnsupported for 32-bit runs.
inline KernelStatus CheckLayouts(const KvBlockLayout* layouts, int n_layouts, int head_dim) {
  if (layouts == nullptr || n_layouts < 1 || n_layouts > kAttentionLayoutsMax) return KernelStatus::kBadShape;
  for (int i = 0; i < n_layouts; ++i) {
    if (layouts[i].head_dim != head_dim || head_dim < 16 || head_dim > kMaxHeadDim || head_dim % 16 != 0) {
      return KernelStatus::kBadShape;
    }
    if (HasFloatRuns(layouts[i])) return KernelStatus::kUnsupported;
  }
  return KernelStatus::kOk;
}

struct Layouts {
  KvBlockLayout at[kAttentionLayoutsMax];
};

// Bytes that a stage needs for a head: the 16-byte pieces around it, and a word behind for LoadSharedWord.
constexpr int StageBytes(int head_bytes) { return (head_bytes + 15 + 15) / 16 * 16 + 16; }

ZEROC_DEVICE SegmentWindow WindowOf(const DeviceSegment& segment, const KvBlockLayout& layout) {
  return {segment.n_blocks, layout.n_tokens, segment.first_pos, segment.begin_pos,
          segment.end_pos,  segment.min_age, segment.max_age};
}

// Starts the copy of a head into a stage: whole 16-byte pieces around it, which lie inside the block.
ZEROC_DEVICE void CopyHead(const DeviceSegment& segment, const KvBlockLayout& layout, int kv_head, int block_idx,
                           std::uint8_t* stage) {
  const std::uint8_t* head = segment.blocks[block_idx] + std::int64_t{kv_head} * layout.head_bytes;
  const int misaligned = static_cast<int>(reinterpret_cast<std::uintptr_t>(head) % 16);
  const int n_bytes = misaligned + layout.head_bytes;
  for (int i = 16 * ThreadIdx(); i < n_bytes; i += 16 * kKvThreads) CopyAsync16(stage + i, head - misaligned + i);
  CopyAsyncCommit();
}

// Where the head begins in its stage.
ZEROC_DEVICE const std::uint8_t* StagedHead(const DeviceSegment& segment, const KvBlockLayout& layout, int kv_head,
                                            int block_idx, const std::uint8_t* stage) {
  return stage + (reinterpret_cast<std::uintptr_t>(segment.blocks[block_idx]) +
                  static_cast<std::uintptr_t>(kv_head) * static_cast<std::uintptr_t>(layout.head_bytes)) %
                     16;
}

// Scales of a block's tokens as floats; 0 for tokens that a short block does not have.
struct ScaleTables {
  float k_step[kMaxRuns][kBlockTokens];
  float k_base[kMaxRuns][kBlockTokens];
  float v_step[kMaxRuns][kBlockTokens];
  float v_base[kMaxRuns][kBlockTokens];
  float mass[kBlockTokens];       // what every score of the token grows by
  float v_step_max[kMaxRuns][2];  // of either half of the tokens
};

// Warps 0 and 1 those of K, 2 and 3 those of V. v_step_max only if kWithMax.
template <bool kWithMax>
ZEROC_DEVICE void LoadScales(const DeviceSegment& segment, const KvBlockLayout& layout, int kv_head,
                             const std::uint8_t* head, ScaleTables* tables) {
  const bool is_value = ThreadIdx() >= kBlockTokens;
  const KvSideLayout& side = is_value ? layout.v : layout.k;
  const int token = ThreadIdx() % kBlockTokens;
  const bool is_token = token < layout.n_tokens;
  const float* mass = segment.mass == nullptr ? nullptr : segment.mass + kv_head * (1 + kMaxRuns);
  float mass_sum = mass == nullptr ? 0.0f : mass[0];
  for (int r = 0; r < side.n_runs; ++r) {
    if (!IsQuantised(side.runs[r].bits)) continue;
    TokenScale scale = {0.0f, 0.0f};
    if (is_token) scale = ScaleOfToken(side, r, head, layout.n_tokens, token);
    if (is_value) {
      tables->v_step[r][token] = scale.step;
      tables->v_base[r][token] = scale.base;
      if (!kWithMax) continue;
      float largest = scale.step;
      for (int mask = 16; mask > 0; mask /= 2) largest = Max(largest, ShuffleXor(largest, mask));
      if (token % 32 == 0) tables->v_step_max[r][token / 32] = largest;
    } else {
      tables->k_step[r][token] = scale.step;
      tables->k_base[r][token] = scale.base;
      if (mass != nullptr && is_token) {
        const float half = HalfOfScaleCode(ScaleCodeOf(side, r, head, token));
        mass_sum += mass[1 + r] * half * half;
      }
    }
  }
  if (!is_value) tables->mass[token] = mass_sum;
}

// A pair of exact tokens, zero where no row sees them: what lies there may never have been written.
ZEROC_DEVICE std::uint32_t MaskPair(std::uint32_t pair, int token, int begin, int end) {
  if (token < begin || token >= end) pair &= 0xffff0000u;
  if (token + 1 < begin || token + 1 >= end) pair &= 0x0000ffffu;
  return pair;
}

ZEROC_DEVICE int QueryPos(const DeviceQueryTile& tile, int row) {
  return tile.first_query_pos + (tile.first_row + row) / tile.group;
}

// Of a row's first number in the output.
ZEROC_DEVICE std::int64_t OutputOffset(const DeviceQueryTile& tile, int row, std::int64_t dst_stride, int head_dim) {
  const int at = tile.first_row + row;
  return (tile.dst_token + at / tile.group) * dst_stride +
         std::int64_t{tile.kv_head * tile.group + at % tile.group} * head_dim;
}

}  // namespace zeroc::kernels::cuda
