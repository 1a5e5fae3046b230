#include "tools/zeroc/model_cost.h"

namespace zeroc {
namespace {

constexpr double kWeightBytes = 2;  // bf16

// Tokens that the queries at positions [first, end) see, summed: each sees itself and all before.
double TokensSeen(double first, double end) { return (end - first) * (first + end + 1) / 2; }

}  // namespace

PassCost CostOfPass(const ModelConfig& config, std::int64_t n_past, std::int64_t n_new, std::int64_t n_logits) {
  const auto hidden = static_cast<double>(config.hidden_size);
  const auto q_width = static_cast<double>(config.n_heads * config.head_dim);
  const auto kv_width = static_cast<double>(config.n_kv_heads * config.head_dim);
  const double kv_weights = 2 * hidden * kv_width;
  const double mlp_matrices = config.mlp == MlpKind::kSwiGlu ? 3 : 2;
  const double other_weights =
      2 * hidden * q_width + mlp_matrices * hidden * static_cast<double>(config.intermediate_size);
  const double head_weights = hidden * static_cast<double>(config.vocab_size);
  const auto n_full = static_cast<double>(config.n_layers - 1);  // layers that compute everything for every token
  const auto rows = static_cast<double>(n_new);
  const auto logit_rows = static_cast<double>(n_logits);
  const double end = static_cast<double>(n_past) + rows;
  const double attention_per_token_seen = 4 * q_width;  // q.k and p.v

  PassCost cost;
  cost.flops = 2 * (n_full + 1) * rows * kv_weights + 2 * (n_full * rows + logit_rows) * other_weights +
               2 * logit_rows * head_weights +
               attention_per_token_seen *
                   (n_full * TokensSeen(static_cast<double>(n_past), end) + TokensSeen(end - logit_rows, end));
  cost.bytes = kWeightBytes * ((n_full + 1) * kv_weights + n_full * other_weights);
  if (n_logits > 0) cost.bytes += kWeightBytes * (other_weights + head_weights);
  return cost;
}

}  // namespace zeroc
