// Time as the services take it: what o'clock it is, and callbacks for later. Implemented by a thread on the system's
// clocks (timer_thread.h), and by a simulation's virtual clock.
//
// Thread-safe. Callbacks run one at a time, never inside Schedule or Cancel, and must not block.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>

namespace zeroc {

enum class TimerId : std::uint64_t { kNone = 0 };

class Timers {
 public:
  using Clock = std::chrono::steady_clock;
  using WallClock = std::chrono::system_clock;  // what deadlines of RPCs are told in

  virtual ~Timers() = default;
  virtual Clock::time_point Now() const = 0;
  virtual WallClock::time_point WallNow() const = 0;
  // Never kNone. Callbacks may call this and Cancel.
  virtual TimerId Schedule(Clock::time_point when, std::function<void()> callback) = 0;
  // After it the callback does not start; one that is running already is not waited for. Unknown ids are fine.
  virtual void Cancel(TimerId id) = 0;
};

}  // namespace zeroc
