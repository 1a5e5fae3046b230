#include "libzeroc/engine/engine_thread.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace zeroc {
namespace {

TEST(EngineThreadTest, RunsPostedWorkInOrderBetweenSteps) {
  std::vector<int> order;  // engine thread only
  std::atomic<int> work{0};
  EngineThread engine("test", [&] {
    if (work.load() == 0) return false;
    work.fetch_sub(1);
    order.push_back(-1);
    return true;
  });
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(engine.Post([&order, i] { order.push_back(i); }));
  const auto seen = engine.Call<std::vector<int>>([&] { return order; });
  ASSERT_EQ(seen.size(), 100u);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(seen[static_cast<std::size_t>(i)], i);
  work = 3;
  engine.Post([] {});  // wakes it
  while (engine.Call<std::size_t>([&] { return order.size(); }) < 103) std::this_thread::yield();
}

TEST(EngineThreadTest, StopRunsWhatWasPostedAndRefusesMore) {
  std::atomic<int> n{0};
  EngineThread engine("test", [] { return false; });
  for (int i = 0; i < 1000; ++i) engine.Post([&] { n.fetch_add(1); });
  engine.Stop();
  EXPECT_EQ(n.load(), 1000);
  EXPECT_FALSE(engine.Post([&] { n.fetch_add(1); }));
  EXPECT_EQ(engine.Call<int>([] { return 7; }), 0);
  EXPECT_EQ(n.load(), 1000);
}

TEST(EngineThreadTest, ManyCallersEachGetTheirAnswer) {
  int counter = 0;  // engine thread only
  EngineThread engine("test", [] { return false; });
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int t = 0; t < 4; ++t) {
    callers.emplace_back([&, t] {
      for (int i = 0; i < 500; ++i) {
        const int echoed = engine.Call<int>([&, value = t * 1000 + i] {
          ++counter;
          return value;
        });
        if (echoed != t * 1000 + i) wrong.fetch_add(1);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong.load(), 0);
  EXPECT_EQ(engine.Call<int>([&] { return counter; }), 2000);
}

TEST(EngineThreadDeathTest, CallFromItsOwnThreadIsABug) {
  EXPECT_DEATH(
      {
        EngineThread engine("test", [] { return false; });
        engine.Call<int>([&] { return engine.Call<int>([] { return 1; }); });
      },
      "own thread");
}

}  // namespace
}  // namespace zeroc
