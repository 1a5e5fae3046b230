// The weights of a model as kernels take them: bf16, row-major, views into the checkpoint's memory map.
// A tensor that the checkpoint keeps in another dtype, or that a plan folds, is the only kind that is copied.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/ops.h"
#include "libzeroc/base/status.h"
#include "libzeroc/checkpoint/checkpoint.h"
#include "libzeroc/compression/plan.h"

namespace zeroc {

// Either a view (owned is empty) or a copy.
struct Weight {
  const kernels::Bf16* data = nullptr;
  std::vector<kernels::Bf16> owned;
};

struct NormWeights {
  Weight gain;              // [hidden]
  std::vector<float> bias;  // [hidden] of a layer norm, empty for an RMS norm
};

// y = w x + b.
struct LinearWeights {
  Weight w;              // [n_out, n_in]
  std::vector<float> b;  // [n_out], empty without a bias
};

struct LayerWeights {
  NormWeights attention_norm;
  LinearWeights q;        // n_out = n_heads * head_dim
  LinearWeights k, v;     // n_out = n_kv_heads * head_dim
  LinearWeights o;        // n_in = n_heads * head_dim
  Weight q_norm, k_norm;  // [head_dim]; no data without QK-norm
  NormWeights mlp_norm;
  LinearWeights gate;  // SwiGLU only
  LinearWeights up, down;
};

struct TransformerWeights {
  // Learned positions begin with two rows that nobody's position is.
  static constexpr int kFirstPositionRow = 2;

  Weight embedding;  // [vocab, hidden]
  Weight positions;  // [kFirstPositionRow + max_positions, hidden]; no data for models with RoPE
  std::vector<LayerWeights> layers;
  NormWeights final_norm;
  LinearWeights lm_head;  // n_out = vocab; its w is the embedding when tied

  // kNotFound / kInvalidArgument naming the tensor. plan may be null; with one, values and outputs are folded, and
  // queries and keys too where there is no RoPE between them and their maps.
  static Result<TransformerWeights> Load(const Checkpoint& checkpoint, const Plan* plan);
};

}  // namespace zeroc
