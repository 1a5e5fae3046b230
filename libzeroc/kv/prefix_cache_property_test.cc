#include <gtest/gtest.h>

#include <deque>

#include "libzeroc/kv/prefix_cache_testing.h"

namespace zeroc {
namespace {

using testing::Compute;
using testing::ExpectSameBytes;
using testing::ForEachPair;
using testing::Formats;
using testing::kGrain;
using testing::kLayers;
using testing::Pool;
using testing::RandomTokens;
using testing::RunStep;
using testing::Tokens;

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
    for (int i = 0; i < 700 && !::testing::Test::HasFatalFailure(); ++i) {
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
      cache_->KeepState(*live.kv, live.tokens, end);
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
    for (unsigned seed = 1; seed <= 2; ++seed) {
      SCOPED_TRACE(format->profile + " seed " + std::to_string(seed));
      ASSERT_NO_FATAL_FAILURE(Property(format, seed).Run());
    }
  }
}

}  // namespace
}  // namespace zeroc
