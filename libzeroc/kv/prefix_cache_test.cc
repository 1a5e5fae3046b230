#include "libzeroc/kv/prefix_cache.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <set>

#include "libzeroc/compression/prefix_hash.h"
#include "libzeroc/compression/profile.h"

namespace zeroc {
namespace {

constexpr int kLayers = 2;
constexpr int kHeadDim = 32;
constexpr int kGrain = 128;
using Tokens = std::vector<std::int32_t>;

class Pool {
 public:
  explicit Pool(std::size_t bytes, std::size_t slab_bytes = 16 << 10)
      : data_(static_cast<std::byte*>(std::aligned_alloc(64, bytes))),
        pool_(BlockPool::Create({data_, bytes}, slab_bytes).value()) {
    std::memset(data_, 0x5a, bytes);
  }
  ~Pool() {
    pool_.reset();
    std::free(data_);
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  BlockPool& operator*() { return *pool_; }
  BlockPool* operator->() { return pool_.get(); }

 private:
  std::byte* data_;
  std::unique_ptr<BlockPool> pool_;
};

// young: blocks of each younger tier, at 8 bits. bits 16: packs nothing.
std::shared_ptr<const KvFormat> Format(int bits, int recent_tokens, int sink_tokens,
                                       const std::vector<int>& young = {}) {
  const ModelGeometry geometry{kLayers, 2, 1, kHeadDim, 64};
  std::string name = "b";
  name += std::to_string(bits) + "r" + std::to_string(recent_tokens);
  Profile profile = UniformProfile(name, bits, kLayers, kHeadDim);
  profile.recent_tokens = recent_tokens;
  profile.sink_tokens = sink_tokens;
  for (const int n_blocks : young) {
    profile.young.push_back({n_blocks, UniformProfile("8", 8, kLayers, kHeadDim).layers});
  }
  return KvFormat::FromProfile(geometry, profile, /*exact_bits=*/16).value();
}

Tokens RandomTokens(std::mt19937& rng, int n) {
  Tokens tokens;
  for (int i = 0; i < n; ++i) tokens.push_back(static_cast<std::int32_t>(rng() % 1000));
  return tokens;
}

// Stands in for the forward pass: every byte of a block is a function of the tokens up to it, of the layer and of the
// tiers that the block went through.
void RunStep(SequenceKv& kv, const Tokens& tokens, int n_new) {
  const int begin = kv.n_tokens();
  std::uint64_t hash = 14695981039346656037u;
  for (int pos = 0; pos < begin; ++pos) hash = (hash ^ static_cast<std::uint64_t>(tokens[pos])) * 1099511628211u;
  kv.BeginStep(n_new);
  for (int pos = begin; pos < begin + n_new; ++pos) {
    hash = (hash ^ static_cast<std::uint64_t>(tokens[pos])) * 1099511628211u;
    for (int layer = 0; layer < kLayers; ++layer) {
      std::uint8_t* block = kv.WriteBlocks(layer)[pos / 64 - begin / 64];
      const int slot_bytes = kv.format().exact.block_bytes / 64;
      if (pos % 64 == 0) std::memset(block, 0, static_cast<std::size_t>(kv.format().exact.block_bytes));
      for (int i = 0; i < slot_bytes; ++i) {
        block[pos % 64 * slot_bytes + i] =
            static_cast<std::uint8_t>(hash >> (i % 7 * 8)) + static_cast<std::uint8_t>(layer);
      }
    }
  }
  for (int layer = 0; layer < kLayers; ++layer) {
    for (int tier = 0; tier < static_cast<int>(kv.format().tiers.size()); ++tier) {
      const int from_bytes = kv.SourceLayout(layer, tier).block_bytes;
      const int to_bytes =
          kv.format().tiers[static_cast<std::size_t>(tier)].layouts[static_cast<std::size_t>(layer)].block_bytes;
      for (int b = kv.pack_begin(tier); b < kv.pack_end(tier); ++b) {
        const std::uint8_t* from = kv.PackSource(layer, tier, b);
        std::uint8_t* to = kv.PackedBlock(layer, tier, b);
        for (int i = 0; i < to_bytes; ++i) to[i] = static_cast<std::uint8_t>(from[i * 3 % from_bytes] * 3 + tier);
      }
    }
    if (!kv.format().tiers.empty() && kv.pack_begin(0) == 0 && kv.pack_end(0) > 0) kv.CopySink(layer);
  }
  kv.EndStep();
}

template <typename Fn>
void ForEachPair(const LayerBlocks& a, const LayerBlocks& b, const KvFormat& format, Fn fn) {
  ASSERT_EQ(a.packed.size(), b.packed.size());
  for (std::size_t tier = 0; tier < a.packed.size(); ++tier) {
    ASSERT_EQ(a.packed[tier].refs.size(), b.packed[tier].refs.size());
    for (std::size_t i = 0; i < a.packed[tier].refs.size(); ++i) {
      fn(a.packed[tier].refs[i], b.packed[tier].refs[i], static_cast<std::size_t>(a.packed[tier].block_bytes));
    }
  }
  ASSERT_EQ(a.exact.size(), b.exact.size());
  for (std::size_t i = 0; i < a.exact.size(); ++i) {
    fn(a.exact[i], b.exact[i], static_cast<std::size_t>(format.exact.block_bytes));
  }
  ASSERT_EQ(a.sink.valid(), b.sink.valid());
  if (a.sink.valid()) fn(a.sink, b.sink, static_cast<std::size_t>(format.sink.block_bytes));
}

void ExpectSameBytes(const SequenceKv& got, const SequenceKv& want) {
  ASSERT_EQ(got.n_tokens(), want.n_tokens());
  for (int layer = 0; layer < kLayers; ++layer) {
    ForEachPair(got.BlocksAt(layer, got.n_tokens()), want.BlocksAt(layer, want.n_tokens()), got.format(),
                [&](BlockRef a, BlockRef b, std::size_t bytes) {
                  ASSERT_EQ(std::memcmp(got.pool().Data(a), want.pool().Data(b), bytes), 0)
                      << "layer " << layer << " at " << got.n_tokens() << " of " << got.format().profile;
                });
  }
}

// Computes tokens from where the sequence is, in steps that end at multiples of kGrain, keeping what `keep` wants.
void Compute(SequenceKv& kv, const Tokens& tokens, int end, PrefixCache* cache = nullptr) {
  while (kv.n_tokens() < end) {
    RunStep(kv, tokens, std::min(end, (kv.n_tokens() / kGrain + 1) * kGrain) - kv.n_tokens());
    if (cache != nullptr && kv.n_tokens() % kGrain == 0) cache->KeepState(kv, tokens);
  }
}

std::vector<std::shared_ptr<const KvFormat>> Formats() {
  return {Format(16, 128, 0),        Format(4, 128, 16),    Format(4, 0, 0),
          Format(2, 20, 16, {1, 2}), Format(2, 64, 0, {2}), Format(3, 0, 16, {1})};
}

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
    cache.KeepState(*kv, tokens);
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
      ASSERT_TRUE(cache.KeepState(*kv, tokens));
    }
    const auto other = SequenceKv::Create(*lasting_pool, format, n_tokens, n_tokens).value();
    RunStep(*other, tokens, n_tokens);
    lasting.KeepLasting(*other, tokens, format->LastingBlocksAt(n_tokens));
    const double extra = static_cast<double>(cache.stats().bytes) / static_cast<double>(lasting.stats().bytes) - 1;
    EXPECT_LE(extra, 0.4) << format->profile << " spacing " << spacing;  // the first states stand on few lasting blocks
  }
}

