// Both engines with a prefix cache: prompts that begin alike are computed and received from where they part, and
// nothing else about them changes.
#include "libzeroc/engine/engines_testing.h"
#include "libzeroc/kv/prefix_cache.h"

namespace zeroc {
namespace {

using testing::DecodeLog;
using testing::PrefillLog;

constexpr int kChunk = 64;

struct ResumedLog : PrefillLog {
  void OnStarted(int n_cached) override { n_cached_tokens = n_cached; }
  int n_cached_tokens = -1;
};

class PrefixReuseTest : public testing::EnginesTest {
 protected:
  using Tokens = std::vector<std::int32_t>;

  // The first n_same tokens of `tokens` and others behind them.
  Tokens Fork(const Tokens& tokens, int n_same, int n_more, unsigned seed) {
    Tokens fork(tokens.begin(), tokens.begin() + n_same);
    for (const std::int32_t id : tiny_.RandomIds(n_more, seed)) fork.push_back(id);
    return fork;
  }

  // Every block of the prompt was announced, and holds what a cold run computes; so does the first token.
  void ExpectAsCold(const Tokens& prompt, const std::shared_ptr<const KvFormat>& format, const ResumedLog& log) {
    const int n = static_cast<int>(prompt.size());
    const auto pool = Pool(1, 1024);
    PrefillEngine cold(*model_, pool->pool(), {.chunk_tokens = kChunk, .queue_max = 1});
    PrefillLog cold_log;
    ASSERT_TRUE(cold.Submit({prompt, Sampling(1, 1.0f), format, &cold_log}).ok());
    while (cold.Step()) {
    }
    ASSERT_NE(log.kv, nullptr) << log.status.ToString();
    EXPECT_EQ(log.token.id, cold_log.token.id);
    const auto same = [&](BlockRef a, BlockRef b, std::int64_t bytes) {
      EXPECT_EQ(std::memcmp(log.kv->pool().Data(a), cold_log.kv->pool().Data(b), static_cast<std::size_t>(bytes)), 0);
    };
    for (int layer = 0; layer < format->n_layers; ++layer) {
      const LayerBlocks a = log.kv->BlocksAt(layer, n), b = cold_log.kv->BlocksAt(layer, n);
      EXPECT_EQ(log.packed.contains(layer) ? log.packed.at(layer).size() : 0, b.n_packed());
      EXPECT_EQ(log.exact.at(layer), static_cast<int>(b.exact.size()));
      EXPECT_EQ(log.sinks.at(layer), b.n_packed() > 0 && format->sink_tokens > 0 ? 1 : 0);
      for (std::size_t i = 0; i < b.n_packed(); ++i) {
        std::size_t tier = 0, before = 0;
        while (i - before >= b.packed[tier].refs.size()) before += b.packed[tier++].refs.size();
        same(a.packed_ref(i), b.packed_ref(i), b.packed[tier].block_bytes);
      }
      // Of the last block, what was written: whole blocks only, its token slots lie scattered.
      for (std::size_t i = 0; i < b.exact.size() - (n % 64 != 0 ? 1 : 0); ++i) {
        same(a.exact[i], b.exact[i], format->exact.block_bytes);
      }
      if (b.sink.valid()) same(a.sink, b.sink, format->sink.block_bytes);
    }
  }

