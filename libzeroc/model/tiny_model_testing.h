// Shared by model and engine tests: a small random Llama checkpoint on disk, and the plainest float64 forward pass over
// the same numbers, without blocks, caches or chunks.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "kernels/bf16.h"
#include "libzeroc/checkpoint/checkpoint.h"
#include "libzeroc/checkpoint/checkpoint_testing.h"
#include "libzeroc/checkpoint/rope.h"
#include "libzeroc/checkpoint/tensor_values.h"

namespace zeroc::testing {

struct TinyShape {
  int vocab = 97, hidden = 48, n_layers = 2, n_heads = 4, n_kv_heads = 2, head_dim = 16, intermediate = 64;
  bool tied = false, bias = false;
  DType dtype = DType::kBf16;
  std::string rope_scaling = "null";
};

// Writes config.json and model.safetensors with seeded weights; values are exact in bf16 unless the dtype is another.
class TinyModel {
 public:
  explicit TinyModel(const TinyShape& shape, unsigned seed = 1) : shape_(shape), rng_(seed) {
    Add("model.embed_tokens.weight", {shape.vocab, shape.hidden}, 1.0);
    Add("model.norm.weight", {shape.hidden}, 0.2, 1.0);
    if (!shape.tied) Add("lm_head.weight", {shape.vocab, shape.hidden}, 0.3);
    const int q = shape.n_heads * shape.head_dim, kv = shape.n_kv_heads * shape.head_dim;
    for (int l = 0; l < shape.n_layers; ++l) {
      const std::string p = "model.layers." + std::to_string(l) + ".";
      Add(p + "input_layernorm.weight", {shape.hidden}, 0.2, 1.0);
      Add(p + "post_attention_layernorm.weight", {shape.hidden}, 0.2, 1.0);
      for (const auto& [name, out, in] :
           {Linear{"self_attn.q_proj", q, shape.hidden}, Linear{"self_attn.k_proj", kv, shape.hidden},
            Linear{"self_attn.v_proj", kv, shape.hidden}, Linear{"self_attn.o_proj", shape.hidden, q}}) {
        Add(p + name + ".weight", {out, in}, 1.5 / std::sqrt(in));
        if (shape.bias) Add(p + name + ".bias", {out}, 0.3);
      }
      Add(p + "mlp.gate_proj.weight", {shape.intermediate, shape.hidden}, 1 / std::sqrt(shape.hidden));
      Add(p + "mlp.up_proj.weight", {shape.intermediate, shape.hidden}, 1 / std::sqrt(shape.hidden));
      Add(p + "mlp.down_proj.weight", {shape.hidden, shape.intermediate}, 1 / std::sqrt(shape.intermediate));
    }
    EXPECT_TRUE(WriteSafetensors(dir_.path() + "/model.safetensors", tensors_, {}).ok());
    dir_.Write("config.json", Config());
  }

  const std::string& dir() const { return dir_.path(); }
  std::shared_ptr<const Checkpoint> Open() const {
    auto checkpoint = Checkpoint::Open(dir());
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
    return std::move(checkpoint).value();
  }

  // Logits [tokens, vocab] in float64; every token sees all before it exactly.
  std::vector<std::vector<double>> Forward(const std::vector<std::int32_t>& ids) const;

  std::vector<std::int32_t> RandomIds(int n, unsigned seed) const {
    std::mt19937 rng(seed);
    std::vector<std::int32_t> ids(static_cast<std::size_t>(n));
    for (auto& id : ids) id = static_cast<std::int32_t>(rng() % static_cast<unsigned>(shape_.vocab));
    return ids;
  }

 private:
  struct Linear {
    const char* name;
    int out, in;
  };
  using Rows = std::vector<std::vector<double>>;

