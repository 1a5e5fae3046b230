#include "services/router/request_flow.h"

#include <algorithm>
#include <random>
#include <utility>

#include "services/common/logging.h"

namespace zeroc {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint32_t kReserveAttemptsMax = 2;
constexpr std::chrono::seconds kReleaseTimeout(5);

std::uint64_t FreshSeed() {
  thread_local std::mt19937_64 generator{std::random_device{}()};
  return generator();
}

// Refusals that another worker may not share, and that leave nothing behind.
bool MayRetryReserve(const Status& status) {
  return status.code() == StatusCode::kResourceExhausted || status.code() == StatusCode::kUnavailable;
}

}  // namespace

RequestFlow::RequestFlow(const FlowContext& context, v1::GenerateRequest request,
                         std::optional<Deadline> client_deadline, std::shared_ptr<ResponseSink> sink,
                         std::function<void()> on_end)
    : context_(context),
      request_(std::move(request)),
      sink_(std::move(sink)),
      on_end_(std::move(on_end)),
      deadline_(std::min(client_deadline.value_or(Deadline::max()),
                         std::chrono::system_clock::now() + context.config.request_timeout)),
      text_(context.model.codec->NewStream()),
      stops_({request_.sampling().stop().begin(), request_.sampling().stop().end()}) {
  times_.arrival = Clock::now();
}

struct RequestFlow::Choice {
  std::vector<std::uint32_t> prompt_ids;
  v1::SamplingParams sampling;
  PolicyDecision decision;
};

// Everything that needs no worker. Reads only constants, so it runs without the lock.
Result<RequestFlow::Choice> RequestFlow::Choose() {
  const RequestLimits& limits = context_.config.limits;
  Choice choice;
  ZEROC_RETURN_IF_ERROR(CheckRequest(request_, limits));
  if (request_.has_text()) {
    ZEROC_ASSIGN_OR_RETURN(choice.prompt_ids, context_.model.codec->EncodePrompt(request_.text()));
  } else {
    choice.prompt_ids.assign(request_.token_ids().ids().begin(), request_.token_ids().ids().end());
  }
  ZEROC_ASSIGN_OR_RETURN(choice.sampling, ResolveSampling(request_, limits, choice.prompt_ids.size(), FreshSeed()));
  PolicyInput input;
  input.ladder = context_.model.ladder;
  input.default_max_ppl_increase = context_.config.default_max_ppl_increase;
  if (request_.kv().has_profile()) input.requested_profile = request_.kv().profile();
  if (request_.kv().has_max_ppl_increase()) input.max_ppl_increase = request_.kv().max_ppl_increase();
  ZEROC_ASSIGN_OR_RETURN(choice.decision, ChooseProfile(input));
  return choice;
}

void RequestFlow::Start() {
  Result<Choice> choice = Choose();
  MutexLock lock(mu_);
  if (ended_) return;
  if (!choice.ok()) return Fail(choice.status());
  prompt_ids_ = std::move(choice->prompt_ids);
  sampling_ = std::move(choice->sampling);
  stop_token_ids_ = {sampling_.stop_token_ids().begin(), sampling_.stop_token_ids().end()};
  rung_ = &context_.model.ladder[choice->decision.rung_idx];
  reason_ = choice->decision.reason;
  budget_ = choice->decision.budget;
  context_.metrics.CountDecision(rung_->name, reason_);
  context_.metrics.SetPplIncrease("budget", budget_);
  context_.metrics.SetPplIncrease("predicted", rung_->ppl_increase);

  const auto left = deadline_ - std::chrono::system_clock::now();
  const auto at_deadline = [weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->Cancel(DeadlineExceeded("the request's deadline has passed"));
  };
  deadline_timer_ =
      context_.timers.Schedule(Clock::now() + std::chrono::duration_cast<Clock::duration>(left), at_deadline);

  // Prefill is chosen first, so that nothing is reserved when there is nobody to fill it.
  const auto lost = [weak = weak_from_this()](const char* role) {
    return [weak, role] {
      if (const auto self = weak.lock()) self->OnWorkerLost(role);
    };
  };
  Result<WorkerPool::Ref> prefill = context_.pool.PickPrefill({prompt_ids_.size(), {}, lost("prefill")});
  if (!prefill.ok()) return Fail(prefill.status());
  prefill_worker_ = std::move(*prefill);
  Result<WorkerPool::Ref> decode =
      context_.pool.PickDecode({prompt_ids_.size() + sampling_.max_tokens(), {}, lost("decode")});
  if (!decode.ok()) return Fail(decode.status());
  decode_worker_ = std::move(*decode);
  times_.reserve_begin = Clock::now();
  Reserve();
}

