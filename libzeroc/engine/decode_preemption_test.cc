// Output that grows in a pool too small for everyone: who gives way, that all come to their end, and that nobody's
// tokens change.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "libzeroc/engine/engines_testing.h"
#include "libzeroc/engine/local_generator.h"

namespace zeroc {
namespace {

using testing::DecodeLog;
using testing::EnginesTest;
using testing::TightPool;

class DecodePreemptionTest : public EnginesTest {
 protected:
  std::vector<std::int32_t> Alone(const std::shared_ptr<const KvFormat>& format,
                                  const std::vector<std::int32_t>& prompt, const SamplingParams& sampling) {
    return GenerateLocally(*model_, format, prompt, sampling)->ids;
  }
  std::uint64_t Bytes(int n_tokens) const { return SequenceKv::BytesNeeded(*plain_, n_tokens, 1); }
};

TEST_F(DecodePreemptionTest, RoomIsTakenAsTheOutputGrows) {
  const auto pool = Pool(2, 600);
  DecodeEngine decode(*model_, pool->pool(), {.batch_max = 4, .headroom_tokens = 64});
  const auto used = [&] { return pool->pool().usage().bytes_used; };
  const SequenceId id = decode.Reserve(plain_, 100, 400).value();
  EXPECT_EQ(used(), Bytes(164));
  DecodeLog log;
  Fill(decode, id, plain_, tiny_.RandomIds(100, 1), Sampling(400), &log);
  std::uint64_t last = used();
  while (decode.Step()) {
    const int n_held = 100 + static_cast<int>(log.ids.size()) - 1;
    EXPECT_LE(used(), Bytes(std::min(499, n_held + 64)));
    EXPECT_GE(used(), last);
    last = used();
  }
  EXPECT_EQ(used(), Bytes(499));
  EXPECT_EQ(decode.n_preemptions(), 0u);
  EXPECT_EQ(log.ids, Alone(plain_, tiny_.RandomIds(100, 1), Sampling(400)));
  decode.Release(id);
  EXPECT_EQ(used(), 0u);
}

// Random arrivals, slow wires and slow owners over a pool that holds little more than the largest of them.
TEST_F(DecodePreemptionTest, EverybodyEndsWithItsOwnTokens) {
  struct Request {
    std::vector<std::int32_t> prompt;
    std::shared_ptr<const KvFormat> format;
    SamplingParams sampling;
    int priority = 0;
    SequenceId id{};
    int wire_steps = 0;  // until admitted
    bool reserved = false, admitted = false, released = false;
    DecodeLog log;
  };
  std::uint64_t n_preemptions = 0;
  for (unsigned seed = 0; seed < 6; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 rng(seed);
    const auto below = [&rng](unsigned n) { return static_cast<int>(rng() % n); };
    std::deque<Request> requests(14);
    std::uint64_t largest = 0;
    for (Request& r : requests) {
      r.prompt = tiny_.RandomIds(5 + below(150), static_cast<unsigned>(rng()));
      r.format = below(3) == 0 ? packing_ : plain_;
      r.sampling = Sampling(2 + below(150), below(2) == 0 ? 0.0f : 1.0f);
      r.priority = below(3);
      r.wire_steps = below(10);
      largest = std::max(
          largest, SequenceKv::BytesNeeded(*r.format, static_cast<int>(r.prompt.size()) + r.sampling.max_tokens, 1));
    }
    TightPool tight(largest * static_cast<std::uint64_t>(11 + below(7)) / 10 + (96 << 10));
    DecodeEngine decode(*model_, tight.pool(),
                        {.batch_max = 1 + below(6), .headroom_tokens = 1 + below(64), .swap_bytes = 64 << 20});
    int n_open = static_cast<int>(requests.size());
    for (int turn = 0; n_open > 0; ++turn) {
      ASSERT_LT(turn, 20'000) << "a livelock";
      for (Request& r : requests) {
        if (r.released) continue;
        if (!r.reserved) {
          if (below(3) != 0) break;
          const auto id =
              decode.Reserve(r.format, static_cast<int>(r.prompt.size()), r.sampling.max_tokens, r.priority);
          ASSERT_TRUE(id.ok() || id.status().code() == StatusCode::kResourceExhausted) << id.status().ToString();
          if (!id.ok()) continue;
          r.id = *id;
          r.reserved = true;
        } else if (!r.admitted && --r.wire_steps < 0) {
          r.admitted = true;
          ASSERT_NO_FATAL_FAILURE(Fill(decode, r.id, r.format, r.prompt, r.sampling, &r.log));
        } else if (r.log.n_finished > 0 && below(3) == 0) {
          r.released = true;
          --n_open;
          decode.Release(r.id);
        }
        ASSERT_TRUE(r.log.status.ok()) << r.log.status.ToString();
      }
      decode.Step();
    }
    for (const Request& r : requests) EXPECT_EQ(r.log.ids, Alone(r.format, r.prompt, r.sampling));
    EXPECT_EQ(tight.pool().usage().n_blocks_used, 0u);
    EXPECT_EQ(decode.swapped_bytes(), 0u);
    EXPECT_EQ(decode.n_preempted() + decode.n_running() + decode.n_reserved(), 0);
    n_preemptions += decode.n_preemptions();
  }
  EXPECT_GT(n_preemptions, 10u) << "the pools were large enough for everyone: nothing was tried";
}

TEST_F(DecodePreemptionTest, TheLowestInRankGivesWayAndComesBackFirst) {
  TightPool tight(3 * Bytes(128) + Bytes(64));
  DecodeEngine decode(*model_, tight.pool(), {.batch_max = 4, .headroom_tokens = 64, .swap_bytes = 64 << 20});
  const int priorities[] = {0, 1, 0};
  std::vector<SequenceId> ids;
  std::deque<DecodeLog> logs(3);
  for (int i = 0; i < 3; ++i) {
    ids.push_back(decode.Reserve(plain_, 64, 150, priorities[i]).value());
    Fill(decode, ids.back(), plain_, tiny_.RandomIds(64, static_cast<unsigned>(i)), Sampling(150), &logs[i]);
  }
  while (decode.n_preempted() == 0) ASSERT_TRUE(decode.Step());
  EXPECT_EQ(decode.kv(ids[2]), nullptr) << "the newest of the lowest priority";
  EXPECT_NE(decode.kv(ids[0]), nullptr);
  EXPECT_NE(decode.kv(ids[1]), nullptr);
  EXPECT_GT(decode.swapped_bytes(), 0u);
  const Status low = decode.Reserve(plain_, 1, 1, 0).status();
  EXPECT_EQ(low.code(), StatusCode::kResourceExhausted) << "nobody new of its rank while it waits";
  const auto high = decode.Reserve(plain_, 1, 1, 1);
  ASSERT_TRUE(high.ok()) << high.status().ToString();
  decode.Release(*high);
  // Cancelled while it is out: its bytes go too, and the others end.
  decode.Release(ids[2]);
  EXPECT_EQ(decode.swapped_bytes(), 0u);
  while (decode.Step()) {
    for (int i : {0, 1}) {
      if (logs[i].n_finished > 0) decode.Release(ids[i]);
    }
  }
  for (int i : {0, 1})
    EXPECT_EQ(logs[i].ids, Alone(plain_, tiny_.RandomIds(64, static_cast<unsigned>(i)), Sampling(150)));
  for (const SequenceId id : ids) decode.Release(id);
  EXPECT_EQ(tight.pool().usage().n_blocks_used, 0u);
}

TEST_F(DecodePreemptionTest, WithoutSwapThePreemptedFailsAndSaysSo) {
  TightPool tight(2 * Bytes(128) + Bytes(64));
  DecodeEngine decode(*model_, tight.pool(), {.batch_max = 4, .headroom_tokens = 64, .swap_bytes = 1000});
  std::deque<DecodeLog> logs(2);
  std::vector<SequenceId> ids;
  for (int i = 0; i < 2; ++i) {
    ids.push_back(decode.Reserve(plain_, 64, 150).value());
    Fill(decode, ids.back(), plain_, tiny_.RandomIds(64, static_cast<unsigned>(i)), Sampling(150), &logs[i]);
  }
  while (decode.Step()) {
  }
  EXPECT_EQ(logs[1].status.code(), StatusCode::kResourceExhausted);
  EXPECT_NE(logs[1].status.ToString().find("preempted"), std::string::npos) << logs[1].status.ToString();
  EXPECT_EQ(decode.n_preemptions(), 1u);
  EXPECT_EQ(logs[0].ids, Alone(plain_, tiny_.RandomIds(64, 0), Sampling(150)));
  EXPECT_EQ(logs[0].n_finished, 1);
  for (const SequenceId id : ids) decode.Release(id);
  EXPECT_EQ(tight.pool().usage().n_blocks_used, 0u);
}

TEST_F(DecodePreemptionTest, WhatCanNeverFitIsRefusedAtOnce) {
  TightPool tight(Bytes(300));
  DecodeEngine decode(*model_, tight.pool(), {});
  EXPECT_EQ(decode.Reserve(plain_, 64, 900).status().code(), StatusCode::kOutOfRange);
  const auto id = decode.Reserve(plain_, 64, 200);
  ASSERT_TRUE(id.ok()) << id.status().ToString();
  decode.Release(*id);
}

// Blocks that a wire fills cannot be taken away: the one that runs waits for them and goes on where it was.
TEST_F(DecodePreemptionTest, WaitsForBlocksThatNobodyCanTake) {
  TightPool tight(2 * Bytes(128) + Bytes(64));
  DecodeEngine decode(*model_, tight.pool(), {.batch_max = 4, .headroom_tokens = 64, .swap_bytes = 64 << 20});
  DecodeLog log;
  const SequenceId runs = decode.Reserve(plain_, 64, 200).value();
  const SequenceId leased = decode.Reserve(plain_, 128, 1).value();
  Fill(decode, runs, plain_, tiny_.RandomIds(64, 7), Sampling(200), &log);
  while (decode.Step()) {
  }
  EXPECT_EQ(decode.n_preempted(), 1);
  EXPECT_EQ(log.n_finished, 0);
  decode.Release(leased);
  while (decode.Step()) {
  }
  EXPECT_EQ(log.n_finished, 1);
  EXPECT_EQ(log.ids, Alone(plain_, tiny_.RandomIds(64, 7), Sampling(200)));
  decode.Release(runs);
}

TEST_F(DecodePreemptionTest, PriorityComesFirstButEveryoneHasATurn) {
  const auto pool = Pool(6, 400);
  DecodeEngine decode(*model_, pool->pool(), {.batch_max = 2});
  std::deque<DecodeLog> logs(6);
  for (int i = 0; i < 6; ++i) {
    const SequenceId id = decode.Reserve(plain_, 5, 300, i < 3 ? 1 : 0).value();
    Fill(decode, id, plain_, tiny_.RandomIds(5, static_cast<unsigned>(i)), Sampling(300), &logs[i]);
  }
  for (int step = 0; step < 96; ++step) ASSERT_TRUE(decode.Step());
  std::size_t urgent = 0, others = 0;
  for (std::size_t i = 0; i < 6; ++i) {
    const std::size_t n = logs[i].ids.size() - 1;
    (i < 3 ? urgent : others) += n;
    EXPECT_GE(n, 96u / 19) << i << ": sixteen steps of waiting, and two behind others that waited as long";
  }
  EXPECT_EQ(urgent + others, 2u * 96);
  EXPECT_GE(urgent, 4 * others);
  EXPECT_LE(std::max({logs[0].ids.size(), logs[1].ids.size(), logs[2].ids.size()}) -
                std::min({logs[0].ids.size(), logs[1].ids.size(), logs[2].ids.size()}),
            2u)
      << "in turn among equals";
}

}  // namespace
}  // namespace zeroc
