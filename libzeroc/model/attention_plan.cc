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

// The part of a segment that lies in logical blocks of 64 tokens; the sink belongs to the first.
kernels::KvSegment Within(const kernels::KvSegment& segment, const BlockRange& range) {
  const int block_tokens = segment.layout->n_tokens;
  const auto idx_of = [&](int block) {
    const int tokens = block * kernels::kBlockTokens - segment.first_pos;
    return std::clamp((tokens + block_tokens - 1) / block_tokens, 0, segment.n_blocks);
  };
  const int begin = idx_of(range.begin);
  return Slice(segment, begin, std::max(begin, idx_of(range.end)));
}

}  // namespace

bool IsLasting(const KvFormat& format, int layer, const kernels::KvSegment& segment) {
  return segment.layout ==
         (format.packs ? &format.tiers.back().layouts[static_cast<std::size_t>(layer)] : &format.exact);
}

AttentionWorkspace::AttentionWorkspace(const kernels::Ops& ops, ThreadPool& threads)
    : ops_(ops),
      threads_(threads),
      local_(static_cast<std::size_t>(threads.size())),
      scratch_(static_cast<std::size_t>(threads.size())) {}

void AttentionWorkspace::MakeTiles(std::span<const AttentionQueries> queries) {
  tiles_.clear();
  parts_.clear();
  const int group = shape_.group();
  std::int64_t n_tokens = 0;
  for (const AttentionQueries& q : queries) n_tokens += q.n_tokens;
  // Two tiles for every thread keep all busy to the end; larger tiles unpack less often.
  const std::int64_t share = n_tokens * shape_.n_kv_heads / (2 * threads_.size());
  const int largest = std::max(1, kernels::kAttentionRowsMax / group);
  const auto tile_tokens =
      static_cast<int>(std::clamp<std::int64_t>(share, std::min(largest, (kTileRowsMin + group - 1) / group), largest));
  for (const AttentionQueries& q : queries) {
    const int n_pieces = (q.n_tokens + tile_tokens - 1) / tile_tokens;
    const int piece = (q.n_tokens + n_pieces - 1) / n_pieces;
    for (int begin = 0; begin < q.n_tokens; begin += piece) {
      const int n = std::min(piece, q.n_tokens - begin);
      for (int head = 0; head < shape_.n_kv_heads; ++head) tiles_.push_back({&q, head, begin, n, 0, 0});
    }
  }
}

int AttentionWorkspace::SegmentsOf(const Tile& tile, kernels::KvSegment out[KvFormat::kMaxSegments]) const {
  const int first = tile.queries->first_pos + tile.token_begin;
  return tile.queries->kv->Segments(layer_, first, first + tile.n_tokens - 1, out);
}