void RequestFlow::Reserve() {
  reserving_ = true;
  v1::ReserveRequest reserve;
  reserve.set_request_id(id());
  reserve.set_attempt(++attempt_);
  reserve.set_n_prompt_tokens(static_cast<std::uint32_t>(prompt_ids_.size()));
  reserve.set_max_tokens(sampling_.max_tokens());
  reserve.set_profile(rung_->name);
  reserve.set_plan_id(context_.model.plan_id);
  reserve.set_model_fingerprint(context_.model.fingerprint);
  reserve.set_layout_hash(rung_->layout_hash);
  // Never cancelled, nor by the request's own deadline: a grant that crossed with it would be lost until it expires.
  const Deadline deadline = std::chrono::system_clock::now() + context_.config.reserve_timeout;
  decode_worker_.connection().Reserve(
      reserve, deadline, [self = shared_from_this()](const Status& status, const v1::ReserveResponse& response) {
        self->OnReserved(status, response);
      });
}

void RequestFlow::OnReserved(const Status& status, const v1::ReserveResponse& response) {
  MutexLock lock(mu_);
  reserving_ = false;
  if (ended_) {
    if (status.ok()) Release(decode_worker_.connection(), response.lease(), "ended_while_reserving");
    decode_worker_.Reset();
    on_end_();
    return;
  }
  if (!status.ok()) {
    if (RetryReserve(status)) return;
    return FailAt("decode", status);
  }
  times_.reserve_end = Clock::now();
  lease_ = response.lease();

  v1::Started started;
  started.set_request_id(id());
  started.set_prompt_tokens(static_cast<std::uint32_t>(prompt_ids_.size()));
  started.set_profile(rung_->name);
  started.set_reason(reason_);
  started.set_ppl_increase(rung_->ppl_increase);
  started.set_ppl_base(context_.model.ppl_base);
  started.set_model(context_.model.name);
  sink_->OnStarted(started);
  StartWorkers();
}

bool RequestFlow::RetryReserve(const Status& status) {
  if (!MayRetryReserve(status) || attempt_ >= kReserveAttemptsMax) return false;
  refused_by_.insert(decode_worker_.name());
  const auto lost = [weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->OnWorkerLost("decode");
  };
  Result<WorkerPool::Ref> other =
      context_.pool.PickDecode({prompt_ids_.size() + sampling_.max_tokens(), refused_by_, lost});
  if (!other.ok()) return false;
  context_.metrics.CountRetry("reserve");
  LogWarning("retry request=" + id() + " stage=reserve worker=" + decode_worker_.name() + " because=\"" +
             status.ToString() + "\"");
  decode_worker_ = std::move(*other);
  Reserve();
  return true;
}

void RequestFlow::StartWorkers() {
  v1::DecodeRequest decode;
  decode.set_lease_id(lease_->lease_id());
  decode.set_generation(lease_->generation());
  decode.set_request_id(id());
  *decode.mutable_sampling() = sampling_;
  decode.set_n_prompt_tokens(static_cast<std::uint32_t>(prompt_ids_.size()));
  if (sampling_.repetition_penalty() != 1) decode.mutable_prompt_ids()->Assign(prompt_ids_.begin(), prompt_ids_.end());
  decode_call_ = decode_worker_.connection().Generate(
      decode, deadline_, [self = shared_from_this()](const v1::DecodeEvent& event) { self->OnDecodeEvent(event); },
      [self = shared_from_this()](const Status& status) { self->OnDecodeDone(status); });

  v1::PrefillRequest prefill;
  prefill.set_request_id(id());
  prefill.set_attempt(attempt_);
  prefill.mutable_token_ids()->Assign(prompt_ids_.begin(), prompt_ids_.end());
  *prefill.mutable_sampling() = sampling_;
  prefill.set_profile(rung_->name);
  prefill.set_plan_id(context_.model.plan_id);
  prefill.set_model_fingerprint(context_.model.fingerprint);
  *prefill.mutable_lease() = *lease_;
  prefill.set_decode_worker(decode_worker_.name());
  prefill_call_ = prefill_worker_.connection().Prefill(
      prefill, deadline_, [self = shared_from_this()](const v1::PrefillEvent& event) { self->OnPrefillEvent(event); },
      [self = shared_from_this()](const Status& status) { self->OnPrefillDone(status); });
}

void RequestFlow::OnPrefillEvent(const v1::PrefillEvent& event) {
  MutexLock lock(mu_);
  if (ended_) return;
  if (event.has_first_token()) {
    if (!first_token_seen_) return OnFirstToken(event.first_token());
    return FailAt("prefill", Internal("sent two first tokens"));
  }
  if (event.has_done()) {
    transfer_ = event.done();
    transfer_accounted_ = true;
    FinishWhenAccounted();
  }
}

