#include "services/router/request_flow.h"

#include <algorithm>
#include <utility>

#include "services/common/logging.h"

namespace zeroc {

RequestFlow::RequestFlow(const FlowContext& context, v1::GenerateRequest request,
                         std::optional<Deadline> client_deadline, std::shared_ptr<ResponseSink> sink,
                         std::function<void()> on_end, RequestKind kind)
    : context_(context),
      request_(std::move(request)),
      sink_(std::move(sink)),
      on_end_(std::move(on_end)),
      deadline_(std::min(client_deadline.value_or(Deadline::max()),
                         context.timers.WallNow() + context.config.request_timeout)),
      kind_(kind),
      answer_(context.model.codec->NewStream(), {request_.sampling().stop().begin(), request_.sampling().stop().end()},
              request_.sampling().include_stop()) {
  times_.arrival = context_.timers.Now();
}

void RequestFlow::Start() {
  Result<Choice> choice = Choose();
  MutexLock lock(mu_);
  if (ended_) return;
  if (!choice.ok()) return Fail(choice.status());
  prompt_ids_ = std::move(choice->prompt_ids);
  sampling_ = std::move(choice->sampling);
  answer_.SetLimits(sampling_.max_tokens(), {sampling_.stop_token_ids().begin(), sampling_.stop_token_ids().end()},
                    static_cast<std::uint32_t>(sampling_.forced_ids_size()));

  const auto left = deadline_ - context_.timers.WallNow();
  const auto at_deadline = [weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->Cancel(DeadlineExceeded("the request's deadline has passed"));
  };
  deadline_timer_ = context_.timers.Schedule(
      context_.timers.Now() + std::chrono::duration_cast<Timers::Clock::duration>(left), at_deadline);

  Result<AttemptPtr> attempt = NewAttempt();
  if (!attempt.ok()) return Fail(attempt.status());
  AskForRoom(std::move(*attempt));
}

void RequestFlow::Reserve(AttemptPtr attempt) {
  attempt_ = std::move(attempt);
  // A retry before the first token starts these anew; what was lost until here counts as queue. Behind the first token
  // it belongs to the phase that it interrupted.
  if (!times_.first_token.has_value()) {
    times_.reserve_begin = context_.timers.Now();
    times_.reserve_end.reset();
  }
  ++n_reserving_;
  attempt_->Reserve(
      // Not the request's deadline: a grant that crossed with it would be lost until it expires.
      context_.timers.WallNow() + context_.config.reserve_timeout,
      [self = shared_from_this(), reserving = attempt_](const Status& status, const v1::ReserveResponse& response) {
        self->OnReserved(reserving, status, response);
      });
}

void RequestFlow::OnReserved(const AttemptPtr& attempt, const Status& status, const v1::ReserveResponse& response) {
  MutexLock lock(mu_);
  --n_reserving_;
  attempt->TakeAnswer(status, response);
  if (ended_) return EndIfQuiet();
  if (!IsCurrent(attempt)) return;  // lost while it reserved; the next one may still wait
  if (!status.ok()) return OnRefused(status);
  if (!times_.first_token.has_value()) times_.reserve_end = context_.timers.Now();
  round_ = {};
  context_.timers.Cancel(std::exchange(queue_timer_, TimerId::kNone));
  context_.queue.Admitted(std::exchange(ticket_, AdmissionQueue::kNoTicket));
  SendStarted();
  RunAttempt();
}

void RequestFlow::RunAttempt() {
  const auto self = shared_from_this();
  const AttemptPtr attempt = attempt_;
  attempt->StartDecode([self, attempt](const v1::DecodeEvent& event) { self->OnDecodeEvent(attempt, event); },
                       [self, attempt](const Status& status) { self->OnDecodeDone(attempt, status); });
  if (attempt->plan().local_prefill) return;
  attempt->StartPrefill([self, attempt](const v1::PrefillEvent& event) { self->OnPrefillEvent(attempt, event); },
                        [self, attempt](const Status& status) { self->OnPrefillDone(attempt, status); });
}

void RequestFlow::OnPrefillEvent(const AttemptPtr& attempt, const v1::PrefillEvent& event) {
  MutexLock lock(mu_);
  if (!IsCurrent(attempt)) return;
  if (event.has_first_token()) {
    if (!attempt->first_token_seen) return OnFirstToken(event.first_token());
    return FailAt(Role::kPrefill, Internal("sent two first tokens"));
  }
  if (event.has_done()) {
    attempt->transfer = event.done();
    attempt->transfer_accounted = true;
    FinishWhenAccounted();
  }
}

void RequestFlow::OnFirstToken(const v1::FirstToken& first) {
  attempt_->first_token_seen = true;
  attempt_->n_cached_tokens = std::min(first.n_cached_tokens(), attempt_->n_prompt_tokens());
  if (!times_.first_token.has_value()) {
    n_cached_tokens_ = attempt_->n_cached_tokens;
    times_.first_token = context_.timers.Now();
    times_.prefill_seconds = first.prefill_seconds();
    if (is_client()) context_.metrics.ObserveTimeToFirstToken(TtftSeconds(times_));
  }
  v1::Tokens tokens;
  tokens.add_ids(first.id());
  if (first.has_logprobs()) *tokens.add_logprobs() = first.logprobs();
  Emit(tokens);
  if (ended_ || answer_.finished()) return;
  if (first.finish_reason() != v1::FINISH_REASON_UNSPECIFIED) return SetFinish(first.finish_reason());
  if (answer_.is_full()) return SetFinish(v1::FINISH_REASON_LENGTH);
  if (!attempt_->decode_failure.ok()) return ActOnHeldFailure();
  if (attempt_->early_tokens.ids_size() > 0) Emit(std::exchange(attempt_->early_tokens, {}));
  if (!ended_ && attempt_->decode_finish != v1::FINISH_REASON_UNSPECIFIED) SetFinish(attempt_->decode_finish);
}

void RequestFlow::OnPrefillDone(const AttemptPtr& attempt, const Status& status) {
  MutexLock lock(mu_);
  attempt->PrefillEnded();
  if (!IsCurrent(attempt)) return;
  if (!attempt->PrefillDidItsPart() && !answer_.finished()) {
    if (!status.ok()) return OnWorkerFailed(Role::kPrefill, status);
    return FailAt(Role::kPrefill, Internal("the stream ended before its last message"));
  }
  attempt->transfer_accounted = true;  // nothing more will come
  FinishWhenAccounted();
}

void RequestFlow::OnDecodeEvent(const AttemptPtr& attempt, const v1::DecodeEvent& event) {
  MutexLock lock(mu_);
  if (!IsCurrent(attempt) || answer_.finished()) return;
  switch (event.event_case()) {
    case v1::DecodeEvent::kAdmitted:
      attempt->admitted = true;
      attempt->resident = event.admitted().kv_bytes();
      if (times_.admitted.has_value()) break;
      times_.admitted = context_.timers.Now();
      times_.admit_seconds = event.admitted().admit_seconds();
      break;
    case v1::DecodeEvent::kTokens:
      return OnDecodeTokens(event.tokens());
    case v1::DecodeEvent::kFinal:
      attempt->LeaseEnded();
      attempt->decode_finish = event.final().finish_reason();
      attempt->decode_seconds = event.final().decode_seconds();
      if (attempt->decode_finish == v1::FINISH_REASON_UNSPECIFIED) {
        return FailAt(Role::kDecode, Internal("gave no finish reason"));
      }
      if (attempt->first_token_seen) SetFinish(attempt->decode_finish);
      break;
    case v1::DecodeEvent::kFirstToken:
      if (attempt->plan().local_prefill && !attempt->first_token_seen) return OnFirstToken(event.first_token());
      return FailAt(Role::kDecode, Internal("sent a first token that is not its to send"));
    case v1::DecodeEvent::EVENT_NOT_SET:
      break;
  }
}

void RequestFlow::OnDecodeTokens(const v1::Tokens& tokens) {
  if (attempt_->first_token_seen) return Emit(tokens);
  attempt_->early_tokens.MergeFrom(tokens);
  if (static_cast<std::uint32_t>(attempt_->early_tokens.ids_size()) > attempt_->plan().sampling.max_tokens()) {
    FailAt(Role::kDecode, Internal("sent more than max_tokens tokens"));
  }
}

void RequestFlow::OnDecodeDone(const AttemptPtr& attempt, const Status& status) {
  MutexLock lock(mu_);
  attempt->DecodeEnded();
  if (!IsCurrent(attempt) || answer_.finished()) return;
  if (attempt->decode_finish != v1::FINISH_REASON_UNSPECIFIED) return;  // only prefill's first token is missing
  if (!status.ok())
    return PrefillMayExplain(status) ? HoldDecodeFailure(status) : OnWorkerFailed(Role::kDecode, status);
  FailAt(Role::kDecode, Internal("the stream ended before its last message"));
}

void RequestFlow::OnWorkerLost(const AttemptPtr& attempt, Role role) {
  MutexLock lock(mu_);
  if (!IsCurrent(attempt) || answer_.finished()) return;
  if (role == Role::kPrefill && attempt->PrefillDidItsPart()) return;
  OnWorkerFailed(role, Unavailable("its heartbeats have stopped"));
}

void RequestFlow::Emit(const v1::Tokens& tokens) {
  if (answer_.finished()) return;
  const auto now = context_.timers.Now();
  if (times_.last_token.has_value() && tokens.ids_size() > 0 && is_client()) {
    const double seconds = std::chrono::duration<double>(now - *times_.last_token).count() / tokens.ids_size();
    // Forced tokens are the client's own, scored: no answer of ours.
    const std::size_t n_after = answer_.ids().size() + static_cast<std::size_t>(tokens.ids_size());
    const std::size_t n_begin = std::max(answer_.ids().size(), static_cast<std::size_t>(sampling_.forced_ids_size()));
    for (std::size_t i = n_begin; i < n_after; ++i) context_.metrics.ObserveInterTokenLatency(seconds);
  }
  Result<v1::Delta> delta = answer_.Add(tokens);
  if (!delta.ok()) return FailAt(Role::kDecode, delta.status());
  times_.last_token = now;
  sink_->OnDelta(*delta);
  if (answer_.stop_string_found()) SetFinish(v1::FINISH_REASON_STOP);
}

// The last token is out. What is held back of the text follows; decode, if it still runs, is stopped.
void RequestFlow::SetFinish(v1::FinishReason reason) {
  if (answer_.finished()) return;
  v1::Delta rest;
  rest.set_text(answer_.Finish(reason));
  if (!rest.text().empty()) sink_->OnDelta(rest);
  attempt_->CancelDecode();
  FinishWhenAccounted();
}

void RequestFlow::FinishWhenAccounted() {
  if (ended_ || !answer_.finished()) return;
  if (attempt_->transfer_accounted) return Finish();
  if (stats_timer_ == TimerId::kNone) {
    stats_timer_ = After(context_.config.stats_timeout, &RequestFlow::Finish);
  }
}

void RequestFlow::Finish() {
  v1::Final final;
  final.set_finish_reason(answer_.finish_reason());
  if (answer_.stop_string_found()) {
    final.set_stop_string(answer_.stop_string());
  } else if (answer_.finish_reason() == v1::FINISH_REASON_STOP && answer_.IsStopToken(answer_.ids().back())) {
    final.set_stop_token_id(answer_.ids().back());
  }
  final.mutable_usage()->set_prompt_tokens(static_cast<std::uint32_t>(prompt_ids_.size()));
  final.mutable_usage()->set_completion_tokens(static_cast<std::uint32_t>(answer_.ids().size()));
  final.mutable_usage()->set_cached_tokens(n_cached_tokens_);
  *final.mutable_stats() = Stats();
  sink_->OnFinal(final);
  End(OkStatus(), "finished");
}

void RequestFlow::Fail(const Status& status, ErrorOrigin origin) {
  if (ended_) return;
  times_.last_token = context_.timers.Now();
  sink_->OnError(status, origin);
  End(status, StatusCodeName(status.code()));
}

void RequestFlow::FailAt(Role role, const Status& status) { Fail(Name(role, status), ErrorOrigin::kWorker); }

Status RequestFlow::Name(Role role, const Status& status) const {
  const bool decode = role == Role::kDecode;
  const std::string& name = decode ? attempt_->decode_worker.name() : attempt_->prefill_worker.name();
  return status.WithContext(std::string(decode ? "decode" : "prefill") + " worker " + name + " in phase " + Phase());
}

void RequestFlow::Cancel(const Status& why) {
  MutexLock lock(mu_);
  if (!ended_) Fail(why.WithContext(std::string("in phase ") + Phase()));
}

void RequestFlow::End(const Status& status, std::string_view release_reason) {
  ended_ = true;
  context_.timers.Cancel(deadline_timer_);
  context_.timers.Cancel(stats_timer_);
  context_.timers.Cancel(retry_timer_);
  context_.timers.Cancel(queue_timer_);
  context_.timers.Cancel(held_timer_);
  context_.queue.Leave(ticket_);
  Account(status);
  if (attempt_ != nullptr) attempt_->Stop(release_reason);
  EndIfQuiet();
}

// Grants that are under way are still to be given back.
void RequestFlow::EndIfQuiet() {
  if (n_reserving_ > 0) return;
  context_.queue.Wake();  // what this request held is free
  on_end_();
}

TimerId RequestFlow::After(Timers::Clock::duration delay, void (RequestFlow::*then)()) {
  return context_.timers.Schedule(context_.timers.Now() + delay, [self = shared_from_this(), then] {
    MutexLock lock(self->mu_);
    if (!self->ended_) ((*self).*then)();
  });
}

const char* RequestFlow::Phase() const {
  if (!times_.reserve_begin.has_value()) return "queue";
  if (!times_.reserve_end.has_value()) return "reserve";
  if (!times_.first_token.has_value()) return "prefill";
  return times_.admitted.has_value() ? "decode" : "wire";
}

}  // namespace zeroc
