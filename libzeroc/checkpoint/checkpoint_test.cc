#include "libzeroc/checkpoint/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "libzeroc/checkpoint/checkpoint_testing.h"

namespace zeroc {
namespace {

using nlohmann::json;
using testing::Bytes;
using ::testing::HasSubstr;
using testing::RawSafetensors;
using testing::TempDir;

json TinyConfig() {
  return json::parse(R"({"architectures":["LlamaForCausalLM"],"vocab_size":32,"hidden_size":32,"num_hidden_layers":1,
    "num_attention_heads":2,"intermediate_size":64,"max_position_embeddings":64})");
}

// Three tensors; "big" is larger than the fingerprint's whole-tensor limit.
class CheckpointTest : public ::testing::Test {
 protected:
  CheckpointTest() : data_(40000, '\0') {
    for (std::size_t i = 0; i < data_.size(); ++i) data_[i] = static_cast<char>(i * 2654435761U >> 13);
    dir_.Write("config.json", TinyConfig().dump());
  }

  TensorMap Tensors() const {
    const auto view = [this](std::vector<std::int64_t> shape, std::size_t offset) {
      std::size_t bytes = 2;
      for (const std::int64_t dim : shape) bytes *= static_cast<std::size_t>(dim);
      return TensorView{
          .dtype = DType::kBf16, .shape = std::move(shape), .data = Bytes(data_).data() + offset, .bytes = bytes};
    };
    return {{"a", view({2, 3}, 0)}, {"big", view({200, 100}, 0)}, {"c", view({5}, 64)}};
  }

  void WriteShards(const TempDir& dir, json map) const {
    const TensorMap all = Tensors();
    ASSERT_TRUE(WriteSafetensors(dir.path() + "/s1", {{"a", all.at("a")}, {"c", all.at("c")}}, {}).ok());
    ASSERT_TRUE(WriteSafetensors(dir.path() + "/s2", {{"big", all.at("big")}}, {{"format", "pt"}}).ok());
    dir.Write("model.safetensors.index.json", json{{"weight_map", std::move(map)}}.dump());
    dir.Write("config.json", TinyConfig().dump());
  }

  void WriteSingle() const { ASSERT_TRUE(WriteSafetensors(Single(), Tensors(), {}).ok()); }
  std::string Single() const { return dir_.path() + "/model.safetensors"; }

  std::string FingerprintOf(const std::string& dir) const {
    const auto checkpoint = Checkpoint::Open(dir);
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
    return checkpoint.ok() ? (*checkpoint)->fingerprint() : std::string();
  }

