#include "libzeroc/checkpoint/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "libzeroc/checkpoint/checkpoint_testing.h"

namespace zeroc {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::TempDir;

json Llama() {
  return json::parse(R"({"architectures":["LlamaForCausalLM"],"model_type":"llama","vocab_size":128256,
    "hidden_size":4096,"num_hidden_layers":32,"num_attention_heads":32,"num_key_value_heads":8,
    "intermediate_size":14336,"max_position_embeddings":131072,"rms_norm_eps":1e-05,"hidden_act":"silu",
    "tie_word_embeddings":false,"rope_theta":500000.0,"bos_token_id":128000,"eos_token_id":[128001,128008],
    "rope_scaling":{"factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,
                    "original_max_position_embeddings":8192,"rope_type":"llama3"}})");
}

Result<ModelConfig> Load(const std::string& config, const std::string& generation = "") {
  const TempDir dir;
  dir.Write("config.json", config);
  if (!generation.empty()) dir.Write("generation_config.json", generation);
  return LoadModelConfig(dir.path());
}

TEST(ModelConfigTest, ReadsLlama31) {
  const Result<ModelConfig> config = Load(Llama().dump(), R"({"eos_token_id":[128009,128001],"pad_token_id":128004})");
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_EQ(config->architecture, "LlamaForCausalLM");
  EXPECT_EQ(config->head_dim, 128);
  EXPECT_EQ(config->n_kv_heads, 8);
  EXPECT_EQ(config->max_positions, 131072);
  EXPECT_FLOAT_EQ(config->norm_eps, 1e-5F);
  EXPECT_EQ(config->rope_theta, 500000.0);
  EXPECT_EQ(config->rope_scaling.kind, RopeScaling::Kind::kLlama3);
  EXPECT_EQ(config->rope_scaling.original_max_positions, 8192);
  EXPECT_EQ(config->bos_id, 128000);
  EXPECT_EQ(config->pad_id, 128004);
  EXPECT_THAT(config->eos_ids, ElementsAre(128009, 128001, 128008));
}

TEST(ModelConfigTest, AbsentFieldsTakeTheFamilysDefaults) {
  json object = Llama();
  for (const char* name : {"num_key_value_heads", "rope_theta", "rope_scaling", "tie_word_embeddings", "bos_token_id",
                           "eos_token_id", "hidden_act", "rms_norm_eps"}) {
    object.erase(name);
  }
  const Result<ModelConfig> config = Load(object.dump());
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_EQ(config->n_kv_heads, 32);
  EXPECT_EQ(config->rope_theta, 10000.0);
  EXPECT_EQ(config->rope_scaling.kind, RopeScaling::Kind::kNone);
  EXPECT_FALSE(config->tie_embeddings);
  EXPECT_EQ(config->bos_id, -1);
  EXPECT_TRUE(config->eos_ids.empty());
}

TEST(ModelConfigTest, RopeMayStandInRopeParameters) {
  json object = Llama();
  object.erase("rope_theta");
  object["rope_scaling"] = nullptr;
  object["rope_parameters"] = {{"rope_theta", 1e6}, {"rope_type", "linear"}, {"factor", 2.0}};
  const Result<ModelConfig> config = Load(object.dump());
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_EQ(config->rope_theta, 1e6);
  EXPECT_EQ(config->rope_scaling.kind, RopeScaling::Kind::kLinear);
  EXPECT_EQ(config->rope_scaling.factor, 2.0);
}

TEST(ModelConfigTest, MistralNeedsFullAttention) {
  json object = Llama();
  object["architectures"] = {"MistralForCausalLM"};
  for (const json& window : {json(nullptr), json(131072)}) {
    object["sliding_window"] = window;
    EXPECT_TRUE(Load(object.dump()).ok()) << window;
  }
  object["sliding_window"] = 4096;
  const Status status = Load(object.dump()).status();
  EXPECT_EQ(status.code(), StatusCode::kUnimplemented);
  EXPECT_THAT(status.ToString(), HasSubstr("sliding_window 4096"));
}

json Qwen2() {
  return json::parse(R"({"architectures":["Qwen2ForCausalLM"],"model_type":"qwen2","vocab_size":151936,
    "hidden_size":896,"num_hidden_layers":24,"num_attention_heads":14,"num_key_value_heads":2,
    "intermediate_size":4864,"max_position_embeddings":32768,"rms_norm_eps":1e-06,"hidden_act":"silu",
    "rope_theta":1000000.0,"sliding_window":32768,"max_window_layers":21,"use_sliding_window":false,
    "use_mrope":false,"tie_word_embeddings":true,"bos_token_id":151643,"eos_token_id":151643})");
}

