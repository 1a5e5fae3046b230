// Caches that keep some tokens exactly and drop the rest: H2O and SnapKV.
//
// H2O (arXiv 2306.14048): per KV head, half of the budget for the newest tokens, half for the heavy hitters, the tokens
// with the most attention received so far (column sums over every query, of all heads of the group). The prompt attends
// to everything, then is cut down to the budget; each decoded token evicts one. A 4-byte sum per token is state.
//
// SnapKV (arXiv 2404.14469): behind the prompt, its last 32 queries vote: their attention is summed per token over the
// group, max-pooled over 7 neighbours, and the best tokens stay beside the 32. Decoded tokens are all kept, so its size
// grows with the output.
#pragma once

#include <memory>

#include "libzeroc/baselines/cache_attention.h"

namespace zeroc {

inline constexpr int kSnapKvWindow = 32;  // queries that vote, tokens that always stay
inline constexpr int kSnapKvPool = 7;

// budget: tokens kept per head at any time after the prompt, at least 2.
std::unique_ptr<SequenceAttention> NewH2oCache(const CacheShape& shape, int max_tokens, int budget);
// share: of the prompt's tokens that stay, in (0, 1].
std::unique_ptr<SequenceAttention> NewSnapKvCache(const CacheShape& shape, int max_tokens, double share);

// The last `window` scaled queries of every head, for votes behind the prompt.
class QueryWindow {
 public:
  QueryWindow(std::size_t n_heads, int window, int group, int head_dim)
      : window_(window), row_(static_cast<std::size_t>(group * head_dim)), group_(group), queries_(n_heads) {}

  void Add(std::size_t head_idx, int n_tokens, const float* q);
  // Attention that the kept queries, the last of the prompt, pay to each slot of the store, summed over rows.
  std::vector<float> Votes(std::size_t head_idx, const HeadStore& store) const;

 private:
  int window_;
  std::size_t row_;  // floats per token
  int group_;
  std::vector<std::vector<float>> queries_;
};

// out[i] = max of x[i - width / 2 .. i + width / 2].
std::vector<float> MaxPool(std::span<const float> x, int width);

// Indices of the n largest values, ascending; ties go to the smaller index.
std::vector<int> LargestIndices(std::span<const float> values, int n);

}  // namespace zeroc
