// Reading the bodies of /v1/completions, /tokenize and /detokenize.
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
  void Fail(const char* name, const std::string& why) {
    if (status_.ok()) status_ = InvalidArgument(prefix_ + name + ": " + why);
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
    if (value != nullptr && *value != neutral) Fail(name, "only " + neutral.dump() + " is supported");
  }
  // Clients send these for their own books.
  void Ignore(const char* name) { Find(name); }

  Status Done() {
    for (const auto& entry : object_.items()) {
      if (status_.ok() && !known_.contains(entry.key())) {
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

// A string, token ids, or a batch of exactly one of either.
void ReadPrompt(Fields& fields, v1::GenerateRequest* generate) {
  const Json* prompt = fields.Find("prompt");
  if (prompt == nullptr) return fields.Fail("prompt", "is missing");
  if (prompt->is_array() && !prompt->empty() && !prompt->front().is_number()) {
    if (prompt->size() != 1) return fields.Fail("prompt", "one prompt per request is supported");
    prompt = &prompt->front();
  }
  if (prompt->is_string()) {
    generate->set_text(prompt->get_ref<const std::string&>());
  } else if (!prompt->is_array() || !ReadIds(*prompt, generate->mutable_token_ids())) {
    fields.Fail("prompt", "is neither a string nor a list of token ids");
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
  fields.Bool("ignore_eos", [&](bool x) { sampling->set_ignore_eos(x); });
  fields.Unsigned("logprobs", [&](std::uint32_t x) { sampling->set_logprobs(x); });
  ReadSeed(fields, sampling);
  ReadStop(fields, sampling);
  ReadStopTokens(fields, sampling);
  ReadLogitBias(fields, sampling);
}

}  // namespace

Result<CompletionRequest> ParseCompletionRequest(std::string_view body) {
  Json json;
  ZEROC_ASSIGN_OR_RETURN(json, ParseObject(body));
  CompletionRequest request;
  v1::GenerateRequest& generate = request.generate;
  Fields fields(json, "");
  ReadPrompt(fields, &generate);
  ReadSampling(fields, generate.mutable_sampling());
  fields.String("model", [&](const std::string& x) { request.model = x; });
  fields.Bool("stream", [&](bool x) { request.stream = x; });
  fields.Number("max_ppl_increase", [&](double x) { generate.mutable_kv()->set_max_ppl_increase(x); });
  fields.String("profile", [&](const std::string& x) { generate.mutable_kv()->set_profile(x); });
  fields.Number("ttft_slo_ms", [&](double x) { generate.set_ttft_slo_ms(x); });
  fields.Number("tpot_slo_ms", [&](double x) { generate.set_tpot_slo_ms(x); });
  if (const Json* priority = fields.Find("priority"); priority != nullptr) {
    const bool fits = priority->is_number_integer() && std::abs(priority->get<double>()) <= 1e6;
    if (!fits) fields.Fail("priority", "is not a whole number of at most a million");
    if (fits) generate.set_priority(priority->get<int>());
  }
  fields.Only("n", 1);
  fields.Only("best_of", 1);
  fields.Only("echo", false);
  fields.Only("suffix", "");
  fields.Only("min_tokens", 0);
  fields.Only("use_beam_search", false);
  fields.Only("skip_special_tokens", true);
  fields.Ignore("user");
  if (const Json* options = fields.Find("stream_options"); options != nullptr) {
    if (!options->is_object()) return InvalidArgument("stream_options: is not an object");
    Fields inner(*options, "stream_options.");
    inner.Bool("include_usage", [&](bool x) { request.include_usage = x; });
    inner.Only("continuous_usage_stats", false);
    ZEROC_RETURN_IF_ERROR(inner.Done());
    if (!request.stream) fields.Fail("stream_options", "needs stream = true");
  }
  ZEROC_RETURN_IF_ERROR(fields.Done());
  return request;
}

Result<std::string> ParseTokenizeRequest(std::string_view body) {
  Json json;
  ZEROC_ASSIGN_OR_RETURN(json, ParseObject(body));
  Fields fields(json, "");
  std::string text;
  bool given = false;
  for (const char* name : {"text", "prompt"}) {
    fields.String(name, [&](const std::string& x) {
      text = x;
      given = true;
    });
  }
  fields.Ignore("model");
  fields.Only("add_special_tokens", true);
  ZEROC_RETURN_IF_ERROR(fields.Done());
  if (!given) return InvalidArgument("text: is missing");
  return text;
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
