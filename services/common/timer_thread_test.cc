#include "services/common/timer_thread.h"

#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <vector>

#include "services/common/logging.h"

namespace zeroc {
namespace {

using std::chrono::milliseconds;
using Clock = TimerThread::Clock;

TEST(TimerThread, RunsInOrderOfTime) {
  TimerThread timers;
  std::vector<int> order;
  std::promise<void> done;
  const auto now = Clock::now();
  timers.Schedule(now + milliseconds(60), [&] {
    order.push_back(3);
    done.set_value();
  });
  timers.Schedule(now + milliseconds(20), [&] { order.push_back(1); });
  timers.Schedule(now + milliseconds(40), [&] { order.push_back(2); });
  ASSERT_EQ(done.get_future().wait_for(std::chrono::seconds(5)), std::future_status::ready);
  EXPECT_EQ(order, (std::vector<int>{1, 2, 3}));
}

TEST(TimerThread, CancelledCallbacksDoNotRunAndCallbacksMaySchedule) {
  TimerThread timers;
  std::atomic<int> ran{0};
  const TimerId id = timers.Schedule(Clock::now() + milliseconds(30), [&] { ran += 100; });
  timers.Cancel(id);
  timers.Cancel(id);
  timers.Cancel(TimerId::kNone);
  std::promise<void> done;
  timers.Schedule(Clock::now(), [&] {
    ran += 1;
    timers.Schedule(Clock::now() + milliseconds(50), [&] { done.set_value(); });
  });
  ASSERT_EQ(done.get_future().wait_for(std::chrono::seconds(5)), std::future_status::ready);
  EXPECT_EQ(ran.load(), 1);
}

TEST(TimerThread, DropsWhatIsLeftWhenItEnds) {
  std::atomic<bool> ran{false};
  {
    TimerThread timers;
    timers.Schedule(Clock::now() + std::chrono::hours(1), [&] { ran = true; });
  }
  EXPECT_FALSE(ran.load());
}

TEST(Logging, ForeignTextCannotForgeALine) {
  EXPECT_EQ(EscapeControls("a\nb\r\x1b[0m\x7f ü"), "a\\x0ab\\x0d\\x1b[0m\\x7f ü");
  EXPECT_TRUE(ParseLogLevel("warning").ok());
  EXPECT_FALSE(ParseLogLevel("loud").ok());
}

}  // namespace
}  // namespace zeroc
