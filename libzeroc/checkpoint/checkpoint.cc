#include "libzeroc/checkpoint/checkpoint.h"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "libzeroc/checkpoint/file_io.h"
#include "libzeroc/checkpoint/tensor_values.h"

namespace zeroc {
namespace {

using internal::Quoted;

constexpr std::string_view kSingleFile = "model.safetensors";
constexpr std::string_view kIndexFile = "model.safetensors.index.json";
constexpr std::size_t kIndexBytesMax = 16 << 20;  // 10^5 tensors need about 8 MiB
constexpr std::size_t kShardsMax = 1024;

using WeightMap = std::map<std::string, std::string>;  // tensor -> shard

// A plain name: no separator, so no way out of the directory, and not "." or "..".
bool IsPlainFileName(std::string_view name) {
  return !name.empty() && name.size() <= 255 && name != "." && name != ".." &&
         name.find_first_of(std::string_view("/\\\0", 3)) == std::string_view::npos;
}

Result<WeightMap> ReadIndex(const std::string& path) {
  ZEROC_ASSIGN_OR_RETURN(const std::string text, internal::ReadFile(path, kIndexBytesMax));
  const nlohmann::json index = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (index.is_discarded() || !index.is_object()) return InvalidArgument(path + ": not a JSON object");
  const auto map = index.find("weight_map");
  if (map == index.end() || !map->is_object() || map->empty()) {
    return InvalidArgument(path + ": weight_map is missing, empty or not an object");
  }
  WeightMap out;
  for (const auto& [tensor, shard] : map->items()) {
    if (!shard.is_string() || !IsPlainFileName(shard.get_ref<const std::string&>())) {
      return InvalidArgument(path + ": weight_map " + Quoted(tensor) + " does not name a file of this directory");
    }
    out.emplace(tensor, shard.get_ref<const std::string&>());
  }
  return out;
}

// Each shard must hold exactly the tensors that the index gives to it.
Status CheckShard(const std::string& shard, const SafetensorsFile& file, const WeightMap& index) {
  for (const auto& [tensor, view] : file.tensors()) {
    const auto it = index.find(tensor);
    if (it == index.end()) return InvalidArgument(shard + ": tensor " + Quoted(tensor) + " is not in the index");
    if (it->second != shard) {
      return InvalidArgument(shard + ": tensor " + Quoted(tensor) + " belongs to " + Quoted(it->second) +
                             " by the index");
    }
  }
  return OkStatus();
}

void Update(XXH3_state_t* state, std::string_view text) {
  const std::uint64_t length = text.size();
  XXH3_128bits_update(state, &length, sizeof length);  // the length first: no two field lists hash the same bytes
  XXH3_128bits_update(state, text.data(), text.size());
}

// What the architecture's name implies (norms, positions, the other biases) needs no words of its own.
std::string ConfigText(const ModelConfig& c) {
  std::string out = c.architecture;
  const auto add = [&out](auto value) { out += ' ' + std::to_string(value); };
  for (const std::int64_t value : {c.vocab_size, c.hidden_size, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim,
                                   c.intermediate_size, c.rope_scaling.original_max_positions}) {
    add(value);
  }
  for (const bool value : {c.tie_embeddings, c.qkv_bias, c.mlp_bias}) add(static_cast<int>(value));
  add(static_cast<int>(c.rope_scaling.kind));
  for (const double value : {static_cast<double>(c.norm_eps), c.rope_theta, c.rope_scaling.factor,
                             c.rope_scaling.low_freq_factor, c.rope_scaling.high_freq_factor}) {
    add(std::bit_cast<std::uint64_t>(value));  // exact, whatever the locale
  }
  return out;
}

void UpdateSample(XXH3_state_t* state, const TensorView& view) {
  constexpr std::size_t kPieces = 8;
  constexpr std::size_t kPieceBytes = 4096;
  if (view.bytes <= kPieces * kPieceBytes) {
    XXH3_128bits_update(state, view.data, view.bytes);
    return;
  }
  const std::size_t last = view.bytes - kPieceBytes;
  for (std::size_t i = 0; i < kPieces; ++i) {
    const std::size_t offset = last / (kPieces - 1) * i + last % (kPieces - 1) * i / (kPieces - 1);
    XXH3_128bits_update(state, view.data + offset, kPieceBytes);
  }
}

std::string Fingerprint(const ModelConfig& config, const TensorMap& tensors) {
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(), &XXH3_freeState);
  if (state == nullptr) throw std::bad_alloc();
  XXH3_128bits_reset(state.get());
  Update(state.get(), "zeroc checkpoint 1");
  Update(state.get(), ConfigText(config));
  for (const auto& [name, view] : tensors) {
    Update(state.get(), name);
    Update(state.get(), DTypeName(view.dtype));
    Update(state.get(), ShapeToString(view.shape));
    UpdateSample(state.get(), view);
  }
  XXH128_canonical_t digest;
  XXH128_canonicalFromHash(&digest, XXH3_128bits_digest(state.get()));
  constexpr char kHex[] = "0123456789abcdef";
  std::string out;
  for (const unsigned char byte : digest.digest) {
    out += kHex[byte >> 4];
    out += kHex[byte & 15];
  }
  return out;
}

}  // namespace

