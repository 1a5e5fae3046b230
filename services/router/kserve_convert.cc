#include "services/router/kserve_convert.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

#include "libzeroc/tokenizer/utf8.h"
#include "services/router/completions_api.h"

namespace zeroc {
namespace {

using Json = nlohmann::json;
using Input = inference::ModelInferRequest::InferInputTensor;

// Parameters that mean what the field of that name means in the body of /v1/completions.
constexpr std::string_view kShared[] = {"frequency_penalty",
                                        "ignore_eos",
                                        "max_completion_tokens",
                                        "max_ppl_increase",
                                        "max_tokens",
                                        "min_p",
                                        "min_tokens",
                                        "presence_penalty",
                                        "priority",
                                        "profile",
                                        "repetition_penalty",
                                        "seed",
                                        "stop",
                                        "temperature",
                                        "top_k",
                                        "top_p",
                                        "tpot_slo_ms",
                                        "ttft_slo_ms"};

// Longer than any request; added to the time of day it does not overflow.
constexpr std::chrono::microseconds kTimeoutMax = std::chrono::hours(24 * 365);

// A name of the client's, bounded; cutting may split a character.
std::string Shown(const std::string& name) { return ReplaceInvalidUtf8(name.substr(0, 64)); }

Json ValueOf(const inference::InferParameter& parameter) {
  switch (parameter.parameter_choice_case()) {
    case inference::InferParameter::kBoolParam:
      return parameter.bool_param();
    case inference::InferParameter::kInt64Param:
      // JSON tells 5 from -5 by type: only what is negative is signed there.
      if (parameter.int64_param() >= 0) return static_cast<std::uint64_t>(parameter.int64_param());
      return parameter.int64_param();
    case inference::InferParameter::kStringParam:
      return parameter.string_param();
    case inference::InferParameter::kDoubleParam:
      return parameter.double_param();
    case inference::InferParameter::kUint64Param:
      return parameter.uint64_param();
    case inference::InferParameter::PARAMETER_CHOICE_NOT_SET:
      return nullptr;
  }
  return nullptr;
}

Status ReadParameter(const std::string& name, const inference::InferParameter& parameter, KserveRequest* out,
                     Json* body) {
  const bool shared = std::find(std::begin(kShared), std::end(kShared), name) != std::end(kShared);
  if (shared) {
    (*body)[name] = ValueOf(parameter);
    return OkStatus();
  }
  if (name == "triton_enable_empty_final_response") {
    out->empty_final = parameter.bool_param();
    return OkStatus();
  }
  if (name == "timeout") {  // Triton's: microseconds, 0 for none
    const std::chrono::microseconds timeout(parameter.int64_param());
    if (timeout.count() < 0) return InvalidArgument("parameter timeout: is negative");
    if (timeout.count() > 0) out->timeout = std::min(timeout, kTimeoutMax);
    return OkStatus();
  }
  return InvalidArgument("parameter " + Shown(name) + ": is not supported");
}

// The bytes of the tensor's one element.
Result<std::string> RawElement(const Input& input, const std::string& raw) {
  const auto wrong = [&](const char* why) {
    return InvalidArgument("input " + input.name() + ": raw_input_contents " + why);
  };
  if (input.datatype() != "BYTES") return raw;
  constexpr std::size_t kLengthBytes = 4;
  if (raw.size() < kLengthBytes) return wrong("has no length");
  std::size_t length = 0;
  for (std::size_t i = 0; i < kLengthBytes; ++i) length |= std::size_t{static_cast<unsigned char>(raw[i])} << (8 * i);
  if (length != raw.size() - kLengthBytes) return wrong("is not one element of its stated length");
  return raw.substr(kLengthBytes);
}

Status CheckTensor(const Input& input, const char* datatype) {
  const bool one = !input.shape().empty() &&
                   std::all_of(input.shape().begin(), input.shape().end(), [](std::int64_t n) { return n == 1; });
  if (input.datatype() != datatype) {
    return InvalidArgument("input " + input.name() + ": datatype is not " + datatype);
  }
  if (!one) return InvalidArgument("input " + input.name() + ": shape is not [1]");
  return OkStatus();
}

// `raw`: null when the input brings its own contents.
Status ReadInput(const Input& input, const std::string* raw, KserveRequest* out, Json* body) {
  const bool is_text = input.name() == "text_input";
  const bool is_streaming = input.name() == "streaming" || input.name() == "stream";
  if (!is_text && !is_streaming) {
    return InvalidArgument("input " + Shown(input.name()) + ": is not one of text_input, streaming");
  }
  ZEROC_RETURN_IF_ERROR(CheckTensor(input, is_text ? "BYTES" : "BOOL"));
  std::string element;
  if (raw != nullptr) {
    ZEROC_ASSIGN_OR_RETURN(element, RawElement(input, *raw));
  } else if (is_text && input.contents().bytes_contents_size() == 1) {
    element = input.contents().bytes_contents(0);
  } else if (is_streaming && input.contents().bool_contents_size() == 1) {
    element = input.contents().bool_contents(0) ? '\1' : '\0';
  } else {
    return InvalidArgument("input " + input.name() + ": contents is not one element");
  }
  if (is_text) {
    (*body)["prompt"] = std::move(element);
    return OkStatus();
  }
  if (element.size() != 1) return InvalidArgument("input " + input.name() + ": is not one byte");
  out->streaming = element[0] != '\0';
  return OkStatus();
}

Status ReadInputs(const inference::ModelInferRequest& request, KserveRequest* out, Json* body) {
  out->raw = request.raw_input_contents_size() > 0;
  if (out->raw && request.raw_input_contents_size() != request.inputs_size()) {
    return InvalidArgument("raw_input_contents: has " + std::to_string(request.raw_input_contents_size()) +
                           " entries for " + std::to_string(request.inputs_size()) + " inputs");
  }
  for (int i = 0; i < request.inputs_size(); ++i) {
    const std::string* raw = out->raw ? &request.raw_input_contents(i) : nullptr;
    ZEROC_RETURN_IF_ERROR(ReadInput(request.inputs(i), raw, out, body));
  }
  if (!body->contains("prompt")) return InvalidArgument("input text_input: is missing");
  return OkStatus();
}

Status ReadOutputs(const inference::ModelInferRequest& request, KserveRequest* out) {
  if (request.outputs().empty()) return OkStatus();
  out->want_text = out->want_finish_reason = false;
  for (const auto& output : request.outputs()) {
    if (output.name() != "text_output" && output.name() != "finish_reason") {
      return InvalidArgument("output " + Shown(output.name()) + ": is not one of text_output, finish_reason");
    }
    (output.name() == "text_output" ? out->want_text : out->want_finish_reason) = true;
  }
  return OkStatus();
}

void AddOutput(bool raw, const char* name, const std::string& value, inference::ModelInferResponse* response) {
  auto* output = response->add_outputs();
  output->set_name(name);
  output->set_datatype("BYTES");
  output->add_shape(1);
  if (!raw) {
    output->mutable_contents()->add_bytes_contents(value);
    return;
  }
  std::string bytes;
  for (int i = 0; i < 4; ++i) bytes.push_back(static_cast<char>((value.size() >> (8 * i)) & 0xff));
  response->add_raw_output_contents(bytes + value);
}

inference::ModelInferResponse Head(const KserveRequest& request) {
  inference::ModelInferResponse response;
  response.set_model_name(request.model);
  response.set_model_version(kKserveModelVersion);
  response.set_id(request.id);
  return response;
}

void AddStats(const v1::Started& started, const v1::Final& final, inference::ModelInferResponse* response) {
  auto& parameters = *response->mutable_parameters();
  const auto number = [&](const char* name, std::uint64_t value) {
    parameters[name].set_int64_param(static_cast<std::int64_t>(value));
  };
  number("prompt_tokens", final.usage().prompt_tokens());
  number("completion_tokens", final.usage().completion_tokens());
  number("kv_bytes_raw", final.stats().kv_bytes().raw());
  number("kv_bytes_wire", final.stats().kv_bytes().wire());
  parameters["profile"].set_string_param(started.profile());
  parameters["reason"].set_string_param(started.reason());
  parameters["ppl_increase"].set_double_param(started.ppl_increase());
  parameters["ttft_seconds"].set_double_param(final.stats().ttft_seconds());
  parameters["jct_seconds"].set_double_param(final.stats().jct_seconds());
}

}  // namespace

Result<KserveRequest> ParseKserveRequest(const inference::ModelInferRequest& request) {
  if (!request.model_version().empty() && request.model_version() != kKserveModelVersion) {
    return NotFound("model version '" + Shown(request.model_version()) + "': there is only " + kKserveModelVersion);
  }
  KserveRequest out;
  out.id = request.id();
  out.model = request.model_name();
  Json body = Json::object();
  ZEROC_RETURN_IF_ERROR(ReadInputs(request, &out, &body));
  ZEROC_RETURN_IF_ERROR(ReadOutputs(request, &out));
  for (const auto& [name, parameter] : request.parameters()) {
    ZEROC_RETURN_IF_ERROR(ReadParameter(name, parameter, &out, &body));
  }
  // Through the body of /v1/completions, so that fields are read and refused in one place.
  std::string text;
  try {
    text = body.dump();
  } catch (const Json::exception&) {
    return InvalidArgument("input text_input or a parameter is not UTF-8");
  }
  CompletionRequest completion;
  ZEROC_ASSIGN_OR_RETURN(completion, ParseCompletionRequest(text));
  out.generate = std::move(completion.generate);
  out.generate.set_text(std::get<std::string>(completion.prompts.front()));
  return out;
}

inference::ModelInferResponse KserveAnswer(const KserveRequest& request, const std::string& text,
                                           const v1::Started& started, const v1::Final* final) {
  inference::ModelInferResponse response = Head(request);
  if (request.want_text) AddOutput(request.raw, "text_output", text, &response);
  if (final != nullptr) {
    const bool length = final->finish_reason() == v1::FINISH_REASON_LENGTH;
    if (request.want_finish_reason) AddOutput(request.raw, "finish_reason", length ? "length" : "stop", &response);
    AddStats(started, *final, &response);
  }
  (*response.mutable_parameters())["triton_final_response"].set_bool_param(final != nullptr && !request.empty_final);
  return response;
}

inference::ModelInferResponse KserveEmptyFinal(const KserveRequest& request) {
  inference::ModelInferResponse response = Head(request);
  (*response.mutable_parameters())["triton_final_response"].set_bool_param(true);
  return response;
}

inference::ModelMetadataResponse KserveModelMetadata(const std::string& model) {
  inference::ModelMetadataResponse response;
  response.set_name(model);
  response.add_versions(kKserveModelVersion);
  response.set_platform("zeroc");
  const auto set = [](auto* tensor, const char* name, const char* datatype) {
    tensor->set_name(name);
    tensor->set_datatype(datatype);
    tensor->add_shape(1);
  };
  set(response.add_inputs(), "text_input", "BYTES");
  set(response.add_inputs(), "streaming", "BOOL");
  set(response.add_outputs(), "text_output", "BYTES");
  set(response.add_outputs(), "finish_reason", "BYTES");
  return response;
}

inference::ModelConfig KserveModelConfig(const std::string& model) {
  inference::ModelConfig config;
  config.set_name(model);
  config.set_platform("zeroc");
  config.set_backend("zeroc");
  config.mutable_model_transaction_policy()->set_decoupled(true);
  const auto set = [](auto* tensor, const char* name, inference::DataType type) {
    tensor->set_name(name);
    tensor->set_data_type(type);
    tensor->add_dims(1);
  };
  set(config.add_input(), "text_input", inference::TYPE_STRING);
  set(config.add_input(), "streaming", inference::TYPE_BOOL);
  config.mutable_input(1)->set_optional(true);
  set(config.add_output(), "text_output", inference::TYPE_STRING);
  set(config.add_output(), "finish_reason", inference::TYPE_STRING);
  return config;
}

}  // namespace zeroc