// Random prompts of a few families on a pool that holds three of them: some computed, some received, several at a time.
// All bytes that a query sees are those of a run without a cache; nothing leaks; nothing is refused for the cache.
class Property {
 public:
  Property(const std::shared_ptr<const KvFormat>& format, unsigned seed)
      : rng_(seed),
        format_(format),
        pool_((3 * SequenceKv::BytesNeeded(*format, kMaxTokens, kGrain) + (1 << 18)) / kSlab * kSlab, kSlab),
        plain_pool_(8 << 20),
        cache_(std::make_unique<PrefixCache>(*pool_, "m", "p", PrefixCache::Options{})) {
    for (Tokens& family : families_) family = RandomTokens(rng_, kMaxTokens);
  }

  void Run() {
    for (int i = 0; i < 1500 && !::testing::Test::HasFatalFailure(); ++i) {
      if (live_.size() < 4 && rng_() % 3 == 0) Start();
      if (live_.empty()) continue;
      const std::size_t at = rng_() % live_.size();
      if (rng_() % 12 == 0 || Done(live_[at])) {
        live_.erase(live_.begin() + static_cast<std::ptrdiff_t>(at));
      } else {
        Step(live_[at]);
      }
    }
    EXPECT_GT(n_resumed_, 10);
    EXPECT_GT(n_shared_, 10);
    EXPECT_GT(cache_->stats().n_evicted, 10u);
    if (live_.size() % 2 == 0) live_.clear();
    cache_.reset();
    live_.clear();
    EXPECT_EQ(pool_->usage().n_blocks_used + pool_->usage().n_blocks_kept, 0u);
    EXPECT_EQ(pool_->usage().bytes_reclaimable, pool_->usage().bytes_total);
  }

