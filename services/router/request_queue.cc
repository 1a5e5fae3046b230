// How a flow gets room at a decode worker: in its turn, from the first worker that has some, or not in time.
#include <utility>

#include "services/common/logging.h"
#include "services/router/request_flow.h"

namespace zeroc {
// One that has been started before goes ahead of its equals: its client waits in the middle of a stream.
void RequestFlow::AskForRoom(AttemptPtr attempt) {
  attempt_ = std::move(attempt);
  if (ticket_ == AdmissionQueue::kNoTicket) {
    const Result<AdmissionQueue::Entry> entry =
        context_.queue.Enter(request_.priority(), started_sent_, [self = shared_from_this()] { self->OnTurn(); });
    if (!entry.ok()) return Fail(entry.status());
    ticket_ = entry->ticket;
    if (!entry->may_ask) return Wait(ResourceExhausted("others wait for room already"));
  }
  Reserve(attempt_);
}

void RequestFlow::OnTurn() {
  MutexLock lock(mu_);
  if (ended_ || ticket_ == AdmissionQueue::kNoTicket) return;
  round_ = {};
  Result<AttemptPtr> attempt = NewAttempt();
  if (!attempt.ok()) return Fail(attempt.status());
  AskForRoom(std::move(*attempt));
}

// Workers are full now and then: the others are asked at once, and when all are full the request waits. One that no
// worker could hold if it had nothing else to do ends.
void RequestFlow::OnRefused(const Status& status) {
  const bool too_small = status.code() == StatusCode::kOutOfRange;
  const bool full = status.code() == StatusCode::kResourceExhausted;
  if (!full && !too_small && status.code() != StatusCode::kUnavailable) return OnWorkerFailed(Role::kDecode, status);
  round_.refused_by.insert(attempt_->decode_worker.name());
  round_.any_full |= full;
  round_.all_too_small &= too_small;
  if (TryElsewhere(status)) return;
  if (round_.all_too_small) {
    return FailAt(Role::kDecode, Status(status.code(), "no decode worker can ever hold it as profile " + rung_->name +
                                                           ": " + std::string(status.message())));
  }
  if (!full && !too_small && !round_.any_full) return OnWorkerFailed(Role::kDecode, status);
  const Status refusal = Name(Role::kDecode, status);
  attempt_->Stop("refused");
  if (const Status queued = context_.queue.Refused(ticket_); !queued.ok()) return Fail(queued);
  Wait(refusal);
}

bool RequestFlow::TryElsewhere(const Status& status) {
  Result<AttemptPtr> next = NewAttempt();
  if (!next.ok()) return false;
  if (status.code() == StatusCode::kUnavailable) {
    ++n_elsewhere_;
    if (is_client()) context_.metrics.CountRetry("reserve");
    LogWarning("retry request=" + id() + " stage=reserve worker=" + attempt_->decode_worker.name() + " because=\"" +
               status.ToString() + "\"");
  }
  attempt_->Stop("refused");
  Reserve(std::move(*next));
  return true;
}

void RequestFlow::Wait(const Status& refusal) {
  attempt_->Stop("waits");
  last_failure_ = refusal;
  if (!times_.first_token.has_value()) times_.reserve_begin.reset();  // this is the queue again
  if (queue_timer_ != TimerId::kNone) return;
  LogInfo("waits request=" + id() + " priority=" + std::to_string(request_.priority()) + " because=\"" +
          refusal.ToString() + "\"");
  queue_timer_ = After(context_.config.queue_timeout, &RequestFlow::OnQueueTimeout);
}

// An answer to Reserve that is under way comes too late then: a grant is given back.
void RequestFlow::OnQueueTimeout() {
  if (ticket_ == AdmissionQueue::kNoTicket) return;
  Fail(ResourceExhausted("no decode worker had room within " + std::to_string(context_.config.queue_timeout.count()) +
                         " ms: " + std::string(last_failure_.message())));
}

}  // namespace zeroc
