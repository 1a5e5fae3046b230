// The services' Timers on the fake network's virtual clock. Single-threaded; callbacks run as events of the network and
// are dropped with this object.
#pragma once

#include <algorithm>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <utility>

#include "libzeroc/comm/fake_transport.h"
#include "services/common/timers.h"

namespace zeroc::simulation {

class VirtualTimers final : public Timers {
 public:
  explicit VirtualTimers(FakeNetwork& network) : network_(network) {}

  Clock::time_point Now() const override { return Clock::time_point(SinceStart<Clock::duration>()); }
  WallClock::time_point WallNow() const override { return WallClock::time_point(SinceStart<WallClock::duration>()); }
  // Seconds from now until a deadline.
  double Until(WallClock::time_point deadline) const {
    return std::max(0.0, std::chrono::duration<double>(deadline - WallNow()).count());
  }
  TimerId Schedule(Clock::time_point when, std::function<void()> callback) override {
    const auto id = static_cast<TimerId>(next_id_++);
    (*callbacks_)[id] = std::move(callback);
    const double delay = std::max(0.0, std::chrono::duration<double>(when - Now()).count());
    network_.At(delay, {}, [weak = std::weak_ptr(callbacks_), id] {
      const auto callbacks = weak.lock();
      if (callbacks == nullptr) return;
      const auto node = callbacks->extract(id);
      if (!node.empty()) node.mapped()();
    });
    return id;
  }
  void Cancel(TimerId id) override {
    callbacks_->extract(id);
  }  // destroyed at the end of the statement, outside the map

 private:
  template <typename Duration>
  Duration SinceStart() const {
    return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(network_.now_seconds()));
  }

  FakeNetwork& network_;
  std::uint64_t next_id_ = 1;
  std::shared_ptr<std::map<TimerId, std::function<void()>>> callbacks_ =
      std::make_shared<std::map<TimerId, std::function<void()>>>();
};

}  // namespace zeroc::simulation
