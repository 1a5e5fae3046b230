#include "libzeroc/checkpoint/model_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>

#include "libzeroc/checkpoint/file_io.h"

namespace zeroc {
namespace {

using internal::Quoted;
using nlohmann::json;

constexpr std::size_t kConfigBytesMax = 1 << 20;

// Typed look-ups in one JSON object. A field that is absent or null has no value; one of the wrong type is an error.
class Fields {
 public:
  Fields(const json& object, std::string prefix) : object_(object), prefix_(std::move(prefix)) {}

  const json* Find(const char* name) const {
    const auto it = object_.find(name);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }

  template <typename T>
  Result<std::optional<T>> Optional(const char* name) const {
    const json* const value = Find(name);
    if (value == nullptr) return std::optional<T>();
    if constexpr (std::is_same_v<T, bool>) {
      if (value->is_boolean()) return std::optional<T>(value->get<bool>());
      return WrongType(name, "a boolean");
    } else if constexpr (std::is_same_v<T, std::int64_t>) {
      const bool fits = value->is_number_integer() &&
                        (!value->is_number_unsigned() || value->get<std::uint64_t>() <= std::uint64_t{INT64_MAX});
      if (fits) return std::optional<T>(value->get<std::int64_t>());
      return WrongType(name, "an integer");
    } else if constexpr (std::is_same_v<T, double>) {
      if (value->is_number()) return std::optional<T>(value->get<double>());
      return WrongType(name, "a number");
    } else {
      static_assert(std::is_same_v<T, std::string>);
      if (value->is_string()) return std::optional<T>(value->get<std::string>());
      return WrongType(name, "a string");
    }
  }

  template <typename T>
  Status Read(const char* name, T* out) const {  // keeps *out when the field is absent
    ZEROC_ASSIGN_OR_RETURN(std::optional<T> value, Optional<T>(name));
    if (value) *out = std::move(*value);
    return OkStatus();
  }

  template <typename T>
  Status Require(const char* name, T* out) const {
    if (Find(name) == nullptr) return InvalidArgument(prefix_ + name + " is missing");
    return Read(name, out);
  }

  std::string Path(const char* name) const { return prefix_ + name; }

 private:
  Status WrongType(const char* name, std::string_view wanted) const {
    return InvalidArgument(prefix_ + name + " is " + object_.at(name).type_name() + ", not " + std::string(wanted));
  }

  const json& object_;
  std::string prefix_;
};

Result<json> ReadJsonObject(const std::string& path) {
  ZEROC_ASSIGN_OR_RETURN(const std::string text, internal::ReadFile(path, kConfigBytesMax));
  json value = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded()) return InvalidArgument(path + ": not valid JSON");
  if (!value.is_object()) return InvalidArgument(path + ": not a JSON object");
  return value;
}

Result<int> TokenId(const json& value, const std::string& name) {
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() > std::numeric_limits<int>::max()) {
    return InvalidArgument(name + " is not a token id");
  }
  return value.get<int>();
}

Status ReadTokenId(const Fields& fields, const char* name, int* out) {
  const json* const value = fields.Find(name);
  if (value == nullptr) return OkStatus();
  // Some files write -1 for "none".
  if (value->is_number_integer() && !value->is_number_unsigned() && value->get<std::int64_t>() == -1) return OkStatus();
  ZEROC_ASSIGN_OR_RETURN(*out, TokenId(*value, fields.Path(name)));
  return OkStatus();
}

Status ReadEosIds(const Fields& fields, std::vector<int>* out) {
  constexpr std::size_t kEosIdsMax = 1024;
  const json* const value = fields.Find("eos_token_id");
  if (value == nullptr) return OkStatus();
  const json list = value->is_array() ? *value : json::array({*value});
  if (list.size() > kEosIdsMax) return InvalidArgument("eos_token_id has " + std::to_string(list.size()) + " values");
  for (const json& item : list) {
    ZEROC_ASSIGN_OR_RETURN(const int id, TokenId(item, fields.Path("eos_token_id")));
    if (std::find(out->begin(), out->end(), id) == out->end()) out->push_back(id);
  }
  return OkStatus();
}

// What a family's config.json leaves unsaid.
struct Family {
  const char* architecture;
  void (*set_defaults)(ModelConfig*);
};

constexpr Family kFamilies[] = {
    {"LlamaForCausalLM", [](ModelConfig*) {}},
    {"MistralForCausalLM", [](ModelConfig*) {}},
    {"Qwen2ForCausalLM", [](ModelConfig* config) { config->qkv_bias = true; }},
    {"Qwen3ForCausalLM", [](ModelConfig* config) { config->qk_norm = true; }},
    {"OPTForCausalLM",
     [](ModelConfig* config) {
       config->positions = PositionKind::kLearned;
       config->norm = NormKind::kLayer;
       config->mlp = MlpKind::kRelu;
       config->norm_eps = 1e-5F;
       config->tie_embeddings = true;
       config->qkv_bias = config->o_bias = config->mlp_bias = true;
     }},
};