 private:
  static constexpr int kMaxTokens = 700;
  static constexpr std::size_t kSlab = 16 << 10;
  struct Live {
    Tokens tokens;
    int n_prompt = 0;
    bool received = false;
    std::unique_ptr<SequenceKv> kv, plain;
  };

  bool Done(const Live& live) const { return live.kv->n_tokens() == static_cast<int>(live.tokens.size()); }

  void Start() {
    Live live;
    live.tokens = families_[rng_() % std::size(families_)];
    const auto n_same = 1 + rng_() % kMaxTokens;
    live.tokens.resize(n_same);
    const auto n_more = rng_() % (kMaxTokens - n_same + 1);
    for (const int id : RandomTokens(rng_, static_cast<int>(n_more))) live.tokens.push_back(id);
    const int n = static_cast<int>(live.tokens.size());
    live.received = rng_() % 2 == 0;
    live.n_prompt = live.received ? 1 + static_cast<int>(rng_() % live.tokens.size()) : n;
    const int step = live.received ? 1 : kGrain;
    const auto prompt = std::span(live.tokens).first(static_cast<std::size_t>(live.n_prompt));
    auto kv = live.received ? cache_->CreateSharing(format_, prompt, n, step)
                            : cache_->CreateResumed(format_, prompt, n, step, kGrain);
    if (!kv.ok()) {
      ASSERT_EQ(kv.status().code(), StatusCode::kResourceExhausted);
      const BlockPool::Usage usage = pool_->usage();
      const bool fits = SequenceKv::BytesNeeded(*format_, n, step) <= usage.bytes_total - usage.bytes_used;
      ASSERT_TRUE(!fits || usage.bytes_kept == 0) << "refused while blocks were only kept";
      return;
    }
    live.kv = std::move(*kv);
    live.plain = SequenceKv::Create(*plain_pool_, format_, n, kGrain).value();
    Compute(*live.plain, live.tokens, live.received ? live.n_prompt : live.kv->n_tokens());
    if (live.received) Receive(live);
    n_resumed_ += live.kv->n_tokens() > 0 && !live.received ? 1 : 0;
    n_shared_ += live.received && live.kv->n_shared_blocks() > 0 ? 1 : 0;
    ASSERT_NO_FATAL_FAILURE(ExpectSameBytes(*live.kv, *live.plain));
    live_.push_back(std::move(live));
  }

