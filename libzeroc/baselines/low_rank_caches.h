// Caches that keep fewer coordinates: Palu and the first form of ZeroC, with the statistics that their bases come from.
//
// Palu (ICLR 2025, arXiv 2407.21118): W_k and W_v are factored jointly over groups of up to 4 KV heads; the low-rank
// part of every token is cached, keys are rebuilt and then rotated. Its whitened SVD is the projection onto the leading
// eigenvectors of the second moment of the group's keys before RoPE (and of its values): the best rank-r approximation
// of W X is U_r U_r^T W X, with U_r the left singular vectors of W X. The factored weights act on the prompt, too.
// Half the size and above: 16-bit latents. Below: quantised latents, as in its second part, rotated so that no
// coordinate stands out (a random rotation for its Hadamard, whose sizes do not fit every rank), one scale and zero
// point per token and group; 4 bits as long as half the rank remains, then 3, then 2.
//
// ZeroC, first form (arXiv 2408.04107 with its public code): per KV head an orthogonal R from the SVD of the stacked
// [Q; K] after RoPE (the queries of all heads of the group, so that they share one cached key) and one from [V; W_O];
// the trailing coordinates are dropped. Two token tiers: the 30 % of the prompt's tokens with the least attention keep
// half the coordinates. The public code ranks tokens by row means of raw scores, which say how a token looks at others;
// the attention that the prompt's last 32 queries pay (column sums) is used instead, found in the first layer and
// reused by all. Its code selects no ratios: every layer has the same.
//
// Palu's ranks are uniform, one of its three rules. Its Fisher rule (a share in proportion to the root of the mean
// squared gradient) did worse on the demo model (docs/baselines.md).

#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "libzeroc/baselines/cache_attention.h"

namespace zeroc {

inline constexpr int kPaluHeadGroup = 4;
inline constexpr double kColdShare = 0.3;  // zeroc-paper: tokens in the lower tier, which keeps half the coordinates

// Uncentred second moments over calibration text, float64 sums, every token counted.
struct LayerStatistics {
  std::int64_t n_tokens = 0;
  std::vector<double> k_before_rope, v;  // [kv_width, kv_width]
  std::vector<double> q, k;              // [n_kv_heads, head_dim, head_dim] after RoPE; q summed over the group
};

// Feeds every window (ids, BOS included) through the model with exact attention. kInvalidArgument without a window.
Result<std::vector<LayerStatistics>> GatherStatistics(Transformer& model,
                                                      std::span<const std::vector<std::int32_t>> windows,
                                                      const std::function<bool(double)>& progress = nullptr);

// A projection onto the span of `rank` orthonormal columns, basis [dim, rank] row-major.
struct Projection {
  int dim = 0, rank = 0;
  std::vector<float> basis;
  // c = basis^T x in the precision of a cache; x = basis c. Only the first n_kept coordinates when n_kept < rank.
  void ApplyExact(float* x, int n_kept, int exact_bytes) const;
  // The same with c in affine codes of `bits` bits, one scale and zero for all.
  void ApplyCodes(float* x, int bits) const;

 private:
  std::vector<float> Coordinates(const float* x, int n_kept) const;
  void Rebuild(std::span<const float> c, float* x) const;
};

// Leading eigenvectors of a symmetric matrix [dim, dim], largest first, 1 <= rank <= dim. kDataLoss on NaN.
Result<Projection> LeadingEigenvectors(const std::vector<double>& matrix, int dim, int rank);

struct PaluBases {
  int group = 0;                 // KV heads per factorisation
  int code_bits = 0;             // of a latent number; 0: exact
  std::vector<Projection> k, v;  // [n_layers, n_kv_heads / group]
};
// kv_bits per element of a 16-bit cache (twice that beside the float32 reference).
Result<PaluBases> SolvePalu(const CacheShape& shape, std::span<const LayerStatistics> statistics, double kv_bits);

struct PaperBases {
  std::vector<Projection> k, v;  // [n_layers * n_kv_heads]; rank: the important tokens' coordinates
};
inline int ColdRank(int rank) { return rank > 1 ? rank / 2 : 1; }
// Ranks such that a prompt of which kColdShare is cold costs kv_bits per element.
Result<PaperBases> SolvePaper(const Transformer& model, const CacheShape& shape,
                              std::span<const LayerStatistics> statistics, double kv_bits);

std::unique_ptr<SequenceAttention> NewPaluCache(const CacheShape& shape, int max_tokens,
                                                std::shared_ptr<const PaluBases> bases);
std::unique_ptr<SequenceAttention> NewPaperCache(const CacheShape& shape, int max_tokens,
                                                 std::shared_ptr<const PaperBases> bases);

}  // namespace zeroc