Result<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& dir) {
  std::unique_ptr<Checkpoint> out(new Checkpoint());
  out->dir_ = dir;
  ZEROC_ASSIGN_OR_RETURN(out->config_, LoadModelConfig(dir));

  const std::string prefix = dir + "/";
  const std::string single = prefix + std::string(kSingleFile);
  const std::string index_path = prefix + std::string(kIndexFile);
  WeightMap index;
  std::set<std::string> shards;
  if (internal::FileExists(single) || !internal::FileExists(index_path)) {
    shards.emplace(kSingleFile);
  } else {
    ZEROC_ASSIGN_OR_RETURN(index, ReadIndex(index_path));
    for (const auto& [tensor, shard] : index) shards.insert(shard);
    if (shards.size() > kShardsMax) {
      return InvalidArgument(index_path + ": " + std::to_string(shards.size()) + " shards, more than " +
                             std::to_string(kShardsMax));
    }
  }
  for (const std::string& shard : shards) {
    ZEROC_ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsFile> file, SafetensorsFile::Open(prefix + shard));
    if (!index.empty()) ZEROC_RETURN_IF_ERROR(CheckShard(shard, *file, index).WithContext(dir));
    out->tensors_.insert(file->tensors().begin(), file->tensors().end());
    out->files_.push_back(std::move(file));
  }
  for (const auto& [tensor, shard] : index) {
    if (!out->Has(tensor)) return InvalidArgument(prefix + shard + ": tensor " + Quoted(tensor) + " is missing");
  }
  out->fingerprint_ = Fingerprint(out->config_, out->tensors_);
  return out;
}

Result<TensorView> Checkpoint::Tensor(std::string_view name, std::initializer_list<std::int64_t> shape) const {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) return NotFound(dir_ + ": no tensor " + Quoted(name));
  const TensorView& view = it->second;
  if (!std::equal(view.shape.begin(), view.shape.end(), shape.begin(), shape.end())) {
    return InvalidArgument(dir_ + ": tensor " + Quoted(name) + " has shape " + ShapeToString(view.shape) + ", not " +
                           ShapeToString(std::span(shape.begin(), shape.size())));
  }
  if (reinterpret_cast<std::uintptr_t>(view.data) % DTypeBytes(view.dtype) != 0) {
    return InvalidArgument(dir_ + ": tensor " + Quoted(name) + " is not aligned to its elements: write the file anew");
  }
  return view;
}

Status Checkpoint::CheckFinite() const {
  constexpr std::int64_t kPart = 1 << 14;  // values; stays in the first-level cache with its source
  std::vector<float> part(kPart);
  for (const auto& [name, view] : tensors_) {
    if (!IsWeightType(view.dtype)) continue;
    const auto n = static_cast<std::int64_t>(view.bytes / DTypeBytes(view.dtype));
    for (std::int64_t first = 0; first < n; first += kPart) {
      const std::int64_t count = std::min(kPart, n - first);
      ReadFloats(view, first, count, part.data());
      const auto end = part.begin() + count;
      const auto bad = std::find_if(part.begin(), end, [](float x) { return !std::isfinite(x); });
      if (bad == end) continue;
      return DataLoss(dir_ + ": tensor " + Quoted(name) + " holds " + (std::isnan(*bad) ? "NaN" : "infinity") +
                      " at value " + std::to_string(first + (bad - part.begin())) + " of " + std::to_string(n));
    }
  }
  return OkStatus();
}

}  // namespace zeroc
