// Writing errors, model lists and the answers of /tokenize and /detokenize.
#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "services/router/completions_api.h"

namespace zeroc {
namespace {

using Json = nlohmann::ordered_json;

// Text that is not UTF-8 is our bug, not a reason to throw.
std::string Dump(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

const char* ErrorType(int http_status) {
  if (http_status == 429) return "rate_limit_error";
  if (http_status == 503) return "service_unavailable";
  return http_status < 500 ? "invalid_request_error" : "server_error";
}

// The field that a message of ours begins with ("top_p 2 is not in ..", "prompt: is missing"); null for any other.
Json ParamOf(int http_status, std::string_view message) {
  if (http_status != 400) return nullptr;
  const std::size_t end = message.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_.[]");
  const std::string_view word = message.substr(0, end);
  const bool field = end != std::string_view::npos && message[end] == ':' && !word.empty();
  static constexpr std::string_view kChecked[] = {
      "forced_ids", "frequency_penalty", "logit_bias",  "logprobs",           "max_tokens", "min_p",
      "min_tokens", "presence_penalty",  "prompt",      "repetition_penalty", "stop",       "stop_token_ids",
      "top_p",      "temperature",       "tpot_slo_ms", "ttft_slo_ms"};
  if (field || std::find(std::begin(kChecked), std::end(kChecked), word) != std::end(kChecked)) return word;
  return nullptr;
}

Json ErrorJson(int http_status, std::string_view message, std::string_view code) {
  Json error{{"message", message},
             {"type", ErrorType(http_status)},
             {"param", ParamOf(http_status, message)},
             {"code", http_status}};
  if (!code.empty()) error["code"] = code;
  return {{"error", std::move(error)}};
}

// What a worker can say of a request. Its other codes are of its own doing: a lease that it does not know is no path.
bool IsOfTheRequest(StatusCode code) {
  return code == StatusCode::kInvalidArgument || code == StatusCode::kOutOfRange ||
         code == StatusCode::kResourceExhausted || code == StatusCode::kDeadlineExceeded;
}

}  // namespace

std::string ErrorBody(int http_status, std::string_view message, std::string_view code) {
  return Dump(ErrorJson(http_status, message, code));
}

std::string ErrorEvent(const Status& status, ErrorOrigin origin) {
  const int http_status = HttpStatusOf(status, origin);
  return "event: error\ndata: " + ErrorBody(http_status, status.message(), StatusCodeName(status.code())) + "\n\n";
}

int HttpStatusOf(const Status& status, ErrorOrigin origin) {
  if (origin == ErrorOrigin::kWorker && !IsOfTheRequest(status.code())) return 502;
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
      return 503;
    case StatusCode::kDeadlineExceeded:
      return 504;
    case StatusCode::kUnimplemented:
      return 501;
    default:
      return 500;
  }
}

namespace {

Json ModelJson(const v1::GetModelInfoResponse& info, std::int64_t created) {
  Json profiles = Json::array();
  for (const v1::ProfileInfo& profile : info.profiles()) {
    profiles.push_back({{"name", profile.name()},
                        {"kv_bytes_per_token", profile.kv_bytes_per_token()},
                        {"ppl_increase", profile.ppl_increase()}});
  }
  return {{"id", info.model()},
          {"object", "model"},
          {"created", created},
          {"owned_by", "zeroc"},
          {"max_model_len", info.max_positions()},
          {"zeroc", {{"plan_id", info.plan_id()}, {"ppl_base", info.ppl_base()}, {"profiles", profiles}}}};
}

}  // namespace

std::string ModelsBody(const v1::GetModelInfoResponse& info, std::int64_t created) {
  return Dump({{"object", "list"}, {"data", Json::array({ModelJson(info, created)})}});
}

std::string ModelBody(const v1::GetModelInfoResponse& info, std::int64_t created) {
  return Dump(ModelJson(info, created));
}

std::string TokenizeBody(const std::vector<std::uint32_t>& ids, std::uint32_t max_positions, const TextCodec* codec) {
  Json json{{"count", ids.size()}, {"max_model_len", max_positions}, {"tokens", ids}};
  if (codec != nullptr) {
    json["token_strs"] = Json::array();
    for (const std::uint32_t id : ids) json["token_strs"].push_back(codec->TokenText(id));
  }
  return Dump(json);
}

std::string DetokenizeBody(const std::string& text) { return Dump({{"prompt", text}}); }

}  // namespace zeroc
