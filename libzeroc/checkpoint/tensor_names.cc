#include "libzeroc/checkpoint/tensor_names.h"

namespace zeroc {
namespace {

bool IsOpt(const Checkpoint& checkpoint) { return checkpoint.config().architecture == "OPTForCausalLM"; }

// Files written from the bare decoder, as the first ones were, leave out the outer name.
std::string OptPrefix(const Checkpoint& checkpoint) {
  return checkpoint.Has("decoder.embed_tokens.weight") ? "decoder." : "model.decoder.";
}

}  // namespace

ModelTensorNames TensorNamesOf(const Checkpoint& checkpoint) {
  if (!IsOpt(checkpoint)) return {"model.embed_tokens", "", "model.norm", "lm_head"};
  const std::string prefix = OptPrefix(checkpoint);
  return {prefix + "embed_tokens", prefix + "embed_positions", prefix + "final_layer_norm", "lm_head"};
}

LayerTensorNames LayerTensorNamesOf(const Checkpoint& checkpoint, int layer) {
  const bool opt = IsOpt(checkpoint);
  const std::string prefix = (opt ? OptPrefix(checkpoint) : "model.") + "layers." + std::to_string(layer) + ".";
  const std::string attention = prefix + "self_attn.";
  LayerTensorNames names;
  names.q = attention + "q_proj";
  names.k = attention + "k_proj";
  names.v = attention + "v_proj";
  if (opt) {
    names.attention_norm = prefix + "self_attn_layer_norm";
    names.o = attention + "out_proj";
    names.mlp_norm = prefix + "final_layer_norm";
    names.up = prefix + "fc1";
    names.down = prefix + "fc2";
    return names;
  }
  names.attention_norm = prefix + "input_layernorm";
  names.o = attention + "o_proj";
  names.q_norm = attention + "q_norm";
  names.k_norm = attention + "k_norm";
  names.mlp_norm = prefix + "post_attention_layernorm";
  names.gate = prefix + "mlp.gate_proj";
  names.up = prefix + "mlp.up_proj";
  names.down = prefix + "mlp.down_proj";
  return names;
}

Result<TensorView> OutputWeight(const Checkpoint& checkpoint, int layer) {
  const ModelConfig& c = checkpoint.config();
  return checkpoint.Tensor(LayerTensorNamesOf(checkpoint, layer).o + ".weight",
                           {c.hidden_size, c.n_heads * c.head_dim});
}

}  // namespace zeroc