json Opt() {
  return json::parse(R"({"architectures":["OPTForCausalLM"],"model_type":"opt","vocab_size":50272,
    "hidden_size":768,"word_embed_proj_dim":768,"num_hidden_layers":12,"num_attention_heads":12,"ffn_dim":3072,
    "max_position_embeddings":2048,"activation_function":"relu","do_layer_norm_before":true,
    "_remove_final_layer_norm":false,"prefix":"</s>","bos_token_id":2,"eos_token_id":2,"pad_token_id":1})");
}

TEST(ModelConfigTest, ReadsQwen2) {
  const Result<ModelConfig> config = Load(Qwen2().dump());
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_TRUE(config->qkv_bias && config->tie_embeddings && config->has_rope());
  EXPECT_FALSE(config->o_bias || config->mlp_bias || config->qk_norm);
  json object = Qwen2();
  object["sliding_window"] = 4096;
  EXPECT_TRUE(Load(object.dump()).ok()) << "the switch is off";
  object["use_sliding_window"] = true;
  EXPECT_THAT(Load(object.dump()).status().ToString(), HasSubstr("config.json: sliding_window 4096 is below"));
  object = Qwen2();
  object["layer_types"] = {"full_attention", "sliding_attention"};
  EXPECT_THAT(Load(object.dump()).status().ToString(), HasSubstr("layer_types holds \"sliding_attention\""));
}

TEST(ModelConfigTest, ReadsQwen3) {
  json object = Qwen2();
  object["architectures"] = {"Qwen3ForCausalLM"};
  object["head_dim"] = 128;
  object["attention_bias"] = false;
  const Result<ModelConfig> config = Load(object.dump());
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_TRUE(config->qk_norm);
  EXPECT_FALSE(config->qkv_bias || config->o_bias);
  EXPECT_EQ(config->head_dim, 128);
}

TEST(ModelConfigTest, ReadsOpt) {
  const Result<ModelConfig> config = Load(Opt().dump());
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_FALSE(config->has_rope());
  EXPECT_EQ(config->norm, NormKind::kLayer);
  EXPECT_EQ(config->mlp, MlpKind::kRelu);
  EXPECT_EQ(config->n_kv_heads, 12);
  EXPECT_EQ(config->head_dim, 64);
  EXPECT_EQ(config->intermediate_size, 3072);
  EXPECT_TRUE(config->qkv_bias && config->o_bias && config->mlp_bias && config->tie_embeddings);
  json object = Opt();
  object["enable_bias"] = false;
  EXPECT_FALSE(Load(object.dump())->qkv_bias);
}

TEST(ModelConfigTest, OptVariantsThatComputeOtherwiseAreRefusedByName) {
  const std::pair<const char*, json> changes[] = {{"do_layer_norm_before", false},
                                                  {"_remove_final_layer_norm", true},
                                                  {"layer_norm_elementwise_affine", false},
                                                  {"activation_function", "gelu"},
                                                  {"word_embed_proj_dim", 512}};
  for (const auto& [name, value] : changes) {
    json object = Opt();
    object[name] = value;
    const Status status = Load(object.dump()).status();
    EXPECT_EQ(status.code(), StatusCode::kUnimplemented) << name;
    EXPECT_THAT(status.ToString(), HasSubstr(std::string("config.json: ") + name));
  }
  json object = Opt();
  object["ffn_dim"] = 0;
  EXPECT_THAT(Load(object.dump()).status().ToString(), HasSubstr("config.json: ffn_dim 0 is outside"));
}

struct BadField {
  std::string name;
  json value;
  std::string cause;
};

class BadFieldTest : public ::testing::TestWithParam<BadField> {};

TEST_P(BadFieldTest, IsRefusedNamingFileAndField) {
  json object = Llama();
  object[GetParam().name] = GetParam().value;
  const Status status = Load(object.dump()).status();
  ASSERT_FALSE(status.ok());
  EXPECT_THAT(status.ToString(), HasSubstr("/config.json: " + GetParam().name));
  EXPECT_THAT(status.ToString(), HasSubstr(GetParam().cause));
}