  const TempDir dir_;
  std::string data_;
};

TEST_F(CheckpointTest, GivesViewsOfTheAskedShapeOnly) {
  WriteSingle();
  const auto checkpoint = Checkpoint::Open(dir_.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  const Result<TensorView> a = (*checkpoint)->Tensor("a", {2, 3});
  ASSERT_TRUE(a.ok()) << a.status().ToString();
  EXPECT_EQ(std::memcmp(a->data, data_.data(), 12), 0);
  EXPECT_TRUE((*checkpoint)->Has("big"));
  EXPECT_FALSE((*checkpoint)->Has("b"));
  EXPECT_EQ((*checkpoint)->Tensor("b", {2, 3}).status().code(), StatusCode::kNotFound);
  EXPECT_THAT((*checkpoint)->Tensor("a", {3, 2}).status().ToString(), HasSubstr("has shape [2, 3], not [3, 2]"));
  EXPECT_FALSE((*checkpoint)->Tensor("a", {6}).ok());
}

TEST_F(CheckpointTest, ShardsEqualTheSingleFile) {
  WriteSingle();
  const TempDir sharded;
  WriteShards(sharded, {{"a", "s1"}, {"c", "s1"}, {"big", "s2"}});
  const auto checkpoint = Checkpoint::Open(sharded.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  EXPECT_TRUE((*checkpoint)->Tensor("big", {200, 100}).ok());
  EXPECT_EQ((*checkpoint)->fingerprint(), FingerprintOf(dir_.path()));
}

TEST_F(CheckpointTest, FingerprintSeesSampledBytesNamesAndConfig) {
  WriteSingle();
  const std::string base = FingerprintOf(dir_.path());
  EXPECT_EQ(base.size(), 32U);
  for (const std::size_t offset : {std::size_t{0}, std::size_t{64}, data_.size() - 1}) {
    data_[offset] ^= 1;
    WriteSingle();
    EXPECT_NE(FingerprintOf(dir_.path()), base) << offset;
    data_[offset] ^= 1;
  }
  WriteSingle();
  EXPECT_EQ(FingerprintOf(dir_.path()), base);

  TensorMap renamed = Tensors();
  renamed["d"] = renamed.at("c");
  renamed.erase("c");
  ASSERT_TRUE(WriteSafetensors(Single(), renamed, {}).ok());
  EXPECT_NE(FingerprintOf(dir_.path()), base);

  WriteSingle();
  json config = TinyConfig();
  config["eos_token_id"] = 3;  // does not enter the arithmetic
  dir_.Write("config.json", config.dump());
  EXPECT_EQ(FingerprintOf(dir_.path()), base);
  config["rope_theta"] = 10001.0;
  dir_.Write("config.json", config.dump());
  EXPECT_NE(FingerprintOf(dir_.path()), base);
}

TEST_F(CheckpointTest, BadIndexesAreErrors) {
  const auto open = [this](json map) {
    const TempDir dir;
    WriteShards(dir, std::move(map));
    return Checkpoint::Open(dir.path()).status().ToString();
  };
  EXPECT_THAT(open({{"a", "s1"}, {"c", "s1"}}), HasSubstr("OK"));  // s2 is nobody's and stays closed
  EXPECT_THAT(open({{"a", "s1"}, {"c", "s1"}, {"big", "s3"}}), HasSubstr("NOT_FOUND"));
  EXPECT_THAT(open({{"a", "s1"}, {"c", "s2"}, {"big", "s2"}}), HasSubstr("belongs to"));
  EXPECT_THAT(open({{"a", "s1"}, {"big", "s2"}}), HasSubstr("not in the index"));
  EXPECT_THAT(open({{"a", "s1"}, {"c", "s1"}, {"big", "s2"}, {"x", "s2"}}), HasSubstr("\"x\" is missing"));
  for (const json& shard :
       {json("../s1"), json("/etc/passwd"), json(".."), json(""), json(7), json(std::string("s1\0", 3))}) {
    EXPECT_THAT(open({{"a", shard}}), HasSubstr("does not name a file")) << shard;
  }
  EXPECT_THAT(open(json::object()), HasSubstr("weight_map"));
  EXPECT_THAT(open({"s1"}), HasSubstr("weight_map"));
}

TEST_F(CheckpointTest, MissingWeightsAreNotFound) {
  const Status status = Checkpoint::Open(dir_.path()).status();
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_THAT(status.ToString(), HasSubstr("model.safetensors"));
}

TEST_F(CheckpointTest, UnalignedTensorsAreRefused) {
  const std::string header = R"({"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                             R"("w":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}})";
  dir_.Write("model.safetensors", RawSafetensors(header + std::string(8 - header.size() % 8, ' '), "12345"));
  const auto checkpoint = Checkpoint::Open(dir_.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  EXPECT_TRUE((*checkpoint)->Tensor("b", {1}).ok());
  EXPECT_THAT((*checkpoint)->Tensor("w", {1}).status().ToString(), HasSubstr("not aligned"));
}

TEST(CheckpointDemoTest, OpensTheBundledModel) {
  const auto checkpoint = Checkpoint::Open("models/zeroc-demo");
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  const ModelConfig& config = (*checkpoint)->config();
  const auto embedding = (*checkpoint)->Tensor("model.embed_tokens.weight", {config.vocab_size, config.hidden_size});
  ASSERT_TRUE(embedding.ok()) << embedding.status().ToString();
  EXPECT_EQ(embedding->dtype, DType::kBf16);
  EXPECT_EQ((*checkpoint)->fingerprint().size(), 32U);
}

}  // namespace
}  // namespace zeroc
