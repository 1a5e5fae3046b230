// Prefill and decode engines over the tiny model: hand-off by copied blocks, batching, limits, and blocks that come
// back.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <vector>

#include "libzeroc/engine/engines_testing.h"
#include "libzeroc/engine/local_generator.h"

namespace zeroc {
namespace {

using testing::DecodeLog;
using testing::EnginesTest;
using testing::PrefillLog;

TEST_F(EnginesTest, HandedOffTokensEqualLocalOnes) {
  for (const auto& format : {plain_, packing_}) {
    for (const float temperature : {0.0f, 1.0f}) {
      for (const int n_prompt : {1, 16, 63, 64, 65, 191, 192, 193, 300}) {
        const auto prompt = tiny_.RandomIds(n_prompt, static_cast<unsigned>(n_prompt));
        const SamplingParams sampling = Sampling(100, temperature);
        const auto local = GenerateLocally(*model_, format, prompt, sampling);
        ASSERT_TRUE(local.ok()) << local.status().ToString();

        const auto prefill_pool = Pool(1, 512), decode_pool = Pool(1, 512);
        PrefillEngine prefill(*model_, prefill_pool->pool(), {.chunk_tokens = 64, .queue_max = 4});
        DecodeEngine decode(*model_, decode_pool->pool(), {});
        PrefillLog prefill_log;
        DecodeLog decode_log;
        const SequenceId reserved = decode.Reserve(format, n_prompt, 100).value();
        const PrefillJobId job = prefill.Submit({prompt, sampling, format, &prefill_log}).value();
        while (prefill.Step()) {
        }
        ASSERT_NE(prefill_log.kv, nullptr);
        const int n_packed = format->PackedBlocksAt(n_prompt);
        for (int layer = 0; layer < format->n_layers; ++layer) {
          EXPECT_EQ(prefill_log.packed[layer].size(), static_cast<std::size_t>(n_packed));
          if (n_packed > 0) {
            EXPECT_EQ(*prefill_log.packed[layer].rbegin(), n_packed - 1);
          }
          EXPECT_EQ(prefill_log.sinks[layer], n_packed > 0 ? 1 : 0);
          EXPECT_EQ(prefill_log.exact[layer], (n_prompt + 63) / 64 - n_packed);
        }
        ASSERT_NO_FATAL_FAILURE(CopyPrompt(*prefill_log.kv, *decode.kv(reserved), n_prompt));
        prefill.Release(job);
        EXPECT_EQ(prefill_pool->pool().usage().n_blocks_used, 0u);
        ASSERT_TRUE(decode.Admit(reserved, {sampling, prompt, n_prompt, prefill_log.token, &decode_log}).ok());
        while (decode.Step()) {
        }
        EXPECT_EQ(decode_log.n_finished, 1);
        EXPECT_EQ(decode_log.reason, FinishReason::kLength);
        decode_log.ids.insert(decode_log.ids.begin(), prefill_log.token.id);
        EXPECT_EQ(decode_log.ids, local->ids) << "prompt " << n_prompt << " temperature " << temperature;
        decode.Release(reserved);
        EXPECT_EQ(decode_pool->pool().usage().n_blocks_used, 0u);
      }
    }
  }
}

class TwoThreadsTest : public EnginesTest {
 protected:
  TwoThreadsTest() : EnginesTest(2) {}
};

TEST_F(TwoThreadsTest, TokensAreThoseOfOneThread) {
  ThreadPool alone(1);
  const auto model = Transformer::Open(tiny_.Open(), nullptr, kernels::ReferenceOps(), alone).value();
  const auto prompt = tiny_.RandomIds(260, 1);
  for (const auto& format : {plain_, packing_}) {
    for (const float temperature : {0.0f, 1.0f}) {
      const SamplingParams sampling = Sampling(20, temperature);
      const auto one = GenerateLocally(*model, format, prompt, sampling);
      const auto two = GenerateLocally(*model_, format, prompt, sampling);
      ASSERT_TRUE(one.ok() && two.ok());
      EXPECT_EQ(one->ids, two->ids);
    }
  }
}

// What is never packed must not wait for the prompt's end: without compression that is everything there is to send.
TEST_F(EnginesTest, ExactBlocksAreReadyWithTheirChunk) {
  const auto pool = Pool(1, 512);
  PrefillEngine prefill(*model_, pool->pool(), {.chunk_tokens = 128, .queue_max = 1});
  PrefillLog log;
  ASSERT_TRUE(prefill.Submit({tiny_.RandomIds(300, 1), Sampling(1), plain_, &log}).ok());
  std::vector<int> after_step;
  while (prefill.Step()) after_step.push_back(log.exact[0]);
  EXPECT_EQ(after_step, (std::vector<int>{2, 4, 5}));  // 300 tokens: four full blocks and one of 44 tokens
  EXPECT_EQ(log.exact_at_call.size(), 3u * static_cast<std::size_t>(model_->config().n_layers));
}

TEST_F(EnginesTest, MoreSequencesThanTheBatchTakeTurns) {
  const auto pool = Pool(5, 200);
  DecodeEngine decode(*model_, pool->pool(), {.batch_max = 2});
  std::vector<std::vector<std::int32_t>> prompts;
  std::vector<DecodeLog> logs(5);
  std::vector<SequenceId> ids;
  for (unsigned i = 0; i < 5; ++i) {
    // One token of prompt: its KV is computed by prefilling into a scratch engine and copying.
    const auto prompt = tiny_.RandomIds(20 + static_cast<int>(i), i);
    const auto scratch = Pool(1, 200);
    PrefillEngine prefill(*model_, scratch->pool(), {.chunk_tokens = 64, .queue_max = 1});
    PrefillLog log;
    ASSERT_TRUE(prefill.Submit({prompt, Sampling(10), packing_, &log}).ok());
    ASSERT_TRUE(prefill.Step());
    ids.push_back(decode.Reserve(packing_, static_cast<int>(prompt.size()), 10).value());
    ASSERT_NO_FATAL_FAILURE(CopyPrompt(*log.kv, *decode.kv(ids[i]), static_cast<int>(prompt.size())));
    ASSERT_TRUE(
        decode.Admit(ids[i], {Sampling(10), prompt, static_cast<int>(prompt.size()), log.token, &logs[i]}).ok());
    prompts.push_back(prompt);
  }
  std::size_t most = 0, least = 0;
  int n_steps = 0;
  for (; decode.Step(); ++n_steps) {
    most = least = logs[0].ids.size();
    for (const DecodeLog& log : logs) {
      most = std::max(most, log.ids.size());
      least = std::min(least, log.ids.size());
    }
    EXPECT_LE(most - least, 1u);
  }
  EXPECT_EQ(n_steps, (5 * 9 + 1) / 2);
  for (std::size_t i = 0; i < 5; ++i) {
    const auto local = GenerateLocally(*model_, packing_, prompts[i], Sampling(10));
    ASSERT_EQ(logs[i].ids.size(), 9u);
    EXPECT_TRUE(std::equal(logs[i].ids.begin(), logs[i].ids.end(), local->ids.begin() + 1));
    decode.Release(ids[i]);
  }
  EXPECT_EQ(pool->pool().usage().n_blocks_used, 0u);
}

TEST_F(EnginesTest, PrefillWaitsForBlocksAndFailsWhatNeverFits) {
  const auto needed = SequenceKv::BytesNeeded(*plain_, 1500, 64);
  std::vector<std::byte> memory(needed * 5 / 4 + 64);
  void* start = memory.data();
  std::size_t room = memory.size();
  auto* arena = static_cast<std::byte*>(std::align(64, needed * 5 / 4 / 64 * 64, start, room));
  const auto pool =
      BlockPool::Create({arena, needed * 5 / 4 / 64 * 64}, static_cast<std::size_t>(plain_->exact.block_bytes)).value();
  PrefillEngine engine(*model_, *pool, {.chunk_tokens = 64, .queue_max = 3});
  PrefillLog first, second, huge, one_more;
  const auto a = engine.Submit({tiny_.RandomIds(1500, 1), Sampling(1), plain_, &first}).value();
  while (engine.Step()) {
  }
  EXPECT_NE(first.kv, nullptr);
  const auto b = engine.Submit({tiny_.RandomIds(1500, 2), Sampling(1), plain_, &second}).value();
  EXPECT_FALSE(engine.Step());
  EXPECT_EQ(second.kv, nullptr);
  EXPECT_TRUE(second.status.ok());
  engine.Release(a);
  while (engine.Step()) {
  }
  EXPECT_NE(second.kv, nullptr);
  engine.Release(b);
  EXPECT_EQ(pool->usage().n_blocks_used, 0u);

  ASSERT_TRUE(engine.Submit({tiny_.RandomIds(2048, 3), Sampling(1), packing_, &one_more}).ok());
  EXPECT_TRUE(engine.Step());  // packed, even the longest prompt fits
  const auto c = engine.Submit({tiny_.RandomIds(2048, 3), Sampling(1), plain_, &huge});
  ASSERT_TRUE(c.ok());
  while (engine.Step()) {
  }
  EXPECT_TRUE(huge.status.ok()) << "others hold blocks: it waits";
  EXPECT_NE(one_more.kv, nullptr);
  engine.Release(PrefillJobId{static_cast<std::uint64_t>(*c) - 1});
  EXPECT_FALSE(engine.Step());
  EXPECT_EQ(huge.status.code(), StatusCode::kResourceExhausted) << "alone, and still too long";
  engine.Release(*c);

  for (int i = 0; i < 3; ++i) ASSERT_TRUE(engine.Submit({tiny_.RandomIds(5, 1), Sampling(1), plain_, &one_more}).ok());
  EXPECT_EQ(engine.Submit({tiny_.RandomIds(5, 1), Sampling(1), plain_, &one_more}).status().code(),
            StatusCode::kResourceExhausted);
  EXPECT_EQ(engine.waiting_tokens(), 15);
  EXPECT_EQ(engine.Submit({{}, Sampling(1), plain_, &huge}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(engine.Submit({{1, 97}, Sampling(1), plain_, &huge}).status().code(), StatusCode::kInvalidArgument);
}

TEST_F(EnginesTest, ReleaseAtEveryStageReturnsTheBlocks) {
  for (int steps = 0; steps < 6; ++steps) {
    const auto pool = Pool(1, 400);
    PrefillEngine engine(*model_, pool->pool(), {.chunk_tokens = 64, .queue_max = 3});
    PrefillLog log;
    const auto job = engine.Submit({tiny_.RandomIds(300, 1), Sampling(1), packing_, &log}).value();
    for (int i = 0; i < steps; ++i) engine.Step();
    engine.Release(job);
    engine.Release(job);
    EXPECT_EQ(pool->pool().usage().n_blocks_used, 0u) << steps;
    EXPECT_EQ(engine.n_held(), 0);
    EXPECT_FALSE(engine.Step());
  }
}

TEST_F(EnginesTest, DecodeRefusesWhatWasNotReserved) {
  const auto pool = Pool(1, 100);
  DecodeEngine decode(*model_, pool->pool(), {});
  DecodeLog log;
  const SequenceId id = decode.Reserve(plain_, 10, 5).value();
  EXPECT_EQ(decode.Admit(SequenceId{999}, {Sampling(5), {}, 10, {}, &log}).code(), StatusCode::kNotFound);
  EXPECT_EQ(decode.Admit(id, {Sampling(6), {}, 10, {}, &log}).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(decode.Admit(id, {Sampling(5), {}, 11, {}, &log}).code(), StatusCode::kInvalidArgument);
  SampledToken bad;
  bad.id = 97;
  EXPECT_EQ(decode.Admit(id, {Sampling(5), {}, 10, bad, &log}).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(decode.Reserve(plain_, 2000, 100).status().code(), StatusCode::kInvalidArgument);
  // One token asked for, and it came from prefill: finished without a step.
  const SequenceId single = decode.Reserve(plain_, 10, 1).value();
  ASSERT_TRUE(decode.Admit(single, {Sampling(1), {}, 10, {}, &log}).ok());
  EXPECT_EQ(log.n_finished, 1);
  EXPECT_EQ(decode.Admit(single, {Sampling(1), {}, 10, {}, &log}).code(), StatusCode::kFailedPrecondition);
  EXPECT_FALSE(decode.Step());
  decode.Release(id);
  decode.Release(single);
  EXPECT_EQ(pool->pool().usage().n_blocks_used, 0u);
}

TEST(EndsRequestTest, StopsAtEosStopIdsAndLength) {
  SamplingParams sampling;
  sampling.max_tokens = 3;
  sampling.stop_ids = {7};
  const std::vector<int> eos = {2};
  FinishReason reason;
  EXPECT_FALSE(EndsRequest(sampling, eos, 5, 2, &reason));
  EXPECT_TRUE(EndsRequest(sampling, eos, 5, 3, &reason));
  EXPECT_EQ(reason, FinishReason::kLength);
  EXPECT_TRUE(EndsRequest(sampling, eos, 7, 1, &reason));
  EXPECT_EQ(reason, FinishReason::kStop);
  EXPECT_TRUE(EndsRequest(sampling, eos, 2, 3, &reason));
  EXPECT_EQ(reason, FinishReason::kStop);
  sampling.ignore_eos = true;
  EXPECT_FALSE(EndsRequest(sampling, eos, 2, 1, &reason));
}

}  // namespace
}  // namespace zeroc
