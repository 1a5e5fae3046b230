#include "services/router/score_call.h"

#include <memory>
#include <utility>

#include "services/router/unary_call.h"

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

class ScoreCall : public UnaryCall<v1::ScoreResponse> {
 public:
  void OnStarted(const v1::Started& started) override {
    MutexLock lock(mu_);
    *response_.mutable_started() = started;
  }
  void OnDelta(const v1::Delta& delta) override {
    MutexLock lock(mu_);
    response_.mutable_logprobs()->MergeFrom(delta.logprobs());
    for (const v1::TokenLogprobs& token : delta.logprobs()) response_.set_sum(response_.sum() + token.logprob());
  }
  void OnFinal(const v1::Final& final) override {
    MutexLock lock(mu_);
    *response_.mutable_usage() = final.usage();
    *response_.mutable_stats() = final.stats();
    End(OkStatus());
  }
};

}  // namespace

grpc::ServerUnaryReactor* StartScore(Router& router, grpc::CallbackServerContext* context,
                                     const v1::ScoreRequest& request, v1::ScoreResponse* response,
                                     std::shared_ptr<const void> pass) {
  auto call = std::make_shared<ScoreCall>();
  auto* reactor = new ScoreCall::Reactor(call, response, std::move(pass));  // OnDone deletes it
  if (request.target().ids().empty()) {
    call->OnError(InvalidArgument("target is empty"), ErrorOrigin::kRequest);
  } else {
    call->client.Bind(router.Generate(ToGenerate(request), context->deadline(), call));
  }
  call->Attach(reactor);
  return reactor;
}

}  // namespace zeroc
