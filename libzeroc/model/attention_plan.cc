#include "libzeroc/model/attention_plan.h"

#include <algorithm>
#include <numeric>

#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

// A query tile of fewer rows would unpack every block for too few.
constexpr int kTileRowsMin = 192;

void* Align64(std::vector<std::byte>& bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(bytes.data());
  return bytes.data() + ((address + 63) / 64 * 64 - address);
}

std::int64_t SegmentBytes(const kernels::KvSegment& segment) {
  return std::int64_t{segment.n_blocks} * segment.layout->head_bytes;
}

// Blocks [begin, end) of a segment.
kernels::KvSegment Slice(const kernels::KvSegment& segment, int begin, int end) {
  kernels::KvSegment part = segment;
  const int block_tokens = segment.layout->n_tokens;
  part.blocks += begin;
  part.n_blocks = end - begin;
  part.first_pos += begin * block_tokens;
  part.begin_pos = std::max(segment.begin_pos, part.first_pos);
  part.end_pos = std::min(segment.end_pos, part.first_pos + part.n_blocks * block_tokens);
  return part;
}

}  // namespace

AttentionWorkspace::AttentionWorkspace(const kernels::Ops& ops, ThreadPool& threads)
    : ops_(ops),
      threads_(threads),
      local_(static_cast<std::size_t>(threads.size())),
      scratch_(static_cast<std::size_t>(threads.size())) {}

void AttentionWorkspace::MakeTiles(int layer, int group, int n_kv_heads, std::span<const AttentionQueries> queries) {
  tiles_.clear();
  parts_.clear();
  std::int64_t n_tokens = 0;
  for (const AttentionQueries& q : queries) n_tokens += q.n_tokens;
  // Two tiles for every thread keep all busy to the end; larger tiles unpack less often.
  const std::int64_t share = n_tokens * n_kv_heads / (2 * threads_.size());
  const int largest = std::max(1, kernels::kAttentionRowsMax / group);
  const auto tile_tokens =
      static_cast<int>(std::clamp<std::int64_t>(share, std::min(largest, (kTileRowsMin + group - 1) / group), largest));
  struct Range {
    const AttentionQueries* queries;
    int begin, end;
  };
  std::vector<Range> ranges;
  for (const AttentionQueries& q : queries) {
    const int n_pieces = (q.n_tokens + tile_tokens - 1) / tile_tokens;
    const int piece = (q.n_tokens + n_pieces - 1) / n_pieces;
    for (int begin = 0; begin < q.n_tokens; begin += piece) {
      ranges.push_back({&q, begin, std::min(q.n_tokens, begin + piece)});
    }
  }
  const auto n_tiles = static_cast<int>(ranges.size()) * n_kv_heads;
  // Two parts per thread let the larger ones start first and the smaller ones fill up.
  const int n_parts = n_tiles >= 2 * threads_.size() ? 1 : (2 * threads_.size() + n_tiles - 1) / n_tiles;
  for (const Range& range : ranges) {
    const int first = range.queries->first_pos + range.begin;
    const int last = range.queries->first_pos + range.end - 1;
    kernels::KvSegment segments[KvFormat::kMaxSegments];
    const int n_segments = range.queries->kv->Segments(layer, first, last, segments);
    for (int head = 0; head < n_kv_heads; ++head) {
      tiles_.push_back({range.queries, head, range.begin, range.end - range.begin, parts_.size(), 0});
      AddParts(tiles_.size() - 1, {segments, static_cast<std::size_t>(n_segments)}, n_parts);
      tiles_.back().n_parts = parts_.size() - tiles_.back().first_part;
    }
  }
}

// Cuts the segments, in order, into at most n_parts pieces of about equal bytes at block borders.
void AttentionWorkspace::AddParts(std::size_t tile_idx, std::span<const kernels::KvSegment> segments, int n_parts) {
  std::int64_t total = 0;
  for (const kernels::KvSegment& segment : segments) total += SegmentBytes(segment);
  const std::int64_t target = (total + n_parts - 1) / n_parts;
  const std::int64_t n_rows = tiles_[tile_idx].n_tokens;
  Part part{tile_idx, {}, 0, 0};
  for (const kernels::KvSegment& segment : segments) {
    const std::int64_t block_bytes = segment.layout->head_bytes;
    for (int begin = 0; begin < segment.n_blocks;) {
      const std::int64_t room = std::max<std::int64_t>(1, (target - part.cost + block_bytes - 1) / block_bytes);
      const int end = static_cast<int>(std::min<std::int64_t>(segment.n_blocks, begin + room));
      part.segments[part.n_segments++] = Slice(segment, begin, end);
      part.cost += (end - begin) * block_bytes;
      begin = end;
      if (part.cost >= target) {
        part.cost *= n_rows;
        parts_.push_back(part);
        part = Part{tile_idx, {}, 0, 0};
      }
    }
  }
  if (part.n_segments > 0) {
    part.cost *= n_rows;
    parts_.push_back(part);
  }
}