void RequestFlow::OnFirstToken(const v1::FirstToken& first) {
  first_token_seen_ = true;
  times_.first_token = Clock::now();
  times_.prefill_seconds = first.prefill_seconds();
  context_.metrics.ObserveTimeToFirstToken(TtftSeconds(times_));
  v1::Tokens tokens;
  tokens.add_ids(first.id());
  if (first.has_logprobs()) *tokens.add_logprobs() = first.logprobs();
  Emit(tokens);
  if (ended_) return;
  if (first.finish_reason() != v1::FINISH_REASON_UNSPECIFIED) return SetFinish(first.finish_reason());
  if (n_output_tokens_ >= sampling_.max_tokens()) return SetFinish(v1::FINISH_REASON_LENGTH);
  if (early_tokens_.ids_size() > 0) Emit(std::exchange(early_tokens_, {}));
  if (!ended_ && decode_finish_ != v1::FINISH_REASON_UNSPECIFIED) SetFinish(decode_finish_);
}

void RequestFlow::OnPrefillDone(const Status& status) {
  MutexLock lock(mu_);
  prefill_call_ = nullptr;
  if (ended_) return;
  if (!PrefillDidItsPart() && finish_reason_ == v1::FINISH_REASON_UNSPECIFIED) {
    if (!status.ok()) return FailAt("prefill", status);
    return FailAt("prefill", Internal("the stream ended before its last message"));
  }
  transfer_accounted_ = true;  // nothing more will come
  FinishWhenAccounted();
}

// Once decode has admitted the request, everything that prefill owed has arrived and was verified: its loss, with the
// transfer's statistics perhaps, is no reason to end the stream.
bool RequestFlow::PrefillDidItsPart() const {
  return transfer_accounted_ || (first_token_seen_ && times_.admitted.has_value());
}

void RequestFlow::OnDecodeEvent(const v1::DecodeEvent& event) {
  MutexLock lock(mu_);
  if (ended_ || finish_reason_ != v1::FINISH_REASON_UNSPECIFIED) return;
  switch (event.event_case()) {
    case v1::DecodeEvent::kAdmitted:
      times_.admitted = Clock::now();
      times_.admit_seconds = event.admitted().admit_seconds();
      resident_ = event.admitted().kv_bytes();
      break;
    case v1::DecodeEvent::kTokens:
      if (first_token_seen_) return Emit(event.tokens());
      early_tokens_.MergeFrom(event.tokens());
      if (static_cast<std::uint32_t>(early_tokens_.ids_size()) > sampling_.max_tokens()) {
        return FailAt("decode", Internal("sent more than max_tokens tokens"));
      }
      break;
    case v1::DecodeEvent::kFinal:
      lease_.reset();  // decode has ended it
      decode_finish_ = event.final().finish_reason();
      if (decode_finish_ == v1::FINISH_REASON_UNSPECIFIED) {
        return FailAt("decode", Internal("gave no finish reason"));
      }
      if (first_token_seen_) SetFinish(decode_finish_);
      break;
    case v1::DecodeEvent::EVENT_NOT_SET:
      break;
  }
}

void RequestFlow::OnDecodeDone(const Status& status) {
  MutexLock lock(mu_);
  decode_call_ = nullptr;
  if (ended_ || finish_reason_ != v1::FINISH_REASON_UNSPECIFIED) return;
  if (decode_finish_ != v1::FINISH_REASON_UNSPECIFIED) return;  // only prefill's first token is missing
  if (!status.ok()) return FailAt("decode", status);
  FailAt("decode", Internal("the stream ended before its last message"));
}

void RequestFlow::OnWorkerLost(const char* role) {
  MutexLock lock(mu_);
  if (ended_) return;
  const bool decode = std::string_view(role) == "decode";
  if (!decode && PrefillDidItsPart()) return;
  FailAt(role, Unavailable("its heartbeats have stopped"));
}

void RequestFlow::Emit(const v1::Tokens& tokens) {
  if (finish_reason_ != v1::FINISH_REASON_UNSPECIFIED) return;
  const auto now = Clock::now();
  if (times_.last_token.has_value() && tokens.ids_size() > 0) {
    const double seconds = std::chrono::duration<double>(now - *times_.last_token).count() / tokens.ids_size();
    for (int i = 0; i < tokens.ids_size(); ++i) context_.metrics.ObserveInterTokenLatency(seconds);
  }
  v1::Delta delta;
  bool stopped = false;
  for (int i = 0; i < tokens.ids_size() && !stopped; ++i) {
    if (n_output_tokens_ >= sampling_.max_tokens()) {
      return FailAt("decode", Internal("sent more than max_tokens tokens"));
    }
    ++n_output_tokens_;
    delta.add_token_ids(tokens.ids(i));
    if (i < tokens.logprobs_size()) *delta.add_logprobs() = tokens.logprobs(i);
    if (stop_token_ids_.contains(tokens.ids(i))) continue;  // ends the answer and is no part of its text
    StopMatcher::Output output = stops_.Push(text_->Push(tokens.ids(i)));
    delta.mutable_text()->append(output.text);
    stopped = output.stopped;
  }
  times_.last_token = now;
  sink_->OnDelta(delta);
  if (stopped) {
    text_ = nullptr;  // the rest is cut off
    SetFinish(v1::FINISH_REASON_STOP);
  }
}

