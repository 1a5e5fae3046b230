// Reading the bodies of /v1/completions, /v1/chat/completions, /tokenize and /detokenize.
#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "services/router/completions_api.h"

namespace zeroc {
namespace {

using Json = nlohmann::json;

// Objects in arrays in objects is all that the API has; depth costs memory.
constexpr int kDepthMax = 8;

struct TooDeep {};

Result<Json> ParseObject(std::string_view body) {
  try {
    Json json = Json::parse(body, [](int depth, Json::parse_event_t, Json&) {
      if (depth > kDepthMax) throw TooDeep();
      return true;
    });
    if (!json.is_object()) return InvalidArgument("the body is not a JSON object");
    return json;
  } catch (const Json::exception& error) {
    return InvalidArgument(std::string("the body is not JSON: ") + error.what());
  } catch (const TooDeep&) {
    return InvalidArgument("the body is nested too deeply");
  }
}

// Reads fields out of one JSON object and remembers the first thing that was wrong. null counts as absent.
class Fields {
 public:
  Fields(const Json& object, std::string prefix) : object_(object), prefix_(std::move(prefix)) {}

  // nullptr when absent.
  const Json* Find(const char* name) {
    known_.insert(name);
    const auto found = object_.find(name);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }
  void Fail(const char* name, const std::string& why) { Fail(InvalidArgument(prefix_ + name + ": " + why)); }
  void Fail(const Status& status) {
    if (status_.ok()) status_ = status;
  }

  template <typename F>
  void Number(const char* name, F set) {
    const Json* value = Find(name);
    if (value == nullptr) return;
    if (!value->is_number() || !std::isfinite(value->get<double>())) return Fail(name, "is not a number");
    set(value->get<double>());
  }
  template <typename F>
  void Unsigned(const char* name, F set) {
    const Json* value = Find(name);
    if (value == nullptr) return;
    if (!value->is_number_unsigned() || value->get<std::uint64_t>() > std::numeric_limits<std::uint32_t>::max()) {
      return Fail(name, "is not a whole number of 0 or more");
    }
    set(static_cast<std::uint32_t>(value->get<std::uint64_t>()));
  }
  template <typename F>
  void Bool(const char* name, F set) {
    const Json* value = Find(name);
    if (value == nullptr) return;
    if (!value->is_boolean()) return Fail(name, "is neither true nor false");
    set(value->get<bool>());
  }
  template <typename F>
  void String(const char* name, F set) {
    const Json* value = Find(name);
    if (value == nullptr) return;
    if (!value->is_string()) return Fail(name, "is not a string");
    set(value->get_ref<const std::string&>());
  }
  // Accepted while it says what we do anyway.
  void Only(const char* name, const Json& neutral) {
    const Json* value = Find(name);
    if (value == nullptr || *value == neutral) return;
    Fail(name, neutral.is_null() ? "is not supported" : "only " + neutral.dump() + " is supported");
  }
  // Clients send these for their own books.
  void Ignore(const char* name) { Find(name); }

  Status Done() {
    for (const auto& entry : object_.items()) {
      // Null asks for nothing: clients send their whole objects back (annotations, audio, reasoning_content, ..).
      if (status_.ok() && !entry.value().is_null() && !known_.contains(entry.key())) {
        status_ = InvalidArgument(prefix_ + entry.key().substr(0, 64) + ": unknown field");
      }
    }
    return status_;
  }

