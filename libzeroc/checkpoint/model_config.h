// The shape and constants of a Llama-family model, read from a Hugging Face directory (config.json and, where present,
// generation_config.json).
//
// Plain values; share as const. Both files are untrusted: a wrong type or an impossible value is an error that names
// file and field, and a feature that would change the arithmetic and is not supported is kUnimplemented.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "libzeroc/base/status.h"

namespace zeroc {

// How rotary frequencies are stretched beyond the trained context. kLlama3: "The Llama 3 Herd of Models", as in
// rope_type "llama3"; kLinear divides every frequency by `factor`.
struct RopeScaling {
  enum class Kind { kNone, kLinear, kLlama3 };
  Kind kind = Kind::kNone;
  double factor = 1.0;
  double low_freq_factor = 1.0;  // kLlama3 only, as are the next two
  double high_freq_factor = 4.0;
  std::int64_t original_max_positions = 0;  // tokens
};

struct ModelConfig {
  std::string architecture;  // "LlamaForCausalLM"
  std::string model_type;    // "llama"
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t n_layers = 0;
  std::int64_t n_heads = 0;     // query heads
  std::int64_t n_kv_heads = 0;  // head h reads KV head h / (n_heads / n_kv_heads)
  std::int64_t head_dim = 0;    // n_heads * head_dim need not be hidden_size
  std::int64_t intermediate_size = 0;
  std::int64_t max_positions = 0;  // tokens
  float rms_norm_eps = 1e-6F;
  bool tie_embeddings = false;  // the output matrix is the embedding matrix
  bool attention_bias = false;  // biases on q, k, v and o
  bool mlp_bias = false;
  double rope_theta = 10000.0;
  RopeScaling rope_scaling;
  int bos_id = -1;  // -1: none stated
  int pad_id = -1;
  std::vector<int> eos_ids;  // any of them ends a completion; generation_config.json's first, no repeats

  // kInvalidArgument naming the config.json field that is out of bounds.
  Status Validate() const;
};

// kNotFound without config.json; the result is valid.
Result<ModelConfig> LoadModelConfig(const std::string& dir);

}  // namespace zeroc