// The last token is out. What is held back of the text follows; decode, if it still runs, is stopped.
void RequestFlow::SetFinish(v1::FinishReason reason) {
  if (finish_reason_ != v1::FINISH_REASON_UNSPECIFIED) return;
  finish_reason_ = reason;
  if (text_ != nullptr) {
    StopMatcher::Output output = stops_.Push(text_->Flush());
    v1::Delta rest;
    rest.set_text(output.stopped ? output.text : output.text + stops_.Flush());
    if (!rest.text().empty()) sink_->OnDelta(rest);
  }
  if (decode_call_ != nullptr && decode_finish_ == v1::FINISH_REASON_UNSPECIFIED) {
    std::exchange(decode_call_, nullptr)->Cancel();
  }
  FinishWhenAccounted();
}

void RequestFlow::FinishWhenAccounted() {
  if (ended_ || finish_reason_ == v1::FINISH_REASON_UNSPECIFIED) return;
  if (transfer_accounted_) return Finish();
  if (stats_timer_ != TimerId::kNone) return;
  stats_timer_ = context_.timers.Schedule(Clock::now() + context_.config.stats_timeout, [weak = weak_from_this()] {
    const auto self = weak.lock();
    if (self == nullptr) return;
    MutexLock lock(self->mu_);
    if (!self->ended_) self->Finish();
  });
}

void RequestFlow::Finish() {
  v1::Final final;
  final.set_finish_reason(finish_reason_);
  final.mutable_usage()->set_prompt_tokens(static_cast<std::uint32_t>(prompt_ids_.size()));
  final.mutable_usage()->set_completion_tokens(n_output_tokens_);
  *final.mutable_stats() = Stats();
  sink_->OnFinal(final);
  End(OkStatus(), "finished");
}

void RequestFlow::Fail(const Status& status, ErrorOrigin origin) {
  if (ended_) return;
  times_.last_token = Clock::now();
  sink_->OnError(status, origin);
  End(status, StatusCodeName(status.code()));
}

void RequestFlow::FailAt(const char* role, const Status& status) {
  const bool decode = std::string_view(role) == "decode";
  const std::string& name = decode ? decode_worker_.name() : prefill_worker_.name();
  Fail(status.WithContext(std::string(role) + " worker " + name + " in phase " + Phase()), ErrorOrigin::kWorker);
}

void RequestFlow::Cancel(const Status& why) {
  MutexLock lock(mu_);
  if (!ended_) Fail(why.WithContext(std::string("in phase ") + Phase()));
}

void RequestFlow::End(const Status& status, std::string_view release_reason) {
  ended_ = true;
  context_.timers.Cancel(deadline_timer_);
  context_.timers.Cancel(stats_timer_);
  // A worker that has sent its last message ends its stream by itself.
  if (prefill_call_ != nullptr && !transfer_accounted_) prefill_call_->Cancel();
  if (decode_call_ != nullptr && decode_finish_ == v1::FINISH_REASON_UNSPECIFIED) decode_call_->Cancel();
  if (lease_.has_value()) Release(decode_worker_.connection(), *lease_, release_reason);
  lease_.reset();
  Account(status);
  prefill_worker_.Reset();
  // While a Reserve is under way its answer still needs the connection: OnReserved ends the rest.
  if (reserving_) return;
  decode_worker_.Reset();
  on_end_();
}

void RequestFlow::Release(WorkerConnection& connection, const v1::Lease& lease, std::string_view reason) const {
  v1::ReleaseRequest release;
  release.set_lease_id(lease.lease_id());
  release.set_generation(lease.generation());
  release.set_request_id(id());
  release.set_reason(std::string(reason));
  connection.Release(release, std::chrono::system_clock::now() + kReleaseTimeout, [request = id()](const Status& done) {
    if (!done.ok()) LogWarning("release request=" + request + " failed=\"" + done.ToString() + "\": left to expire");
  });
}

const char* RequestFlow::Phase() const {
  if (!times_.reserve_begin.has_value()) return "queue";
  if (!times_.reserve_end.has_value()) return "reserve";
  if (!first_token_seen_) return "prefill";
  return times_.admitted.has_value() ? "decode" : "wire";
}

}  // namespace zeroc
