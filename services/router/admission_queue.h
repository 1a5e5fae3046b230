// Who may ask the decode workers for room, and when: a bounded queue by priority, then arrival.
//
// While nobody waits, everybody may ask at once. Who is refused everywhere waits, and asks again in turns: whenever a
// request has ended, and every `round`. One that does not fit holds up nobody who might: later ones get their turn in
// the same round, up to `tries_per_round`, until `overtakes_max` of them went ahead of it; then all wait for it.
//
// Thread-safe. Owned by a shared_ptr, which its timers do not keep alive.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <utility>

#include "libzeroc/base/mutex.h"
#include "libzeroc/base/status.h"
#include "services/common/metrics.h"
#include "services/common/timers.h"

namespace zeroc {

class AdmissionQueue : public std::enable_shared_from_this<AdmissionQueue> {
 public:
  struct Config {
    std::size_t waiting_max = 128;
    std::chrono::milliseconds round{100};
    int tries_per_round = 8;
    int overtakes_max = 32;
  };
  // Higher goes first; of equals the one that came first.
  using Ticket = std::pair<std::int64_t, std::uint64_t>;  // (-priority, number)
  static constexpr Ticket kNoTicket{0, 0};

  // `metrics` hears how many wait. Both outlive the queue.
  AdmissionQueue(const Config& config, Timers& timers, Metrics& metrics);

  struct Entry {
    Ticket ticket;
    bool may_ask = false;  // at once; else on_turn tells when
  };
  // on_turn runs on the timers' thread, once for every turn; it may still come once after Leave. It is kept until the
  // ticket has left, and may keep its owner alive.
  // `returning`: was served before and goes ahead of its equals. kResourceExhausted when too many wait.
  Result<Entry> Enter(std::int32_t priority, bool returning, std::function<void()> on_turn);

  // What came of asking. Refused waits for its next turn; kResourceExhausted, and it has left, when too many wait.
  Status Refused(Ticket ticket);
  void Admitted(Ticket ticket);
  // Whoever gives up, at any time. Unknown tickets are fine.
  void Leave(Ticket ticket);

  // Room may have come back: the next round begins at once.
  void Wake();

  std::size_t n_waiting() const;

 private:
  struct Place {
    std::function<void()> on_turn;
    bool waiting = false;
    bool tried = false;  // in this round
    int overtaken = 0;
  };
  bool MayGoAhead(Ticket ticket) const ZEROC_REQUIRES(mu_);
  void NextTurn() ZEROC_REQUIRES(mu_);
  void EndTurn(Ticket ticket) ZEROC_REQUIRES(mu_);
  void ScheduleRound(std::chrono::milliseconds delay) ZEROC_REQUIRES(mu_);
  void OnRound();
  void ShowWaiting() ZEROC_REQUIRES(mu_);
  Status CheckRoom() const ZEROC_REQUIRES(mu_);

  const Config config_;
  Timers& timers_;
  Metrics& metrics_;

  mutable Mutex mu_;
  std::map<Ticket, Place> places_ ZEROC_GUARDED_BY(mu_);
  std::size_t n_waiting_ ZEROC_GUARDED_BY(mu_) = 0;
  std::uint64_t next_number_ ZEROC_GUARDED_BY(mu_) = std::uint64_t{1} << 32;  // below: those that return
  std::uint64_t next_returning_ ZEROC_GUARDED_BY(mu_) = 1;
  Ticket turn_ ZEROC_GUARDED_BY(mu_) = kNoTicket;  // who asks in this round, while it asks
  int n_tries_ ZEROC_GUARDED_BY(mu_) = 0;          // in this round
  TimerId round_timer_ ZEROC_GUARDED_BY(mu_) = TimerId::kNone;
};

}  // namespace zeroc
