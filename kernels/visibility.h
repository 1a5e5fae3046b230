// Which tokens of a segment a query sees: the rule of KvSegment (ops.h), once for every backend. Pure; any thread.
#pragma once

#include <algorithm>
#include <cstdint>

namespace zeroc::kernels {

// Tokens [begin, end) as indices from the start of a segment's first block.
struct TokenSpan {
  std::int32_t begin;
  std::int32_t end;
};

// The fields of a KvSegment that decide.
struct SegmentWindow {
  std::int32_t n_blocks, block_tokens;
  std::int32_t first_pos, begin_pos, end_pos;
  std::int32_t min_age, max_age;
};

// The window, cut to its blocks.
constexpr TokenSpan SpanOf(const SegmentWindow& window) {
  const std::int64_t n_tokens = std::int64_t{window.n_blocks} * window.block_tokens;
  const std::int64_t begin = std::int64_t{window.begin_pos} - window.first_pos;
  const std::int64_t end = std::int64_t{window.end_pos} - window.first_pos;
  return {static_cast<std::int32_t>(std::clamp<std::int64_t>(begin, 0, n_tokens)),
          static_cast<std::int32_t>(std::clamp<std::int64_t>(end, 0, n_tokens))};
}

// The same with the ages and the causal limit of a query. Empty spans have begin == end; neither end ever moves back
// from one position to the next.
constexpr TokenSpan SpanOfQuery(const SegmentWindow& window, std::int64_t query_pos) {
  const TokenSpan span = SpanOf(window);
  const std::int64_t n = window.block_tokens;
  const std::int64_t query = query_pos - window.first_pos;
  // Block b ends at token (b + 1) n - 1, so its age is query + 1 - (b + 1) n.
  const std::int64_t n_old = std::max<std::int64_t>(0, query + 1 - window.min_age) / n;
  const std::int64_t n_too_old = std::max<std::int64_t>(0, query - window.max_age + n) / n - 1;
  const std::int64_t begin = std::clamp<std::int64_t>(n_too_old * n, span.begin, std::max(span.begin, span.end));
  const std::int64_t end = std::min(std::min(query + 1, n_old * n), std::int64_t{span.end});
  return {static_cast<std::int32_t>(begin), static_cast<std::int32_t>(std::max(begin, end))};
}

}  // namespace zeroc::kernels
