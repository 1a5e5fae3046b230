#include "libzeroc/model/cuda/device_weights.h"

#include <span>
#include <string>
#include <utility>

#include "kernels/cuda/cuda_ops.h"

namespace zeroc {

namespace cuda = kernels::cuda;
using kernels::Bf16;

namespace {

class Uploader {
 public:
  Uploader(const ModelConfig& config, cuda::Stream stream, std::vector<DeviceBuffer>* owned)
      : config_(config), stream_(stream), owned_(owned) {}

  template <typename T>
  Status Copy(const T* values, std::int64_t n, const std::string& name, const T** out) {
    if (values == nullptr || n == 0) return OkStatus();
    ZEROC_ASSIGN_OR_RETURN(DeviceBuffer buffer, CopyToDevice(std::span<const T>(values, static_cast<std::size_t>(n)),
                                                             ("weights " + name).c_str(), stream_));
    *out = buffer.As<T>();
    owned_->push_back(std::move(buffer));
    return OkStatus();
  }
  Status Copy(const NormWeights& from, const std::string& name, DeviceNorm* to) {
    ZEROC_RETURN_IF_ERROR(Copy(from.gain.data, config_.hidden_size, name, &to->gain));
    return Copy(from.bias.data(), std::ssize(from.bias), name, &to->bias);
  }
  Status Copy(const LinearWeights& from, std::int64_t n_out, std::int64_t n_in, const std::string& name,
              DeviceLinear* to) {
    ZEROC_RETURN_IF_ERROR(Copy(from.w.data, n_out * n_in, name, &to->w));
    return Copy(from.b.data(), std::ssize(from.b), name, &to->b);
  }
  Status Copy(const LayerWeights& from, const std::string& layer, DeviceLayer* to) {
    const std::int64_t hidden = config_.hidden_size, wide = config_.intermediate_size;
    const std::int64_t q_width = config_.n_heads * config_.head_dim, kv_width = config_.n_kv_heads * config_.head_dim;
    ZEROC_RETURN_IF_ERROR(Copy(from.attention_norm, layer + "attention_norm", &to->attention_norm));
    ZEROC_RETURN_IF_ERROR(Copy(from.q, q_width, hidden, layer + "q", &to->q));
    ZEROC_RETURN_IF_ERROR(Copy(from.k, kv_width, hidden, layer + "k", &to->k));
    ZEROC_RETURN_IF_ERROR(Copy(from.v, kv_width, hidden, layer + "v", &to->v));
    ZEROC_RETURN_IF_ERROR(Copy(from.o, hidden, q_width, layer + "o", &to->o));
    ZEROC_RETURN_IF_ERROR(Copy(from.q_norm.data, config_.head_dim, layer + "q_norm", &to->q_norm));
    ZEROC_RETURN_IF_ERROR(Copy(from.k_norm.data, config_.head_dim, layer + "k_norm", &to->k_norm));
    ZEROC_RETURN_IF_ERROR(Copy(from.mlp_norm, layer + "mlp_norm", &to->mlp_norm));
    ZEROC_RETURN_IF_ERROR(Copy(from.gate, wide, hidden, layer + "gate", &to->gate));
    ZEROC_RETURN_IF_ERROR(Copy(from.up, wide, hidden, layer + "up", &to->up));
    return Copy(from.down, hidden, wide, layer + "down", &to->down);
  }