INSTANTIATE_TEST_SUITE_P(
    Cases, BadFieldTest,
    ::testing::Values(
        BadField{"architectures", {"GPT2LMHeadModel"}, "UNIMPLEMENTED"},
        BadField{"architectures", {"GemmaForCausalLM"}, "Qwen3ForCausalLM, OPTForCausalLM are"},
        BadField{"architectures", json::array(), "list of one"},
        BadField{"architectures", "LlamaForCausalLM", "list of one"}, BadField{"vocab_size", 0, "outside"},
        BadField{"vocab_size", "many", "not an integer"}, BadField{"vocab_size", nullptr, "missing"},
        BadField{"vocab_size", 1LL << 40, "outside"}, BadField{"hidden_size", -4096, "outside"},
        BadField{"hidden_size", 4096.0, "not an integer"}, BadField{"num_hidden_layers", 0, "outside"},
        BadField{"num_hidden_layers", 18446744073709551615ULL, "integer"},
        BadField{"num_attention_heads", 2048, "outside"}, BadField{"num_key_value_heads", 0, "outside"},
        BadField{"num_key_value_heads", 64, "outside"}, BadField{"head_dim", 100, "multiple of 16"},
        BadField{"head_dim", 0, "outside"}, BadField{"head_dim", 272, "outside"},
        BadField{"intermediate_size", json::array(), "not an integer"},
        BadField{"max_position_embeddings", -1, "outside"}, BadField{"rms_norm_eps", 0.0, "out of range"},
        BadField{"rms_norm_eps", true, "not a number"}, BadField{"tie_word_embeddings", 1, "not a boolean"},
        BadField{"hidden_act", "gelu", "UNIMPLEMENTED"}, BadField{"quantization_config", json::object(), "quantised"},
        BadField{"rope_theta", 0.0, "out of range"}, BadField{"rope_scaling", 3, "not an object"},
        BadField{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 2.0}}, "\"yarn\""},
        BadField{"rope_scaling", {{"rope_type", "linear"}}, "factor is missing"},
        BadField{"rope_scaling", {{"type", "linear"}, {"factor", 0.0}}, "factor"},
        BadField{"partial_rotary_factor", 0.5, "UNIMPLEMENTED"}, BadField{"bos_token_id", 128256, "outside"},
        BadField{"eos_token_id", -7, "not a token id"}, BadField{"eos_token_id", {1, "2"}, "not a token id"},
        BadField{"eos_token_id", {128256}, "outside"}));

TEST(ModelConfigTest, HeadsMustDivide) {
  json object = Llama();
  object["num_key_value_heads"] = 7;
  EXPECT_THAT(Load(object.dump()).status().ToString(), HasSubstr("not divisible by num_key_value_heads 7"));
  object = Llama();
  object["num_attention_heads"] = 33;
  EXPECT_THAT(Load(object.dump()).status().ToString(), HasSubstr("head_dim is missing"));
  object["head_dim"] = 128;
  object["num_key_value_heads"] = 11;
  EXPECT_TRUE(Load(object.dump()).ok());
}

TEST(ModelConfigTest, BrokenFilesAreErrors) {
  EXPECT_EQ(LoadModelConfig("/no/such/dir").status().code(), StatusCode::kNotFound);
  for (const std::string& text :
       {std::string("{"), std::string("[]"), std::string("\xff"), std::string(1 << 19, '[')}) {
    EXPECT_EQ(Load(text).status().code(), StatusCode::kInvalidArgument);
  }
  EXPECT_THAT(Load(std::string((1 << 20) + 1, ' ')).status().ToString(), HasSubstr("limit"));
  EXPECT_THAT(Load(Llama().dump(), "nope").status().ToString(), HasSubstr("generation_config.json"));
  EXPECT_THAT(Load(Llama().dump(), R"({"eos_token_id":"x"})").status().ToString(),
              HasSubstr("generation_config.json: eos_token_id"));
}

TEST(ModelConfigTest, ReadsTheBundledModel) {
  const Result<ModelConfig> config = LoadModelConfig("models/zeroc-demo");
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_EQ(config->head_dim, 64);
  EXPECT_EQ(config->pad_id, 0);
  EXPECT_THAT(config->eos_ids, ElementsAre(2));
  EXPECT_TRUE(config->tie_embeddings);
}

}  // namespace
}  // namespace zeroc
