#include "services/decode/decode_request.h"

#include <chrono>
#include <utility>

#include "services/common/logging.h"
#include "services/worker/proto_convert.h"

namespace zeroc {
namespace {

double Seconds(std::int64_t ns) { return static_cast<double>(ns) * 1e-9; }

}  // namespace

std::int64_t DecodeNowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void DecodeCore::Request::OnToken(const SampledToken& token) {
  v1::DecodeEvent event;
  event.mutable_tokens()->add_ids(static_cast<std::uint32_t>(token.id));
  if (sampling.logprobs >= 0) *event.mutable_tokens()->add_logprobs() = LogprobsToProto(token);
  sink->Send(std::move(event));
  core->metrics_.AddGenerationTokens(1);
}

void DecodeCore::Request::OnFinished(FinishReason reason) {
  v1::DecodeEvent event;
  const double seconds = Seconds(DecodeNowNs() - admitted_ns);
  event.mutable_final()->set_finish_reason(FinishToProto(reason));
  event.mutable_final()->set_decode_seconds(seconds);
  sink->Send(std::move(event));
  sink->End(OkStatus());
  core->metrics_.ObserveDecodeTime(seconds);
  core->metrics_.CountSuccess(reason == FinishReason::kStop ? "stop" : "length");
  core->EndLease(key, OkStatus());
}

void DecodeCore::Request::OnStarted(int) {
  started_ns = DecodeNowNs();
  core->metrics_.ObserveQueueTime(Seconds(started_ns - arrived_ns));
}

void DecodeCore::Request::OnFirstToken(const SequenceKv&, const SampledToken& token) {
  computed_ns = DecodeNowNs();
  core->metrics_.ObservePrefillTime(Seconds(computed_ns - started_ns));
  core->metrics_.AddPromptTokens(static_cast<std::uint64_t>(n_prompt_tokens));
  v1::DecodeEvent event;
  v1::FirstToken* first = event.mutable_first_token();
  first->set_id(static_cast<std::uint32_t>(token.id));
  if (sampling.logprobs >= 0) *first->mutable_logprobs() = LogprobsToProto(token);
  first->set_queue_seconds(Seconds(started_ns - arrived_ns));
  first->set_prefill_seconds(Seconds(computed_ns - started_ns));
  FinishReason reason;
  if (EndsRequest(sampling, core->model_.config().eos_ids, token, 1, &reason)) {
    first->set_finish_reason(FinishToProto(reason));
  }
  sink->Send(std::move(event));
  core->AdmitLocalOnEngine(*this, token);
}

void DecodeCore::Request::OnFailed(const Status& status) {
  LogWarning("decode failed request=" + EscapeControls(request_id) + " error=\"" + status.ToString() + "\"");
  sink->End(status);
  core->EndLease(key, status);
}

}  // namespace zeroc