Status ReadArchitecture(const Fields& fields, ModelConfig* config) {
  const json* const list = fields.Find("architectures");
  if (list == nullptr || !list->is_array() || list->size() != 1 || !list->front().is_string()) {
    return InvalidArgument("architectures is not a list of one name");
  }
  config->architecture = list->front().get<std::string>();
  std::string known;
  for (const Family& family : kFamilies) {
    if (config->architecture == family.architecture) {
      family.set_defaults(config);
      return fields.Read("model_type", &config->model_type);
    }
    known += (known.empty() ? "" : ", ") + std::string(family.architecture);
  }
  return Unimplemented("architectures " + Quoted(config->architecture) + " is not supported (" + known + " are)");
}

// A field that may only have one value, which is also what its absence means.
template <typename T>
Status RequireValue(const Fields& fields, const char* name, const T& only, const char* only_text) {
  T value = only;
  ZEROC_RETURN_IF_ERROR(fields.Read(name, &value));
  if (value == only) return OkStatus();
  std::string text;
  if constexpr (std::is_same_v<T, std::string>) {
    text = Quoted(value);
  } else if constexpr (std::is_same_v<T, bool>) {
    text = value ? "true" : "false";
  } else {
    text = std::to_string(value);
  }
  return Unimplemented(fields.Path(name) + " " + text + " is not supported (" + only_text + " is)");
}

// Every token attends to every earlier one, or the window is as long as the model's longest sequence.
Status RefuseSlidingWindow(const Fields& fields, const ModelConfig& config) {
  if (const json* const types = fields.Find("layer_types"); types != nullptr) {
    if (!types->is_array()) return InvalidArgument(fields.Path("layer_types") + " is not a list");
    for (const json& type : *types) {
      if (type == "full_attention") continue;
      const std::string name = type.is_string() ? Quoted(type.get<std::string>()) : type.type_name();
      return Unimplemented("layer_types holds " + name + ": only full_attention is supported");
    }
  }
  // Qwen's files name a window that a switch leaves unused.
  bool used = config.architecture == "MistralForCausalLM";
  ZEROC_RETURN_IF_ERROR(fields.Read("use_sliding_window", &used));
  ZEROC_ASSIGN_OR_RETURN(const std::optional<std::int64_t> window, fields.Optional<std::int64_t>("sliding_window"));
  if (!used || !window || *window >= config.max_positions) return OkStatus();
  return Unimplemented("sliding_window " + std::to_string(*window) + " is below max_position_embeddings " +
                       std::to_string(config.max_positions) + ": sliding-window attention is not supported");
}

// Features that would change the arithmetic behind our back.
Status RefuseUnsupported(const Fields& fields, const ModelConfig& config) {
  if (fields.Find("quantization_config") != nullptr) {
    return Unimplemented("quantization_config is set: quantised checkpoints are not supported");
  }
  if (config.has_rope()) {
    ZEROC_RETURN_IF_ERROR(RequireValue<std::string>(fields, "hidden_act", "silu", "silu"));
    ZEROC_RETURN_IF_ERROR(RequireValue(fields, "partial_rotary_factor", 1.0, "1"));
    return RefuseSlidingWindow(fields, config);
  }
  ZEROC_RETURN_IF_ERROR(RequireValue<std::string>(fields, "activation_function", "relu", "relu"));
  ZEROC_RETURN_IF_ERROR(RequireValue(fields, "do_layer_norm_before", true, "true"));
  ZEROC_RETURN_IF_ERROR(RequireValue(fields, "_remove_final_layer_norm", false, "false"));
  ZEROC_RETURN_IF_ERROR(RequireValue(fields, "layer_norm_elementwise_affine", true, "true"));
  return RequireValue(fields, "word_embed_proj_dim", config.hidden_size, "hidden_size");
}

Status ReadRopeScaling(const json& object, const std::string& prefix, RopeScaling* out) {
  const Fields fields(object, prefix);
  std::string kind = "default";
  ZEROC_RETURN_IF_ERROR(fields.Read("type", &kind));  // the older key
  ZEROC_RETURN_IF_ERROR(fields.Read("rope_type", &kind));
  if (kind == "default") return OkStatus();
  ZEROC_RETURN_IF_ERROR(fields.Require("factor", &out->factor));
  if (kind == "linear") {
    out->kind = RopeScaling::Kind::kLinear;
    return OkStatus();
  }
  if (kind != "llama3") {
    return Unimplemented(fields.Path("rope_type") + " " + Quoted(kind) +
                         " is not supported (default, linear and llama3 are)");
  }
  out->kind = RopeScaling::Kind::kLlama3;
  ZEROC_RETURN_IF_ERROR(fields.Require("low_freq_factor", &out->low_freq_factor));
  ZEROC_RETURN_IF_ERROR(fields.Require("high_freq_factor", &out->high_freq_factor));
  return fields.Require("original_max_position_embeddings", &out->original_max_positions);
}

