#include "services/router/admission_queue.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "services/common/timer_thread.h"

namespace zeroc {
namespace {

using std::chrono::milliseconds;
using Ticket = AdmissionQueue::Ticket;

class AdmissionQueueTest : public testing::Test {
 protected:
  // No round comes but those that Wake begins, unless `round` is short.
  void Make(int tries_per_round, int overtakes_max, milliseconds round = std::chrono::hours(1)) {
    AdmissionQueue::Config config;
    config.waiting_max = 3;
    config.round = round;
    config.tries_per_round = tries_per_round;
    config.overtakes_max = overtakes_max;
    queue_ = std::make_shared<AdmissionQueue>(config, timers_, metrics_);
  }
  Result<AdmissionQueue::Entry> Enter(const std::string& name, int priority = 0, bool returning = false) {
    return queue_->Enter(priority, returning, [this, name] {
      const std::lock_guard lock(mu_);
      turns_.push_back(name);
      turned_.notify_all();
    });
  }
  // Whose turn comes next; empty when nobody's comes in good time.
  std::string NextTurn(milliseconds limit = milliseconds(5000)) {
    std::unique_lock lock(mu_);
    if (!turned_.wait_for(lock, limit, [this] { return !turns_.empty(); })) return "";
    const std::string name = turns_.front();
    turns_.pop_front();
    return name;
  }

  Metrics metrics_{"test-model"};
  std::mutex mu_;
  std::condition_variable turned_;
  std::deque<std::string> turns_;
  TimerThread timers_;
  std::shared_ptr<AdmissionQueue> queue_;
};

TEST_F(AdmissionQueueTest, WhileNobodyWaitsEverybodyMayAsk) {
  Make(8, 32);
  const auto a = Enter("a"), b = Enter("b");
  EXPECT_TRUE(a->may_ask && b->may_ask);
  queue_->Admitted(b->ticket);
  queue_->Admitted(a->ticket);
  EXPECT_EQ(queue_->n_waiting(), 0U);
}

TEST_F(AdmissionQueueTest, TurnsGoByPriorityThenArrival) {
  Make(1, 0);
  const Ticket first = Enter("first")->ticket;
  EXPECT_TRUE(queue_->Refused(first).ok());
  const auto second = Enter("second");
  EXPECT_FALSE(second->may_ask) << "it would go ahead of one that waits";
  const auto urgent = Enter("urgent", 5);
  EXPECT_TRUE(urgent->may_ask) << "nobody is before it";
  EXPECT_TRUE(queue_->Refused(urgent->ticket).ok());
  for (int i = 0; i < 3; ++i) {
    queue_->Wake();
    ASSERT_EQ(NextTurn(), "urgent") << "one try a round: the others wait until the first in line is through";
    if (i < 2) {
      EXPECT_TRUE(queue_->Refused(urgent->ticket).ok());
    }
  }
  queue_->Admitted(urgent->ticket);
  for (const char* name : {"first", "second"}) {
    queue_->Wake();
    ASSERT_EQ(NextTurn(), name);
    queue_->Admitted(name == std::string("first") ? first : second->ticket);
  }
  EXPECT_EQ(queue_->n_waiting(), 0U);
}

TEST_F(AdmissionQueueTest, OneThatDoesNotFitHoldsUpNobodyUntilItWasOvertakenOften) {
  Make(8, 2);
  const Ticket big = Enter("big")->ticket;
  EXPECT_TRUE(queue_->Refused(big).ok());
  for (int i = 0; i < 2; ++i) {
    const auto small = Enter("small");
    ASSERT_TRUE(small->may_ask) << i;
    queue_->Admitted(small->ticket);
  }
  const auto third = Enter("third");
  EXPECT_FALSE(third->may_ask) << "the big one was overtaken twice: now it comes first";
  for (int i = 0; i < 3; ++i) {
    queue_->Wake();
    ASSERT_EQ(NextTurn(), "big");
    EXPECT_TRUE(queue_->Refused(big).ok());
    EXPECT_EQ(NextTurn(milliseconds(20)), "") << "nobody else's";
  }
  queue_->Wake();
  ASSERT_EQ(NextTurn(), "big");
  queue_->Admitted(big);
  EXPECT_EQ(NextTurn(), "third") << "in the same round";
}

TEST_F(AdmissionQueueTest, RoundsComeByThemselves) {
  Make(8, 32, milliseconds(5));
  const Ticket ticket = Enter("x")->ticket;
  for (int i = 0; i < 3; ++i) {
    EXPECT_TRUE(queue_->Refused(ticket).ok());
    ASSERT_EQ(NextTurn(), "x");
  }
}

TEST_F(AdmissionQueueTest, LaterOnesGetTheirTurnInTheSameRound) {
  Make(8, 32);
  const Ticket big = Enter("big")->ticket;
  const Ticket small = Enter("small")->ticket;
  EXPECT_TRUE(queue_->Refused(big).ok());
  EXPECT_TRUE(queue_->Refused(small).ok());
  EXPECT_EQ(queue_->n_waiting(), 2U);
  queue_->Wake();
  EXPECT_EQ(NextTurn(), "big");
  EXPECT_TRUE(queue_->Refused(big).ok());
  EXPECT_EQ(NextTurn(), "small");
  queue_->Admitted(small);
  EXPECT_EQ(NextTurn(milliseconds(50)), "") << "everybody had a turn in this round";
  queue_->Wake();
  EXPECT_EQ(NextTurn(), "big");
  queue_->Leave(big);
  queue_->Leave(big);
  EXPECT_EQ(queue_->n_waiting(), 0U);
}

TEST_F(AdmissionQueueTest, IsBounded) {
  Make(8, 0);
  std::vector<Ticket> tickets;
  for (int i = 0; i < 4; ++i) tickets.push_back(Enter("x")->ticket);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(queue_->Refused(tickets[static_cast<std::size_t>(i)]).ok());
  EXPECT_NE(metrics_.Render().find("vllm:num_requests_waiting{model_name=\"test-model\"} 3"), std::string::npos);
  EXPECT_EQ(queue_->Refused(tickets[3]).code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(Enter("more").status().code(), StatusCode::kResourceExhausted);
  const auto urgent = Enter("urgent", 9);
  ASSERT_TRUE(urgent.ok());
  EXPECT_TRUE(urgent->may_ask) << "it need not wait";
  queue_->Leave(tickets[0]);
  EXPECT_TRUE(Enter("more").ok());
}

TEST_F(AdmissionQueueTest, OneThatWasServedBeforeGoesAheadOfItsEquals) {
  Make(1, 32);
  const Ticket first = Enter("first")->ticket;
  EXPECT_TRUE(queue_->Refused(first).ok());
  const auto returning = Enter("returning", 0, true);
  EXPECT_TRUE(returning->may_ask);
  EXPECT_TRUE(queue_->Refused(returning->ticket).ok());
  queue_->Wake();
  EXPECT_EQ(NextTurn(), "returning");
  queue_->Admitted(returning->ticket);
}

TEST_F(AdmissionQueueTest, ItsEndStopsItsTimers) {
  Make(1, 32, milliseconds(5));
  const Ticket ticket = Enter("x")->ticket;
  EXPECT_TRUE(queue_->Refused(ticket).ok());
  queue_.reset();
  std::this_thread::sleep_for(milliseconds(30));
}

}  // namespace
}  // namespace zeroc
