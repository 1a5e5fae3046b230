#include "services/router/http_front.h"

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "services/common/logging.h"
#include "services/common/trace_context.h"
#include "services/router/completions_api.h"
#include "services/router/http_answer.h"

namespace zeroc {
namespace {

// Leaves room for what tells the choices of one request apart ("-511").
constexpr std::size_t kGivenIdBytesMax = 120;

std::int64_t UnixSeconds() {
  return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

HttpResponse Json(std::string body) { return {200, "application/json", std::move(body), {}}; }

Result<std::string> RequestId(const HttpRequest& request) {
  const std::string_view given = request.Header("x-request-id");
  if (given.empty()) return NewRequestId();
  if (given.size() > kGivenIdBytesMax || !IsGoodRequestId(given)) {
    return InvalidArgument("x-request-id is not 1 to 120 printable ASCII characters");
  }
  return std::string(given);
}

Status CheckModel(const Router& router, const std::string& model) {
  if (model.empty() || model == router.model().name) return OkStatus();
  return NotFound("model '" + model.substr(0, 128) + "' is not served here; this is " + router.model().name);
}

// A chat becomes the one prompt that its template makes of it.
Status RenderChat(const Router& router, CompletionRequest* request) {
  std::string text;
  ZEROC_ASSIGN_OR_RETURN(text, router.model().chat_template->Render(request->messages, request->add_generation_prompt));
  request->prompts.emplace_back(std::move(text));
  return OkStatus();
}

Result<std::vector<ChoicePlan>> Plan(const Router& router, const ApiOptions& options, CompletionRequest* request) {
  ZEROC_RETURN_IF_ERROR(CheckModel(router, request->model));
  if (request->kind == ApiKind::kChat) ZEROC_RETURN_IF_ERROR(RenderChat(router, request));
  return PlanChoices(*request, *router.model().codec, options.default_max_tokens);
}

// The headers of every answer: the request's id, and its span where the client sent a trace.
using Headers = std::vector<std::pair<std::string, std::string>>;
Headers AnswerHeaders(const std::string& id, const std::optional<TraceContext>& span) {
  Headers headers{{"X-Request-Id", id}};
  if (span.has_value()) headers.emplace_back("traceparent", span->Header());
  return headers;
}

void Complete(Router& router, const ApiOptions& options, const std::shared_ptr<HttpExchange>& exchange, ApiKind kind) {
  const HttpRequest& http = exchange->request();
  const Result<std::string> id = RequestId(http);
  if (!id.ok()) return exchange->Respond(ErrorResponse(id.status()));
  std::optional<TraceContext> span = ParseTraceparent(http.Header("traceparent"));
  if (span.has_value()) span = ChildOf(*span);
  Headers headers = AnswerHeaders(*id, span);
  const auto refuse = [&](const Status& status) {
    HttpResponse response = ErrorResponse(status);
    response.headers.insert(response.headers.end(), headers.begin(), headers.end());
    exchange->Respond(std::move(response));
  };
  Result<CompletionRequest> request =
      kind == ApiKind::kChat ? ParseChatRequest(http.body) : ParseCompletionRequest(http.body);
  if (!request.ok()) return refuse(request.status());
  if (span.has_value()) request->generate.set_traceparent(span->Header());
  Result<std::vector<ChoicePlan>> plans = Plan(router, options, &*request);
  if (!plans.ok()) return refuse(plans.status());
  LogInfo("http request=" + *id + " path=" + http.path + " peer=" + http.peer + " client=" + http.client +
          " choices=" + std::to_string(plans->size()) + (span.has_value() ? " traceparent=" + span->Header() : ""));
  std::make_shared<HttpAnswer>(router, exchange, *id, *request, std::move(*plans), options.parallel_choices_max,
                               std::move(headers))
      ->Start();
}

Result<std::vector<std::uint32_t>> Encode(const Router& router, const TokenizeRequest& request) {
  const TextCodec& codec = *router.model().codec;
  std::string text = request.text;
  if (!request.messages.empty()) {
    ZEROC_ASSIGN_OR_RETURN(text, router.model().chat_template->Render(request.messages, request.add_generation_prompt));
  }
  return request.add_special_tokens ? codec.EncodePrompt(text) : codec.EncodeText(text);
}

void Tokenize(const Router& router, HttpExchange& exchange) {
  const Result<TokenizeRequest> request = ParseTokenizeRequest(exchange.request().body);
  if (!request.ok()) return exchange.Respond(ErrorResponse(request.status()));
  const auto ids = Encode(router, *request);
  if (!ids.ok()) return exchange.Respond(ErrorResponse(ids.status()));
  const ServedModel& model = router.model();
  exchange.Respond(
      Json(TokenizeBody(*ids, model.max_positions, request->return_token_strs ? model.codec.get() : nullptr)));
}

void Detokenize(const Router& router, HttpExchange& exchange) {
  const auto ids = ParseDetokenizeRequest(exchange.request().body);
  if (!ids.ok()) return exchange.Respond(ErrorResponse(ids.status()));
  exchange.Respond(Json(DetokenizeBody(router.model().codec->Decode(*ids))));
}

// What load generators and SDKs ask before they start.
void Health(const Router& router, HttpExchange& exchange) {
  const Status ready = router.Ready();
  exchange.Respond(ready.ok() ? HttpResponse{200, "text/plain", "", {}} : ErrorResponse(ready));
}

}  // namespace

std::vector<HttpServer::Route> ApiRoutes(Router& router, const ApiOptions& options) {
  const std::int64_t started = UnixSeconds();
  const auto health = [&router](auto exchange) { Health(router, *exchange); };
  return {
      {"POST", "/v1/completions",
       [&router, options](auto exchange) { Complete(router, options, exchange, ApiKind::kCompletions); }},
      {"POST", "/v1/chat/completions",
       [&router, options](auto exchange) { Complete(router, options, exchange, ApiKind::kChat); }},
      {"GET", "/v1/models",
       [&router, started](auto exchange) { exchange->Respond(Json(ModelsBody(router.ModelInfo(), started))); }},
      {"GET", "/v1/models/" + router.model().name,
       [&router, started](auto exchange) { exchange->Respond(Json(ModelBody(router.ModelInfo(), started))); }},
      {"POST", "/tokenize", [&router](auto exchange) { Tokenize(router, *exchange); }},
      {"POST", "/detokenize", [&router](auto exchange) { Detokenize(router, *exchange); }},
      {"GET", "/tokenizer_info", [&router](auto exchange) { exchange->Respond(Json(router.model().tokenizer_info)); }},
      {"GET", "/health", health},
      {"GET", "/ping", health},
      {"GET", "/load",
       [&router](auto exchange) {
         exchange->Respond(Json("{\"server_load\":" + std::to_string(router.in_flight()) + "}"));
       }},
      {"GET", "/version",
       [](auto exchange) { exchange->Respond(Json("{\"version\":\"" + std::string(ZEROC_VERSION) + "\"}")); }},
  };
}

HttpServer::Screener ApiScreener(AccessControl& access) {
  return [&access](const HttpRequest& head) -> HttpServer::Screening {
    static constexpr std::string_view kOpen[] = {"/healthz", "/readyz", "/health", "/ping", "/metrics"};
    if (std::find(std::begin(kOpen), std::end(kOpen), head.path) != std::end(kOpen)) return {};
    AccessControl::Decision decision = access.Admit(head.Header("authorization"));
    if (decision.status.ok()) return {std::nullopt, std::move(decision.client), std::move(decision.pass)};
    const bool unknown = decision.status.code() == StatusCode::kUnauthenticated;
    // The path comes last: it is the client's, and may hold anything.
    LogWarning("refused peer=" + head.peer + " because=\"" + std::string(decision.status.message()) +
               "\" path=" + head.path);
    HttpResponse response{unknown ? 401 : 429, "application/json", "", {}};
    response.body =
        ErrorBody(response.status, decision.status.message(), unknown ? "invalid_api_key" : "rate_limit_exceeded");
    if (unknown) response.headers.emplace_back("WWW-Authenticate", "Bearer");
    if (!unknown) response.headers.emplace_back("Retry-After", std::to_string(decision.retry_after_s));
    return {std::move(response), std::move(decision.client), nullptr};
  };
}

HttpResponse FormatHttpError(int status, std::string_view message) {
  return {status, "application/json", ErrorBody(status, message), {}};
}

}  // namespace zeroc