void AttentionWorkspace::MakeParts() {
  const auto n_tiles = static_cast<int>(tiles_.size());
  // Two parts per thread let the larger ones start first and the smaller ones fill up.
  const int n_parts = n_tiles >= 2 * threads_.size() ? 1 : (2 * threads_.size() + n_tiles - 1) / n_tiles;
  kernels::KvSegment segments[KvFormat::kMaxSegments];
  int n_segments = 0;
  for (std::size_t t = 0; t < tiles_.size(); ++t) {
    Tile& tile = tiles_[t];
    if (tile.kv_head == 0) n_segments = SegmentsOf(tile, segments);  // the heads of one tile of tokens follow it
    tile.first_part = parts_.size();
    AddParts(t, {segments, static_cast<std::size_t>(n_segments)}, n_parts);
    tile.n_parts = parts_.size() - tile.first_part;
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

void AttentionWorkspace::OrderParts() {
  order_.resize(parts_.size());
  std::iota(order_.begin(), order_.end(), std::size_t{0});
  std::stable_sort(order_.begin(), order_.end(),
                   [&](std::size_t a, std::size_t b) { return parts_[a].cost > parts_[b].cost; });
}

void* AttentionWorkspace::Scratch(int n_rows, int thread_idx) {
  auto& scratch = scratch_[static_cast<std::size_t>(thread_idx)];
  const std::size_t bytes = kernels::AttentionScratchBytes(n_rows, shape_.head_dim) + 64;
  if (scratch.size() < bytes) scratch.resize(bytes);
  return Align64(scratch);
}

void AttentionWorkspace::RunPart(const Part& part, float* out, int thread_idx) {
  const Tile& tile = tiles_[part.tile];
  const AttentionQueries& queries = *tile.queries;
  const int group = shape_.group(), head_dim = shape_.head_dim;
  const auto rows = static_cast<int>(n_rows(tile));
  const std::int64_t first_row = (std::int64_t{tile.kv_head} * queries.n_tokens + tile.token_begin) * group * head_dim;
  const std::int64_t n_out = std::int64_t{rows} * head_dim;
  const auto status =
      ops_.attention({queries.q + first_row, rows, group, head_dim, queries.first_pos + tile.token_begin, tile.kv_head,
                      part.segments, part.n_segments, out, out + n_out, out + n_out + rows, Scratch(rows, thread_idx)});
  ZEROC_CHECK(status == kernels::KernelStatus::kOk, static_cast<int>(status));
}

void AttentionWorkspace::Merge(const Tile& tile, std::span<const Partial> partials) {
  std::vector<const float*> outs, maxes, sums;
  for (const Partial& partial : partials) {
    outs.push_back(partial.out);
    maxes.push_back(partial.row_max);
    sums.push_back(partial.row_sum);
  }
  auto* dst = static_cast<std::uint8_t*>(tile.queries->out) + tile.token_begin * dst_stride() * ops_.act_bytes;
  const auto status = ops_.attention_merge(
      {outs.data(), maxes.data(), sums.data(), static_cast<std::int32_t>(partials.size()),
       static_cast<std::int32_t>(n_rows(tile)), shape_.group(), shape_.head_dim, tile.kv_head, dst, dst_stride()});
  ZEROC_CHECK(status == kernels::KernelStatus::kOk, static_cast<int>(status));
}

void AttentionWorkspace::Run(int layer, const AttentionShape& shape, std::span<const AttentionQueries> queries) {
  layer_ = layer;
  shape_ = shape;
  MakeTiles(queries);
  MakeParts();
  OrderParts();

  // Split tiles keep their parts apart until all are there; a whole tile is merged by the thread that made it.
  std::vector<std::size_t> partial_begin(parts_.size(), 0);
  std::size_t n_partial = 0;
  std::vector<std::size_t> split_tiles;
  for (std::size_t t = 0; t < tiles_.size(); ++t) {
    const Tile& tile = tiles_[t];
    if (tile.n_parts == 1) continue;
    split_tiles.push_back(t);
    for (std::size_t p = 0; p < tile.n_parts; ++p, n_partial += PartialFloats(tile))
      partial_begin[tile.first_part + p] = n_partial;
  }
  if (partials_.size() < n_partial) partials_.resize(n_partial);

  threads_.ParallelFor(order_.size(), [&](std::size_t item, int thread_idx) {
    const Part& part = parts_[order_[item]];
    const Tile& tile = tiles_[part.tile];
    if (tile.n_parts > 1) return RunPart(part, partials_.data() + partial_begin[order_[item]], thread_idx);
    auto& local = local_[static_cast<std::size_t>(thread_idx)];
    if (local.size() < PartialFloats(tile)) local.resize(PartialFloats(tile));
    RunPart(part, local.data(), thread_idx);
    const Partial whole = PartialAt(tile, local.data());
    Merge(tile, {&whole, 1});
  });
  threads_.ParallelFor(split_tiles.size(), [&](std::size_t item, int) {
    const Tile& tile = tiles_[split_tiles[item]];
    std::vector<Partial> partials;
    for (std::size_t p = 0; p < tile.n_parts; ++p) {
      partials.push_back(PartialAt(tile, partials_.data() + partial_begin[tile.first_part + p]));
    }
    Merge(tile, partials);
  });
}

// --- in passes ---

void AttentionWorkspace::Begin(int layer, const AttentionShape& shape, std::span<const AttentionQueries> queries) {
  layer_ = layer;
  shape_ = shape;
  queries_ = queries;
  MakeTiles(queries);
  n_passes_ = 0;
  of_tile_.assign(tiles_.size(), {});
}

void AttentionWorkspace::Pass(std::span<const BlockRange> blocks, KeyForms forms) {
  parts_.clear();
  std::vector<std::size_t> begin;  // [parts] of its partial
  std::size_t n_floats = 0;
  kernels::KvSegment segments[KvFormat::kMaxSegments];
  int n_segments = 0;
  for (std::size_t t = 0; t < tiles_.size(); ++t) {
    const Tile& tile = tiles_[t];
    if (tile.kv_head == 0) n_segments = SegmentsOf(tile, segments);
    const KvFormat& format = tile.queries->kv->format();
    Part part{t, {}, 0, 0};
    for (const kernels::KvSegment& segment : std::span(segments).first(static_cast<std::size_t>(n_segments))) {
      if (forms != KeyForms::kAll && (forms == KeyForms::kLasting) != IsLasting(format, layer_, segment)) continue;
      for (const BlockRange& range : blocks) {
        const kernels::KvSegment slice = Within(segment, range);
        if (slice.n_blocks == 0) continue;
        part.segments[part.n_segments++] = slice;
        part.cost += SegmentBytes(slice) * n_rows(tile);
      }
    }
    if (part.n_segments == 0) continue;
    parts_.push_back(part);
    begin.push_back(n_floats);
    n_floats += PartialFloats(tile);
  }
  if (passes_.size() == n_passes_) passes_.emplace_back();
  std::vector<float>& partials = passes_[n_passes_++];
  if (partials.size() < n_floats) partials.resize(n_floats);
  OrderParts();
  threads_.ParallelFor(order_.size(), [&](std::size_t item, int thread_idx) {
    RunPart(parts_[order_[item]], partials.data() + begin[order_[item]], thread_idx);
  });
  for (std::size_t p = 0; p < parts_.size(); ++p) {
    of_tile_[parts_[p].tile].push_back(PartialAt(tiles_[parts_[p].tile], partials.data() + begin[p]));
  }
}

void AttentionWorkspace::End(std::span<const OutsideAttention> outside) {
  const std::vector<float> ones(outside.empty() ? 0 : kernels::kAttentionRowsMax, 1.0f);
  threads_.ParallelFor(tiles_.size(), [&](std::size_t t, int) {
    const Tile& tile = tiles_[t];
    if (!outside.empty()) {
      const OutsideAttention& own = outside[static_cast<std::size_t>(tile.queries - queries_.data())];
      const std::int64_t row =
          (std::int64_t{tile.kv_head} * tile.queries->n_tokens + tile.token_begin) * shape_.group();
      of_tile_[t].push_back({own.out + row * shape_.head_dim, own.log_sum + row, ones.data()});
    }
    Merge(tile, of_tile_[t]);
  });
  queries_ = {};
}

void AttentionWorkspace::RunCalls(const AttentionShape& shape, std::span<const AttentionCall> calls) {
  shape_ = shape;
  order_.resize(calls.size());
  std::iota(order_.begin(), order_.end(), std::size_t{0});
  std::stable_sort(order_.begin(), order_.end(),
                   [&](std::size_t a, std::size_t b) { return calls[a].cost > calls[b].cost; });
  threads_.ParallelFor(order_.size(), [&](std::size_t item, int thread_idx) {
    kernels::AttentionArgs args = calls[order_[item]].args;
    args.scratch = Scratch(args.n_rows, thread_idx);
    const auto status = ops_.attention(args);
    ZEROC_CHECK(status == kernels::KernelStatus::kOk, static_cast<int>(status));
  });
}

}  // namespace zeroc
