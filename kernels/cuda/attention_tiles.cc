#include "kernels/cuda/attention_tiles.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>
#include <utility>

#include "kernels/visibility.h"

namespace zeroc::kernels::cuda {
namespace {

// Index of the layout among those of the launch, -1 when there are too many.
int LayoutIndex(const KvBlockLayout& layout, std::vector<KvBlockLayout>* layouts) {
  const auto found = std::find(layouts->begin(), layouts->end(), layout);
  if (found != layouts->end()) return static_cast<int>(found - layouts->begin());
  if (layouts->size() == kAttentionLayoutsMax) return -1;
  layouts->push_back(layout);
  return static_cast<int>(layouts->size()) - 1;
}

SegmentWindow WindowOf(const AttentionTiles& tiles, const DeviceSegment& segment) {
  return {segment.n_blocks,  tiles.layouts[static_cast<std::size_t>(segment.layout)].n_tokens,
          segment.first_pos, segment.begin_pos,
          segment.end_pos,   segment.min_age,
          segment.max_age};
}

// Segments and tiles; false for too many layouts.
bool AddTiles(std::span<const AttentionSequence> sequences, int group, int n_kv_heads, int head_dim, int tile_rows,
              AttentionTiles* out) {
  for (const AttentionSequence& sequence : sequences) {
    const auto first_segment = static_cast<std::int32_t>(out->segments.size());
    for (const KvSegment& from : sequence.segments) {
      const int layout = LayoutIndex(*from.layout, &out->layouts);
      if (layout < 0) return false;
      out->segments.push_back({from.blocks, from.n_blocks, layout, from.first_pos, from.begin_pos, from.end_pos,
                               from.min_age, from.max_age, from.mass});
    }
    const int n_rows = sequence.n_tokens * group;
    for (int head = 0; head < n_kv_heads; ++head) {
      for (int row = 0; row < n_rows; row += tile_rows) {
        out->tiles.push_back({.q_offset = sequence.q_offset + (std::int64_t{head} * n_rows + row) * head_dim,
                              .dst_token = sequence.dst_token,
                              .first_query_pos = sequence.first_pos,
                              .first_row = row,
                              .n_rows = std::min(tile_rows, n_rows - row),
                              .group = group,
                              .kv_head = head,
                              .first_segment = first_segment,
                              .n_segments = static_cast<std::int32_t>(sequence.segments.size()),
                              .first_part = 0,
                              .n_parts = 0});
      }
    }
  }
  return true;
}

struct BlockRange {
  int begin, end;
};
// Blocks of a segment of which some row of the tile sees something.
BlockRange SeenBlocks(const AttentionTiles& tiles, const DeviceQueryTile& tile, const DeviceSegment& segment) {
  const SegmentWindow window = WindowOf(tiles, segment);
  const auto pos = [&tile](int row) { return tile.first_query_pos + (tile.first_row + row) / tile.group; };
  const int begin = SpanOfQuery(window, pos(0)).begin;
  const int end = SpanOfQuery(window, pos(tile.n_rows - 1)).end;
  if (begin >= end) return {0, 0};
  return {begin / window.block_tokens, (end + window.block_tokens - 1) / window.block_tokens};
}

std::int64_t HeadBytes(const AttentionTiles& tiles, const DeviceSegment& segment) {
  return tiles.layouts[static_cast<std::size_t>(segment.layout)].head_bytes;
}

// Calls fn(tile index, segment index, range) for every segment that a tile sees something of.
template <typename Fn>
void ForEachSeen(const AttentionTiles& tiles, const Fn& fn) {
  for (std::size_t t = 0; t < tiles.tiles.size(); ++t) {
    const DeviceQueryTile& tile = tiles.tiles[t];
    for (int s = tile.first_segment; s < tile.first_segment + tile.n_segments; ++s) {
      const BlockRange range = SeenBlocks(tiles, tile, tiles.segments[static_cast<std::size_t>(s)]);
      if (range.begin < range.end) fn(static_cast<int>(t), s, range);
    }
  }
}

void AddItems(int n_thread_blocks, AttentionTiles* out) {
  std::int64_t total = 0;
  ForEachSeen(*out, [&](int, int s, const BlockRange& range) {
    total += kItemBytes + (range.end - range.begin) * HeadBytes(*out, out->segments[static_cast<std::size_t>(s)]);
  });
  const std::int64_t cost_max = std::max<std::int64_t>(2 * kItemBytes, total / (2 * n_thread_blocks));
  std::vector<std::int64_t> costs;
  ForEachSeen(*out, [&](int t, int s, const BlockRange& range) {
    DeviceQueryTile& tile = out->tiles[static_cast<std::size_t>(t)];
    if (tile.n_parts == 0) tile.first_part = out->n_parts;
    const std::int64_t head_bytes = HeadBytes(*out, out->segments[static_cast<std::size_t>(s)]);
    const int n_blocks = range.end - range.begin;
    const auto n_items_max = std::max<std::int64_t>(1, (n_blocks * head_bytes + cost_max - 1) / cost_max);
    const int piece = static_cast<int>((n_blocks + n_items_max - 1) / n_items_max);
    for (int begin = range.begin; begin < range.end; begin += piece) {
      const int end = std::min(range.end, begin + piece);
      out->items.push_back({t, s, begin, end, out->n_parts++});
      costs.push_back(kItemBytes + (end - begin) * head_bytes);
      ++tile.n_parts;
    }
  });
  // Largest first, each to the thread block that has least; ties by index, so that a plan is a function of its input.
  std::vector<std::size_t> order(costs.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return costs[a] > costs[b]; });
  using Load = std::pair<std::int64_t, int>;
  std::priority_queue<Load, std::vector<Load>, std::greater<>> loads;
  for (int i = 0; i < n_thread_blocks; ++i) loads.push({0, i});
  std::vector<std::vector<DeviceItem>> dealt(static_cast<std::size_t>(n_thread_blocks));
  for (const std::size_t i : order) {
    Load least = loads.top();
    loads.pop();
    dealt[static_cast<std::size_t>(least.second)].push_back(out->items[i]);
    least.first += costs[i];
    loads.push(least);
  }
  out->items.clear();
  out->first_item.assign(1, 0);
  for (const auto& items : dealt) {
    out->items.insert(out->items.end(), items.begin(), items.end());
    out->first_item.push_back(static_cast<std::int32_t>(out->items.size()));
  }
}

KernelStatus MakeTiles(std::span<const AttentionSequence> sequences, int n_heads, int n_kv_heads, int head_dim,
                       int tile_rows, AttentionTiles* out) {
  *out = {};
  if (n_kv_heads < 1 || n_heads < n_kv_heads || n_heads % n_kv_heads != 0) return KernelStatus::kBadShape;
  const bool fits = AddTiles(sequences, n_heads / n_kv_heads, n_kv_heads, head_dim, tile_rows, out);
  return fits ? KernelStatus::kOk : KernelStatus::kBadShape;
}

}  // namespace

KernelStatus MakeDecodeTiles(std::span<const AttentionSequence> sequences, int n_heads, int n_kv_heads, int head_dim,
                             int n_thread_blocks, AttentionTiles* out) {
  if (n_thread_blocks < 1) return KernelStatus::kBadShape;
  const KernelStatus status = MakeTiles(sequences, n_heads, n_kv_heads, head_dim, kDecodeTileRows, out);
  if (status == KernelStatus::kOk) AddItems(n_thread_blocks, out);
  return status;
}

KernelStatus MakePrefillTiles(std::span<const AttentionSequence> sequences, int n_heads, int n_kv_heads, int head_dim,
                              AttentionTiles* out) {
  return MakeTiles(sequences, n_heads, n_kv_heads, head_dim, kPrefillTileRows, out);
}

}  // namespace zeroc::kernels::cuda
