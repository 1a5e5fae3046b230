// Shared by model, engine and baseline tests: one tiny checkpoint of every kind of model, and the logits that Hugging
// Face transformers compute for it (tests/data/model_kinds_golden.json, made by
// tools/golden/make_model_kinds_golden.py, which says how the weights are drawn).
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/bf16.h"
#include "libzeroc/checkpoint/checkpoint.h"
#include "libzeroc/checkpoint/checkpoint_testing.h"

namespace zeroc::testing {

inline constexpr const char* kModelKinds[] = {"llama_mha", "llama_biases", "mistral", "qwen2", "qwen3", "opt"};

class GoldenModel {
 public:
  using Json = nlohmann::json;
  using Tensors = std::map<std::string, std::vector<std::uint16_t>>;  // bf16
  struct Row {
    int pos;
    std::vector<double> logits;  // [vocab]
  };

  // `change` may spoil config and tensors before they are written.
  explicit GoldenModel(std::string_view kind, const std::function<void(Json&, Tensors&)>& change = nullptr) {
    std::ifstream in("tests/data/model_kinds_golden.json");
    const Json golden = Json::parse(in);
    for (const Json& model : golden.at("models")) {
      if (model.at("kind") == kind) Write(model, change);
    }
    EXPECT_FALSE(ids_.empty()) << "no kind " << kind;
  }

  const std::string& dir() const { return dir_.path(); }
  const std::vector<std::int32_t>& ids() const { return ids_; }
  const std::vector<Row>& rows() const { return rows_; }
  std::shared_ptr<const Checkpoint> Open() const {
    auto checkpoint = Checkpoint::Open(dir());
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
    return std::move(checkpoint).value();
  }

 private:
  static std::uint64_t Fnv1a64(std::string_view text) {
    std::uint64_t state = 0xcbf29ce484222325u;
    for (const char byte : text) state = (state ^ static_cast<unsigned char>(byte)) * 0x100000001b3u;
    return state;
  }

  static std::vector<std::uint16_t> Draw(const Json& spec) {
    std::size_t n = 1;
    for (const Json& size : spec.at("shape")) n *= size.get<std::size_t>();
    std::uint64_t state = Fnv1a64(spec.at("name").get<std::string>());
    const auto half_range = spec.at("half_range").get<std::uint64_t>();
    std::vector<std::uint16_t> values(n);
    for (std::uint16_t& value : values) {
      std::uint64_t z = state += 0x9e3779b97f4a7c15u;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
      z ^= z >> 31;
      const auto k =
          static_cast<double>(static_cast<std::int64_t>(z % (2 * half_range + 1))) - static_cast<double>(half_range);
      const double exact = spec.at("mean").get<double>() + std::ldexp(k, spec.at("log2_step").get<int>());
      value = kernels::FloatToBf16(static_cast<float>(exact));
    }
    return values;
  }

  void Write(const Json& model, const std::function<void(Json&, Tensors&)>& change) {
    Json config = model.at("config");
    std::map<std::string, std::vector<std::int64_t>> shapes;
    Tensors values;
    for (const Json& spec : model.at("tensors")) {
      const auto name = spec.at("name").get<std::string>();
      values[name] = Draw(spec);
      shapes[name] = spec.at("shape").get<std::vector<std::int64_t>>();
    }
    Tensors changed = values;
    if (change) change(config, changed);
    TensorMap tensors;
    for (const auto& [name, data] : changed) {
      // "model." may have been taken off.
      auto shape = shapes.find(name);
      if (shape == shapes.end()) shape = shapes.find("model." + name);
      ASSERT_TRUE(shape != shapes.end()) << name;
      tensors[name] = {DType::kBf16, shape->second, reinterpret_cast<const std::byte*>(data.data()), 2 * data.size()};
    }
    ASSERT_TRUE(WriteSafetensors(dir_.path() + "/model.safetensors", tensors, {}).ok());
    dir_.Write("config.json", config.dump());
    ids_ = model.at("ids").get<std::vector<std::int32_t>>();
    for (const Json& row : model.at("rows")) {
      rows_.push_back({row.at("pos").get<int>(), row.at("logits").get<std::vector<double>>()});
    }
  }

  TempDir dir_;
  std::vector<std::int32_t> ids_;
  std::vector<Row> rows_;
};

}  // namespace zeroc::testing
