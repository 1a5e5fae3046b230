#include "libzeroc/model/transformer_weights.h"

#include <string>

#include "kernels/bf16.h"
#include "libzeroc/checkpoint/tensor_names.h"
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

Weight Own(std::vector<std::uint16_t> values) {
  Weight weight;
  weight.owned = std::move(values);
  weight.data = weight.owned.data();
  return weight;
}

class Loader {
 public:
  explicit Loader(const Checkpoint& checkpoint) : checkpoint_(checkpoint), config_(checkpoint.config()) {}

  // `name` without ".weight", as all names below.
  Result<Weight> Load(const std::string& name, std::initializer_list<std::int64_t> shape) const {
    ZEROC_ASSIGN_OR_RETURN(const TensorView tensor, checkpoint_.Tensor(name + ".weight", shape));
    Weight weight;
    if (tensor.dtype == DType::kBf16) {
      weight.data = reinterpret_cast<const Bf16*>(tensor.data);
      return weight;
    }
    ZEROC_ASSIGN_OR_RETURN(const std::vector<float> values, ToFloats(tensor, name + ".weight"));
    std::vector<std::uint16_t> rounded;
    rounded.reserve(values.size());
    for (const float value : values) rounded.push_back(kernels::FloatToBf16(value));
    return Own(std::move(rounded));
  }

  Result<LinearWeights> LoadLinear(const std::string& name, std::int64_t n_out, std::int64_t n_in, bool bias) const {
    LinearWeights out;
    ZEROC_ASSIGN_OR_RETURN(out.w, Load(name, {n_out, n_in}));
    if (bias) {
      ZEROC_ASSIGN_OR_RETURN(out.b, LoadBias(name, n_out));
    }
    return out;
  }

  Result<NormWeights> LoadNorm(const std::string& name) const {
    NormWeights out;
    ZEROC_ASSIGN_OR_RETURN(out.gain, Load(name, {config_.hidden_size}));
    if (config_.norm == NormKind::kLayer) {
      ZEROC_ASSIGN_OR_RETURN(out.bias, LoadBias(name, config_.hidden_size));
    }
    return out;
  }

  Result<LayerWeights> LoadLayer(const Plan* plan, int layer_idx) const;

 private:
  Result<std::vector<float>> LoadBias(const std::string& name, std::int64_t n) const {
    ZEROC_ASSIGN_OR_RETURN(const TensorView tensor, checkpoint_.Tensor(name + ".bias", {n}));
    return ToFloats(tensor, name + ".bias");
  }

  Result<LinearWeights> FoldedHeadsOf(const std::string& name, int n_heads, std::span<const float> maps) const;
  Status FoldValues(const LayerTensorNames& names, const LayerMaps& maps, LayerWeights* layer) const;

  std::int64_t q_width() const { return config_.n_heads * config_.head_dim; }
  std::int64_t kv_width() const { return config_.n_kv_heads * config_.head_dim; }

  const Checkpoint& checkpoint_;
  const ModelConfig& config_;
};

// A projection in the coordinates of its heads' maps.
Result<LinearWeights> Loader::FoldedHeadsOf(const std::string& name, int n_heads, std::span<const float> maps) const {
  const std::int64_t width = n_heads * config_.head_dim;
  ZEROC_ASSIGN_OR_RETURN(const TensorView w, checkpoint_.Tensor(name + ".weight", {width, config_.hidden_size}));
  TensorView bias;
  if (config_.qkv_bias) {
    ZEROC_ASSIGN_OR_RETURN(bias, checkpoint_.Tensor(name + ".bias", {width}));
  }
  ZEROC_ASSIGN_OR_RETURN(FoldedHeads folded, FoldHeads(name.c_str(), w, config_.qkv_bias ? &bias : nullptr, n_heads,
                                                       GeometryOf(config_), maps));
  return LinearWeights{Own(std::move(folded.w)), std::move(folded.bias)};
}

