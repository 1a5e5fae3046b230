#include "libzeroc/model/transformer_weights.h"

#include <string>

#include "kernels/bf16.h"
#include "libzeroc/checkpoint/tensor_values.h"
#include "libzeroc/compression/fold.h"

namespace zeroc {
namespace {

using kernels::Bf16;

Result<std::vector<float>> ToFloats(const TensorView& tensor, const std::string& name) {
  if (!IsWeightType(tensor.dtype)) {
    return Unimplemented("tensor " + name + ": dtype " + std::string(DTypeName(tensor.dtype)) +
                         " is not a weight type (BF16, F16 or F32)");
  }
  std::vector<float> out(tensor.bytes / DTypeBytes(tensor.dtype));
  ReadFloats(tensor, 0, static_cast<std::int64_t>(out.size()), out.data());
  return out;
}

class Loader {
 public:
  explicit Loader(const Checkpoint& checkpoint) : checkpoint_(checkpoint) {}

  Result<Weight> Load(const std::string& name, std::initializer_list<std::int64_t> shape) const {
    ZEROC_ASSIGN_OR_RETURN(const TensorView tensor, checkpoint_.Tensor(name, shape));
    Weight weight;
    if (tensor.dtype == DType::kBf16) {
      weight.data = reinterpret_cast<const Bf16*>(tensor.data);
      return weight;
    }
    ZEROC_ASSIGN_OR_RETURN(const std::vector<float> values, ToFloats(tensor, name));
    weight.owned.reserve(values.size());
    for (const float value : values) weight.owned.push_back(kernels::FloatToBf16(value));
    weight.data = weight.owned.data();
    return weight;
  }

  Result<std::vector<float>> LoadBias(const std::string& name, std::int64_t n) const {
    ZEROC_ASSIGN_OR_RETURN(const TensorView tensor, checkpoint_.Tensor(name, {n}));
    return ToFloats(tensor, name);
  }

 private:
  const Checkpoint& checkpoint_;
};

Weight Own(std::vector<std::uint16_t> values) {
  Weight weight;
  weight.owned = std::move(values);
  weight.data = weight.owned.data();
  return weight;
}

// W_V and W_O in the plan's value coordinates.
Status Fold(const Checkpoint& checkpoint, const Plan& plan, int layer_idx, const std::string& prefix,
            LayerWeights* layer) {
  const ModelConfig& c = checkpoint.config();
  const std::int64_t q_width = c.n_heads * c.head_dim, kv_width = c.n_kv_heads * c.head_dim;
  ZEROC_ASSIGN_OR_RETURN(const TensorView w_v, checkpoint.Tensor(prefix + "v_proj.weight", {kv_width, c.hidden_size}));
  ZEROC_ASSIGN_OR_RETURN(const TensorView w_o, checkpoint.Tensor(prefix + "o_proj.weight", {c.hidden_size, q_width}));
  TensorView v_bias;
  if (c.attention_bias) {
    ZEROC_ASSIGN_OR_RETURN(v_bias, checkpoint.Tensor(prefix + "v_proj.bias", {kv_width}));
  }
  const LayerMaps& maps = plan.layer(layer_idx);
  ZEROC_ASSIGN_OR_RETURN(FoldedValueOutput folded, FoldValueOutput(w_v, w_o, c.attention_bias ? &v_bias : nullptr,
                                                                   GeometryOf(c), maps.m, maps.n));
  layer->w_v = Own(std::move(folded.w_v));
  layer->w_o = Own(std::move(folded.w_o));
  layer->b_v = std::move(folded.v_bias);
  return OkStatus();
}

Result<LayerWeights> LoadLayer(const Checkpoint& checkpoint, const Plan* plan, int layer_idx) {
  const ModelConfig& c = checkpoint.config();
  const Loader loader(checkpoint);
  const std::int64_t q_width = c.n_heads * c.head_dim, kv_width = c.n_kv_heads * c.head_dim;
  const std::string prefix = "model.layers." + std::to_string(layer_idx) + ".";
  const std::string attention = prefix + "self_attn.", mlp = prefix + "mlp.";
  LayerWeights w;
  ZEROC_ASSIGN_OR_RETURN(w.attention_norm, loader.Load(prefix + "input_layernorm.weight", {c.hidden_size}));
  ZEROC_ASSIGN_OR_RETURN(w.mlp_norm, loader.Load(prefix + "post_attention_layernorm.weight", {c.hidden_size}));
  ZEROC_ASSIGN_OR_RETURN(w.w_q, loader.Load(attention + "q_proj.weight", {q_width, c.hidden_size}));
  ZEROC_ASSIGN_OR_RETURN(w.w_k, loader.Load(attention + "k_proj.weight", {kv_width, c.hidden_size}));
  ZEROC_ASSIGN_OR_RETURN(w.w_gate, loader.Load(mlp + "gate_proj.weight", {c.intermediate_size, c.hidden_size}));
  ZEROC_ASSIGN_OR_RETURN(w.w_up, loader.Load(mlp + "up_proj.weight", {c.intermediate_size, c.hidden_size}));
  ZEROC_ASSIGN_OR_RETURN(w.w_down, loader.Load(mlp + "down_proj.weight", {c.hidden_size, c.intermediate_size}));
  if (c.attention_bias) {
    ZEROC_ASSIGN_OR_RETURN(w.b_q, loader.LoadBias(attention + "q_proj.bias", q_width));
    ZEROC_ASSIGN_OR_RETURN(w.b_k, loader.LoadBias(attention + "k_proj.bias", kv_width));
    ZEROC_ASSIGN_OR_RETURN(w.b_o, loader.LoadBias(attention + "o_proj.bias", c.hidden_size));
  }
  if (plan != nullptr) {
    ZEROC_RETURN_IF_ERROR(Fold(checkpoint, *plan, layer_idx, attention, &w));
    return w;
  }
  ZEROC_ASSIGN_OR_RETURN(w.w_v, loader.Load(attention + "v_proj.weight", {kv_width, c.hidden_size}));
  ZEROC_ASSIGN_OR_RETURN(w.w_o, loader.Load(attention + "o_proj.weight", {c.hidden_size, q_width}));
  if (c.attention_bias) {
    ZEROC_ASSIGN_OR_RETURN(w.b_v, loader.LoadBias(attention + "v_proj.bias", kv_width));
  }
  return w;
}

}  // namespace

Result<TransformerWeights> TransformerWeights::Load(const Checkpoint& checkpoint, const Plan* plan) {
  const ModelConfig& c = checkpoint.config();
  if (c.mlp_bias) return Unimplemented(checkpoint.dir() + "/config.json: mlp_bias true is not supported");
  const Loader loader(checkpoint);
  TransformerWeights weights;
  ZEROC_ASSIGN_OR_RETURN(weights.embedding, loader.Load("model.embed_tokens.weight", {c.vocab_size, c.hidden_size}));
  ZEROC_ASSIGN_OR_RETURN(weights.final_norm, loader.Load("model.norm.weight", {c.hidden_size}));
  for (int layer = 0; layer < c.n_layers; ++layer) {
    ZEROC_ASSIGN_OR_RETURN(LayerWeights w, LoadLayer(checkpoint, plan, layer));
    weights.layers.push_back(std::move(w));
  }
  if (c.tie_embeddings) {
    weights.lm_head.data = weights.embedding.data;
  } else {
    ZEROC_ASSIGN_OR_RETURN(weights.lm_head, loader.Load("lm_head.weight", {c.vocab_size, c.hidden_size}));
  }
  return weights;
}

}  // namespace zeroc
