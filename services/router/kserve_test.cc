#include <gtest/gtest.h>

#include <chrono>
#include <limits>

#include "services/router/kserve_convert.h"

namespace zeroc {
namespace {

using inference::ModelInferRequest;
using inference::ModelInferResponse;

ModelInferRequest::InferInputTensor* AddInput(ModelInferRequest* request, const char* name, const char* datatype) {
  auto* input = request->add_inputs();
  input->set_name(name);
  input->set_datatype(datatype);
  input->add_shape(1);
  return input;
}

ModelInferRequest TextRequest(const std::string& text) {
  ModelInferRequest request;
  request.set_model_name("m");
  request.set_id("7");
  AddInput(&request, "text_input", "BYTES")->mutable_contents()->add_bytes_contents(text);
  return request;
}

ModelInferRequest RawRequest(const std::string& text, const std::string& streaming) {
  ModelInferRequest request;
  AddInput(&request, "text_input", "BYTES");
  AddInput(&request, "streaming", "BOOL");
  request.add_raw_input_contents(std::string{static_cast<char>(text.size()), 0, 0, 0} + text);
  request.add_raw_input_contents(streaming);
  return request;
}

TEST(KserveParse, ContentsAndRawBytesMeanTheSame) {
  ModelInferRequest typed = TextRequest("hello");
  AddInput(&typed, "streaming", "BOOL")->mutable_contents()->add_bool_contents(true);
  for (const auto& request : {typed, RawRequest("hello", "\1")}) {
    const Result<KserveRequest> parsed = ParseKserveRequest(request);
    ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
    EXPECT_EQ(parsed->generate.text(), "hello");
    EXPECT_TRUE(parsed->streaming);
    EXPECT_EQ(parsed->raw, request.raw_input_contents_size() > 0);
  }
  EXPECT_FALSE(ParseKserveRequest(TextRequest("hello"))->streaming);
}

TEST(KserveParse, ParametersAreTheFieldsOfCompletions) {
  ModelInferRequest request = TextRequest("x");
  auto& parameters = *request.mutable_parameters();
  parameters["max_tokens"].set_int64_param(5);
  parameters["temperature"].set_double_param(0.5);
  parameters["top_k"].set_uint64_param(3);
  parameters["ignore_eos"].set_bool_param(true);
  parameters["stop"].set_string_param("END");
  parameters["max_ppl_increase"].set_int64_param(1);
  parameters["seed"].set_int64_param(-4);
  parameters["timeout"].set_int64_param(2'000'000);
  parameters["triton_enable_empty_final_response"].set_bool_param(true);
  const Result<KserveRequest> parsed = ParseKserveRequest(request);
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  const v1::SamplingParams& sampling = parsed->generate.sampling();
  EXPECT_EQ(sampling.max_tokens(), 5U);
  EXPECT_EQ(sampling.temperature(), 0.5F);
  EXPECT_EQ(sampling.top_k(), 3U);
  EXPECT_TRUE(sampling.ignore_eos());
  EXPECT_EQ(sampling.stop(0), "END");
  EXPECT_EQ(parsed->generate.kv().max_ppl_increase(), 1.0);
  EXPECT_EQ(static_cast<std::int64_t>(sampling.seed()), -4);
  EXPECT_EQ(parsed->timeout, std::chrono::seconds(2));
  EXPECT_TRUE(parsed->empty_final);
}

TEST(KserveParse, TheLongestTimeoutIsAYear) {
  ModelInferRequest request = TextRequest("x");
  (*request.mutable_parameters())["timeout"].set_int64_param(std::numeric_limits<std::int64_t>::max());
  EXPECT_EQ(ParseKserveRequest(request)->timeout, std::chrono::hours(24 * 365));
  (*request.mutable_parameters())["timeout"].set_int64_param(-1);
  EXPECT_FALSE(ParseKserveRequest(request).ok());
}

TEST(KserveParse, ErrorsNameWhatIsWrong) {
  const auto refused = [](const ModelInferRequest& request) {
    const Result<KserveRequest> parsed = ParseKserveRequest(request);
    return parsed.ok() ? std::string("accepted") : std::string(parsed.status().message());
  };
  EXPECT_EQ(refused({}), "input text_input: is missing");
  ModelInferRequest request = TextRequest("x");
  request.mutable_inputs(0)->set_datatype("FP32");
  EXPECT_EQ(refused(request), "input text_input: datatype is not BYTES");
  request = TextRequest("x");
  request.mutable_inputs(0)->set_shape(0, 2);
  EXPECT_EQ(refused(request), "input text_input: shape is not [1]");
  request = TextRequest("x");
  request.mutable_inputs(0)->mutable_contents()->add_bytes_contents("y");
  EXPECT_EQ(refused(request), "input text_input: contents is not one element");
  request = TextRequest("x");
  AddInput(&request, "image", "BYTES");
  EXPECT_EQ(refused(request), "input image: is not one of text_input, streaming");
  request = TextRequest("x");
  request.add_outputs()->set_name("logits");
  EXPECT_EQ(refused(request), "output logits: is not one of text_output, finish_reason");
  request = TextRequest("x");
  (*request.mutable_parameters())["best"].set_bool_param(true);
  EXPECT_EQ(refused(request), "parameter best: is not supported");
  request = TextRequest("x");
  (*request.mutable_parameters())["max_tokens"].set_string_param("5");
  EXPECT_TRUE(refused(request).starts_with("max_tokens: ")) << refused(request);
  request = TextRequest("\xff");
  EXPECT_EQ(refused(request), "input text_input or a parameter is not UTF-8");
  request = TextRequest("x");
  request.set_model_version("2");
  EXPECT_EQ(ParseKserveRequest(request).status().code(), StatusCode::kNotFound);

  request = RawRequest("x", "\1");
  request.mutable_raw_input_contents(0)->pop_back();
  EXPECT_EQ(refused(request), "input text_input: raw_input_contents is not one element of its stated length");
  request.set_raw_input_contents(0, "ab");
  EXPECT_EQ(refused(request), "input text_input: raw_input_contents has no length");
  request = RawRequest("x", "");
  EXPECT_EQ(refused(request), "input streaming: is not one byte");
  request.mutable_raw_input_contents()->RemoveLast();
  EXPECT_EQ(refused(request), "raw_input_contents: has 1 entries for 2 inputs");
}

TEST(KserveAnswer, ComesInTheFormOfTheQuestion) {
  v1::Final final;
  final.set_finish_reason(v1::FINISH_REASON_LENGTH);
  final.mutable_usage()->set_completion_tokens(3);
  final.mutable_stats()->mutable_kv_bytes()->set_wire(77);
  v1::Started started;
  started.set_profile("q4");
  const ModelInferResponse typed = KserveAnswer(*ParseKserveRequest(TextRequest("x")), "abc", started, &final);
  EXPECT_EQ(typed.id(), "7");
  ASSERT_EQ(typed.outputs_size(), 2);
  EXPECT_EQ(typed.outputs(0).contents().bytes_contents(0), "abc");
  EXPECT_EQ(typed.outputs(1).contents().bytes_contents(0), "length");
  EXPECT_EQ(typed.parameters().at("kv_bytes_wire").int64_param(), 77);
  EXPECT_EQ(typed.parameters().at("profile").string_param(), "q4");
  EXPECT_TRUE(typed.parameters().at("triton_final_response").bool_param());

  ModelInferRequest request = RawRequest("x", "\1");
  request.add_outputs()->set_name("text_output");
  const ModelInferResponse raw = KserveAnswer(*ParseKserveRequest(request), "abc", started, nullptr);
  ASSERT_EQ(raw.outputs_size(), 1);
  EXPECT_EQ(raw.raw_output_contents(0), std::string("\3\0\0\0abc", 7));
  EXPECT_FALSE(raw.parameters().at("triton_final_response").bool_param());
}

// Triton's tools take numbers and names from here; the numbers are Triton's.
TEST(KserveModelConfig, SpeaksOfTheSameTensors) {
  const inference::ModelConfig config = KserveModelConfig("m");
  EXPECT_EQ(config.name(), "m");
  EXPECT_TRUE(config.model_transaction_policy().decoupled());
  ASSERT_EQ(config.input_size(), 2);
  EXPECT_EQ(config.input(0).data_type(), 13) << "TYPE_STRING";
  EXPECT_EQ(config.input(1).data_type(), 1) << "TYPE_BOOL";
  EXPECT_EQ(config.output(1).name(), KserveModelMetadata("m").outputs(1).name());
  EXPECT_EQ(inference::ModelConfig::kModelTransactionPolicyFieldNumber, 19);
  EXPECT_EQ(inference::ModelConfig::kBackendFieldNumber, 17);
}

}  // namespace
}  // namespace zeroc