  // Computes one prompt and checks it; its cached tokens.
  int Run(PrefillEngine& engine, const Tokens& prompt, const std::shared_ptr<const KvFormat>& format) {
    ResumedLog log;
    const auto job = engine.Submit({prompt, Sampling(1, 1.0f), format, &log});
    EXPECT_TRUE(job.ok()) << job.status().ToString();
    while (engine.Step()) {
    }
    ExpectAsCold(prompt, format, log);
    engine.Release(*job);
    return log.n_cached_tokens;
  }
};

TEST_F(PrefixReuseTest, ResumedPromptsHaveTheBytesAndTheTokenOfAColdRun) {
  for (const auto& format : {plain_, packing_}) {
    SCOPED_TRACE(format->profile);
    const auto pool = Pool(3, 1024);
    {
      PrefixCache cache(pool->pool(), "model", "plan", {});
      PrefillEngine engine(*model_, pool->pool(), {.chunk_tokens = kChunk, .queue_max = 4}, &cache);
      const Tokens first = tiny_.RandomIds(400, 1);
      EXPECT_EQ(Run(engine, first, format), 0);
      EXPECT_EQ(Run(engine, first, format), 384);
      EXPECT_EQ(Run(engine, Fork(first, 400, 1, 2), format), 384);
      EXPECT_EQ(Run(engine, Fork(first, 390, 200, 3), format), 384);
      EXPECT_EQ(Run(engine, Fork(first, 384, 1, 4), format), 384);
      EXPECT_EQ(Run(engine, Fork(first, 10, 300, 5), format), 0);
      EXPECT_EQ(pool->pool().usage().n_blocks_used, 0u);
      EXPECT_GT(pool->pool().usage().n_blocks_kept, 0u);
    }
    EXPECT_EQ(pool->pool().usage().bytes_reclaimable, pool->pool().usage().bytes_total);
  }
}

// Where two prompts part cannot be known before the second comes: it leaves a state there for the third.
TEST_F(PrefixReuseTest, TheThirdPromptResumesWhereTheSecondParted) {
  const auto pool = Pool(4, 1024);
  PrefixCache cache(pool->pool(), "model", "plan", {});
  PrefillEngine engine(*model_, pool->pool(), {.chunk_tokens = kChunk, .queue_max = 4}, &cache);
  const int spacing = PrefixCache::StateSpacing(*packing_);
  ASSERT_GT(spacing, 330);
  const Tokens first = tiny_.RandomIds(900, 1);
  EXPECT_EQ(Run(engine, first, packing_), 0);
  EXPECT_EQ(Run(engine, Fork(first, 350, 100, 2), packing_), 0);
  EXPECT_EQ(Run(engine, Fork(first, 350, 120, 3), packing_), 320);
  EXPECT_EQ(Run(engine, Fork(first, 900, 20, 4), packing_), 896) << "the end of the first one is still there";
}

// Several prompts in the same steps, which pass the places where states are wanted.
TEST_F(PrefixReuseTest, PromptsThatShareStepsLeaveStates) {
  const auto pool = Pool(4, 1024);
  PrefixCache cache(pool->pool(), "model", "plan", {});
  PrefillEngine engine(*model_, pool->pool(), {.chunk_tokens = 256, .queue_max = 4}, &cache);
  std::vector<Tokens> prompts;
  std::vector<ResumedLog> logs(3);
  std::vector<PrefillJobId> ids;
  for (unsigned i = 0; i < 3; ++i) {
    prompts.push_back(tiny_.RandomIds(700 - 40 * static_cast<int>(i), 10 + i));
    ids.push_back(engine.Submit({prompts[i], Sampling(1), packing_, &logs[i]}).value());
  }
  while (engine.Step()) {
  }
  for (const PrefillJobId id : ids) engine.Release(id);
  for (const Tokens& prompt : prompts) {
    ResumedLog log;
    const auto id = engine.Submit({prompt, Sampling(1), packing_, &log}).value();
    while (engine.Step()) {
    }
    EXPECT_EQ(log.n_cached_tokens, 512);
    engine.Release(id);
  }
}

TEST_F(PrefixReuseTest, WhatIsOnlyKeptGivesWayToAPromptAtOnce) {
  const auto block = static_cast<std::size_t>(plain_->exact.block_bytes);
  const std::size_t bytes = SequenceKv::BytesNeeded(*plain_, 900, kChunk);
  std::vector<std::byte> memory(bytes + 64);
  void* start = memory.data();
  std::size_t room = memory.size();
  auto* arena = static_cast<std::byte*>(std::align(64, bytes, start, room));
  const auto pool = BlockPool::Create({arena, bytes}, block).value();
  {
    PrefixCache cache(*pool, "model", "plan", {});
    PrefillEngine engine(*model_, *pool, {.chunk_tokens = kChunk, .queue_max = 4}, &cache);
    for (unsigned i = 0; i < 4; ++i) EXPECT_EQ(Run(engine, tiny_.RandomIds(600, i), plain_), 0) << i;
    EXPECT_GT(cache.stats().n_evicted, 0u);
    EXPECT_EQ(Run(engine, tiny_.RandomIds(600, 3), plain_), 576);
  }
  EXPECT_EQ(pool->usage().bytes_reclaimable, bytes);
}

TEST_F(PrefixReuseTest, DecodeReceivesOnlyWhatItDoesNotHold) {
  for (const auto& format : {plain_, packing_}) {
    SCOPED_TRACE(format->profile);
    const auto prefill_pool = Pool(2, 1024), decode_pool = Pool(4, 1024);
    {
      PrefixCache cache(decode_pool->pool(), "model", "plan", {});
      PrefillEngine prefill(*model_, prefill_pool->pool(), {.chunk_tokens = kChunk, .queue_max = 4});
      DecodeEngine decode(*model_, decode_pool->pool(), {}, &cache);
      const Tokens first = tiny_.RandomIds(500, 1);
      const auto run = [&](const Tokens& prompt) {
        const int n = static_cast<int>(prompt.size());
        const SamplingParams sampling = Sampling(150);
        PrefillLog log;
        const PrefillJobId job = prefill.Submit({prompt, sampling, format, &log}).value();
        while (prefill.Step()) {
        }
        const SequenceId id = decode.Reserve(format, n, 150, 0, prompt).value();
        const SequenceKv& kv = *decode.kv(id);
        const int n_present = kv.n_shared_blocks();
        std::set<std::uint32_t> shared;
        for (int layer = 0; layer < format->n_layers && n_present > 0; ++layer) {
          for (int b = 0; b < n_present; ++b) shared.insert(kv.LastingBlock(layer, b).unit);
          shared.insert(kv.SinkBlock(layer).unit);
        }
        CopyPrompt(*log.kv, kv, n, [&](BlockRef to) { return !shared.contains(to.unit); });
        prefill.Release(job);
        DecodeLog decoded;
        EXPECT_TRUE(decode.Admit(id, {sampling, prompt, n, log.token, &decoded}).ok());
        while (decode.Step()) {
        }
        decode.Release(id);
        decoded.ids.insert(decoded.ids.begin(), log.token.id);
        EXPECT_EQ(decoded.ids, GenerateLocally(*model_, format, prompt, sampling, nullptr, kChunk)->ids);
        return n_present;
      };
      EXPECT_EQ(run(first), 0);
      const int lasting = format->LastingBlocksAt(500);
      EXPECT_EQ(run(first), lasting);
      // While the first ones decoded, more of the prompt's blocks got old.
      EXPECT_EQ(run(Fork(first, 450, 400, 2)), std::min(450 / 64, format->LastingBlocksAt(500 + 150 - 1)));
      EXPECT_EQ(run(Fork(first, 130, 300, 3)), 2);
      EXPECT_EQ(run(Fork(first, 63, 200, 4)), 0);
      EXPECT_EQ(decode_pool->pool().usage().n_blocks_used, 0u);
    }
    EXPECT_EQ(decode_pool->pool().usage().bytes_reclaimable, decode_pool->pool().usage().bytes_total);
  }
}

// A reservation that ends before the wire has filled it leaves nothing in the cache.
TEST_F(PrefixReuseTest, UnfilledReservationsAreNotKept) {
  const auto pool = Pool(2, 1024);
  PrefixCache cache(pool->pool(), "model", "plan", {});
  DecodeEngine decode(*model_, pool->pool(), {}, &cache);
  const Tokens prompt = tiny_.RandomIds(500, 1);
  const SequenceId id = decode.Reserve(packing_, 500, 10, 0, prompt).value();
  EXPECT_EQ(decode.Reserve(packing_, 500, 10, 0, Fork(prompt, 400, 0, 1)).status().code(),
            StatusCode::kInvalidArgument);
  decode.Release(id);
  EXPECT_EQ(cache.stats().n_entries, 0u);
  EXPECT_EQ(pool->pool().usage().bytes_reclaimable, pool->pool().usage().bytes_total);
}

// Blocks that a reservation shares are not written when the prompt is computed here after all.
TEST_F(PrefixReuseTest, AReservationThatSharesMayBeComputedInto) {
  for (const auto& format : {plain_, packing_}) {
    const auto pool = Pool(4, 1024);
    PrefixCache cache(pool->pool(), "model", "plan", {});
    PrefillEngine engine(*model_, pool->pool(), {.chunk_tokens = kChunk, .queue_max = 4}, &cache);
    const Tokens first = tiny_.RandomIds(500, 1), prompt = Fork(first, 400, 60, 2);
    Run(engine, first, format);
    const auto kv = cache.CreateSharing(format, prompt, 460, kChunk).value();
    ASSERT_GT(kv->n_shared_blocks(), 0);
    ResumedLog log;
    PrefillJob job{prompt, Sampling(1, 1.0f), format, &log};
    job.into = kv.get();
    const auto id = engine.Submit(std::move(job)).value();
    while (engine.Step()) {
    }
    EXPECT_EQ(log.n_cached_tokens, 0);
    ExpectAsCold(prompt, format, log);
    engine.Release(id);
    EXPECT_EQ(Run(engine, first, format), 448);
  }
}

}  // namespace
}  // namespace zeroc
