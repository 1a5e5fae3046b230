// The JSON of /v1/completions and its neighbours: OpenAI's shapes, plus ours under "zeroc". Pure: text in, text out.
//
// Bodies are foreign: bounded depth, every field's type and range checked and named, unknown fields refused. A field
// that we do not support is accepted while it asks for nothing (null, n = 1, echo = false) and refused otherwise.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "libzeroc/base/status.h"
#include "services/router/response_sink.h"
#include "services/router/served_model.h"
#include "zeroc/v1/inference.pb.h"

namespace zeroc {

struct CompletionRequest {
  v1::GenerateRequest generate;
  std::string model;  // empty: not stated
  bool stream = false;
  bool include_usage = false;  // stream_options.include_usage
};

// kInvalidArgument naming the field.
Result<CompletionRequest> ParseCompletionRequest(std::string_view body);

// One answer's JSON. Not thread-safe.
class CompletionFormatter {
 public:
  // `created` in seconds since 1970. The codec outlives the formatter.
  CompletionFormatter(std::string id, std::int64_t created, const TextCodec& codec, bool with_usage_field);

  void SetStarted(const v1::Started& started) { started_ = started; }

  // Server-sent events, each "data: {..}\n\n".
  std::string DeltaEvent(const v1::Delta& delta);
  std::string FinalEvents(const v1::Final& final);  // finish chunk, usage chunk if asked for, [DONE]
  // Whole answers. AddDelta collects; the choice is made whole by Body.
  void AddDelta(const v1::Delta& delta);
  std::string Body(const v1::Final& final) const;

 private:
  const std::string id_;
  const std::int64_t created_;
  const TextCodec& codec_;
  const bool with_usage_field_;
  v1::Started started_;
  v1::Delta whole_;
  std::size_t text_offset_ = 0;  // of the next token in the text, in bytes
};

// {"error":{"message":..,"type":..,"param":null,"code":..}}
std::string ErrorBody(int http_status, std::string_view message, std::string_view code = {});
std::string ErrorEvent(const Status& status, ErrorOrigin origin);  // "event: error\ndata: {..}\n\n"
// 400, 404, 409, 429, 499 (cancelled), 500, 502 (a worker failed or was lost), 503, 504.
int HttpStatusOf(const Status& status, ErrorOrigin origin);

std::string ModelsBody(const v1::GetModelInfoResponse& info, std::int64_t created);

// {"text": ..} or {"prompt": ..} -> the text, and {"tokens": [..]} -> the ids.
Result<std::string> ParseTokenizeRequest(std::string_view body);
Result<std::vector<std::uint32_t>> ParseDetokenizeRequest(std::string_view body);
std::string TokenizeBody(const std::vector<std::uint32_t>& ids, std::uint32_t max_positions);
std::string DetokenizeBody(const std::string& text);

}  // namespace zeroc
