// Arithmetic and memory traffic of forward passes, counted from the model's shape: the numerators of `zeroc bench`.
// Pure functions. A multiply-add is two floating-point operations. Norms, RoPE and softmax are not counted.
#pragma once

#include <cstdint>

#include "libzeroc/checkpoint/model_config.h"

namespace zeroc {

struct PassCost {
  double flops = 0;
  double bytes = 0;  // weights, once per pass; the caller adds the KV that the pass reads
};

// One pass over n_new tokens behind n_past others, with logits for the last n_logits. The last layer computes keys and
// values for all tokens, and the rest only for those with logits, as the engine does.
PassCost CostOfPass(const ModelConfig& config, std::int64_t n_past, std::int64_t n_new, std::int64_t n_logits);

}  // namespace zeroc