  void Receive(Live& live) {
    for (int layer = 0; layer < kLayers; ++layer) {
      ForEachPair(live.plain->BlocksAt(layer, live.n_prompt), live.kv->BlocksAt(layer, live.n_prompt), *format_,
                  [&](BlockRef from, BlockRef to, std::size_t bytes) {
                    if (pool_->n_users(to) > 1) return;  // shared with a running one: it must hold the bytes already
                    bool shared = false;
                    for (int b = 0; b < live.kv->n_shared_blocks(); ++b)
                      shared |= live.kv->LastingBlock(layer, b) == to;
                    shared |= live.kv->n_shared_blocks() > 0 && live.kv->SinkBlock(layer) == to;
                    if (!shared) std::memcpy(pool_->Data(to), plain_pool_->Data(from), bytes);
                  });
    }
    live.kv->AdoptPrompt(live.n_prompt);
  }

  void Step(Live& live) {
    const int n = static_cast<int>(live.tokens.size());
    const int end = live.received ? std::min(n, live.kv->n_tokens() + 1 + static_cast<int>(rng_() % 70))
                                  : std::min(n, (live.kv->n_tokens() / kGrain + 1) * kGrain);
    while (live.kv->n_tokens() < end) RunStep(*live.kv, live.tokens, live.received ? 1 : end - live.kv->n_tokens());
    Compute(*live.plain, live.tokens, end);
    ASSERT_NO_FATAL_FAILURE(ExpectSameBytes(*live.kv, *live.plain));
    if (live.received) {
      cache_->KeepLasting(*live.kv, live.tokens, std::min(live.n_prompt / 64, format_->LastingBlocksAt(end)));
    } else if (end % kGrain == 0) {
      cache_->KeepState(*live.kv, live.tokens);
    }
  }

  std::mt19937 rng_;
  std::shared_ptr<const KvFormat> format_;
  Pool pool_, plain_pool_;
  std::unique_ptr<PrefixCache> cache_;
  Tokens families_[3];
  std::deque<Live> live_;
  int n_resumed_ = 0, n_shared_ = 0;
};

TEST(PrefixCacheTest, RandomUseOnASmallPoolChangesNoByte) {
  for (const auto& format : Formats()) {
    for (unsigned seed = 1; seed <= 3; ++seed) {
      SCOPED_TRACE(format->profile + " seed " + std::to_string(seed));
      ASSERT_NO_FATAL_FAILURE(Property(format, seed).Run());
    }
  }
}

TEST(BlockPoolHoldsTest, UsersAndKeepsAreCountedApart) {
  Pool pool(4096, 1024);
  std::vector<BlockRef> refs;
  ASSERT_TRUE(pool->Allocate(256, 2, &refs).ok());
  pool->AddUser(refs[0]);
  pool->Keep(refs[0]);
  EXPECT_EQ(pool->n_users(refs[0]), 2u);
  EXPECT_EQ(pool->usage().n_blocks_used, 2u);
  EXPECT_EQ(pool->usage().n_blocks_kept, 0u) << "in use: not only kept";
  pool->Release(refs[0]);
  pool->Release(refs[0]);
  EXPECT_EQ(pool->usage().n_blocks_used, 1u);
  EXPECT_EQ(pool->usage().bytes_kept, 256u);
  EXPECT_DEATH(pool->Release(refs[0]), "check failed");
  EXPECT_DEATH(pool->Drop(refs[1]), "check failed");
  pool->AddUser(refs[0]);
  EXPECT_EQ(pool->usage().bytes_kept, 0u);
  pool->Drop(refs[0]);
  EXPECT_EQ(pool->usage().n_blocks_used, 2u);
  pool->Release(refs[0]);
  pool->Release(refs[1]);
  EXPECT_EQ(pool->usage().bytes_reclaimable, 4096u);
  EXPECT_DEATH(pool->Keep(refs[0]), "check failed");
}

}  // namespace
}  // namespace zeroc