void AttentionWorkspace::RunPart(const Part& part, float* out, int group, int head_dim, int thread_idx) {
  const Tile& tile = tiles_[part.tile];
  const AttentionQueries& queries = *tile.queries;
  const int n_rows = tile.n_tokens * group;
  const std::int64_t first_row = (std::int64_t{tile.kv_head} * queries.n_tokens + tile.token_begin) * group * head_dim;
  auto& scratch = scratch_[static_cast<std::size_t>(thread_idx)];
  const std::size_t scratch_bytes = kernels::AttentionScratchBytes(n_rows, head_dim) + 64;
  if (scratch.size() < scratch_bytes) scratch.resize(scratch_bytes);
  const std::int64_t n_out = std::int64_t{n_rows} * head_dim;
  const auto status = ops_.attention({queries.q + first_row, n_rows, group, head_dim,
                                      queries.first_pos + tile.token_begin, tile.kv_head, part.segments,
                                      part.n_segments, out, out + n_out, out + n_out + n_rows, Align64(scratch)});
  ZEROC_CHECK(status == kernels::KernelStatus::kOk, static_cast<int>(status));
}

void AttentionWorkspace::Merge(const Tile& tile, const float* const* outs, int group, int head_dim,
                               std::int64_t dst_stride) {
  const int n_rows = tile.n_tokens * group;
  const std::int64_t n_out = std::int64_t{n_rows} * head_dim;
  std::vector<const float*> maxes(tile.n_parts), sums(tile.n_parts);
  for (std::size_t p = 0; p < tile.n_parts; ++p) {
    maxes[p] = outs[p] + n_out;
    sums[p] = outs[p] + n_out + n_rows;
  }
  auto* dst = static_cast<std::uint8_t*>(tile.queries->out) + tile.token_begin * dst_stride * ops_.act_bytes;
  const auto status = ops_.attention_merge({outs, maxes.data(), sums.data(), static_cast<std::int32_t>(tile.n_parts),
                                            n_rows, group, head_dim, tile.kv_head, dst, dst_stride});
  ZEROC_CHECK(status == kernels::KernelStatus::kOk, static_cast<int>(status));
}

void AttentionWorkspace::Run(int layer, int n_heads, int n_kv_heads, int head_dim,
                             std::span<const AttentionQueries> queries) {
  const int group = n_heads / n_kv_heads;
  const std::int64_t dst_stride = std::int64_t{n_heads} * head_dim;
  MakeTiles(layer, group, n_kv_heads, queries);
  order_.resize(parts_.size());
  std::iota(order_.begin(), order_.end(), std::size_t{0});
  std::stable_sort(order_.begin(), order_.end(),
                   [&](std::size_t a, std::size_t b) { return parts_[a].cost > parts_[b].cost; });

  // Split tiles keep their parts apart until all are there; a whole tile is merged by the thread that made it.
  std::vector<std::size_t> partial_begin(parts_.size(), 0);
  std::size_t n_partial = 0;
  std::vector<std::size_t> split_tiles;
  for (std::size_t t = 0; t < tiles_.size(); ++t) {
    const Tile& tile = tiles_[t];
    if (tile.n_parts == 1) continue;
    split_tiles.push_back(t);
    const auto part_size = static_cast<std::size_t>(tile.n_tokens) * static_cast<std::size_t>(group * (head_dim + 2));
    for (std::size_t p = 0; p < tile.n_parts; ++p, n_partial += part_size)
      partial_begin[tile.first_part + p] = n_partial;
  }
  if (partials_.size() < n_partial) partials_.resize(n_partial);

  threads_.ParallelFor(order_.size(), [&](std::size_t item, int thread_idx) {
    const Part& part = parts_[order_[item]];
    const Tile& tile = tiles_[part.tile];
    if (tile.n_parts > 1) {
      RunPart(part, partials_.data() + partial_begin[order_[item]], group, head_dim, thread_idx);
      return;
    }
    auto& local = local_[static_cast<std::size_t>(thread_idx)];
    const auto size = static_cast<std::size_t>(tile.n_tokens) * static_cast<std::size_t>(group * (head_dim + 2));
    if (local.size() < size) local.resize(size);
    RunPart(part, local.data(), group, head_dim, thread_idx);
    const float* out = local.data();
    Merge(tile, &out, group, head_dim, dst_stride);
  });
  threads_.ParallelFor(split_tiles.size(), [&](std::size_t item, int) {
    const Tile& tile = tiles_[split_tiles[item]];
    std::vector<const float*> outs(tile.n_parts);
    for (std::size_t p = 0; p < tile.n_parts; ++p) outs[p] = partials_.data() + partial_begin[tile.first_part + p];
    Merge(tile, outs.data(), group, head_dim, dst_stride);
  });
}

}  // namespace zeroc
