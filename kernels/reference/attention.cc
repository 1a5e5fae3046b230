#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/bf16.h"
#include "kernels/checks.h"
#include "kernels/reference/reference.h"
#include "kernels/tile_codec.h"

namespace zeroc::kernels::reference {
namespace {

float Dot(const float* a, const float* b, int n) {
  float sums[16] = {};
  for (int i = 0; i < n; i += 16) {  // head_dim is a multiple of 16
    for (int j = 0; j < 16; ++j) sums[j] += a[i + j] * b[i + j];
  }
  float total = 0.0f;
  for (float sum : sums) total += sum;
  return total;
}

// What the mass correction adds to every score of `token`.
float MassOf(const KvSegment& segment, int kv_head, const std::uint8_t* head, int token) {
  if (segment.mass == nullptr) return 0.0f;
  const float* mass = segment.mass + std::int64_t{kv_head} * (1 + kMaxRuns);
  float sum = mass[0];
  for (int r = 0; r < segment.layout->k.n_runs; ++r) {
    if (!IsQuantised(segment.layout->k.runs[r].bits)) continue;
    const float half = HalfOf(segment.layout->k, r, head, token);
    sum += mass[1 + r] * half * half;
  }
  return sum;
}

// Calls fn(row, key, mass, value) for every visible (row, token) pair, token by token.
template <typename Fn>
void ForEachVisible(const AttentionArgs& args, bool with_values, const Fn& fn) {
  float key[kMaxHeadDim];
  float value[kMaxHeadDim];
  for (int i = 0; i < args.n_segments; ++i) {
    const KvSegment& segment = args.segments[i];
    const KvBlockLayout& layout = *segment.layout;
    const TokenSpan seen = RowsSpan(args, segment);
    for (int token = seen.begin; token < seen.end; ++token) {
      const std::uint8_t* head =
          segment.blocks[token / layout.n_tokens] + std::int64_t{args.kv_head} * layout.head_bytes;
      const int in_block = token % layout.n_tokens;
      DecodeKeyRow(layout, head, in_block, key);
      if (with_values) DecodeValueRow(layout, head, in_block, value);
      const float mass = MassOf(segment, args.kv_head, head, in_block);
      for (int r = 0; r < args.n_rows; ++r) {
        const TokenSpan span = RowSpan(args, segment, r);
        if (span.begin <= token && token < span.end) fn(r, key, mass, value);
      }
    }
  }
}

}  // namespace

// Two passes: first the largest score of each row, then the plain softmax sums.
KernelStatus Attention(const AttentionArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  const int d = args.head_dim;
  std::fill_n(args.row_max, args.n_rows, -std::numeric_limits<float>::infinity());
  std::fill_n(args.row_sum, args.n_rows, 0.0f);
  std::fill_n(args.out, std::int64_t{args.n_rows} * d, 0.0f);
  ForEachVisible(args, false, [&](int r, const float* key, float mass, const float*) {
    const float score = Dot(args.q + std::int64_t{r} * d, key, d) + mass;
    args.row_max[r] = std::isnan(score) ? score : std::max(args.row_max[r], score);
  });
  double sums[kAttentionRowsMax] = {};
  ForEachVisible(args, true, [&](int r, const float* key, float mass, const float* value) {
    const float p = std::exp(Dot(args.q + std::int64_t{r} * d, key, d) + mass - args.row_max[r]);
    sums[r] += double{p};
    float* out = args.out + std::int64_t{r} * d;
    for (int i = 0; i < d; ++i) out[i] += p * value[i];
  });
  for (int r = 0; r < args.n_rows; ++r) args.row_sum[r] = static_cast<float>(sums[r]);
  return KernelStatus::kOk;
}

KernelStatus AttentionMerge(const AttentionMergeArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  auto* dst = static_cast<float*>(args.dst);
  const std::int64_t d = args.head_dim;
  for (std::int64_t r = 0; r < args.n_rows; ++r) {
    float top = -std::numeric_limits<float>::infinity();
    for (int p = 0; p < args.n_parts; ++p) top = std::max(top, args.row_max[p][r]);
    float* row = dst + r / args.group * args.dst_stride + (args.kv_head * args.group + r % args.group) * d;
    std::fill_n(row, d, 0.0f);
    float sum = 0.0f;
    for (int p = 0; p < args.n_parts; ++p) {
      // A part whose row saw nothing has max -inf and weighs nothing; exp(-inf - -inf) would be NaN.
      if (args.row_max[p][r] == -std::numeric_limits<float>::infinity()) continue;
      const float weight = std::exp(args.row_max[p][r] - top);
      sum += weight * args.row_sum[p][r];
      for (std::int64_t i = 0; i < d; ++i) row[i] += weight * args.out[p][r * d + i];
    }
    for (std::int64_t i = 0; i < d; ++i) row[i] = sum == 0.0f ? 0.0f : row[i] / sum;
  }
  return KernelStatus::kOk;
}

}  // namespace zeroc::kernels::reference