  void Add(const std::string& name, std::vector<std::int64_t> shape, double sigma, double mean = 0) {
    std::size_t n = 1;
    for (const std::int64_t size : shape) n *= static_cast<std::size_t>(size);
    std::normal_distribution<double> normal(mean, sigma);
    std::vector<std::byte>& bytes = bytes_[name];
    bytes.resize(n * DTypeBytes(shape_.dtype));
    for (std::size_t i = 0; i < n; ++i) {
      // Seven mantissa bits, so that bf16, f16 and f32 files hold the same model; f16 reaches down to 2^-14 exactly.
      const float value = kernels::Bf16ToFloat(kernels::FloatToBf16(static_cast<float>(normal(rng_))));
      const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
      if (shape_.dtype == DType::kF32) {
        std::memcpy(bytes.data() + 4 * i, &value, 4);
      } else if (shape_.dtype == DType::kBf16) {
        const auto half = static_cast<std::uint16_t>(bits >> 16);
        std::memcpy(bytes.data() + 2 * i, &half, 2);
      } else {
        const int exponent = static_cast<int>((bits >> 23) & 0xff) - 127 + 15;
        const std::uint32_t rest =
            exponent <= 0 ? 0 : static_cast<std::uint32_t>(exponent) << 10 | (bits >> 13 & 0x3ff);
        const auto half = static_cast<std::uint16_t>((bits >> 16 & 0x8000) | rest);
        std::memcpy(bytes.data() + 2 * i, &half, 2);
      }
    }
    tensors_[name] = {shape_.dtype, std::move(shape), bytes.data(), bytes.size()};
    values_[name].resize(n);
    std::vector<float> read(n);
    ReadFloats(tensors_[name], 0, static_cast<std::int64_t>(n), read.data());
    std::copy(read.begin(), read.end(), values_[name].begin());
  }

  std::string Config() const {
    const auto field = [](const char* name, int value) {
      return "\"" + std::string(name) + "\": " + std::to_string(value) + ", ";
    };
    return "{\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\", \"hidden_act\": \"silu\", " +
           field("vocab_size", shape_.vocab) + field("hidden_size", shape_.hidden) +
           field("num_hidden_layers", shape_.n_layers) + field("num_attention_heads", shape_.n_heads) +
           field("num_key_value_heads", shape_.n_kv_heads) + field("head_dim", shape_.head_dim) +
           field("intermediate_size", shape_.intermediate) + field("max_position_embeddings", 2048) +
           field("bos_token_id", 1) + field("eos_token_id", 2) + "\"rms_norm_eps\": 1e-5, \"rope_theta\": 10000.0, " +
           "\"rope_scaling\": " + shape_.rope_scaling + ", \"attention_bias\": " + (shape_.bias ? "true" : "false") +
           ", \"tie_word_embeddings\": " + (shape_.tied ? "true" : "false") + "}";
  }

  std::vector<double> MatVec(const std::string& name, const std::vector<double>& x, std::size_t n_out) const {
    const std::vector<double>& w = values_.at(name + ".weight");
    std::vector<double> y(n_out, 0.0);
    for (std::size_t o = 0; o < n_out; ++o) {
      for (std::size_t i = 0; i < x.size(); ++i) y[o] += w[o * x.size() + i] * x[i];
    }
    const auto bias = values_.find(name + ".bias");
    for (std::size_t o = 0; bias != values_.end() && o < n_out; ++o) y[o] += bias->second[o];
    return y;
  }

  std::vector<double> Norm(const std::string& name, const std::vector<double>& x) const {
    double sum = 0;
    for (const double v : x) sum += v * v;
    const double scale = 1 / std::sqrt(sum / static_cast<double>(x.size()) + static_cast<double>(1e-5F));
    std::vector<double> y(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) y[i] = x[i] * scale * values_.at(name)[i];
    return y;
  }

