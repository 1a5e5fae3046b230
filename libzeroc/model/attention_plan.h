// Attention of one layer over a batch: a flat list of (sequence, KV head, query tile, block range) items, costed in
// bytes and taken by threads largest first, so that uneven sequences do not idle cores (design section 2).
//
// A tile may cross positions where the set of packed blocks changes (KvSegment's ages). When there are fewer tiles than
// threads can share (decode of few long sequences), a tile's keys are split and the parts merged exactly by
// log-sum-exp. Not thread-safe; owns scratch for every thread of the pool.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/ops.h"
#include "libzeroc/base/thread_pool.h"
#include "libzeroc/kv/sequence_kv.h"

namespace zeroc {

struct AttentionQueries {
  const SequenceKv* kv;  // in a step
  int first_pos;         // of the first query
  int n_tokens;
  const float* q;  // [n_kv_heads, n_tokens, group, head_dim] from query_prep
  void* out;       // act [n_tokens, n_heads * head_dim]
};

class AttentionWorkspace {
 public:
  AttentionWorkspace(const kernels::Ops& ops, ThreadPool& threads);

  void Run(int layer, int n_heads, int n_kv_heads, int head_dim, std::span<const AttentionQueries> queries);

 private:
  struct Tile {
    const AttentionQueries* queries;
    int kv_head;
    int token_begin, n_tokens;  // within queries
    std::size_t first_part, n_parts;
  };
  struct Part {
    std::size_t tile;
    kernels::KvSegment segments[KvFormat::kMaxSegments];
    int n_segments;
    std::int64_t cost;  // rows * bytes
  };

  void MakeTiles(int layer, int group, int n_kv_heads, std::span<const AttentionQueries> queries);
  void AddParts(std::size_t tile_idx, std::span<const kernels::KvSegment> segments, int n_parts);
  void RunPart(const Part& part, float* out, int group, int head_dim, int thread_idx);
  void Merge(const Tile& tile, const float* const* outs, int group, int head_dim, std::int64_t dst_stride);

  const kernels::Ops& ops_;
  ThreadPool& threads_;
  std::vector<Tile> tiles_;
  std::vector<Part> parts_;
  std::vector<std::size_t> order_;               // parts, largest first
  std::vector<float> partials_;                  // of split tiles
  std::vector<std::vector<float>> local_;        // [threads] result of an unsplit tile
  std::vector<std::vector<std::byte>> scratch_;  // [threads], 64 bytes longer than needed, for alignment
};

}  // namespace zeroc