Status ReadRope(const Fields& fields, ModelConfig* config) {
  ZEROC_RETURN_IF_ERROR(fields.Read("rope_theta", &config->rope_theta));
  // Newer files hold theta and scaling together in rope_parameters.
  for (const char* name : {"rope_scaling", "rope_parameters"}) {
    const json* const object = fields.Find(name);
    if (object == nullptr) continue;
    if (!object->is_object()) return InvalidArgument(fields.Path(name) + " is not an object");
    const std::string prefix = fields.Path(name) + ".";
    ZEROC_RETURN_IF_ERROR(Fields(*object, prefix).Read("rope_theta", &config->rope_theta));
    ZEROC_RETURN_IF_ERROR(ReadRopeScaling(*object, prefix, &config->rope_scaling));
  }
  return OkStatus();
}

const char* WidthField(const ModelConfig& config) {
  return config.architecture == "OPTForCausalLM" ? "ffn_dim" : "intermediate_size";
}

Status ReadHeads(const Fields& fields, ModelConfig* config) {
  ZEROC_RETURN_IF_ERROR(fields.Require("num_attention_heads", &config->n_heads));
  config->n_kv_heads = config->n_heads;
  ZEROC_RETURN_IF_ERROR(fields.Read("num_key_value_heads", &config->n_kv_heads));
  if (config->n_heads > 0 && config->hidden_size % config->n_heads == 0) {
    config->head_dim = config->hidden_size / config->n_heads;
  } else if (fields.Find("head_dim") == nullptr) {
    return InvalidArgument("head_dim is missing and hidden_size " + std::to_string(config->hidden_size) +
                           " is not divisible by num_attention_heads " + std::to_string(config->n_heads));
  }
  return fields.Read("head_dim", &config->head_dim);
}

Status ReadBiases(const Fields& fields, ModelConfig* config) {
  if (config->architecture == "OPTForCausalLM") {
    ZEROC_RETURN_IF_ERROR(fields.Read("enable_bias", &config->qkv_bias));
    config->o_bias = config->mlp_bias = config->qkv_bias;
    return OkStatus();
  }
  if (config->architecture == "Qwen2ForCausalLM") return OkStatus();  // has no such fields
  ZEROC_RETURN_IF_ERROR(fields.Read("attention_bias", &config->qkv_bias));
  config->o_bias = config->qkv_bias;
  return fields.Read("mlp_bias", &config->mlp_bias);
}

Result<ModelConfig> ParseConfig(const json& object) {
  const Fields fields(object, "");
  ModelConfig config;
  ZEROC_RETURN_IF_ERROR(ReadArchitecture(fields, &config));
  ZEROC_RETURN_IF_ERROR(fields.Require("vocab_size", &config.vocab_size));
  ZEROC_RETURN_IF_ERROR(fields.Require("hidden_size", &config.hidden_size));
  ZEROC_RETURN_IF_ERROR(fields.Require("num_hidden_layers", &config.n_layers));
  ZEROC_RETURN_IF_ERROR(ReadHeads(fields, &config));
  ZEROC_RETURN_IF_ERROR(fields.Require(WidthField(config), &config.intermediate_size));
  ZEROC_RETURN_IF_ERROR(fields.Require("max_position_embeddings", &config.max_positions));
  ZEROC_RETURN_IF_ERROR(fields.Read("tie_word_embeddings", &config.tie_embeddings));
  ZEROC_RETURN_IF_ERROR(ReadBiases(fields, &config));
  if (config.has_rope()) {
    double eps = config.norm_eps;
    ZEROC_RETURN_IF_ERROR(fields.Read("rms_norm_eps", &eps));
    config.norm_eps = static_cast<float>(eps);
    ZEROC_RETURN_IF_ERROR(ReadRope(fields, &config));
  }
  ZEROC_RETURN_IF_ERROR(RefuseUnsupported(fields, config));
  return config;
}

Status ReadSpecialIds(const json& object, ModelConfig* config) {
  const Fields fields(object, "");
  ZEROC_RETURN_IF_ERROR(ReadTokenId(fields, "bos_token_id", &config->bos_id));
  ZEROC_RETURN_IF_ERROR(ReadTokenId(fields, "pad_token_id", &config->pad_id));
  return ReadEosIds(fields, &config->eos_ids);
}