 private:
  const Json& object_;
  const std::string prefix_;
  std::set<std::string> known_;
  Status status_;
};

bool IsTokenId(const Json& value) {
  return value.is_number_unsigned() && value.get<std::uint64_t>() <= std::numeric_limits<std::uint32_t>::max();
}

bool ReadIds(const Json& array, v1::TokenIds* ids) {
  ids->mutable_ids()->Reserve(static_cast<int>(array.size()));
  for (const Json& id : array) {
    if (!IsTokenId(id)) return false;
    ids->add_ids(static_cast<std::uint32_t>(id.get<std::uint64_t>()));
  }
  return true;
}

// As many as a worker gives for any token.
constexpr std::uint32_t kPromptLogprobsMax = 20;

// Prompts times answers: each is a request of its own.
constexpr std::size_t kChoicesMax = 512;

bool ReadPromptEntry(const Json& entry, std::vector<Prompt>* prompts) {
  if (entry.is_string()) {
    prompts->emplace_back(entry.get_ref<const std::string&>());
    return true;
  }
  v1::TokenIds ids;
  if (!entry.is_array() || !ReadIds(entry, &ids)) return false;
  prompts->emplace_back(std::vector<std::uint32_t>(ids.ids().begin(), ids.ids().end()));
  return true;
}

// A string, a list of token ids, or a list of either.
void ReadPrompts(Fields& fields, std::vector<Prompt>* prompts) {
  const Json* prompt = fields.Find("prompt");
  if (prompt == nullptr) return fields.Fail("prompt", "is missing");
  const char* what = "is neither a string, nor a list of token ids, nor a list of those";
  const bool batch = prompt->is_array() && !prompt->empty() && !prompt->front().is_number();
  if (!batch) {
    if (!ReadPromptEntry(*prompt, prompts)) fields.Fail("prompt", what);
    return;
  }
  if (prompt->size() > kChoicesMax) {
    return fields.Fail("prompt", "has more than " + std::to_string(kChoicesMax) + " entries");
  }
  for (const Json& entry : *prompt) {
    if (entry.is_number() || !ReadPromptEntry(entry, prompts)) return fields.Fail("prompt", what);
  }
}

// OpenAI's content: a string, or a list of parts of which we know text.
bool ReadContent(const Json& content, std::string* text) {
  if (content.is_string()) {
    *text = content.get_ref<const std::string&>();
    return true;
  }
  if (!content.is_array()) return false;
  for (const Json& part : content) {
    const bool is_text =
        part.is_object() && part.value("type", Json()) == "text" && part.contains("text") && part["text"].is_string();
    if (!is_text) return false;
    *text += part["text"].get_ref<const std::string&>();
  }
  return true;
}

Status ReadMessage(const Json& json, const std::string& name, ChatMessage* message) {
  if (!json.is_object()) return InvalidArgument(name + ": is not an object");
  Fields fields(json, name + ".");
  fields.String("role", [&](const std::string& x) { message->role = x; });
  if (message->role == "developer") message->role = "system";
  const bool known = message->role == "system" || message->role == "user" || message->role == "assistant";
  if (!known) fields.Fail("role", "is not one of system, developer, user, assistant (tools are not supported)");
  const Json* content = fields.Find("content");
  if (content == nullptr) {
    fields.Fail("content", "is missing");
  } else if (!ReadContent(*content, &message->content)) {
    fields.Fail("content", "is neither a string nor a list of parts of type text");
  }
  fields.Ignore("name");
  fields.Only("refusal", nullptr);
  fields.Only("tool_calls", Json::array());
  fields.Only("annotations", Json::array());
  return fields.Done();
}

void ReadMessages(Fields& fields, std::vector<ChatMessage>* messages) {
  const Json* list = fields.Find("messages");
  if (list == nullptr) return fields.Fail("messages", "is missing");
  if (!list->is_array() || list->empty()) return fields.Fail("messages", "is not a list of at least one message");
  for (std::size_t i = 0; i < list->size(); ++i) {
    const std::string name = "messages[" + std::to_string(i) + "]";
    const Status status = ReadMessage((*list)[i], name, &messages->emplace_back());
    if (!status.ok()) return fields.Fail(status);
  }
}

void ReadStop(Fields& fields, v1::SamplingParams* sampling) {
  const Json* stop = fields.Find("stop");
  if (stop == nullptr) return;
  if (stop->is_string()) {
    sampling->add_stop(stop->get_ref<const std::string&>());
    return;
  }
  if (!stop->is_array()) return fields.Fail("stop", "is neither a string nor a list of strings");
  for (const Json& entry : *stop) {
    if (!entry.is_string()) return fields.Fail("stop", "is neither a string nor a list of strings");
    sampling->add_stop(entry.get_ref<const std::string&>());
  }
}

void ReadStopTokens(Fields& fields, v1::SamplingParams* sampling) {
  const Json* ids = fields.Find("stop_token_ids");
  if (ids == nullptr) return;
  v1::TokenIds read;
  if (!ids->is_array() || !ReadIds(*ids, &read)) return fields.Fail("stop_token_ids", "is not a list of token ids");
  *sampling->mutable_stop_token_ids() = read.ids();
}

void ReadLogitBias(Fields& fields, v1::SamplingParams* sampling) {
  const Json* bias = fields.Find("logit_bias");
  if (bias == nullptr) return;
  if (!bias->is_object()) return fields.Fail("logit_bias", "is not an object from token id to number");
  for (const auto& entry : bias->items()) {
    const std::string& key = entry.key();
    const bool is_id = !key.empty() && key.size() <= 9 && key.find_first_not_of("0123456789") == std::string::npos;
    if (!is_id || !entry.value().is_number()) {
      return fields.Fail("logit_bias", "is not an object from token id to number");
    }
    (*sampling->mutable_logit_bias())[static_cast<std::uint32_t>(std::stoul(key))] = entry.value().get<float>();
  }
}

void ReadSeed(Fields& fields, v1::SamplingParams* sampling) {
  const Json* seed = fields.Find("seed");
  if (seed == nullptr) return;
  if (!seed->is_number_integer()) return fields.Fail("seed", "is not a whole number");
  const bool negative = !seed->is_number_unsigned();
  sampling->set_seed(negative ? static_cast<std::uint64_t>(seed->get<std::int64_t>()) : seed->get<std::uint64_t>());
}

void ReadSampling(Fields& fields, v1::SamplingParams* sampling) {
  fields.Unsigned("max_tokens", [&](std::uint32_t x) { sampling->set_max_tokens(x); });
  fields.Unsigned("max_completion_tokens", [&](std::uint32_t x) { sampling->set_max_tokens(x); });
  fields.Number("temperature", [&](double x) { sampling->set_temperature(static_cast<float>(x)); });
  fields.Number("top_p", [&](double x) { sampling->set_top_p(static_cast<float>(x)); });
  fields.Number("min_p", [&](double x) { sampling->set_min_p(static_cast<float>(x)); });
  fields.Number("repetition_penalty", [&](double x) { sampling->set_repetition_penalty(static_cast<float>(x)); });
  fields.Number("presence_penalty", [&](double x) { sampling->set_presence_penalty(static_cast<float>(x)); });
  fields.Number("frequency_penalty", [&](double x) { sampling->set_frequency_penalty(static_cast<float>(x)); });
  // Some clients write "off" as -1.
  if (const Json* top_k = fields.Find("top_k"); top_k == nullptr || *top_k != -1) {
    fields.Unsigned("top_k", [&](std::uint32_t x) { sampling->set_top_k(x); });
  }
  fields.Bool("include_stop_str_in_output", [&](bool x) { sampling->set_include_stop(x); });
  fields.Bool("ignore_eos", [&](bool x) { sampling->set_ignore_eos(x); });
  fields.Unsigned("min_tokens", [&](std::uint32_t x) { sampling->set_min_tokens(x); });
  ReadSeed(fields, sampling);
  ReadStop(fields, sampling);
  ReadStopTokens(fields, sampling);
  ReadLogitBias(fields, sampling);
}

// What completions and chat have in common.
Status ReadCommon(Fields& fields, CompletionRequest* request) {
  v1::GenerateRequest& generate = request->generate;
  ReadSampling(fields, generate.mutable_sampling());
  fields.String("model", [&](const std::string& x) { request->model = x; });
  fields.Bool("stream", [&](bool x) { request->stream = x; });
  fields.Number("max_ppl_increase", [&](double x) { generate.mutable_kv()->set_max_ppl_increase(x); });
  fields.String("profile", [&](const std::string& x) { generate.mutable_kv()->set_profile(x); });
  fields.Number("ttft_slo_ms", [&](double x) { generate.set_ttft_slo_ms(x); });
  fields.Number("tpot_slo_ms", [&](double x) { generate.set_tpot_slo_ms(x); });
  if (const Json* priority = fields.Find("priority"); priority != nullptr) {
    const bool fits = priority->is_number_integer() && std::abs(priority->get<double>()) <= 1e6;
    if (!fits) fields.Fail("priority", "is not a whole number of at most a million");
    if (fits) generate.set_priority(priority->get<int>());
  }
  fields.Unsigned("n", [&](std::uint32_t x) { request->n = x; });
  if (request->n == 0 || request->n > kChoicesMax) {
    fields.Fail("n", "is not in [1, " + std::to_string(kChoicesMax) + "]");
  }
  fields.Bool("return_token_ids", [&](bool x) { request->shape.token_ids = x; });
  // vLLM's, which its clients send with their defaults.
  fields.Only("use_beam_search", false);
  fields.Only("length_penalty", 1.0);
  fields.Only("skip_special_tokens", true);
  fields.Only("spaces_between_special_tokens", true);
  fields.Only("return_tokens_as_token_ids", false);
  fields.Only("bad_words", Json::array());
  for (const char* name :
       {"allowed_token_ids", "truncate_prompt_tokens", "logits_processors", "guided_json", "guided_regex",
        "guided_choice", "guided_grammar", "structured_outputs", "kv_transfer_params"}) {
    fields.Only(name, nullptr);
  }
  for (const char* name : {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}) {
    fields.Ignore(name);
  }
  const Json* options = fields.Find("stream_options");
  if (options == nullptr) return OkStatus();
  if (!options->is_object()) return InvalidArgument("stream_options: is not an object");
  Fields inner(*options, "stream_options.");
  inner.Bool("include_usage", [&](bool x) { request->shape.usage = x; });
  inner.Bool("continuous_usage_stats", [&](bool x) { request->shape.running_usage = x; });
  inner.Only("include_obfuscation", false);
  ZEROC_RETURN_IF_ERROR(inner.Done());
  request->shape.running_usage &= request->shape.usage;  // as vLLM has it
  if (!request->stream) fields.Fail("stream_options", "needs stream = true");
  return OkStatus();
}

// After echo and logprobs. Scored tokens pass the workers as part of the answer, so one number holds for both.
void ReadScoring(Fields& fields, CompletionRequest* request) {
  AnswerShape& shape = request->shape;
  fields.Unsigned("prompt_logprobs", [&](std::uint32_t x) {
    if (x > kPromptLogprobsMax) fields.Fail("prompt_logprobs", "is more than " + std::to_string(kPromptLogprobsMax));
    if (request->stream) fields.Fail("prompt_logprobs", "is not available with stream = true");
    shape.prompt_logprobs = x;
  });
  fields.Unsigned("score_from", [&](std::uint32_t x) { request->score_from = x; });
  if (request->score_from == 0) fields.Fail("score_from", "is 0: nothing comes before the first token");
  if (request->score_from != 1 && !request->scores()) {
    fields.Fail("score_from", "needs prompt_logprobs, or echo = true and logprobs");
  }
  if (!shape.logprobs.has_value() && !shape.prompt_logprobs.has_value()) return;
  request->generate.mutable_sampling()->set_logprobs(
      std::max(shape.logprobs.value_or(0), shape.prompt_logprobs.value_or(0)));
}

}  // namespace

Result<CompletionRequest> ParseCompletionRequest(std::string_view body) {
  Json json;
  ZEROC_ASSIGN_OR_RETURN(json, ParseObject(body));
  CompletionRequest request;
  Fields fields(json, "");
  ReadPrompts(fields, &request.prompts);
  ZEROC_RETURN_IF_ERROR(ReadCommon(fields, &request));
  fields.Unsigned("logprobs", [&](std::uint32_t x) { request.shape.logprobs = x; });
  fields.Bool("echo", [&](bool x) { request.echo = x; });
  ReadScoring(fields, &request);
  fields.Only("best_of", request.n);
  fields.Only("suffix", "");
  fields.Only("response_format", Json{{"type", "text"}});
  fields.Bool("add_special_tokens", [&](bool x) { request.add_bos = x; });
  if (request.prompts.size() * request.n > kChoicesMax) {
    fields.Fail("n", "times the prompts is more than " + std::to_string(kChoicesMax));
  }
  ZEROC_RETURN_IF_ERROR(fields.Done());
  return request;
}

Result<CompletionRequest> ParseChatRequest(std::string_view body) {
  Json json;
  ZEROC_ASSIGN_OR_RETURN(json, ParseObject(body));
  CompletionRequest request;
  request.kind = ApiKind::kChat;
  Fields fields(json, "");
  ReadMessages(fields, &request.messages);
  ZEROC_RETURN_IF_ERROR(ReadCommon(fields, &request));
  bool logprobs = false;
  fields.Bool("logprobs", [&](bool x) { logprobs = x; });
  if (logprobs) request.shape.logprobs = 0;
  fields.Unsigned("top_logprobs", [&](std::uint32_t x) {
    if (!logprobs && x > 0) return fields.Fail("top_logprobs", "needs logprobs = true");
    if (logprobs) request.shape.logprobs = x;
  });
  ReadScoring(fields, &request);
  fields.Bool("add_generation_prompt", [&](bool x) { request.add_generation_prompt = x; });
  fields.Only("continue_final_message", false);
  fields.Only("chat_template_kwargs", Json::object());
  fields.Only("tools", Json::array());
  fields.Only("tool_choice", "none");
  fields.Only("functions", Json::array());
  fields.Only("function_call", "none");
  fields.Ignore("parallel_tool_calls");
  fields.Only("response_format", Json{{"type", "text"}});
  fields.Only("modalities", Json::array({"text"}));
  ZEROC_RETURN_IF_ERROR(fields.Done());
  return request;
}

Result<TokenizeRequest> ParseTokenizeRequest(std::string_view body) {
  Json json;
  ZEROC_ASSIGN_OR_RETURN(json, ParseObject(body));
  Fields fields(json, "");
  TokenizeRequest request;
  bool given = false;
  for (const char* name : {"text", "prompt"}) {
    fields.String(name, [&](const std::string& x) {
      request.text = x;
      given = true;
    });
  }
  if (fields.Find("messages") != nullptr) {
    if (given) fields.Fail("messages", "cannot be combined with a text");
    ReadMessages(fields, &request.messages);
    given = true;
  }
  fields.Bool("add_generation_prompt", [&](bool x) { request.add_generation_prompt = x; });
  fields.Bool("add_special_tokens", [&](bool x) { request.add_special_tokens = x; });
  fields.Bool("return_token_strs", [&](bool x) { request.return_token_strs = x; });
  fields.Ignore("model");
  ZEROC_RETURN_IF_ERROR(fields.Done());
  if (!given) return InvalidArgument("text: is missing");
  return request;
}

Result<std::vector<std::uint32_t>> ParseDetokenizeRequest(std::string_view body) {
  Json json;
  ZEROC_ASSIGN_OR_RETURN(json, ParseObject(body));
  Fields fields(json, "");
  v1::TokenIds ids;
  const Json* tokens = fields.Find("tokens");
  if (tokens == nullptr || !tokens->is_array() || !ReadIds(*tokens, &ids)) {
    fields.Fail("tokens", "is not a list of token ids");
  }
  fields.Ignore("model");
  ZEROC_RETURN_IF_ERROR(fields.Done());
  return std::vector<std::uint32_t>(ids.ids().begin(), ids.ids().end());
}

}  // namespace zeroc
