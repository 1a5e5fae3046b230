// The shape, the kind and the constants of a model, read from a Hugging Face directory (config.json and, where present,
// generation_config.json). Families: Llama, Mistral, Qwen2, Qwen3 and OPT.
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

enum class PositionKind { kRope, kLearned };  // kLearned: a table of vectors, added to the embeddings
enum class NormKind { kRms, kLayer };         // kLayer: mean and variance, with a bias
enum class MlpKind { kSwiGlu, kRelu };

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
  PositionKind positions = PositionKind::kRope;
  NormKind norm = NormKind::kRms;
  MlpKind mlp = MlpKind::kSwiGlu;
  float norm_eps = 1e-6F;
  bool tie_embeddings = false;  // the output matrix is the embedding matrix
  bool qkv_bias = false;        // biases on q, k and v
  bool o_bias = false;          // on the attention output
  bool mlp_bias = false;        // on every matrix of the MLP
  bool qk_norm = false;         // RMS norm of every query and key head, before RoPE
  double rope_theta = 10000.0;
  RopeScaling rope_scaling;
  int bos_id = -1;  // -1: none stated
  int pad_id = -1;
  std::vector<int> eos_ids;  // any of them ends a completion; generation_config.json's first, no repeats

  bool has_rope() const { return positions == PositionKind::kRope; }

  // kInvalidArgument naming the config.json field that is out of bounds.
  Status Validate() const;
};

// kNotFound without config.json; the result is valid.
Result<ModelConfig> LoadModelConfig(const std::string& dir);

}  // namespace zeroc
