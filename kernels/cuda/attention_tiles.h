// Cuts the attention of a layer into query tiles and, for decode, into items of about equal bytes. Host code, no GPU.
//
// A plan depends on lengths and block tables only: one plan serves a layer after the other as long as its segments'
// block arrays are replaced by those of the next (they keep their sizes within a step). Not thread-safe.
#pragma once

#include <span>
#include <vector>

#include "kernels/cuda/attention.h"

namespace zeroc::kernels::cuda {

// New tokens of one sequence and what they see. `blocks` of the segments are device arrays, `layout` a host pointer.
struct AttentionSequence {
  std::span<const KvSegment> segments;
  std::int32_t first_pos, n_tokens;
  std::int64_t q_offset;   // of [n_kv_heads, n_tokens, group, head_dim] in q, in floats
  std::int64_t dst_token;  // row of the first token in the output
};

struct AttentionTiles {
  std::vector<KvBlockLayout> layouts;
  std::vector<DeviceSegment> segments;
  std::vector<DeviceQueryTile> tiles;
  std::vector<DeviceItem> items;         // decode, ordered by thread block
  std::vector<std::int32_t> first_item;  // decode, [n_thread_blocks + 1]
  std::int32_t n_parts = 0;              // decode
};

// A tile's items cost what they read, and this much for q, the rotation back and the part: some blocks' worth of bytes
// (a guess until it is measured on a GPU).
inline constexpr std::int64_t kItemBytes = 8192;

// kBadShape for more than kAttentionLayoutsMax layouts, or heads that do not divide.
// Items are cut so that none costs more than about half of a thread block's share, and dealt largest first.
KernelStatus MakeDecodeTiles(std::span<const AttentionSequence> sequences, int n_heads, int n_kv_heads, int head_dim,
                             int n_thread_blocks, AttentionTiles* out);
KernelStatus MakePrefillTiles(std::span<const AttentionSequence> sequences, int n_heads, int n_kv_heads, int head_dim,
                              AttentionTiles* out);

}  // namespace zeroc::kernels::cuda
