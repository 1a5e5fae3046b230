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

struct AttentionShape {
  int n_heads, n_kv_heads, head_dim;
  int group() const { return n_heads / n_kv_heads; }
};

// Keys by how long they keep their form: the oldest tier (everything, where nothing is packed), or what precedes it.
enum class KeyForms : std::uint8_t { kAll, kWindow, kLasting };

// Whether a segment of SequenceKv::Segments is of the lasting ones.
bool IsLasting(const KvFormat& format, int layer, const kernels::KvSegment& segment);

// Attention of some rows that was computed elsewhere, over keys that no pass has: normalised, with the logarithm of its
// softmax sum (-inf where a row saw nothing). For the queries of the same index, in the order of their q.
struct OutsideAttention {
  const float* out;      // [n_kv_heads, n_tokens, group, head_dim]
  const float* log_sum;  // [n_kv_heads, n_tokens, group]
};

// One call of the attention op.
struct AttentionCall {
  kernels::AttentionArgs args;  // scratch is the workspace's
  std::int64_t cost;            // of any unit; larger calls start first
};

class AttentionWorkspace {
 public:
  AttentionWorkspace(const kernels::Ops& ops, ThreadPool& threads);

  void Run(int layer, const AttentionShape& shape, std::span<const AttentionQueries> queries);

  // The same over parts of the keys, which need not be there all at once: Begin, passes over disjoint parts, End, which
  // merges them in the order of the passes. `queries` stays valid until End.
  void Begin(int layer, const AttentionShape& shape, std::span<const AttentionQueries> queries);
  void Pass(std::span<const BlockRange> blocks, KeyForms forms);
  void End(std::span<const OutsideAttention> outside = {});

  // Calls of the caller's own making, over the threads.
  void RunCalls(const AttentionShape& shape, std::span<const AttentionCall> calls);

 private:
  struct Tile {
    const AttentionQueries* queries;
    int kv_head;
    int token_begin, n_tokens;  // within queries
    std::size_t first_part, n_parts;
  };
  struct Part {
    std::size_t tile;
    kernels::KvSegment segments[2 * KvFormat::kMaxSegments];  // of a rank's two chunks
    int n_segments;
    std::int64_t cost;  // rows * bytes
  };
  // What one op call leaves: [n_rows, head_dim], [n_rows], [n_rows].
  struct Partial {
    const float *out, *row_max, *row_sum;
  };

  std::int64_t n_rows(const Tile& tile) const { return std::int64_t{tile.n_tokens} * shape_.group(); }
  std::int64_t dst_stride() const { return std::int64_t{shape_.n_heads} * shape_.head_dim; }
  std::size_t PartialFloats(const Tile& tile) const {
    return static_cast<std::size_t>(n_rows(tile) * (shape_.head_dim + 2));
  }
  Partial PartialAt(const Tile& tile, const float* at) const {
    return {at, at + n_rows(tile) * shape_.head_dim, at + n_rows(tile) * (shape_.head_dim + 1)};
  }
  void MakeTiles(std::span<const AttentionQueries> queries);
  int SegmentsOf(const Tile& tile, kernels::KvSegment out[KvFormat::kMaxSegments]) const;
  void MakeParts();
  void AddParts(std::size_t tile_idx, std::span<const kernels::KvSegment> segments, int n_parts);
  void OrderParts();
  void RunPart(const Part& part, float* out, int thread_idx);
  void* Scratch(int n_rows, int thread_idx);
  void Merge(const Tile& tile, std::span<const Partial> partials);

  const kernels::Ops& ops_;
  ThreadPool& threads_;
  int layer_ = 0;
  AttentionShape shape_{};
  std::vector<Tile> tiles_;
  std::vector<Part> parts_;
  std::vector<std::size_t> order_;             // parts, largest first
  std::vector<float> partials_;                // of split tiles
  std::span<const AttentionQueries> queries_;  // between Begin and End
  std::vector<std::vector<float>> passes_;     // partials of every pass; only the first n_passes_ count
  std::size_t n_passes_ = 0;
  std::vector<std::vector<Partial>> of_tile_;    // [tiles] of the passes that had something for it
  std::vector<std::vector<float>> local_;        // [threads] result of an unsplit tile
  std::vector<std::vector<std::byte>> scratch_;  // [threads], 64 bytes longer than needed, for alignment
};

}  // namespace zeroc
