// A model's weights on disk: the config and the tensors of a Hugging Face directory, in one safetensors file or in
// shards, read in place.
//
// Thread-safety: const after Open. Ownership: views point into the memory map and live as long as the Checkpoint; there
// is no second copy of the weights. The directory is untrusted.
#pragma once

#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/checkpoint/model_config.h"
#include "libzeroc/checkpoint/safetensors.h"

namespace zeroc {

class Checkpoint {
 public:
  // Reads config.json, then model.safetensors or, without it, the shards that model.safetensors.index.json names.
  // kNotFound for a missing file or shard, kInvalidArgument or kUnimplemented with file and field otherwise.
  static Result<std::unique_ptr<Checkpoint>> Open(const std::string& dir);

  const ModelConfig& config() const { return config_; }
  const std::string& dir() const { return dir_; }

  bool Has(std::string_view name) const { return tensors_.contains(name); }

  // The tensor of this exact shape. kNotFound when absent, kInvalidArgument when the shape differs or the data is not
  // aligned to its element. The dtype is the file's: look at it.
  Result<TensorView> Tensor(std::string_view name, std::initializer_list<std::int64_t> shape) const;

  const TensorMap& tensors() const { return tensors_; }

  // Reads every weight. kDataLoss naming the first tensor, in name order, that holds NaN or infinity, and where.
  Status CheckFinite() const;

  // 32 hex digits: XXH3-128 over the config fields that enter the arithmetic and, for each tensor in name order, its
  // name, dtype, shape and a sample of its bytes: all of them up to 32 KiB, else 8 pieces of 4 KiB spread evenly from
  // the first byte to the last. Equal for sharded and unsharded copies of the same weights; a change outside the
  // sampled pieces is not seen. Cost: at most 32 KiB per tensor.
  const std::string& fingerprint() const { return fingerprint_; }

 private:
  Checkpoint() = default;
  std::string dir_;
  ModelConfig config_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  TensorMap tensors_;
  std::string fingerprint_;
};

}  // namespace zeroc
