// What stays on a device as long as the model is open: the weights, and of every KV format in use the maps and the mass
// corrections. One stream, one thread.
#pragma once

#include <memory>
#include <unordered_map>
#include <vector>

#include "kernels/ops.h"
#include "libzeroc/checkpoint/model_config.h"
#include "libzeroc/kv/kv_format.h"
#include "libzeroc/model/cuda/device_memory.h"
#include "libzeroc/model/transformer_weights.h"

namespace zeroc {

// Views of DeviceWeights, null for what the model does not have. Shapes as in TransformerWeights.
struct DeviceNorm {
  const kernels::Bf16* gain = nullptr;
  const float* bias = nullptr;
};
struct DeviceLinear {
  const kernels::Bf16* w = nullptr;
  const float* b = nullptr;
};
struct DeviceLayer {
  DeviceNorm attention_norm, mlp_norm;
  DeviceLinear q, k, v, o, gate, up, down;
  const kernels::Bf16* q_norm = nullptr;
  const kernels::Bf16* k_norm = nullptr;
};

struct DeviceWeights {
  const kernels::Bf16* embedding = nullptr;
  const kernels::Bf16* positions = nullptr;
  std::vector<DeviceLayer> layers;
  DeviceNorm final_norm;
  DeviceLinear lm_head;
  std::vector<DeviceBuffer> owned;

  // Copies all of them; the host's may go afterwards. kResourceExhausted naming the tensor that did not fit.
  static Result<DeviceWeights> Upload(const TransformerWeights& weights, const ModelConfig& config,
                                      kernels::cuda::Stream stream);
};

// One format's numbers. Null pointers where KvFormat has nothing.
struct DeviceFormat {
  std::shared_ptr<const KvFormat> format;
  std::vector<const std::uint8_t*> k_maps, q_maps;  // [n_layers], as SplitMaps makes them
  std::vector<std::vector<const float*>> mass;      // [tiers][n_layers] of [n_kv_heads][KvTier::kMassColumns]
  std::vector<DeviceBuffer> owned;

  static Result<std::unique_ptr<DeviceFormat>> Upload(std::shared_ptr<const KvFormat> format,
                                                      kernels::cuda::Stream stream);
};

// Of all formats that were used so far.
class DeviceFormats {
 public:
  // Valid as long as this object.
  Result<const DeviceFormat*> Of(const std::shared_ptr<const KvFormat>& format, kernels::cuda::Stream stream);

 private:
  std::unordered_map<const KvFormat*, std::unique_ptr<DeviceFormat>> formats_;
};

}  // namespace zeroc
