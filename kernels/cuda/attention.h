// Attention over packed and exact blocks on a GPU: what kernels/ops.h states for one tile of one KV head, for a whole
// layer of a whole batch in one launch.
//
// A *query tile* is some rows of one KV head of one sequence: consecutive tokens, all heads of the group, as query_prep
// leaves them. Its keys lie in segments. Decode (few rows) cuts the segments into items at block borders, costed in
// bytes and dealt to a fixed number of resident thread blocks, so that uneven sequences keep all processors busy; each
// item gives an unnormalised part, and AttentionMerge adds the parts of a tile exactly. Prefill (many rows) takes all
// segments of a tile in one thread block. The plan is made on the host (attention_tiles.h) and can be replayed while
// block tables and lengths stay; results do not depend on the order in which items are computed.
#pragma once

#include "kernels/cuda/runtime.h"
#include "kernels/ops.h"

namespace zeroc::kernels::cuda {

// Layouts travel in the kernel's constant parameters; a launch takes this many different ones.
inline constexpr int kAttentionLayoutsMax = 8;
inline constexpr int kDecodeTileRows = 16;   // rows of one tensor-core operand
inline constexpr int kPrefillTileRows = 64;  // sixteen for each of four warps

// KvSegment on the device.
struct DeviceSegment {
  const std::uint8_t* const* blocks;  // [n_blocks] device array of device pointers, multiples of 16
  std::int32_t n_blocks;
  std::int32_t layout;  // index into the launch's layouts
  std::int32_t first_pos, begin_pos, end_pos;
  std::int32_t min_age, max_age;
  const float* mass;  // [n_kv_heads][1 + kMaxRuns] or null
};

// Rows first_row .. first_row + n_rows - 1 of one KV head of one sequence, row = token * group + head in group.
struct DeviceQueryTile {
  std::int64_t q_offset;         // of the tile's first row in q, in floats
  std::int64_t dst_token;        // of the sequence's first token in the output
  std::int32_t first_query_pos;  // of the sequence's first token
  std::int32_t first_row, n_rows;
  std::int32_t group, kv_head;
  std::int32_t first_segment, n_segments;  // prefill
  std::int32_t first_part, n_parts;        // decode
};

// Blocks [block_begin, block_end) of one segment for one tile.
struct DeviceItem {
  std::int32_t tile, segment;
  std::int32_t block_begin, block_end;
  std::int32_t part;
};

struct DecodeAttentionArgs {
  const float* q;
  const DeviceQueryTile* tiles;
  const DeviceSegment* segments;
  const DeviceItem* items;         // ordered by thread block
  const std::int32_t* first_item;  // [n_thread_blocks + 1]
  const KvBlockLayout* layouts;    // host, [n_layouts]
  std::int32_t n_layouts, n_thread_blocks, head_dim;
  // Parts, [n_parts] of [kDecodeTileRows, head_dim], [kDecodeTileRows] and [kDecodeTileRows]; rows that the tile does
  // not have are not written.
  float* out;
  float* row_max;
  float* row_sum;
};

// Precision: q, and the probabilities times V's step, are 16-bit integers with one scale for each row, run and (for the
// probabilities) block; sums over codes are exact. Exact runs take the sum of two bf16 for q and for the probabilities.
KernelStatus DecodeAttention(const DecodeAttentionArgs& args, Stream stream);

struct DecodeMergeArgs {
  const DeviceQueryTile* tiles;
  std::int32_t n_tiles, head_dim;
  const float* out;
  const float* row_max;
  const float* row_sum;
  Bf16* dst;  // [tokens, n_heads * head_dim] with dst_stride
  std::int64_t dst_stride;
};
KernelStatus DecodeMerge(const DecodeMergeArgs& args, Stream stream);

struct PrefillAttentionArgs {
  const float* q;
  const DeviceQueryTile* tiles;
  std::int32_t n_tiles;
  const DeviceSegment* segments;
  const KvBlockLayout* layouts;  // host
  std::int32_t n_layouts, head_dim;
  Bf16* dst;
  std::int64_t dst_stride;
};

// Precision: q and the probabilities (times V's step) are rounded to bf16; codes are exact.
KernelStatus PrefillAttention(const PrefillAttentionArgs& args, Stream stream);

}  // namespace zeroc::kernels::cuda
