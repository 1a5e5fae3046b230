#include "services/router/score_call.h"

#include <memory>
#include <utility>

#include "services/common/grpc_status.h"

namespace zeroc {
namespace {

v1::GenerateRequest ToGenerate(const v1::ScoreRequest& request) {
  v1::GenerateRequest generate;
  generate.set_request_id(request.request_id());
  if (request.has_text()) generate.set_text(request.text());
  if (request.has_token_ids()) *generate.mutable_token_ids() = request.token_ids();
  *generate.mutable_kv() = request.kv();
  generate.set_traceparent(request.traceparent());
  v1::SamplingParams* sampling = generate.mutable_sampling();
  *sampling->mutable_forced_ids() = request.target().ids();
  sampling->set_max_tokens(static_cast<std::uint32_t>(request.target().ids_size()));
  sampling->set_temperature(0);
  sampling->set_logprobs(request.top());
  return generate;
}

class Reactor;

// Shared by the flow's sink and the reactor, which end independently.
class ScoreState : public ResponseSink {
 public:
  void Attach(Reactor* reactor) {
    MutexLock lock(mu_);
    reactor_ = reactor;
    FinishIfEnded();
  }
  void Detach() {
    MutexLock lock(mu_);
    reactor_ = nullptr;
  }
  void Bind(const std::shared_ptr<RequestFlow>& flow) {
    bool cancelled = false;
    {
      MutexLock lock(mu_);
      flow_ = flow;
      cancelled = cancelled_;
    }
    if (cancelled) ClientGone();
  }
  void ClientGone() {
    std::shared_ptr<RequestFlow> flow;
    {
      MutexLock lock(mu_);
      cancelled_ = true;
      flow = flow_.lock();
    }
    if (flow != nullptr) flow->Cancel(Cancelled("the client has gone"));
  }

  void OnStarted(const v1::Started& started) override {
    MutexLock lock(mu_);
    *result_.mutable_started() = started;
  }
  void OnDelta(const v1::Delta& delta) override {
    MutexLock lock(mu_);
    result_.mutable_logprobs()->MergeFrom(delta.logprobs());
    for (const v1::TokenLogprobs& token : delta.logprobs()) result_.set_sum(result_.sum() + token.logprob());
  }
  void OnFinal(const v1::Final& final) override {
    MutexLock lock(mu_);
    *result_.mutable_usage() = final.usage();
    *result_.mutable_stats() = final.stats();
    end_ = OkStatus();
    FinishIfEnded();
  }
  void OnError(const Status& status, ErrorOrigin) override {
    MutexLock lock(mu_);
    end_ = status;
    FinishIfEnded();
  }

 private:
  void FinishIfEnded() ZEROC_REQUIRES(mu_);

  Mutex mu_;
  Reactor* reactor_ ZEROC_GUARDED_BY(mu_) = nullptr;
  std::weak_ptr<RequestFlow> flow_ ZEROC_GUARDED_BY(mu_);
  bool cancelled_ ZEROC_GUARDED_BY(mu_) = false;
  std::optional<Status> end_ ZEROC_GUARDED_BY(mu_);
  v1::ScoreResponse result_ ZEROC_GUARDED_BY(mu_);
};

class Reactor : public grpc::ServerUnaryReactor {
 public:
  Reactor(std::shared_ptr<ScoreState> state, v1::ScoreResponse* out, std::shared_ptr<const void> pass)
      : response(out), state_(std::move(state)), pass_(std::move(pass)) {}
  void OnCancel() override { state_->ClientGone(); }
  void OnDone() override {
    state_->Detach();
    delete this;
  }
  v1::ScoreResponse* const response;

 private:
  const std::shared_ptr<ScoreState> state_;
  const std::shared_ptr<const void> pass_;
};

// Finish runs no reaction inline, so the lock may be held.
void ScoreState::FinishIfEnded() {
  if (reactor_ == nullptr || !end_.has_value()) return;
  if (end_->ok()) *reactor_->response = std::move(result_);
  std::exchange(reactor_, nullptr)->Finish(ToGrpc(*end_));
}

}  // namespace

grpc::ServerUnaryReactor* StartScore(Router& router, grpc::CallbackServerContext* context,
                                     const v1::ScoreRequest& request, v1::ScoreResponse* response,
                                     std::shared_ptr<const void> pass) {
  auto state = std::make_shared<ScoreState>();
  auto* reactor = new Reactor(state, response, std::move(pass));  // OnDone deletes it
  if (request.target().ids().empty()) {
    state->OnError(InvalidArgument("target is empty"), ErrorOrigin::kRequest);
  } else {
    state->Bind(router.Generate(ToGenerate(request), context->deadline(), state));
  }
  // Only now: OnDone could otherwise race with the lines above.
  state->Attach(reactor);
  return reactor;
}

}  // namespace zeroc
