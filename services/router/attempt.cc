#include "services/router/attempt.h"

#include <algorithm>
#include <utility>

#include "services/common/logging.h"

namespace zeroc {
namespace {

constexpr std::chrono::seconds kReleaseTimeout(5);
constexpr std::uint32_t kPrefixTokensMin = 64;

}  // namespace

v1::SamplingParams SamplingBehind(v1::SamplingParams sampling, std::uint32_t n_streamed) {
  sampling.set_max_tokens(sampling.max_tokens() - std::min(sampling.max_tokens(), n_streamed));
  return sampling;
}

void Attempt::Reserve(Deadline deadline, UnaryDone<v1::ReserveResponse> done) {
  reserving_ = true;
  v1::ReserveRequest reserve;
  reserve.set_request_id(plan_.request_id);
  reserve.set_attempt(number_);
  reserve.set_n_prompt_tokens(n_prompt_tokens());
  reserve.set_max_tokens(plan_.sampling.max_tokens());
  reserve.set_profile(plan_.profile);
  reserve.set_plan_id(plan_.plan_id);
  reserve.set_model_fingerprint(plan_.model_fingerprint);
  reserve.set_layout_hash(plan_.layout_hash);
  reserve.set_priority(plan_.priority);
  reserve.set_local_prefill(plan_.local_prefill);
  // For its prefix cache, whose blocks are of 64 tokens.
  if (n_prompt_tokens() > kPrefixTokensMin) {
    reserve.mutable_prompt_ids()->Assign(plan_.token_ids.begin(), plan_.token_ids.end());
  }
  decode_worker.connection().Reserve(reserve, deadline, std::move(done));
}

void Attempt::TakeAnswer(const Status& status, const v1::ReserveResponse& response) {
  reserving_ = false;
  if (stopped_) {
    if (status.ok()) Release(response.lease(), "ended_while_reserving");
    decode_worker.Reset();
    return;
  }
  if (!status.ok()) return;
  lease_ = response.lease();
  n_cached_at_decode_ = std::min(response.n_cached_tokens(), n_prompt_tokens());
}

void Attempt::StartDecode(OnEvent<v1::DecodeEvent> on_event, StreamDone done) {
  running_ = true;
  v1::DecodeRequest decode;
  decode.set_lease_id(lease_->lease_id());
  decode.set_generation(lease_->generation());
  decode.set_request_id(plan_.request_id);
  *decode.mutable_sampling() = plan_.sampling;
  decode.set_n_prompt_tokens(n_prompt_tokens());
  decode.set_n_streamed(plan_.n_streamed);
  decode.set_local_prefill(plan_.local_prefill);
  // Beside local prefill the penalties look at the prompt and at what was generated before.
  if (plan_.local_prefill || plan_.sampling.repetition_penalty() != 1 || plan_.n_streamed > 0) {
    decode.mutable_prompt_ids()->Assign(plan_.token_ids.begin(), plan_.token_ids.end());
  }
  decode_call_ = decode_worker.connection().Generate(decode, plan_.deadline, std::move(on_event), std::move(done));
}

void Attempt::StartPrefill(OnEvent<v1::PrefillEvent> on_event, StreamDone done) {
  running_ = true;
  v1::PrefillRequest prefill;
  prefill.set_request_id(plan_.request_id);
  prefill.set_attempt(number_);
  prefill.mutable_token_ids()->Assign(plan_.token_ids.begin(), plan_.token_ids.end());
  prefill.set_n_streamed(plan_.n_streamed);
  *prefill.mutable_sampling() = plan_.sampling;
  prefill.set_profile(plan_.profile);
  prefill.set_plan_id(plan_.plan_id);
  prefill.set_model_fingerprint(plan_.model_fingerprint);
  prefill.set_priority(plan_.priority);
  prefill.set_n_cached_tokens(n_cached_at_decode_);
  prefill.set_sp_ranks(prefill_worker.n_ranks());
  *prefill.mutable_lease() = *lease_;
  prefill.set_decode_worker(decode_worker.name());
  prefill_call_ = prefill_worker.connection().Prefill(prefill, plan_.deadline, std::move(on_event), std::move(done));
}

// Its tokens are no load of that worker any more.
void Attempt::PrefillEnded() {
  prefill_call_ = nullptr;
  prefill_worker.Reset();
}

void Attempt::CancelDecode() {
  if (decode_call_ == nullptr || decode_finish != v1::FINISH_REASON_UNSPECIFIED) return;
  std::exchange(decode_call_, nullptr)->Cancel();
}

void Attempt::Stop(std::string_view reason) {
  if (std::exchange(stopped_, true)) return;
  if (prefill_call_ != nullptr && !transfer_accounted) prefill_call_->Cancel();
  prefill_call_ = nullptr;
  CancelDecode();
  decode_call_ = nullptr;
  if (lease_.has_value()) Release(*lease_, reason);
  lease_.reset();
  prefill_worker.Reset();
  // While a Reserve is under way its answer still needs the connection: TakeAnswer ends the rest.
  if (!reserving_) decode_worker.Reset();
}

void Attempt::Release(const v1::Lease& lease, std::string_view reason) const {
  v1::ReleaseRequest release;
  release.set_lease_id(lease.lease_id());
  release.set_generation(lease.generation());
  release.set_request_id(plan_.request_id);
  release.set_reason(std::string(reason));
  decode_worker.connection().Release(
      release, timers_.WallNow() + kReleaseTimeout, [request = plan_.request_id](const Status& done) {
        if (!done.ok())
          LogWarning("release request=" + request + " failed=\"" + done.ToString() + "\": left to expire");
      });
}

}  // namespace zeroc
