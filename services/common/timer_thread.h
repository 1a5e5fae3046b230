// Timers on one thread and the system's clocks: request deadlines, expiry sweeps, bounded waits.
//
// The destructor drops what has not run and waits for a callback that is running.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <thread>
#include <utility>

#include "libzeroc/base/mutex.h"
#include "services/common/timers.h"

namespace zeroc {

class TimerThread final : public Timers {
 public:
  TimerThread();
  ~TimerThread() override;
  TimerThread(const TimerThread&) = delete;
  TimerThread& operator=(const TimerThread&) = delete;

  Clock::time_point Now() const override { return Clock::now(); }
  WallClock::time_point WallNow() const override { return WallClock::now(); }
  TimerId Schedule(Clock::time_point when, std::function<void()> callback) override;
  void Cancel(TimerId id) override;

 private:
  using Key = std::pair<Clock::time_point, TimerId>;
  void Run();

  Mutex mu_;
  CondVar wake_;
  std::map<Key, std::function<void()>> queue_ ZEROC_GUARDED_BY(mu_);
  std::map<TimerId, Clock::time_point> when_ ZEROC_GUARDED_BY(mu_);
  std::uint64_t next_id_ ZEROC_GUARDED_BY(mu_) = 1;
  bool stopping_ ZEROC_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace zeroc
