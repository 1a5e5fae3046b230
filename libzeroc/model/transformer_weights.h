// The weights of a Llama-family model as kernels take them: bf16, row-major, views into the checkpoint's memory map.
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

struct LayerWeights {
  Weight attention_norm;                  // [hidden]
  Weight w_q;                             // [n_heads * head_dim, hidden]
  Weight w_k, w_v;                        // [n_kv_heads * head_dim, hidden]
  Weight w_o;                             // [hidden, n_heads * head_dim]
  std::vector<float> b_q, b_k, b_v, b_o;  // empty without biases
  Weight mlp_norm;                        // [hidden]
  Weight w_gate, w_up;                    // [intermediate, hidden]
  Weight w_down;                          // [hidden, intermediate]
};

struct TransformerWeights {
  Weight embedding;  // [vocab, hidden]
  std::vector<LayerWeights> layers;
  Weight final_norm;  // [hidden]
  Weight lm_head;     // [vocab, hidden]; the embedding when tied

  // kNotFound / kInvalidArgument naming the tensor. plan may be null; with one, values and outputs are folded.
  static Result<TransformerWeights> Load(const Checkpoint& checkpoint, const Plan* plan);
};

}  // namespace zeroc