 private:
  const ModelConfig& config_;
  cuda::Stream stream_;
  std::vector<DeviceBuffer>* owned_;
};

// The maps of one layer in the form of the tensor cores.
Result<DeviceBuffer> UploadMaps(const std::vector<float>& maps, const KvFormat& format, cuda::Stream stream) {
  ZEROC_ASSIGN_OR_RETURN(const DeviceBuffer floats, CopyToDevice(std::span(maps), "maps", stream));
  DeviceBuffer tiles;
  const auto bytes = static_cast<std::size_t>(cuda::SplitMapBytes(format.n_kv_heads, format.head_dim));
  ZEROC_RETURN_IF_ERROR(tiles.Reserve(bytes, "maps"));
  ZEROC_RETURN_IF_ERROR(Launched(
      cuda::SplitMaps(floats.As<const float>(), format.n_kv_heads, format.head_dim, tiles.As<std::uint8_t>(), stream),
      "split_maps"));
  ZEROC_RETURN_IF_ERROR(WaitFor(stream));  // before the floats go
  return tiles;
}

Status UploadAllMaps(const std::vector<std::vector<float>>& maps, const KvFormat& format, cuda::Stream stream,
                     std::vector<const std::uint8_t*>* out, std::vector<DeviceBuffer>* owned) {
  out->assign(static_cast<std::size_t>(format.n_layers), nullptr);
  for (std::size_t layer = 0; layer < maps.size(); ++layer) {
    ZEROC_ASSIGN_OR_RETURN(DeviceBuffer tiles, UploadMaps(maps[layer], format, stream));
    (*out)[layer] = tiles.As<std::uint8_t>();
    owned->push_back(std::move(tiles));
  }
  return OkStatus();
}

}  // namespace

Result<DeviceWeights> DeviceWeights::Upload(const TransformerWeights& weights, const ModelConfig& config,
                                            cuda::Stream stream) {
  DeviceWeights out;
  Uploader uploader(config, stream, &out.owned);
  const std::int64_t table = config.vocab_size * config.hidden_size;
  ZEROC_RETURN_IF_ERROR(uploader.Copy(weights.embedding.data, table, "embedding", &out.embedding));
  const std::int64_t n_positions = TransformerWeights::kFirstPositionRow + config.max_positions;
  ZEROC_RETURN_IF_ERROR(
      uploader.Copy(weights.positions.data, n_positions * config.hidden_size, "positions", &out.positions));
  for (std::size_t layer = 0; layer < weights.layers.size(); ++layer) {
    const std::string name = "layer " + std::to_string(layer) + " ";
    ZEROC_RETURN_IF_ERROR(uploader.Copy(weights.layers[layer], name, &out.layers.emplace_back()));
  }
  ZEROC_RETURN_IF_ERROR(uploader.Copy(weights.final_norm, "final_norm", &out.final_norm));
  if (weights.lm_head.w.data == weights.embedding.data) {
    out.lm_head.w = out.embedding;
    return out;
  }
  ZEROC_RETURN_IF_ERROR(uploader.Copy(weights.lm_head, config.vocab_size, config.hidden_size, "lm_head", &out.lm_head));
  return out;
}

Result<std::unique_ptr<DeviceFormat>> DeviceFormat::Upload(std::shared_ptr<const KvFormat> format,
                                                           cuda::Stream stream) {
  auto out = std::make_unique<DeviceFormat>();
  ZEROC_RETURN_IF_ERROR(UploadAllMaps(format->k_map, *format, stream, &out->k_maps, &out->owned));
  ZEROC_RETURN_IF_ERROR(UploadAllMaps(format->q_map, *format, stream, &out->q_maps, &out->owned));
  for (const KvTier& tier : format->tiers) {
    std::vector<const float*>& of_tier = out->mass.emplace_back(static_cast<std::size_t>(format->n_layers), nullptr);
    for (std::size_t layer = 0; layer < tier.mass.size(); ++layer) {
      if (tier.mass[layer].empty()) continue;
      ZEROC_ASSIGN_OR_RETURN(DeviceBuffer mass, CopyToDevice(std::span(tier.mass[layer]), "mass correction", stream));
      of_tier[layer] = mass.As<const float>();
      out->owned.push_back(std::move(mass));
    }
  }
  out->format = std::move(format);
  return out;
}

Result<const DeviceFormat*> DeviceFormats::Of(const std::shared_ptr<const KvFormat>& format, cuda::Stream stream) {
  std::unique_ptr<DeviceFormat>& found = formats_[format.get()];
  if (found == nullptr) {
    ZEROC_ASSIGN_OR_RETURN(found, DeviceFormat::Upload(format, stream));
  }
  return found.get();
}

}  // namespace zeroc
