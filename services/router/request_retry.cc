// What a flow does when a worker of its attempt fails: another attempt elsewhere, where that can help.
#include <algorithm>
#include <utility>

#include "services/common/logging.h"
#include "services/router/request_flow.h"

namespace zeroc {
namespace {

// Losses and refusals that say nothing about the request itself.
bool IsPassing(StatusCode code) {
  return code == StatusCode::kUnavailable || code == StatusCode::kDataLoss || code == StatusCode::kAborted ||
         code == StatusCode::kResourceExhausted ||
         code == StatusCode::kCancelled;  // the worker's own: the router ignores what it has cancelled itself
}

}  // namespace

bool RequestFlow::MayRetry(Role role, const Status& status) const {
  if (n_retries_ >= context_.config.retries_max) return false;
  if (context_.timers.WallNow() + context_.config.retry_delay >= deadline_) return false;
  if (IsPassing(status.code())) return true;
  // Well before the request's own deadline: a lease that expired, a reservation that took too long.
  if (status.code() == StatusCode::kDeadlineExceeded) return true;
  // A decode worker that was started again does not know the lease.
  return role == Role::kDecode && status.code() == StatusCode::kNotFound && attempt_->running();
}

// A first token that is the last one makes prefill let go of the lease, and what decode says of that may overtake the
// token itself.
bool RequestFlow::PrefillMayExplain(const Status& status) const {
  return status.code() == StatusCode::kCancelled && !attempt_->first_token_seen && attempt_->prefill_open();
}

void RequestFlow::HoldDecodeFailure(const Status& status) {
  attempt_->decode_failure = status;
  held_timer_ = After(context_.config.held_failure_timeout, &RequestFlow::ActOnHeldFailure);
}

void RequestFlow::ActOnHeldFailure() {
  if (attempt_->stopped() || answer_.finished() || attempt_->decode_failure.ok()) return;
  OnWorkerFailed(Role::kDecode, attempt_->decode_failure);
}

void RequestFlow::OnWorkerFailed(Role role, const Status& status) {
  context_.timers.Cancel(std::exchange(held_timer_, TimerId::kNone));
  if (!MayRetry(role, status)) return FailAt(role, status);
  last_failure_ = Name(role, status);
  // During the hand-off either side may report that the other one was lost, so neither is the first choice again.
  const bool either = attempt_->running() && !attempt_->admitted;
  if (!attempt_->plan().local_prefill && (role == Role::kPrefill || either)) {
    avoided_prefill_.insert(attempt_->prefill_worker.name());
  }
  if (role == Role::kDecode || either) avoided_decode_.insert(attempt_->decode_worker.name());
  const char* const stage = !attempt_->running() ? "reserve" : role == Role::kPrefill ? "prefill" : "decode";
  if (is_client()) context_.metrics.CountRetry(stage);
  LogWarning("retry request=" + id() + " stage=" + stage + " n_streamed=" + std::to_string(answer_.ids().size()) +
             " because=\"" + last_failure_.ToString() + "\"");
  ++n_retries_;
  ++n_elsewhere_;
  round_ = {};
  attempt_->Stop("lost");
  Retry();
}

// A worker that an attempt was just lost with is tried again only when there is no other, and a little later: a dead
// one has left the pool by then.
void RequestFlow::Retry() {
  Result<AttemptPtr> next = NewAttempt();
  if (!next.ok()) {
    return Fail(Status(last_failure_.code(), std::string(last_failure_.message()) +
                                                 "; not tried again: " + std::string(next.status().message())),
                ErrorOrigin::kWorker);
  }
  const bool again = avoided_prefill_.contains((*next)->prefill_worker.name()) ||
                     avoided_decode_.contains((*next)->decode_worker.name());
  if (!again || retry_timer_ != TimerId::kNone) {
    retry_timer_ = TimerId::kNone;
    return AskForRoom(std::move(*next));
  }
  retry_timer_ = After(context_.config.retry_delay, &RequestFlow::Retry);
}

}  // namespace zeroc
