#include "kernels/checks.h"

#include <algorithm>
#include <cstring>

namespace zeroc::kernels {
namespace {

bool IsHeadDim(int head_dim) { return head_dim >= kTileDepth && head_dim <= kMaxHeadDim && head_dim % kTileDepth == 0; }

bool IsRange(int begin, int end, int size) { return 0 <= begin && begin <= end && end <= size; }

// cos and sin come together, or neither.
bool IsRope(const RopeRows& rope) { return (rope.cos == nullptr) == (rope.sin == nullptr); }

// Runs that cover the head, or none asked for.
bool IsRotation(const KvSideLayout* side, int head_dim) {
  if (side == nullptr) return true;
  int width = 0;
  for (int r = 0; r < side->n_runs; ++r) width += side->runs[r].width;
  return width == head_dim;
}

// One run of 16 or 32 bits on both sides.
bool IsExactLayout(const KvBlockLayout* layout) {
  if (layout == nullptr || layout->k.n_runs != 1 || layout->v.n_runs != 1) return false;
  const int k_bits = layout->k.runs[0].bits;
  const int v_bits = layout->v.runs[0].bits;
  return (k_bits == 16 || k_bits == 32) && (v_bits == 16 || v_bits == 32) && IsHeadDim(layout->head_dim);
}

SegmentWindow WindowOf(const KvSegment& segment) {
  return {segment.n_blocks, segment.layout->n_tokens, segment.first_pos, segment.begin_pos,
          segment.end_pos,  segment.min_age,          segment.max_age};
}

}  // namespace

bool IsGood(const EmbedArgs& a) {
  return a.n_rows >= 0 && a.hidden >= 1 &&
         (a.n_rows == 0 || (a.table != nullptr && a.ids != nullptr && a.out != nullptr));
}

bool IsGood(const RmsNormArgs& a) {
  return a.n_rows >= 0 && a.hidden >= 1 && a.eps >= 0.0f &&
         (a.n_rows == 0 || (a.x != nullptr && a.gain != nullptr && a.out != nullptr));
}

bool IsGood(const LayerNormArgs& a) {
  return a.n_rows >= 0 && a.hidden >= 1 && a.eps >= 0.0f &&
         (a.n_rows == 0 || (a.x != nullptr && a.gain != nullptr && a.bias != nullptr && a.out != nullptr));
}

bool IsGood(const HeadNormArgs& a) {
  return a.n_rows >= 0 && a.n_heads >= 1 && a.head_dim >= 1 && a.stride >= a.n_heads * a.head_dim && a.eps >= 0.0f &&
         (a.n_rows == 0 || (a.x != nullptr && a.gain != nullptr));
}

bool IsGood(const LinearArgs& a) {
  if (a.n_rows < 0 || a.k < 1 || a.n_out < 1 || a.y_stride < a.n_out) return false;
  if (a.out_begin < 0 || a.out_begin > a.out_end || a.out_end > a.n_out) return false;
  return a.n_rows == 0 || (a.x != nullptr && a.w != nullptr && a.y != nullptr);
}

bool IsGood(const SwiGluArgs& a) {
  return a.n_rows >= 0 && a.width >= 1 && a.stride >= a.width &&
         (a.n_rows == 0 || (a.gate != nullptr && a.up != nullptr && a.out != nullptr));
}

bool IsGood(const ReluArgs& a) {
  return a.n_rows >= 0 && a.width >= 1 && a.stride >= a.width &&
         (a.n_rows == 0 || (a.x != nullptr && a.out != nullptr));
}

bool IsGood(const QueryPrepArgs& a) {
  if (a.n_tokens < 0 || !IsHeadDim(a.head_dim) || a.n_kv_heads < 1 || a.n_heads < a.n_kv_heads) return false;
  if (a.n_heads % a.n_kv_heads != 0 || a.q_stride < std::int64_t{a.n_heads} * a.head_dim) return false;
  if (!IsRange(a.kv_head_begin, a.kv_head_end, a.n_kv_heads) || !IsRope(a.rope)) return false;
  if (!IsRotation(a.rotation, a.head_dim)) return false;
  return a.n_tokens == 0 || (a.q != nullptr && a.out != nullptr);
}

bool IsGood(const KvWriteArgs& a) {
  if (!IsExactLayout(a.layout) || a.layout->n_tokens != kBlockTokens || a.n_tokens < 0 || a.first_pos < 0) return false;
  if (a.kv_stride < std::int64_t{a.layout->n_kv_heads} * a.layout->head_dim) return false;
  if (!IsRange(a.kv_head_begin, a.kv_head_end, a.layout->n_kv_heads) || !IsRope(a.rope)) return false;
  if (!IsRotation(a.rotation, a.layout->head_dim)) return false;
  return a.n_tokens == 0 || (a.k != nullptr && a.v != nullptr && a.blocks != nullptr);
}

bool IsGood(const KvPackArgs& a) {
  if (a.source_layout == nullptr || a.packed_layout == nullptr || a.source == nullptr || a.packed == nullptr) {
    return false;
  }
  const KvBlockLayout& from = *a.source_layout;
  const KvBlockLayout& to = *a.packed_layout;
  return from.n_kv_heads == to.n_kv_heads && from.head_dim == to.head_dim && from.n_tokens == kBlockTokens &&
         to.n_tokens <= from.n_tokens && IsRange(a.kv_head_begin, a.kv_head_end, to.n_kv_heads);
}

bool IsGood(const AttentionArgs& a) {
  if (!IsHeadDim(a.head_dim) || a.n_rows < 1 || a.n_rows > kAttentionRowsMax || a.group < 1 || a.kv_head < 0) {
    return false;
  }
  if (a.q == nullptr || a.out == nullptr || a.row_max == nullptr || a.row_sum == nullptr || a.n_segments < 0) {
    return false;
  }
  if (a.first_query_pos < 0 || (a.n_segments > 0 && a.segments == nullptr)) return false;
  for (int i = 0; i < a.n_segments; ++i) {
    const KvSegment& segment = a.segments[i];
    if (segment.n_blocks < 0 || (segment.n_blocks > 0 && segment.blocks == nullptr)) return false;
    if (segment.layout == nullptr || segment.layout->head_dim != a.head_dim) return false;
    if (a.kv_head >= segment.layout->n_kv_heads || segment.first_pos < 0) return false;
  }
  return true;
}

bool IsGood(const AttentionMergeArgs& a) {
  if (!IsHeadDim(a.head_dim) || a.n_parts < 1 || a.n_rows < 0 || a.group < 1 || a.kv_head < 0) return false;
  if (a.n_rows % a.group != 0) return false;
  if (a.dst_stride < (std::int64_t{a.kv_head} + 1) * a.group * a.head_dim && a.n_rows > a.group) return false;
  return a.n_rows == 0 || (a.out != nullptr && a.row_max != nullptr && a.row_sum != nullptr && a.dst != nullptr);
}

KernelStatus CopyHeads(const KvPackArgs& args) {
  const std::int64_t head_bytes = args.packed_layout->head_bytes;
  const std::int64_t begin = args.kv_head_begin * head_bytes;
  std::memcpy(args.packed + begin, args.source + begin,
              static_cast<std::size_t>((args.kv_head_end - args.kv_head_begin) * head_bytes));
  return KernelStatus::kOk;
}

bool HasFloatRuns(const KvBlockLayout& layout) {
  const auto has = [](const KvSideLayout& side) {
    return std::any_of(side.runs, side.runs + side.n_runs, [](const KvRun& run) { return run.bits == 32; });
  };
  return has(layout.k) || has(layout.v);
}

TokenSpan SegmentSpan(const KvSegment& segment) { return SpanOf(WindowOf(segment)); }

TokenSpan RowSpan(const AttentionArgs& args, const KvSegment& segment, int row) {
  return SpanOfQuery(WindowOf(segment), std::int64_t{args.first_query_pos} + row / args.group);
}

TokenSpan RowsSpan(const AttentionArgs& args, const KvSegment& segment) {
  return {RowSpan(args, segment, 0).begin, RowSpan(args, segment, args.n_rows - 1).end};
}

}  // namespace zeroc::kernels
