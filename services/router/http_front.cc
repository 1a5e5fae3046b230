#include "services/router/http_front.h"

#include <chrono>
#include <utility>

#include "services/router/completions_api.h"

namespace zeroc {
namespace {

std::int64_t UnixSeconds() {
  return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

HttpResponse ErrorResponse(const Status& status, ErrorOrigin origin = ErrorOrigin::kRequest) {
  HttpResponse response{HttpStatusOf(status, origin), "application/json", "", {}};
  response.body = ErrorBody(response.status, status.message(), StatusCodeName(status.code()));
  if (response.status == 429 || response.status == 503) response.headers.emplace_back("Retry-After", "1");
  return response;
}

// The answer as one body, or as server-sent events from the first text on: until then a failure still has its own
// status.
class HttpSink : public ResponseSink {
 public:
  HttpSink(std::shared_ptr<HttpExchange> exchange, std::string id, const TextCodec& codec,
           const CompletionRequest& request)
      : exchange_(std::move(exchange)),
        id_(std::move(id)),
        stream_(request.stream),
        formatter_(id_, UnixSeconds(), codec, request.include_usage) {}

  void OnStarted(const v1::Started& started) override { formatter_.SetStarted(started); }

  void OnDelta(const v1::Delta& delta) override {
    if (!stream_) return formatter_.AddDelta(delta);
    BeginStream();
    exchange_->Write(formatter_.DeltaEvent(delta));
  }

  void OnFinal(const v1::Final& final) override {
    if (!stream_) {
      exchange_->Respond({200, "application/json", formatter_.Body(final), IdHeader()});
      return;
    }
    BeginStream();
    exchange_->Write(formatter_.FinalEvents(final));
    exchange_->Finish();
  }

  void OnError(const Status& status, ErrorOrigin origin) override {
    if (!begun_) {
      HttpResponse response = ErrorResponse(status, origin);
      for (auto& header : IdHeader()) response.headers.push_back(std::move(header));
      return exchange_->Respond(std::move(response));
    }
    // The status line has gone out: an error event, and no [DONE], no last chunk.
    exchange_->Write(ErrorEvent(status, origin));
    exchange_->Abort();
  }

 private:
  std::vector<std::pair<std::string, std::string>> IdHeader() const { return {{"X-Request-Id", id_}}; }
  void BeginStream() {
    if (std::exchange(begun_, true)) return;
    HttpResponse head{200, "text/event-stream; charset=utf-8", "", IdHeader()};
    head.headers.emplace_back("Cache-Control", "no-cache");
    head.headers.emplace_back("X-Accel-Buffering", "no");  // proxies must not collect the stream
    exchange_->StartStream(std::move(head));
  }

  const std::shared_ptr<HttpExchange> exchange_;
  const std::string id_;
  const bool stream_;
  CompletionFormatter formatter_;
  bool begun_ = false;
};

void Complete(Router& router, const std::shared_ptr<HttpExchange>& exchange) {
  Result<CompletionRequest> request = ParseCompletionRequest(exchange->request().body);
  if (!request.ok()) return exchange->Respond(ErrorResponse(request.status()));
  if (!request->model.empty() && request->model != router.model().name) {
    return exchange->Respond(ErrorResponse(
        NotFound("model '" + request->model.substr(0, 128) + "' is not served here; this is " + router.model().name)));
  }
  const std::string_view given_id = exchange->request().Header("x-request-id");
  if (!given_id.empty() && !IsGoodRequestId(given_id)) {
    return exchange->Respond(ErrorResponse(InvalidArgument("x-request-id is not 1 to 128 printable ASCII characters")));
  }
  const std::string id = given_id.empty() ? NewRequestId() : std::string(given_id);
  request->generate.set_request_id(id);
  auto sink = std::make_shared<HttpSink>(exchange, id, *router.model().codec, *request);
  const auto flow = router.Generate(std::move(request->generate), std::nullopt, std::move(sink));
  exchange->OnClientGone([weak = std::weak_ptr<RequestFlow>(flow)] {
    if (const auto running = weak.lock()) running->Cancel(Cancelled("the client has gone or reads too slowly"));
  });
}

void Tokenize(const Router& router, HttpExchange& exchange) {
  const Result<std::string> text = ParseTokenizeRequest(exchange.request().body);
  if (!text.ok()) return exchange.Respond(ErrorResponse(text.status()));
  const auto ids = router.model().codec->EncodePrompt(*text);
  if (!ids.ok()) return exchange.Respond(ErrorResponse(ids.status()));
  exchange.Respond({200, "application/json", TokenizeBody(*ids, router.model().max_positions), {}});
}

void Detokenize(const Router& router, HttpExchange& exchange) {
  const auto ids = ParseDetokenizeRequest(exchange.request().body);
  if (!ids.ok()) return exchange.Respond(ErrorResponse(ids.status()));
  exchange.Respond({200, "application/json", DetokenizeBody(router.model().codec->Decode(*ids)), {}});
}

}  // namespace

std::vector<HttpServer::Route> ApiRoutes(Router& router) {
  const std::int64_t started = UnixSeconds();
  return {
      {"POST", "/v1/completions", [&router](auto exchange) { Complete(router, exchange); }},
      {"GET", "/v1/models",
       [&router, started](auto exchange) {
         exchange->Respond({200, "application/json", ModelsBody(router.ModelInfo(), started), {}});
       }},
      {"POST", "/tokenize", [&router](auto exchange) { Tokenize(router, *exchange); }},
      {"POST", "/detokenize", [&router](auto exchange) { Detokenize(router, *exchange); }},
  };
}

HttpResponse FormatHttpError(int status, std::string_view message) {
  return {status, "application/json", ErrorBody(status, message), {}};
}

}  // namespace zeroc
