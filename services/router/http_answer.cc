#include "services/router/http_answer.h"

#include <chrono>

namespace zeroc {
namespace {

std::int64_t UnixSeconds() {
  return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

}  // namespace

HttpResponse ErrorResponse(const Status& status, ErrorOrigin origin) {
  HttpResponse response{HttpStatusOf(status, origin), "application/json", "", {}};
  response.body = ErrorBody(response.status, status.message(), StatusCodeName(status.code()));
  if (response.status == 429 || response.status == 503) response.headers.emplace_back("Retry-After", "1");
  return response;
}

class HttpAnswer::ChoiceSink : public ResponseSink {
 public:
  ChoiceSink(std::shared_ptr<HttpAnswer> answer, std::size_t choice) : answer_(std::move(answer)), choice_(choice) {}
  void OnStarted(const v1::Started& started) override { answer_->OnStarted(choice_, started); }
  void OnDelta(const v1::Delta& delta) override { answer_->OnDelta(choice_, delta); }
  void OnFinal(const v1::Final& final) override { answer_->OnFinal(choice_, final); }
  void OnError(const Status& status, ErrorOrigin origin) override { answer_->OnError(status, origin); }

 private:
  const std::shared_ptr<HttpAnswer> answer_;
  const std::size_t choice_;
};

HttpAnswer::HttpAnswer(Router& router, std::shared_ptr<HttpExchange> exchange, std::string id,
                       const CompletionRequest& request, std::vector<ChoicePlan> plans, std::size_t parallel_max,
                       std::vector<std::pair<std::string, std::string>> headers)
    : router_(router),
      exchange_(std::move(exchange)),
      id_(std::move(id)),
      stream_(request.stream),
      parallel_max_(parallel_max),
      headers_(std::move(headers)),
      plans_(std::move(plans)),
      formatter_(request.kind, id_, UnixSeconds(), router.model().name, *router.model().codec, request.shape, plans_),
      hold_(router.Hold()),
      begun_(plans_.size(), false) {}

void HttpAnswer::Start() {
  exchange_->OnClientGone([weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->CancelAll(Cancelled("the client has gone or reads too slowly"));
  });
  StartMore();
}

void HttpAnswer::StartMore() {
  for (;;) {
    v1::GenerateRequest generate;
    std::size_t choice = 0;
    bool first = false;
    {
      MutexLock lock(mu_);
      if (ended_ || next_ == plans_.size() || n_running_ >= parallel_max_) return;
      choice = next_++;
      if (!plans_[choice].runs) {
        EndChoice(choice, {});
        continue;
      }
      ++n_running_;
      first = !std::exchange(admitted_, true);
      generate = std::move(plans_[choice].generate);
      generate.set_request_id(plans_.size() == 1 ? id_ : id_ + "-" + std::to_string(choice));
    }
    auto sink = std::make_shared<ChoiceSink>(shared_from_this(), choice);
    const auto flow = first ? router_.Generate(std::move(generate), std::nullopt, std::move(sink))
                            : router_.GenerateMore(std::move(generate), std::move(sink));
    bool ended = false;
    {
      MutexLock lock(mu_);
      flows_.push_back(flow);
      ended = ended_;
    }
    if (ended) return CancelAll(Cancelled("another choice of the request has failed"));
  }
}

void HttpAnswer::CancelAll(const Status& why) {
  std::vector<std::weak_ptr<RequestFlow>> flows;
  {
    MutexLock lock(mu_);
    SetEnded();
    flows = flows_;
  }
  for (const auto& weak : flows) {
    if (const auto flow = weak.lock()) flow->Cancel(why);
  }
}

void HttpAnswer::OnStarted(std::size_t choice, const v1::Started& started) {
  MutexLock lock(mu_);
  formatter_.SetStarted(choice, started);
}

// Streams begin with the first token: until then a failure still has a status of its own.
void HttpAnswer::BeginStream() {
  if (std::exchange(streaming_, true)) return;
  HttpResponse head{200, "text/event-stream; charset=utf-8", "", headers_};
  head.headers.emplace_back("Cache-Control", "no-cache");
  head.headers.emplace_back("X-Accel-Buffering", "no");  // proxies must not collect the stream
  exchange_->StartStream(std::move(head));
}

void HttpAnswer::Begin(std::size_t choice) {
  BeginStream();
  if (begun_[choice]) return;
  begun_[choice] = true;
  exchange_->Write(formatter_.BeginEvent(choice));
}

void HttpAnswer::OnDelta(std::size_t choice, const v1::Delta& delta) {
  MutexLock lock(mu_);
  if (ended_) return;
  if (!stream_) return formatter_.AddDelta(choice, delta);
  Begin(choice);
  exchange_->Write(formatter_.DeltaEvent(choice, delta));
}

void HttpAnswer::OnFinal(std::size_t choice, const v1::Final& final) {
  MutexLock lock(mu_);
  if (ended_) return;
  --n_running_;
  EndChoice(choice, final);
  // Starting a flow takes time and locks: not from inside another one.
  if (!ended_ && next_ < plans_.size()) exchange_->Post([self = shared_from_this()] { self->StartMore(); });
}

void HttpAnswer::EndChoice(std::size_t choice, const v1::Final& final) {
  if (stream_) {
    Begin(choice);
    exchange_->Write(formatter_.FinishEvent(choice, final));
  } else {
    formatter_.AddFinal(choice, final);
  }
  if (++n_ended_ < plans_.size()) return;
  SetEnded();
  if (!stream_) return exchange_->Respond({200, "application/json", formatter_.Body(), headers_});
  exchange_->Write(formatter_.EndEvents());
  exchange_->Finish();
}

void HttpAnswer::OnError(const Status& status, ErrorOrigin origin) {
  MutexLock lock(mu_);
  if (ended_) return;
  SetEnded();
  exchange_->Post(
      [self = shared_from_this()] { self->CancelAll(Cancelled("another choice of the request has failed")); });
  if (streaming_) {
    // The status line has gone out: an error event, and no [DONE], no last chunk.
    exchange_->Write(ErrorEvent(status, origin));
    return exchange_->Abort();
  }
  HttpResponse response = ErrorResponse(status, origin);
  response.headers.insert(response.headers.end(), headers_.begin(), headers_.end());
  exchange_->Respond(std::move(response));
}

}  // namespace zeroc
