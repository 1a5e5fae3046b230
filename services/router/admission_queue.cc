#include "services/router/admission_queue.h"

#include <string>

namespace zeroc {
namespace {

// For Release to reach the worker before somebody asks it again.
constexpr std::chrono::milliseconds kSettle(2);

}  // namespace

AdmissionQueue::AdmissionQueue(const Config& config, Timers& timers, Metrics& metrics)
    : config_(config), timers_(timers), metrics_(metrics) {
  metrics_.SetRequestsWaiting(0);
}

Status AdmissionQueue::CheckRoom() const {
  if (n_waiting_ < config_.waiting_max) return OkStatus();
  return ResourceExhausted("the decode workers are full and " + std::to_string(n_waiting_) + " requests wait already");
}

Result<AdmissionQueue::Entry> AdmissionQueue::Enter(std::int32_t priority, bool returning,
                                                    std::function<void()> on_turn) {
  MutexLock lock(mu_);
  const Ticket ticket{-std::int64_t{priority}, returning ? next_returning_++ : next_number_++};
  const bool may_ask = MayGoAhead(ticket) && (n_waiting_ == 0 || n_tries_ < config_.tries_per_round);
  if (!may_ask) ZEROC_RETURN_IF_ERROR(CheckRoom());
  if (n_waiting_ > 0 && may_ask) ++n_tries_;
  Place& place = places_[ticket];
  place.on_turn = std::move(on_turn);
  place.waiting = !may_ask;
  if (place.waiting) {
    ++n_waiting_;
    ShowWaiting();
    ScheduleRound(config_.round);
  }
  return Entry{ticket, may_ask};
}

// Nobody before it has been overtaken too often.
bool AdmissionQueue::MayGoAhead(Ticket ticket) const {
  for (const auto& [other, place] : places_) {
    if (other >= ticket) break;
    if (place.waiting && place.overtaken >= config_.overtakes_max) return false;
  }
  return true;
}

Status AdmissionQueue::Refused(Ticket ticket) {
  MutexLock lock(mu_);
  const auto found = places_.find(ticket);
  if (found == places_.end()) return OkStatus();  // left meanwhile
  Status room = CheckRoom();
  if (room.ok()) {
    found->second.waiting = true;
    found->second.tried = true;
    ++n_waiting_;
    ScheduleRound(config_.round);
  } else {
    places_.erase(found);
  }
  ShowWaiting();
  EndTurn(ticket);
  return room;
}

void AdmissionQueue::Admitted(Ticket ticket) {
  MutexLock lock(mu_);
  if (places_.erase(ticket) == 0) return;
  for (auto& [other, place] : places_) {
    if (other >= ticket) break;
    if (place.waiting) ++place.overtaken;
  }
  EndTurn(ticket);
}

void AdmissionQueue::Leave(Ticket ticket) {
  MutexLock lock(mu_);
  const auto found = places_.find(ticket);
  if (found == places_.end()) return;
  if (found->second.waiting) --n_waiting_;
  places_.erase(found);
  ShowWaiting();
  EndTurn(ticket);
}

void AdmissionQueue::Wake() {
  MutexLock lock(mu_);
  if (n_waiting_ == 0) return;
  timers_.Cancel(round_timer_);
  round_timer_ = TimerId::kNone;
  ScheduleRound(kSettle);
}

void AdmissionQueue::ScheduleRound(std::chrono::milliseconds delay) {
  if (round_timer_ != TimerId::kNone) return;
  round_timer_ = timers_.Schedule(timers_.Now() + delay, [weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->OnRound();
  });
}

void AdmissionQueue::OnRound() {
  MutexLock lock(mu_);
  round_timer_ = TimerId::kNone;
  n_tries_ = 0;
  for (auto& [ticket, place] : places_) place.tried = false;
  if (n_waiting_ > 0) ScheduleRound(config_.round);
  NextTurn();
}

// One at a time, so that the order decides who gets what there is.
void AdmissionQueue::NextTurn() {
  if (turn_ != kNoTicket || n_tries_ >= config_.tries_per_round) return;
  for (auto& [ticket, place] : places_) {
    if (!place.waiting) continue;
    if (!place.tried) {
      turn_ = ticket;
      place.waiting = false;
      place.tried = true;
      --n_waiting_;
      ++n_tries_;
      ShowWaiting();
      timers_.Schedule(timers_.Now(), place.on_turn);
      return;
    }
    if (place.overtaken >= config_.overtakes_max) return;
  }
}

void AdmissionQueue::EndTurn(Ticket ticket) {
  if (ticket != turn_) return;
  turn_ = kNoTicket;
  NextTurn();
}

void AdmissionQueue::ShowWaiting() { metrics_.SetRequestsWaiting(static_cast<double>(n_waiting_)); }

std::size_t AdmissionQueue::n_waiting() const {
  MutexLock lock(mu_);
  return n_waiting_;
}

}  // namespace zeroc
