// A request whose decode worker was lost goes on elsewhere: its prompt and the tokens that the client has are prefilled
// again, and the rest comes out as if nothing had happened.
#include <gtest/gtest.h>

#include <cstdint>
#include <span>
#include <vector>

#include "libzeroc/engine/engines_testing.h"
#include "libzeroc/engine/local_generator.h"

namespace zeroc {
namespace {

using testing::DecodeLog;
using testing::EnginesTest;
using testing::PrefillLog;

using Ids = std::vector<std::int32_t>;

class MigrationTest : public EnginesTest {
 protected:
  // Prefill and decode of `tokens`, whose last n_streamed an earlier attempt generated.
  Ids Resume(const std::shared_ptr<const KvFormat>& format, const Ids& tokens, int n_streamed,
             const SamplingParams& sampling) {
    const int n_prompt = static_cast<int>(tokens.size());
    const auto prefill_pool = Pool(1, 512), decode_pool = Pool(1, 512);
    PrefillEngine prefill(*model_, prefill_pool->pool(), {.chunk_tokens = 64, .queue_max = 1});
    DecodeEngine decode(*model_, decode_pool->pool(), {});
    PrefillLog prefill_log;
    DecodeLog decode_log;
    const SequenceId reserved = decode.Reserve(format, n_prompt, sampling.max_tokens).value();
    PrefillJob job{tokens, sampling, format, &prefill_log};
    job.n_streamed = n_streamed;
    EXPECT_TRUE(prefill.Submit(job).ok());
    while (prefill.Step()) {
    }
    CopyPrompt(*prefill_log.kv, *decode.kv(reserved), n_prompt);
    DecodeStart start{sampling, tokens, n_prompt, prefill_log.token, &decode_log};
    start.n_streamed = n_streamed;
    const Status admitted = decode.Admit(reserved, start);
    EXPECT_TRUE(admitted.ok()) << admitted.ToString();
    while (decode.Step()) {
    }
    EXPECT_EQ(decode_log.n_finished, 1);
    decode_log.ids.insert(decode_log.ids.begin(), prefill_log.token.id);
    return decode_log.ids;
  }
};

SamplingParams Penalised(SamplingParams sampling) {
  sampling.repetition_penalty = 1.3f;
  sampling.presence_penalty = 0.7f;
  sampling.frequency_penalty = 0.9f;
  return sampling;
}

TEST_F(MigrationTest, GoesOnWithTheTokensOfAnUninterruptedRun) {
  constexpr int kTokens = 90;
  for (const auto& format : {plain_, packing_}) {
    for (const SamplingParams& sampling : {Sampling(kTokens), Sampling(kTokens, 1.0f), Penalised(Sampling(kTokens)),
                                           Penalised(Sampling(kTokens, 0.8f))}) {
      const Ids prompt = tiny_.RandomIds(70, 3);
      const auto whole = GenerateLocally(*model_, format, prompt, sampling);
      ASSERT_TRUE(whole.ok());
      for (const int n_streamed : {1, 5, 57, 58, 59, 89}) {
        Ids tokens = prompt;
        tokens.insert(tokens.end(), whole->ids.begin(), whole->ids.begin() + n_streamed);
        SamplingParams rest = sampling;
        rest.max_tokens = kTokens - n_streamed;
        EXPECT_EQ(Resume(format, tokens, n_streamed, rest), Ids(whole->ids.begin() + n_streamed, whole->ids.end()))
            << n_streamed << " temperature " << sampling.temperature;
      }
    }
  }
}

// The penalties do tell: without n_streamed the same tokens count as prompt and the answer is another one.
TEST_F(MigrationTest, StreamedTokensAreNoPrompt) {
  const SamplingParams sampling = Penalised(Sampling(60));
  const Ids prompt = tiny_.RandomIds(70, 3);
  const auto whole = GenerateLocally(*model_, plain_, prompt, sampling);
  ASSERT_TRUE(whole.ok());
  Ids tokens = prompt;
  tokens.insert(tokens.end(), whole->ids.begin(), whole->ids.begin() + 30);
  SamplingParams rest = sampling;
  rest.max_tokens = 30;
  EXPECT_NE(Resume(plain_, tokens, 0, rest), Ids(whole->ids.begin() + 30, whole->ids.end()));
}

// Forced tokens are told by position; those that were streamed count neither for the penalties nor for max_tokens.
TEST_F(MigrationTest, GoesOnAmongForcedTokens) {
  SamplingParams sampling = Penalised(Sampling(40));
  const Ids prompt = tiny_.RandomIds(70, 3);
  sampling.forced_ids = tiny_.RandomIds(20, 9);
  sampling.forced_from = 70;
  const auto whole = GenerateLocally(*model_, plain_, prompt, sampling);
  ASSERT_TRUE(whole.ok());
  for (const int n_streamed : {8, 20, 33}) {
    Ids tokens = prompt;
    tokens.insert(tokens.end(), whole->ids.begin(), whole->ids.begin() + n_streamed);
    SamplingParams rest = sampling;
    rest.max_tokens = 40 - n_streamed;
    EXPECT_EQ(Resume(plain_, tokens, n_streamed, rest), Ids(whole->ids.begin() + n_streamed, whole->ids.end()));
  }
}

TEST_F(MigrationTest, RefusesMoreStreamedTokensThanThePromptHas) {
  const auto pool = Pool(1, 100);
  PrefillEngine prefill(*model_, pool->pool(), {.chunk_tokens = 64, .queue_max = 1});
  DecodeEngine decode(*model_, pool->pool(), {});
  PrefillLog prefill_log;
  DecodeLog decode_log;
  const SequenceId id = decode.Reserve(plain_, 10, 5).value();
  for (const int n_streamed : {-1, 10, 11}) {
    PrefillJob job{tiny_.RandomIds(10, 1), Sampling(5), plain_, &prefill_log};
    job.n_streamed = n_streamed;
    EXPECT_EQ(prefill.Submit(job).status().code(), StatusCode::kInvalidArgument);
    DecodeStart start{Sampling(5), {}, 10, {}, &decode_log};
    start.n_streamed = n_streamed;
    EXPECT_EQ(decode.Admit(id, start).code(), StatusCode::kInvalidArgument);
  }
  // Penalties that look at streamed tokens need them.
  DecodeStart start{Penalised(Sampling(5)), {}, 10, {}, &decode_log};
  EXPECT_EQ(decode.Admit(id, start).code(), StatusCode::kInvalidArgument);
  start.sampling.repetition_penalty = 1;
  start.n_streamed = 3;
  EXPECT_EQ(decode.Admit(id, start).code(), StatusCode::kInvalidArgument);
  start.n_streamed = 0;
  EXPECT_TRUE(decode.Admit(id, start).ok());
}

}  // namespace
}  // namespace zeroc