// W_V and W_O in the plan's value coordinates. The output bias is added behind W_O and stays as it is.
Status Loader::FoldValues(const LayerTensorNames& names, const LayerMaps& maps, LayerWeights* layer) const {
  ZEROC_ASSIGN_OR_RETURN(const TensorView w_v,
                         checkpoint_.Tensor(names.v + ".weight", {kv_width(), config_.hidden_size}));
  ZEROC_ASSIGN_OR_RETURN(const TensorView w_o,
                         checkpoint_.Tensor(names.o + ".weight", {config_.hidden_size, q_width()}));
  TensorView bias;
  if (config_.qkv_bias) {
    ZEROC_ASSIGN_OR_RETURN(bias, checkpoint_.Tensor(names.v + ".bias", {kv_width()}));
  }
  ZEROC_ASSIGN_OR_RETURN(FoldedValueOutput folded, FoldValueOutput(w_v, w_o, config_.qkv_bias ? &bias : nullptr,
                                                                   GeometryOf(config_), maps.m, maps.n));
  layer->v = {Own(std::move(folded.w_v)), std::move(folded.v_bias)};
  layer->o.w = Own(std::move(folded.w_o));
  return OkStatus();
}

Result<LayerWeights> Loader::LoadLayer(const Plan* plan, int layer_idx) const {
  const LayerTensorNames names = LayerTensorNamesOf(checkpoint_, layer_idx);
  const ModelConfig& c = config_;
  LayerWeights w;
  ZEROC_ASSIGN_OR_RETURN(w.attention_norm, LoadNorm(names.attention_norm));
  ZEROC_ASSIGN_OR_RETURN(w.mlp_norm, LoadNorm(names.mlp_norm));
  ZEROC_ASSIGN_OR_RETURN(w.q, LoadLinear(names.q, q_width(), c.hidden_size, c.qkv_bias));
  ZEROC_ASSIGN_OR_RETURN(w.k, LoadLinear(names.k, kv_width(), c.hidden_size, c.qkv_bias));
  ZEROC_ASSIGN_OR_RETURN(w.v, LoadLinear(names.v, kv_width(), c.hidden_size, c.qkv_bias));
  ZEROC_ASSIGN_OR_RETURN(w.o, LoadLinear(names.o, c.hidden_size, q_width(), c.o_bias));
  if (c.qk_norm) {
    ZEROC_ASSIGN_OR_RETURN(w.q_norm, Load(names.q_norm, {c.head_dim}));
    ZEROC_ASSIGN_OR_RETURN(w.k_norm, Load(names.k_norm, {c.head_dim}));
  }
  if (c.mlp == MlpKind::kSwiGlu) {
    ZEROC_ASSIGN_OR_RETURN(w.gate, LoadLinear(names.gate, c.intermediate_size, c.hidden_size, c.mlp_bias));
  }
  ZEROC_ASSIGN_OR_RETURN(w.up, LoadLinear(names.up, c.intermediate_size, c.hidden_size, c.mlp_bias));
  ZEROC_ASSIGN_OR_RETURN(w.down, LoadLinear(names.down, c.hidden_size, c.intermediate_size, c.mlp_bias));
  if (plan == nullptr) return w;
  const LayerMaps& maps = plan->layer(layer_idx);
  ZEROC_RETURN_IF_ERROR(FoldValues(names, maps, &w));
  if (c.has_rope()) return w;
  ZEROC_ASSIGN_OR_RETURN(w.q, FoldedHeadsOf(names.q, static_cast<int>(c.n_heads), maps.a));
  ZEROC_ASSIGN_OR_RETURN(w.k, FoldedHeadsOf(names.k, static_cast<int>(c.n_kv_heads), maps.b));
  return w;
}

}  // namespace

Result<TransformerWeights> TransformerWeights::Load(const Checkpoint& checkpoint, const Plan* plan) {
  const ModelConfig& c = checkpoint.config();
  const ModelTensorNames names = TensorNamesOf(checkpoint);
  const Loader loader(checkpoint);
  TransformerWeights weights;
  ZEROC_ASSIGN_OR_RETURN(weights.embedding, loader.Load(names.embedding, {c.vocab_size, c.hidden_size}));
  if (!c.has_rope()) {
    ZEROC_ASSIGN_OR_RETURN(weights.positions,
                           loader.Load(names.positions, {kFirstPositionRow + c.max_positions, c.hidden_size}));
  }
  ZEROC_ASSIGN_OR_RETURN(weights.final_norm, loader.LoadNorm(names.final_norm));
  for (int layer = 0; layer < c.n_layers; ++layer) {
    ZEROC_ASSIGN_OR_RETURN(LayerWeights w, loader.LoadLayer(plan, layer));
    weights.layers.push_back(std::move(w));
  }
  if (c.tie_embeddings) {
    weights.lm_head.w.data = weights.embedding.data;
  } else {
    ZEROC_ASSIGN_OR_RETURN(weights.lm_head, loader.LoadLinear(names.lm_head, c.vocab_size, c.hidden_size, false));
  }
  return weights;
}

}  // namespace zeroc
