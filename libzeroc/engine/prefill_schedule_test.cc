// Who the prefill engine computes next: priorities, short prompts beside long ones, deadlines, blocks that are not to
// be had; and that the company changes nobody's result.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "libzeroc/engine/engines_testing.h"
#include "libzeroc/engine/local_generator.h"

namespace zeroc {
namespace {

using testing::EnginesTest;
using testing::PrefillLog;
using testing::TightPool;

class PrefillScheduleTest : public EnginesTest {
 protected:
  struct Job : PrefillLog {
    PrefillScheduleTest* test = nullptr;
    int idx = 0;
    PrefillJobId id{};
    void OnStarted(int) override { test->started_.push_back(idx); }
    void OnFirstToken(const SequenceKv& sequence, const SampledToken& sampled) override {
      PrefillLog::OnFirstToken(sequence, sampled);
      test->finished_.push_back(idx);
    }
    bool done() const { return kv != nullptr; }
  };

  Job& Submit(PrefillEngine& engine, int n_tokens, int priority = 0, std::int64_t deadline_ns = 0) {
    Job& job = jobs_.emplace_back();
    job.test = this;
    job.idx = static_cast<int>(jobs_.size()) - 1;
    PrefillJob request{tiny_.RandomIds(n_tokens, static_cast<unsigned>(job.idx)), Sampling(1), packing_, &job};
    request.priority = priority;
    request.deadline_ns = deadline_ns;
    job.id = engine.Submit(std::move(request)).value();
    return job;
  }

