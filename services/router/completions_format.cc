// Writing the answers of /v1/completions and its neighbours.
#include <nlohmann/json.hpp>
#include <utility>

#include "services/router/completions_api.h"

namespace zeroc {
namespace {

// Field order is what people see in curl, so it is kept. Text that is not UTF-8 is our codec's bug, not a reason to
// throw.
using Json = nlohmann::ordered_json;

std::string Dump(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }
std::string Event(const Json& json) { return "data: " + Dump(json) + "\n\n"; }

const char* FinishName(v1::FinishReason reason) { return reason == v1::FINISH_REASON_LENGTH ? "length" : "stop"; }

Json UsageJson(const v1::Usage& usage) {
  return {{"prompt_tokens", usage.prompt_tokens()},
          {"completion_tokens", usage.completion_tokens()},
          {"total_tokens", usage.prompt_tokens() + usage.completion_tokens()},
          {"prompt_tokens_details", {{"cached_tokens", usage.cached_tokens()}}}};
}

Json ZerocJson(const v1::Started& started, const v1::RequestStats& stats) {
  const v1::PhaseSeconds& phases = stats.phases();
  return {{"profile", started.profile()},
          {"reason", started.reason()},
          {"ppl_increase", started.ppl_increase()},
          {"ppl_base", started.ppl_base()},
          {"kv_bytes",
           {{"raw", stats.kv_bytes().raw()}, {"packed", stats.kv_bytes().packed()}, {"wire", stats.kv_bytes().wire()}}},
          {"ttft_seconds", stats.ttft_seconds()},
          {"jct_seconds", stats.jct_seconds()},
          {"phases",
           {{"queue", phases.queue()},
            {"reserve", phases.reserve()},
            {"prefill", phases.prefill()},
            {"wire", phases.wire()},
            {"admit", phases.admit()},
            {"decode", phases.decode()}}},
          {"wire_seconds", stats.wire_total_seconds()},
          {"wire_hidden_share", stats.wire_hidden_share()},
          {"transport", stats.transport()},
          {"prefill_worker", stats.prefill_worker()},
          {"decode_worker", stats.decode_worker()},
          {"attempts", stats.attempts()}};
}

const char* ErrorType(int http_status) {
  if (http_status == 429) return "rate_limit_error";
  if (http_status == 503) return "service_unavailable";
  return http_status < 500 ? "invalid_request_error" : "server_error";
}

Json ErrorJson(int http_status, std::string_view message, std::string_view code) {
  Json error{{"message", message}, {"type", ErrorType(http_status)}, {"param", nullptr}, {"code", http_status}};
  if (!code.empty()) error["code"] = code;
  return {{"error", std::move(error)}};
}

// OpenAI's parallel lists. Offsets count bytes of the text so far; a token whose text is still held back has the offset
// at which it will appear.
Json LogprobsJson(const v1::Delta& delta, const TextCodec& codec, std::size_t* text_offset) {
  if (delta.logprobs().empty()) return nullptr;
  Json tokens = Json::array(), logprobs = Json::array(), tops = Json::array(), offsets = Json::array();
  for (const v1::TokenLogprobs& token : delta.logprobs()) {
    const std::string text = codec.TokenText(token.token_id());
    tokens.push_back(text);
    logprobs.push_back(token.logprob());
    Json top = Json::object();
    for (const v1::TopLogprob& best : token.top()) top[codec.TokenText(best.token_id())] = best.logprob();
    tops.push_back(std::move(top));
    offsets.push_back(*text_offset);
    *text_offset += text.size();
  }
  return {{"tokens", tokens}, {"token_logprobs", logprobs}, {"top_logprobs", tops}, {"text_offset", offsets}};
}

Json Envelope(const std::string& id, std::int64_t created, const std::string& model) {
  return {{"id", "cmpl-" + id}, {"object", "text_completion"}, {"created", created}, {"model", model}};
}

Json Choice(const std::string& text, Json logprobs, Json finish_reason) {
  Json choice{{"index", 0}, {"text", text}};
  choice["logprobs"] = std::move(logprobs);
  choice["finish_reason"] = std::move(finish_reason);
  return Json::array({std::move(choice)});
}

}  // namespace

CompletionFormatter::CompletionFormatter(std::string id, std::int64_t created, const TextCodec& codec,
                                         bool with_usage_field)
    : id_(std::move(id)), created_(created), codec_(codec), with_usage_field_(with_usage_field) {}

std::string CompletionFormatter::DeltaEvent(const v1::Delta& delta) {
  Json json = Envelope(id_, created_, started_.model());
  json["choices"] = Choice(delta.text(), LogprobsJson(delta, codec_, &text_offset_), nullptr);
  if (with_usage_field_) json["usage"] = nullptr;
  return Event(json);
}

std::string CompletionFormatter::FinalEvents(const v1::Final& final) {
  Json json = Envelope(id_, created_, started_.model());
  json["choices"] = Choice("", nullptr, FinishName(final.finish_reason()));
  json["zeroc"] = ZerocJson(started_, final.stats());
  if (with_usage_field_) json["usage"] = nullptr;
  std::string events = Event(json);
  if (with_usage_field_) {
    Json usage = Envelope(id_, created_, started_.model());
    usage["choices"] = Json::array();
    usage["usage"] = UsageJson(final.usage());
    events += Event(usage);
  }
  return events + "data: [DONE]\n\n";
}

void CompletionFormatter::AddDelta(const v1::Delta& delta) {
  whole_.mutable_text()->append(delta.text());
  whole_.mutable_logprobs()->MergeFrom(delta.logprobs());
}

std::string CompletionFormatter::Body(const v1::Final& final) const {
  Json json = Envelope(id_, created_, started_.model());
  std::size_t offset = 0;
  json["choices"] = Choice(whole_.text(), LogprobsJson(whole_, codec_, &offset), FinishName(final.finish_reason()));
  json["usage"] = UsageJson(final.usage());
  json["zeroc"] = ZerocJson(started_, final.stats());
  return Dump(json);
}

std::string ErrorBody(int http_status, std::string_view message, std::string_view code) {
  return Dump(ErrorJson(http_status, message, code));
}

std::string ErrorEvent(const Status& status, ErrorOrigin origin) {
  const int http_status = HttpStatusOf(status, origin);
  return "event: error\n" + Event(ErrorJson(http_status, status.message(), StatusCodeName(status.code())));
}

int HttpStatusOf(const Status& status, ErrorOrigin origin) {
  switch (status.code()) {
    case StatusCode::kOk:
      return 200;
    case StatusCode::kCancelled:
      return 499;
    case StatusCode::kInvalidArgument:
    case StatusCode::kOutOfRange:
      return 400;
    case StatusCode::kUnauthenticated:
      return 401;
    case StatusCode::kPermissionDenied:
      return 403;
    case StatusCode::kNotFound:
      return 404;
    case StatusCode::kAlreadyExists:
    case StatusCode::kAborted:
      return 409;
    case StatusCode::kResourceExhausted:
      return 429;
    case StatusCode::kUnavailable:
      return origin == ErrorOrigin::kWorker ? 502 : 503;
    case StatusCode::kDeadlineExceeded:
      return 504;
    case StatusCode::kUnimplemented:
      return 501;
    default:
      return origin == ErrorOrigin::kWorker ? 502 : 500;
  }
}

std::string ModelsBody(const v1::GetModelInfoResponse& info, std::int64_t created) {
  Json profiles = Json::array();
  for (const v1::ProfileInfo& profile : info.profiles()) {
    profiles.push_back({{"name", profile.name()},
                        {"kv_bytes_per_token", profile.kv_bytes_per_token()},
                        {"ppl_increase", profile.ppl_increase()}});
  }
  Json model{{"id", info.model()},
             {"object", "model"},
             {"created", created},
             {"owned_by", "zeroc"},
             {"max_model_len", info.max_positions()},
             {"zeroc", {{"plan_id", info.plan_id()}, {"ppl_base", info.ppl_base()}, {"profiles", profiles}}}};
  return Dump({{"object", "list"}, {"data", Json::array({std::move(model)})}});
}

std::string TokenizeBody(const std::vector<std::uint32_t>& ids, std::uint32_t max_positions) {
  return Dump({{"count", ids.size()}, {"max_model_len", max_positions}, {"tokens", ids}});
}

std::string DetokenizeBody(const std::string& text) { return Dump({{"prompt", text}}); }

}  // namespace zeroc
