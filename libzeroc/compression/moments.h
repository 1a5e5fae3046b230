// Second moments of keys, queries and values over calibration text.
//
// Per layer and KV head: C_k = E[k k^T], C_q = sum over the group's query heads of E[q q^T] (both after RoPE and after
// QK-norm), C_v = E[v v^T]. Float64 sums of float32 products over slices of 256 rows. Calls for different layers may
// run at the same time; calls for one layer may not.
#pragma once

#include <cstdint>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/compression/basis.h"
#include "libzeroc/compression/profile.h"

namespace zeroc {

// Element i of query head h = g * group + j at token t lies at data[t * token_stride + g * kv_head_stride
// + j * head_dim + i]. Plain rows [n_tokens, n_heads * head_dim]: token_stride = n_heads * head_dim and
// kv_head_stride = group * head_dim. Keys and values have group = 1.
struct HeadRows {
  const float* data = nullptr;
  std::int64_t token_stride = 0;
  std::int64_t kv_head_stride = 0;
};

class MomentAccumulator {
 public:
  // The first skip_tokens positions of every sequence are left out: attention sinks have far larger norms than other
  // tokens, are kept exact anyway, and would bend the basis towards themselves.
  MomentAccumulator(const ModelGeometry& geometry, int skip_tokens = kernels::kSinkTokens);

  // Adds tokens first_pos .. first_pos + n_tokens - 1 of one sequence. q and k after RoPE.
  void Add(int layer, int first_pos, int n_tokens, const HeadRows& q, const HeadRows& k, const HeadRows& v);

  const ModelGeometry& geometry() const { return geometry_; }
  int skip_tokens() const { return skip_tokens_; }
  std::int64_t n_tokens(int layer) const { return layers_[static_cast<std::size_t>(layer)].n_tokens; }

  // Values are averages; NaN and infinity pass through and are refused by SolveBalancedBasis. Without a token: zeros.
  SecondMoment Queries(int layer, int kv_head) const;
  SecondMoment Keys(int layer, int kv_head) const;
  SecondMoment Values(int layer, int kv_head) const;

 private:
  struct Layer {
    std::int64_t n_tokens = 0;
    std::vector<double> q, k, v;  // [n_kv_heads, head_dim, head_dim] sums, lower triangle
  };
  SecondMoment Average(const std::vector<double>& sums, std::int64_t n_tokens, int kv_head) const;

  ModelGeometry geometry_;
  int skip_tokens_;
  std::vector<Layer> layers_;
};

}  // namespace zeroc