Status CheckRange(std::string_view name, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value >= low && value <= high) return OkStatus();
  return InvalidArgument(std::string(name) + " " + std::to_string(value) + " is outside [" + std::to_string(low) +
                         ", " + std::to_string(high) + "]");
}

Status CheckRealRange(std::string_view name, double value, double low, double high) {
  if (value >= low && value <= high) return OkStatus();  // false for NaN
  return InvalidArgument(std::string(name) + " " + std::to_string(value) + " is out of range");
}

Status ValidateRope(const ModelConfig& config) {
  const RopeScaling& scaling = config.rope_scaling;
  ZEROC_RETURN_IF_ERROR(CheckRealRange("rope_theta", config.rope_theta, 1.0, 1e15));
  if (scaling.kind == RopeScaling::Kind::kNone) return OkStatus();
  ZEROC_RETURN_IF_ERROR(CheckRealRange("rope_scaling.factor", scaling.factor, 1.0, 1e6));
  if (scaling.kind == RopeScaling::Kind::kLinear) return OkStatus();
  ZEROC_RETURN_IF_ERROR(CheckRealRange("rope_scaling.low_freq_factor", scaling.low_freq_factor, 1e-3, 1e6));
  ZEROC_RETURN_IF_ERROR(CheckRealRange("rope_scaling.high_freq_factor", scaling.high_freq_factor, 1e-3, 1e6));
  if (scaling.high_freq_factor <= scaling.low_freq_factor) {
    return InvalidArgument("rope_scaling.high_freq_factor is not above low_freq_factor");
  }
  return CheckRange("rope_scaling.original_max_position_embeddings", scaling.original_max_positions, 1, 1 << 27);
}

}  // namespace

Status ModelConfig::Validate() const {
  // The bounds are a few times above the largest published models; they keep every later product inside 64 bits.
  ZEROC_RETURN_IF_ERROR(CheckRange("vocab_size", vocab_size, 1, 1 << 24));
  ZEROC_RETURN_IF_ERROR(CheckRange("hidden_size", hidden_size, 1, 1 << 17));
  ZEROC_RETURN_IF_ERROR(CheckRange("num_hidden_layers", n_layers, 1, 1024));
  ZEROC_RETURN_IF_ERROR(CheckRange("num_attention_heads", n_heads, 1, 1024));
  ZEROC_RETURN_IF_ERROR(CheckRange("num_key_value_heads", n_kv_heads, 1, n_heads));
  ZEROC_RETURN_IF_ERROR(CheckRange("head_dim", head_dim, 16, 256));  // what the kernels take
  ZEROC_RETURN_IF_ERROR(CheckRange(WidthField(*this), intermediate_size, 1, 1 << 20));
  ZEROC_RETURN_IF_ERROR(CheckRange("max_position_embeddings", max_positions, 1, 1 << 27));
  ZEROC_RETURN_IF_ERROR(CheckRealRange("rms_norm_eps", norm_eps, 1e-12, 0.1));
  if (head_dim % 16 != 0) {
    return InvalidArgument("head_dim " + std::to_string(head_dim) + " is not a multiple of 16");
  }
  if (n_heads % n_kv_heads != 0) {
    return InvalidArgument("num_attention_heads " + std::to_string(n_heads) +
                           " is not divisible by num_key_value_heads " + std::to_string(n_kv_heads));
  }
  if (has_rope()) ZEROC_RETURN_IF_ERROR(ValidateRope(*this));
  ZEROC_RETURN_IF_ERROR(CheckRange("bos_token_id", bos_id, -1, vocab_size - 1));
  for (const int id : eos_ids) ZEROC_RETURN_IF_ERROR(CheckRange("eos_token_id", id, 0, vocab_size - 1));
  // A pad id just behind the vocabulary is common and harmless: nothing is padded here.
  return OkStatus();
}

Result<ModelConfig> LoadModelConfig(const std::string& dir) {
  const std::string path = dir + "/config.json";
  ZEROC_ASSIGN_OR_RETURN(const json object, ReadJsonObject(path));
  Result<ModelConfig> config = ParseConfig(object);
  if (!config.ok()) return config.status().WithContext(path);

  const std::string generation_path = dir + "/generation_config.json";
  if (internal::FileExists(generation_path)) {
    ZEROC_ASSIGN_OR_RETURN(const json generation, ReadJsonObject(generation_path));
    ZEROC_RETURN_IF_ERROR(ReadSpecialIds(generation, &*config).WithContext(generation_path));
  }
  ZEROC_RETURN_IF_ERROR(ReadSpecialIds(object, &*config).WithContext(path));
  ZEROC_RETURN_IF_ERROR(config->Validate().WithContext(path));
  return config;
}

}  // namespace zeroc