  void Rope(std::vector<double>& x, int pos, const std::vector<double>& inv_freq) const {
    const auto d = static_cast<std::size_t>(shape_.head_dim);
    for (std::size_t head = 0; head < x.size() / d; ++head) {
      for (std::size_t i = 0; i < d / 2; ++i) {
        const double c = std::cos(pos * inv_freq[i]), s = std::sin(pos * inv_freq[i]);
        double& a = x[head * d + i];
        double& b = x[head * d + d / 2 + i];
        const double turned = a * c - b * s;
        b = b * c + a * s;
        a = turned;
      }
    }
  }

  TinyShape shape_;
  std::mt19937 rng_;
  TempDir dir_;
  std::map<std::string, std::vector<std::byte>> bytes_;
  std::map<std::string, std::vector<double>> values_;
  TensorMap tensors_;
};

inline std::vector<std::vector<double>> TinyModel::Forward(const std::vector<std::int32_t>& ids) const {
  const auto d = static_cast<std::size_t>(shape_.head_dim), hidden = static_cast<std::size_t>(shape_.hidden);
  const auto n_heads = static_cast<std::size_t>(shape_.n_heads), n_kv = static_cast<std::size_t>(shape_.n_kv_heads);
  const std::vector<double> inv_freq = RopeInverseFrequencies(Open()->config());
  Rows x;
  for (const std::int32_t id : ids) {
    const auto row = values_.at("model.embed_tokens.weight").begin() + id * shape_.hidden;
    x.emplace_back(row, row + shape_.hidden);
  }
  for (int l = 0; l < shape_.n_layers; ++l) {
    const std::string p = "model.layers." + std::to_string(l) + ".";
    Rows keys, values;
    for (std::size_t t = 0; t < x.size(); ++t) {
      const std::vector<double> normed = Norm(p + "input_layernorm.weight", x[t]);
      std::vector<double> q = MatVec(p + "self_attn.q_proj", normed, n_heads * d);
      keys.push_back(MatVec(p + "self_attn.k_proj", normed, n_kv * d));
      values.push_back(MatVec(p + "self_attn.v_proj", normed, n_kv * d));
      Rope(q, static_cast<int>(t), inv_freq);
      Rope(keys.back(), static_cast<int>(t), inv_freq);
      std::vector<double> attended(n_heads * d, 0.0);
      for (std::size_t h = 0; h < n_heads; ++h) {
        const std::size_t g = h / (n_heads / n_kv);
        std::vector<double> weight(t + 1, 0.0);
        for (std::size_t s = 0; s <= t; ++s) {
          for (std::size_t i = 0; i < d; ++i)
            weight[s] += q[h * d + i] * keys[s][g * d + i] / std::sqrt(static_cast<double>(d));
        }
        const double max = *std::max_element(weight.begin(), weight.end());
        double sum = 0;
        for (double& w : weight) sum += w = std::exp(w - max);
        for (std::size_t s = 0; s <= t; ++s) {
          for (std::size_t i = 0; i < d; ++i) attended[h * d + i] += weight[s] / sum * values[s][g * d + i];
        }
      }
      const std::vector<double> o = MatVec(p + "self_attn.o_proj", attended, hidden);
      for (std::size_t i = 0; i < hidden; ++i) x[t][i] += o[i];
    }
    for (auto& row : x) {
      const std::vector<double> normed = Norm(p + "post_attention_layernorm.weight", row);
      std::vector<double> gate = MatVec(p + "mlp.gate_proj", normed, static_cast<std::size_t>(shape_.intermediate));
      const std::vector<double> up = MatVec(p + "mlp.up_proj", normed, static_cast<std::size_t>(shape_.intermediate));
      for (std::size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
      const std::vector<double> down = MatVec(p + "mlp.down_proj", gate, hidden);
      for (std::size_t i = 0; i < hidden; ++i) row[i] += down[i];
    }
  }
  Rows logits;
  for (const auto& row : x) {
    logits.push_back(MatVec(shape_.tied ? "model.embed_tokens" : "lm_head", Norm("model.norm.weight", row),
                            static_cast<std::size_t>(shape_.vocab)));
  }
  return logits;
}

}  // namespace zeroc::testing