  std::deque<Job> jobs_;
  std::vector<int> started_, finished_;  // by idx
};

TEST_F(PrefillScheduleTest, HigherPrioritiesFirstThenArrival) {
  const auto pool = Pool(8, 512);
  PrefillEngine engine(*model_, pool->pool(), {.chunk_tokens = 64, .queue_max = 64});
  for (const int priority : {0, 5, 5, 1}) Submit(engine, 64, priority);
  while (engine.Step()) {
  }
  EXPECT_EQ(finished_, (std::vector<int>{1, 2, 3, 0}));
}

TEST_F(PrefillScheduleTest, ShortPromptsPassALongOneWhichGoesOn) {
  const auto pool = Pool(12, 2048);
  PrefillEngine engine(*model_, pool->pool(), {.chunk_tokens = 512, .queue_max = 64});
  const Job& slow = Submit(engine, 2000);
  ASSERT_TRUE(engine.Step());
  EXPECT_EQ(engine.waiting_tokens(), 2000 - 512) << "alone it has the whole chunk";
  for (int i = 0; i < 9; ++i) Submit(engine, 60);
  int n_steps = 1;
  for (; n_steps < 4; ++n_steps) {
    const std::int64_t left = engine.waiting_tokens();
    ASSERT_TRUE(engine.Step());
    EXPECT_EQ(finished_.size(), static_cast<std::size_t>(n_steps) * 3) << "three slots of eight";
    EXPECT_GE(left - engine.waiting_tokens(), 3 * 60 + 4 * 64);
  }
  EXPECT_FALSE(slow.done());
  for (; !slow.done(); ++n_steps) ASSERT_TRUE(engine.Step());
  EXPECT_LE(n_steps, 1 + 3 + 2);
}

// However many more urgent prompts arrive, the oldest job has one slot of eight.
TEST_F(PrefillScheduleTest, NobodyStarves) {
  for (const int chunk : {64, 128, 512}) {
    jobs_.clear();
    const auto pool = Pool(64, 256);
    PrefillEngine engine(*model_, pool->pool(), {.chunk_tokens = chunk, .queue_max = 1000});
    const Job& meek = Submit(engine, 256, -1);
    int n_slots = 0;
    while (!meek.done() && n_slots < 64) {
      // The urgent ones never run out.
      while (engine.n_waiting() < 12) Submit(engine, 64, 1);
      ASSERT_TRUE(engine.Step());
      n_slots += chunk / 64;
      for (Job& job : jobs_) {
        if (job.done() && &job != &meek) engine.Release(job.id);
      }
    }
    EXPECT_TRUE(meek.done());
    EXPECT_LE(n_slots, 4 * 8 + 8) << "a slot of eight for each of its four blocks";
  }
}

TEST_F(PrefillScheduleTest, ALatePromptIsDroppedBetweenChunks) {
  const auto pool = Pool(3, 512);
  PrefillEngine engine(*model_, pool->pool(), {.chunk_tokens = 64, .queue_max = 8});
  Job& running = Submit(engine, 512, 1, 100);
  Job& queued = Submit(engine, 64, 0, 50);
  Job& patient = Submit(engine, 64, 0);
  ASSERT_TRUE(engine.Step(10));
  ASSERT_TRUE(engine.Step(49));
  EXPECT_TRUE(queued.status.ok());
  engine.DropLate(50);
  EXPECT_EQ(queued.status.code(), StatusCode::kDeadlineExceeded);
  EXPECT_NE(queued.status.ToString().find("0 of 64"), std::string::npos) << queued.status.ToString();
  EXPECT_TRUE(running.status.ok());
  ASSERT_TRUE(engine.Step(100));
  EXPECT_EQ(running.status.code(), StatusCode::kDeadlineExceeded);
  EXPECT_NE(running.status.ToString().find("128 of 512"), std::string::npos) << running.status.ToString();
  EXPECT_TRUE(patient.done()) << "the step that dropped one had room for the next";
  EXPECT_FALSE(engine.Step(1000));
  for (const Job& job : jobs_) engine.Release(job.id);
  EXPECT_EQ(pool->pool().usage().n_blocks_used, 0u);
}

// A long prompt that waits for blocks is passed by a few, not for ever.
TEST_F(PrefillScheduleTest, OvertakingEndsWhileBlocksAreShort) {
  const std::uint64_t room = SequenceKv::BytesNeeded(*packing_, 2000, 64) * 13 / 10;  // and the slabs' waste
  TightPool tight(room);
  BlockPool* pool = &tight.pool();
  PrefillEngine engine(*model_, *pool, {.chunk_tokens = 64, .queue_max = 64});
  Job& holder = Submit(engine, 1200);
  while (engine.Step()) {
  }
  Job& large = Submit(engine, 2000);
  EXPECT_FALSE(engine.Step()) << "it waits for blocks";
  for (int i = 0; i < 20; ++i) Submit(engine, 64);
  for (int i = 0; i < 40 && engine.Step(); ++i) {
    for (Job& job : jobs_) {
      if (job.done() && &job != &holder) engine.Release(job.id);
    }
  }
  EXPECT_EQ(started_.size(), 1u + 8u) << "eight passed, and then it is the large one's turn";
  engine.Release(holder.id);
  while (engine.Step()) {
    for (Job& job : jobs_) {
      if (job.done()) engine.Release(job.id);
    }
  }
  EXPECT_TRUE(large.done());
  EXPECT_EQ(started_[9], large.idx);
  EXPECT_EQ(finished_.size(), 22u);
  EXPECT_EQ(pool->usage().n_blocks_used, 0u);
}

TEST_F(PrefillScheduleTest, TheCompanyChangesNoResult) {
  for (unsigned seed = 0; seed < 4; ++seed) {
    std::mt19937 rng(seed);
    const auto pool = Pool(24, 512);
    PrefillEngine engine(*model_, pool->pool(),
                         {.chunk_tokens = 64 * static_cast<int>(1 + rng() % 6), .queue_max = 64});
    std::vector<PrefillJob> requests;
    std::deque<PrefillLog> logs;
    std::vector<PrefillJobId> ids;
    std::vector<bool> cancelled;
    while (requests.size() < 24 || engine.n_waiting() > 0) {
      if (requests.size() < 24 && rng() % 2 == 0) {
        const int n = rng() % 3 == 0 ? 200 + static_cast<int>(rng() % 300) : 1 + static_cast<int>(rng() % 90);
        SamplingParams sampling = Sampling(1, rng() % 2 == 0 ? 0.0f : 0.9f);
        sampling.logprobs = 5;
        PrefillJob request{tiny_.RandomIds(n, static_cast<unsigned>(rng())), sampling,
                           rng() % 3 == 0 ? plain_ : packing_, &logs.emplace_back()};
        request.priority = static_cast<int>(rng() % 3);
        requests.push_back(request);
        ids.push_back(engine.Submit(request).value());
        cancelled.push_back(false);
      }
      engine.Step();
      if (!ids.empty() && rng() % 12 == 0) {
        const std::size_t i = rng() % ids.size();
        engine.Release(ids[i]);
        if (logs[i].kv == nullptr) cancelled[i] = true;
      }
    }
    for (std::size_t i = 0; i < requests.size(); ++i) {
      if (cancelled[i]) {
        EXPECT_EQ(logs[i].kv, nullptr);
        continue;
      }
      const auto alone_pool = Pool(1, 512);
      PrefillEngine alone(*model_, alone_pool->pool(), {.chunk_tokens = 512, .queue_max = 1});
      PrefillLog log;
      requests[i].listener = &log;
      ASSERT_TRUE(alone.Submit(requests[i]).ok());
      while (alone.Step()) {
      }
      EXPECT_EQ(logs[i].token.id, log.token.id) << i;
      ASSERT_EQ(logs[i].token.top.size(), log.token.top.size());
      for (std::size_t j = 0; j < log.token.top.size(); ++j) {
        // Float sums over another cut of the same keys differ in their last bits.
        EXPECT_NEAR(logs[i].token.top[j].second, log.token.top[j].second, 1e-4);
      }
      EXPECT_EQ(logs[i].packed, log.packed);
      EXPECT_EQ(logs[i].exact, log.exact);
    }
    for (const PrefillJobId id : ids) engine.Release(id);
    EXPECT_EQ(pool->pool().usage().n_blocks_used, 0u);
  }
}

}  // namespace
}  // namespace zeroc
