#include "libzeroc/base/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace zeroc {
namespace {

TEST(ThreadPoolTest, RunsEveryItemOnce) {
  for (const int n_threads : {1, 2, 3, 7}) {
    ThreadPool pool(n_threads);
    for (const std::size_t n_items : {0u, 1u, 2u, 5u, 1000u}) {
      std::vector<std::atomic<int>> hits(n_items);
      std::atomic<int> bad_thread{0};
      pool.ParallelFor(n_items, [&](std::size_t item, int thread_idx) {
        hits[item].fetch_add(1);
        if (thread_idx < 0 || thread_idx >= pool.size()) bad_thread.fetch_add(1);
      });
      for (const auto& h : hits) EXPECT_EQ(h.load(), 1);
      EXPECT_EQ(bad_thread.load(), 0);
    }
  }
}

TEST(ThreadPoolTest, WritesOfOneRoundAreSeenInTheNext) {
  ThreadPool pool(3);
  std::vector<int> values(64, 0);
  for (int round = 0; round < 2000; ++round) {
    pool.ParallelFor(values.size(), [&](std::size_t i, int) { values[i] += 1; });
  }
  for (const int v : values) EXPECT_EQ(v, 2000);
}

// Rounds of few items, shorter than it takes a worker to come: late ones must not touch what is no more.
TEST(ThreadPoolTest, LateWorkersTakeNothingOfAFinishedRound) {
  ThreadPool pool(6);
  for (int round = 0; round < 20'000; ++round) {
    const std::size_t n_items = 2 + static_cast<std::size_t>(round % 3);
    std::vector<int> hits(n_items, 0);
    pool.ParallelFor(n_items, [&](std::size_t item, int) { ++hits[item]; });
    for (const int n : hits) ASSERT_EQ(n, 1) << round;
  }
}

TEST(ThreadPoolTest, WakesFromSleep) {
  ThreadPool pool(2);
  for (int round = 0; round < 5; ++round) {
    std::atomic<int> sum{0};
    pool.ParallelFor(10, [&](std::size_t i, int) { sum.fetch_add(static_cast<int>(i)); });
    EXPECT_EQ(sum.load(), 45);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // past the spin phase
  }
}

}  // namespace
}  // namespace zeroc
