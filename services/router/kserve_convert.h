// The Open Inference Protocol's tensors to our request and back. Pure. What is accepted: docs/api.md.
//
// Messages are foreign: names, datatypes, shapes and lengths are checked and named, unknown ones refused.
#pragma once

#include <chrono>
#include <optional>
#include <string>

#include "inference/grpc_service.pb.h"
#include "libzeroc/base/status.h"
#include "zeroc/v1/inference.pb.h"

namespace zeroc {

struct KserveRequest {
  std::string id;                // the client's, goes back with every answer
  std::string model;             // as stated
  v1::GenerateRequest generate;  // text prompt; no request_id
  bool streaming = false;        // one answer for every piece of text
  bool raw = false;              // answers in raw_output_contents, as the inputs came
  bool want_text = true;         // of the outputs: text_output, finish_reason
  bool want_finish_reason = true;
  bool empty_final = false;  // Triton's: the last answer is one of its own, without tensors
  std::optional<std::chrono::microseconds> timeout;
};

// kInvalidArgument naming the input, output or parameter; kNotFound for a version that does not exist.
Result<KserveRequest> ParseKserveRequest(const inference::ModelInferRequest& request);

// A piece of the answer, or with `final` its end: finish_reason, and the statistics as parameters.
inference::ModelInferResponse KserveAnswer(const KserveRequest& request, const std::string& text,
                                           const v1::Started& started, const v1::Final* final);
// Triton's empty last answer.
inference::ModelInferResponse KserveEmptyFinal(const KserveRequest& request);

inline constexpr char kKserveModelVersion[] = "1";
inference::ModelMetadataResponse KserveModelMetadata(const std::string& model);
inference::ModelConfig KserveModelConfig(const std::string& model);

}  // namespace zeroc
