// What both attention kernels need: the launch's layouts, and the row helpers of rows_in_shared.h.
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
