#include "libzeroc/kv/prefix_cache.h"

#include <gtest/gtest.h>

#include <set>

#include "libzeroc/compression/prefix_hash.h"
#include "libzeroc/kv/prefix_cache_testing.h"

namespace zeroc {
namespace {

using testing::Compute;
using testing::ExpectSameBytes;
using testing::ForEachPair;
using testing::Format;
using testing::Formats;
using testing::kGrain;
using testing::kLayers;
using testing::Pool;
using testing::RandomTokens;
using testing::RunStep;
using testing::Tokens;

TEST(PrefixCacheTest, AResumedSequenceHasTheBytesOfAComputedOne) {
  for (const auto& format : Formats()) {
    SCOPED_TRACE(format->profile);
    std::mt19937 rng(1);
    Pool pool(4 << 20), plain_pool(4 << 20);
    const Tokens tokens = RandomTokens(rng, 1000);
    {
      PrefixCache cache(*pool, "model", "plan", {});
      auto first = cache.CreateResumed(format, tokens, 1000, kGrain, kGrain).value();
      EXPECT_EQ(first->n_tokens(), 0);
      Compute(*first, tokens, 1000, &cache);
      first.reset();
      EXPECT_EQ(pool->usage().n_blocks_used, 0u);
      for (const int n_same : {127, 128, 129, 400, 640, 896, 900, 1000}) {
        Tokens other(tokens.begin(), tokens.begin() + n_same);
        for (const int id : RandomTokens(rng, 300)) other.push_back(1000 + id);
        const auto plain = SequenceKv::Create(*plain_pool, format, 1300, kGrain).value();
        const int n_cached = n_same / kGrain * kGrain;
        Compute(*plain, other, n_cached);
        PrefixCache::Found found;
        auto resumed = cache.CreateResumed(format, other, n_same + 300, kGrain, kGrain, &found).value();
        ASSERT_EQ(resumed->n_tokens(), n_cached);
        EXPECT_GE(found.n_shared_tokens, n_cached);
        EXPECT_LE(found.n_shared_tokens, n_same);
        ASSERT_NO_FATAL_FAILURE(ExpectSameBytes(*resumed, *plain));
        while (resumed->n_tokens() < n_same + 300) {
          const int end = std::min(n_same + 300, (resumed->n_tokens() / kGrain + 1) * kGrain);
          Compute(*resumed, other, end);
          Compute(*plain, other, end);
          ASSERT_NO_FATAL_FAILURE(ExpectSameBytes(*resumed, *plain));
        }
      }
    }
    EXPECT_EQ(pool->usage().bytes_reclaimable, pool->usage().bytes_total) << "everything is back";
  }
}

// The last token is always computed, because its logits are wanted.
TEST(PrefixCacheTest, TheSamePromptResumesBeforeItsLastToken) {
  Pool pool(4 << 20);
  PrefixCache cache(*pool, "m", "p", {});
  std::mt19937 rng(1);
  const Tokens tokens = RandomTokens(rng, 512);
  const auto format = Format(4, 128, 16);
  Compute(*cache.CreateResumed(format, tokens, 512, kGrain, kGrain).value(), tokens, 512, &cache);
  EXPECT_EQ(cache.CreateResumed(format, tokens, 512, kGrain, kGrain).value()->n_tokens(), 384);
  EXPECT_EQ(cache.CreateResumed(format, tokens, 512, kGrain, 256).value()->n_tokens(), 256);
  EXPECT_EQ(cache.stats().n_queried_tokens, 3u * 512);
  EXPECT_EQ(cache.stats().n_hit_tokens, 384u + 256);
}

TEST(PrefixCacheTest, KeysAreModelPlanProfileAndTokens) {
  Pool pool(4 << 20);
  PrefixCache cache(*pool, "m", "p", {});
  std::mt19937 rng(1);
  const Tokens tokens = RandomTokens(rng, 300);
  const auto format = Format(4, 128, 16);
  Compute(*cache.CreateResumed(format, tokens, 300, kGrain, kGrain).value(), tokens, 300, &cache);
  EXPECT_EQ(cache.CreateResumed(Format(4, 64, 16), tokens, 300, kGrain, kGrain).value()->n_tokens(), 0);
  for (const std::size_t at : {0u, 63u, 100u, 255u}) {
    Tokens other = tokens;
    ++other[at];
    EXPECT_EQ(cache.CreateResumed(format, other, 300, kGrain, kGrain).value()->n_tokens(), at < 128 ? 0 : 128) << at;
  }
  const auto hashes = PrefixHashes(PrefixHashRoot("m", "p", format->profile), tokens);
  const auto recent = cache.RecentHashes(PrefixCache::Use::kResume, 64, 10);
  EXPECT_EQ(std::set(recent.begin(), recent.end()), (std::set{hashes[1], hashes[3]}));
  const auto shared = cache.RecentHashes(PrefixCache::Use::kShare, 64, 10);
  EXPECT_EQ(shared, (std::vector{hashes[0], hashes[1]})) << "blocks that have their lasting form at 256 tokens";
  EXPECT_EQ(cache.RecentHashes(PrefixCache::Use::kShare, 64, 1).size(), 1u);
}

TEST(PrefixCacheTest, ReceivedPromptsShareTheirLastingBlocks) {
  for (const auto& format : Formats()) {
    SCOPED_TRACE(format->profile);
    std::mt19937 rng(2);
    Pool pool(4 << 20), plain_pool(4 << 20);
    PrefixCache cache(*pool, "m", "p", {});
    const Tokens tokens = RandomTokens(rng, 900);
    int n_shared_before = 0;
    for (const int n_same : {700, 64, 200, 650, 700}) {
      Tokens prompt(tokens.begin(), tokens.begin() + n_same);
      for (const int id : RandomTokens(rng, n_same == 700 ? 0 : 90)) prompt.push_back(1000 + id);
      const int n_prompt = static_cast<int>(prompt.size());
      Tokens all = prompt;
      for (const int id : RandomTokens(rng, 200)) all.push_back(id);
      const auto sent = SequenceKv::Create(*plain_pool, format, n_prompt + 200, kGrain).value();
      Compute(*sent, all, n_prompt);
      auto kv = cache.CreateSharing(format, prompt, n_prompt + 200, 1).value();
      const int n_shared = kv->n_shared_blocks();
      EXPECT_EQ(n_shared, std::min({n_same / 64, format->LastingBlocksAt(n_prompt), (n_prompt - 1) / 64,
                                    n_shared_before == 0 ? 0 : n_shared_before}));
      // The wire fills the others.
      std::set<std::uint32_t> shared;
      for (int layer = 0; layer < kLayers; ++layer) {
        for (int b = 0; b < n_shared; ++b) shared.insert(kv->LastingBlock(layer, b).unit);
        if (n_shared > 0 && kv->SinkBlock(layer).valid()) shared.insert(kv->SinkBlock(layer).unit);
      }
      for (int layer = 0; layer < kLayers; ++layer) {
        ForEachPair(sent->BlocksAt(layer, n_prompt), kv->BlocksAt(layer, n_prompt), *format,
                    [&](BlockRef from, BlockRef to, std::size_t bytes) {
                      if (!shared.contains(to.unit)) std::memcpy(pool->Data(to), plain_pool->Data(from), bytes);
                    });
      }
      kv->AdoptPrompt(n_prompt);
      ASSERT_NO_FATAL_FAILURE(ExpectSameBytes(*kv, *sent));
      cache.KeepLasting(*kv, prompt, format->LastingBlocksAt(n_prompt));
      for (int i = 0; i < 200; ++i) {
        RunStep(*kv, all, 1);
        RunStep(*sent, all, 1);
      }
      ASSERT_NO_FATAL_FAILURE(ExpectSameBytes(*kv, *sent));
      // What has aged since lasts too; the answer's blocks are another matter.
      const int n_lasting = std::min(n_prompt / 64, format->LastingBlocksAt(n_prompt + 200));
      cache.KeepLasting(*kv, prompt, n_lasting);
      if (n_shared_before == 0) n_shared_before = n_lasting;
    }
  }
}

// A step may pass the place where a state is wanted.
TEST(PrefixCacheTest, KeepsStatesInsideTheLastStep) {
  for (const auto& format : Formats()) {
    SCOPED_TRACE(format->profile);
    std::mt19937 rng(6);
    Pool pool(4 << 20), plain_pool(4 << 20);
    PrefixCache cache(*pool, "m", "p", {});
    const Tokens tokens = RandomTokens(rng, 700);
    const auto kv = SequenceKv::Create(*pool, format, 700, 300).value();
    RunStep(*kv, tokens, 300);
    RunStep(*kv, tokens, 300);
    EXPECT_FALSE(kv->HoldsStateAt(256));
    EXPECT_FALSE(kv->HoldsStateAt(640));
    for (const int n : {512, 320, 576}) ASSERT_TRUE(cache.KeepState(*kv, tokens, n));
    for (const int n_prompt : {321, 570, 577, 700}) {
      const int n_cached = n_prompt > 576 ? 576 : n_prompt > 512 ? 512 : 320;
      const auto plain = SequenceKv::Create(*plain_pool, format, 700, 128).value();
      Compute(*plain, tokens, n_cached);
      const auto prompt = std::span(tokens).first(static_cast<std::size_t>(n_prompt));
      const auto resumed = cache.CreateResumed(format, prompt, 700, 128, 64).value();
      // Without states any multiple of 64 will do.
      const int n_found = PrefixCache::StateSpacing(*format) == 64 ? std::min((n_prompt - 1) / 64, 9) * 64 : n_cached;
      ASSERT_EQ(resumed->n_tokens(), n_found);
      Compute(*plain, tokens, n_found);
      ASSERT_NO_FATAL_FAILURE(ExpectSameBytes(*resumed, *plain));
      Compute(*resumed, tokens, 700);
      Compute(*plain, tokens, 700);
      ASSERT_NO_FATAL_FAILURE(ExpectSameBytes(*resumed, *plain));
    }
  }
}

// A lease may share blocks and then be computed after all.
TEST(PrefixCacheTest, UnsharedBlocksMayBeComputedAnew) {
  for (const auto& format : Formats()) {
    SCOPED_TRACE(format->profile);
    std::mt19937 rng(7);
    Pool pool(4 << 20), plain_pool(4 << 20);
    PrefixCache cache(*pool, "m", "p", {});
    const Tokens tokens = RandomTokens(rng, 700);
    Compute(*cache.CreateResumed(format, tokens, 700, kGrain, kGrain).value(), tokens, 700, &cache);
    const auto kv = cache.CreateSharing(format, tokens, 700, kGrain).value();
    const int n_shared = kv->n_shared_blocks();
    ASSERT_GT(n_shared, 0);
    ASSERT_TRUE(kv->Unshare().ok());
    EXPECT_EQ(kv->n_shared_blocks(), 0);
    EXPECT_EQ(pool->usage().bytes_used, SequenceKv::BytesNeeded(*format, 700, kGrain));
    const auto plain = SequenceKv::Create(*plain_pool, format, 700, kGrain).value();
    Compute(*kv, tokens, 700);
    Compute(*plain, tokens, 700);
    ASSERT_NO_FATAL_FAILURE(ExpectSameBytes(*kv, *plain));
    EXPECT_EQ(cache.CreateSharing(format, tokens, 700, kGrain).value()->n_shared_blocks(), n_shared);
  }
}

TEST(PrefixCacheTest, GivesUpTheLeastRecentlyUsedFromItsEnd) {
  const auto format = Format(16, 0, 0);  // one block size, no states
  const std::size_t block = static_cast<std::size_t>(format->exact.block_bytes);
  const auto bytes = [&](int n_blocks) { return static_cast<std::size_t>(n_blocks) * kLayers * block; };
  Pool pool(bytes(16), block);
  PrefixCache cache(*pool, "m", "p", {});
  std::mt19937 rng(3);
  const Tokens a = RandomTokens(rng, 6 * 64), b = RandomTokens(rng, 6 * 64), c = RandomTokens(rng, 10 * 64);
  const auto n_cached = [&](const Tokens& tokens) {
    Tokens longer = tokens;
    longer.push_back(1);
    return cache.CreateResumed(format, longer, static_cast<int>(longer.size()), kGrain, 64).value()->n_tokens() / 64;
  };
  for (const Tokens& tokens : {a, b}) {
    const auto kv = cache.CreateResumed(format, tokens, 384, 384, 64).value();
    RunStep(*kv, tokens, 384);
    cache.KeepState(*kv, tokens, 384);
  }
  EXPECT_EQ(pool->usage().n_blocks_kept, 12u * kLayers);
  EXPECT_EQ(pool->usage().n_blocks_used, 0u);
  EXPECT_EQ(n_cached(a), 6);                                         // now b is the older one
  auto live = cache.CreateResumed(format, c, 640, 640, 64).value();  // 4 blocks were free: 6 of b are given up
  EXPECT_EQ(cache.stats().n_evicted, 6u);
  live.reset();
  EXPECT_EQ(n_cached(a), 6);
  EXPECT_EQ(n_cached(b), 0);
  live = SequenceKv::Create(*pool, format, 13 * 64, 64).value();
  EXPECT_EQ(cache.stats().n_evicted, 9u);
  live.reset();
  EXPECT_EQ(n_cached(a), 3) << "its end is gone, its beginning is not";

  // In use: kept, and what could not fit costs nothing.
  Tokens longer = a;
  live = cache.CreateResumed(format, longer, 384, 384, 64).value();
  EXPECT_EQ(live->n_shared_blocks(), 3);
  EXPECT_EQ(SequenceKv::Create(*pool, format, 11 * 64, 64).status().code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(cache.stats().n_evicted, 9u);
  EXPECT_TRUE(SequenceKv::Create(*pool, format, 10 * 64, 64).ok());
  live.reset();
  EXPECT_EQ(cache.stats().n_entries, 3u);
}

TEST(PrefixCacheTest, KeepsToItsShare) {
  const auto format = Format(4, 128, 16);
  Pool pool(4 << 20);
  PrefixCache cache(*pool, "m", "p", {.share_max = 0.01});
  std::mt19937 rng(4);
  for (int i = 0; i < 20; ++i) {
    const Tokens tokens = RandomTokens(rng, 512);
    Compute(*cache.CreateResumed(format, tokens, 512, kGrain, kGrain).value(), tokens, 512, &cache);
    EXPECT_LE(cache.stats().bytes, (4 << 20) / 100);
  }
  EXPECT_GT(cache.stats().n_entries, 0u);
  EXPECT_GT(cache.stats().n_evicted, 0u);
}

TEST(PrefixCacheTest, CopiesOfStatesStaySmallBesideTheBlocks) {
  EXPECT_EQ(PrefixCache::StateSpacing(*Format(16, 128, 0)), 64);
  EXPECT_EQ(PrefixCache::StateSpacing(*Format(4, 0, 0)), 64) << "every block behind the query is packed for good";
  for (const auto& format : Formats()) {
    const int spacing = PrefixCache::StateSpacing(*format);
    Pool pool(64 << 20), lasting_pool(64 << 20);
    std::mt19937 rng(5);
    const int n_tokens = 8 * spacing;
    const Tokens tokens = RandomTokens(rng, n_tokens);
    PrefixCache cache(*pool, "m", "p", {}), lasting(*lasting_pool, "m", "p", {});
    const auto kv = SequenceKv::Create(*pool, format, n_tokens, spacing).value();
    while (kv->n_tokens() < n_tokens) {
      RunStep(*kv, tokens, spacing);
      ASSERT_TRUE(cache.KeepState(*kv, tokens, kv->n_tokens()));
    }
    const auto other = SequenceKv::Create(*lasting_pool, format, n_tokens, n_tokens).value();
    RunStep(*other, tokens, n_tokens);
    lasting.KeepLasting(*other, tokens, format->LastingBlocksAt(n_tokens));
    const double extra = static_cast<double>(cache.stats().bytes) / static_cast<double>(lasting.stats().bytes) - 1;
    EXPECT_LE(extra, 0.4) << format->profile << " spacing " << spacing;  // the first states stand on few lasting blocks
  }
}

}  // namespace
}  // namespace zeroc
