// One thread that runs callbacks at a time: request deadlines, expiry sweeps, bounded waits.
//
// Any thread may call Schedule and Cancel, callbacks too. Callbacks run one at a time on the timer's thread and must
// not block. The destructor drops what has not run and waits for a callback that is running.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <thread>
#include <utility>

#include "libzeroc/base/mutex.h"

namespace zeroc {

enum class TimerId : std::uint64_t { kNone = 0 };

class TimerThread {
 public:
  using Clock = std::chrono::steady_clock;

  TimerThread();
  ~TimerThread();
  TimerThread(const TimerThread&) = delete;
  TimerThread& operator=(const TimerThread&) = delete;

  // Never kNone.
  TimerId Schedule(Clock::time_point when, std::function<void()> callback);
  // After it the callback does not start; one that is running already is not waited for. Unknown ids are fine.
  void Cancel(TimerId id);

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
