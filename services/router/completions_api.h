// The JSON of /v1/completions, /v1/chat/completions and their neighbours: OpenAI's shapes, plus ours under "zeroc".
// Pure: text in, text out. What every field does, its range and what is refused: docs/api.md.
//
// Bodies are foreign: bounded depth, every field's type and range checked and named, unknown fields refused. A field
// that we do not support is accepted while it asks for nothing (null, best_of = n, suffix = "") and refused otherwise.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/tokenizer/chat_template.h"
#include "services/router/response_sink.h"
#include "services/router/served_model.h"
#include "zeroc/v1/inference.pb.h"

namespace zeroc {

enum class ApiKind : std::uint8_t { kCompletions, kChat };

// Text, or token ids that are used exactly as given.
using Prompt = std::variant<std::string, std::vector<std::uint32_t>>;

// What an answer shows beside the usual.
struct AnswerShape {
  bool usage = false;          // streams: a last event with the usage (stream_options.include_usage)
  bool running_usage = false;  // streams: the usage so far in every event (.continuous_usage_stats)
  bool token_ids = false;      // the ids that a text was made of (return_token_ids)
  // The answer's own tokens with so many of the best, and the prompt's; nullopt: without.
  std::optional<std::uint32_t> logprobs = {};
  std::optional<std::uint32_t> prompt_logprobs = {};
};

struct CompletionRequest {
  ApiKind kind = ApiKind::kCompletions;
  v1::GenerateRequest generate;  // all but the prompt; max_tokens may be 0 (echo alone)
  std::vector<Prompt> prompts;   // at least one; empty for chat
  std::vector<ChatMessage> messages;
  bool add_generation_prompt = true;
  std::uint32_t n = 1;  // answers per prompt
  bool echo = false;
  std::uint32_t score_from = 1;  // where the prompt is scored: its first token that is
  std::string model;             // empty: not stated
  bool stream = false;
  AnswerShape shape;
  bool add_bos = true;  // before prompts that are texts

  // The prompt's log probabilities are asked for.
  bool scores() const { return shape.prompt_logprobs.has_value() || (echo && shape.logprobs.has_value()); }
};

// kInvalidArgument naming the field.
Result<CompletionRequest> ParseCompletionRequest(std::string_view body);
Result<CompletionRequest> ParseChatRequest(std::string_view body);

// One of the answer's choices: what to run for it and what to show before it.
struct ChoicePlan {
  v1::GenerateRequest generate;           // complete but for the request id
  bool runs = true;                       // false: nothing is to be computed (echo with max_tokens 0)
  bool counts_prompt = true;              // the first choice of its prompt, for the usage
  std::string echo_text;                  // empty without echo
  std::vector<std::uint32_t> prompt_ids;  // of a scored prompt: all of it
  std::uint32_t n_forced = 0;             // of prompt_ids, at the end: they come back as the answer's first tokens
  std::vector<std::uint32_t> shown_ids;   // return_token_ids: the prompt's
};

// Choice p * n + i is the i-th answer to prompt p; a given seed is raised by i. default_max_tokens is used where a
// scored prompt states no max_tokens. kInvalidArgument naming the field.
Result<std::vector<ChoicePlan>> PlanChoices(const CompletionRequest& request, const TextCodec& codec,
                                            std::uint32_t default_max_tokens);

// One answer's JSON: of all its choices, streamed or whole. Not thread-safe.
class CompletionFormatter {
 public:
  // `created` in seconds since 1970. The codec outlives the formatter.
  CompletionFormatter(ApiKind kind, std::string id, std::int64_t created, std::string model, const TextCodec& codec,
                      const AnswerShape& shape, std::vector<ChoicePlan> plans);
  ~CompletionFormatter();

  void SetStarted(std::size_t choice, const v1::Started& started);

  // Server-sent events, each "data: {..}\n\n". Every choice: BeginEvent, DeltaEvent.., FinishEvent; then EndEvents.
  std::string BeginEvent(std::size_t choice);  // the role, or the echoed prompt; may be empty
  std::string DeltaEvent(std::size_t choice, const v1::Delta& delta);
  std::string FinishEvent(std::size_t choice, const v1::Final& final);
  std::string EndEvents() const;  // usage chunk if asked for, [DONE]
  // Whole answers: Add.. collects, Body writes.
  void AddDelta(std::size_t choice, const v1::Delta& delta);
  void AddFinal(std::size_t choice, const v1::Final& final);
  std::string Body();

 private:
  struct Choice;
  void CountTokens(Choice& choice, const v1::Delta& delta) const;
  v1::Usage TotalUsage() const;
  v1::Usage UsageSoFar() const;

  const ApiKind kind_;
  const std::string id_;
  const std::int64_t created_;
  const std::string model_;
  const TextCodec& codec_;
  const AnswerShape shape_;
  std::vector<Choice> choices_;
};

// {"error":{"message":..,"type":..,"param":..,"code":..}}; param is the field that the message begins with.
std::string ErrorBody(int http_status, std::string_view message, std::string_view code = {});
std::string ErrorEvent(const Status& status, ErrorOrigin origin);  // "event: error\ndata: {..}\n\n"
// 400, 404, 409, 429, 499 (cancelled), 500, 502 (a worker failed or was lost), 503, 504.
int HttpStatusOf(const Status& status, ErrorOrigin origin);

std::string ModelsBody(const v1::GetModelInfoResponse& info, std::int64_t created);
std::string ModelBody(const v1::GetModelInfoResponse& info, std::int64_t created);

struct TokenizeRequest {
  std::string text;
  std::vector<ChatMessage> messages;  // instead of a text
  bool add_generation_prompt = true;
  bool add_special_tokens = true;  // BOS
  bool return_token_strs = false;
};
// {"text": ..}, {"prompt": ..} or {"messages": ..}; and {"tokens": [..]} -> the ids.
Result<TokenizeRequest> ParseTokenizeRequest(std::string_view body);
Result<std::vector<std::uint32_t>> ParseDetokenizeRequest(std::string_view body);
// `codec` not null: with the text of every token.
std::string TokenizeBody(const std::vector<std::uint32_t>& ids, std::uint32_t max_positions,
                         const TextCodec* codec = nullptr);
std::string DetokenizeBody(const std::string& text);

}  // namespace zeroc
