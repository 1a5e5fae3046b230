// What the families call their tensors. Pure functions, any thread.
#pragma once

#include <string>

#include "libzeroc/base/status.h"
#include "libzeroc/checkpoint/checkpoint.h"

namespace zeroc {

// Without ".weight" and ".bias".
struct ModelTensorNames {
  std::string embedding;
  std::string positions;  // learned positions only
  std::string final_norm;
  std::string lm_head;
};

struct LayerTensorNames {
  std::string attention_norm, q, k, v, o;
  std::string q_norm, k_norm;  // QK-norm only
  std::string mlp_norm;
  std::string gate;  // SwiGLU only
  std::string up, down;
};

ModelTensorNames TensorNamesOf(const Checkpoint& checkpoint);
LayerTensorNames LayerTensorNamesOf(const Checkpoint& checkpoint, int layer);

// W_O of one layer, [hidden_size, n_heads * head_dim]. Errors as Checkpoint::Tensor.
Result<TensorView> OutputWeight(const Checkpoint& checkpoint, int layer);

}  // namespace zeroc
