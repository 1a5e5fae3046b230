#include "libzeroc/kv/sp_split.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "libzeroc/compression/profile.h"
#include "libzeroc/kv/owned_pool.h"
#include "libzeroc/kv/sequence_kv.h"

namespace zeroc {
namespace {

std::shared_ptr<const KvFormat> Format(int bits, const std::vector<int>& young = {}) {
  const ModelGeometry geometry{2, 2, 2, 32, 64};
  Profile profile = UniformProfile("test", bits, 2, 32);
  for (const int n_blocks : young) profile.young.push_back({n_blocks, UniformProfile("8", 8, 2, 32).layers});
  return KvFormat::FromProfile(geometry, profile, 16).value();
}

TEST(SpSplit, EveryTokenHasOneOwnerAndRankZeroTheLast) {
  for (const int n_ranks : {1, 2, 3, 4, 7}) {
    for (const int n_tokens : {1, 63, 64, 65, 130, 500, 1000, 4096, 5001}) {
      const SpSplit split(n_tokens, n_ranks);
      std::vector<int> owner(static_cast<std::size_t>(n_tokens), -1);
      for (int rank = 0; rank < n_ranks; ++rank) {
        EXPECT_LE(split.Tokens(rank).size(), 2U);
        for (const TokenRange& range : split.Tokens(rank)) {
          EXPECT_EQ(range.begin % 64, 0);
          EXPECT_GT(range.size(), 0);
          for (int t = range.begin; t < range.end; ++t) {
            EXPECT_EQ(owner[static_cast<std::size_t>(t)], -1);
            owner[static_cast<std::size_t>(t)] = rank;
            EXPECT_EQ(split.OwnerOf(t / 64), rank);
          }
        }
      }
      EXPECT_EQ(std::count(owner.begin(), owner.end(), -1), 0);
      EXPECT_EQ(owner.back(), 0);
    }
  }
}

TEST(SpSplit, RanksHaveTheSameCausalWork) {
  const SpSplit split(32768, 4);
  for (int rank = 0; rank < 4; ++rank) {
    double work = 0;
    for (const TokenRange& range : split.Tokens(rank)) {
      for (int t = range.begin; t < range.end; ++t) work += t + 1;
    }
    EXPECT_NEAR(work / (32768.0 * 32769 / 2), 0.25, 1e-9) << rank;
  }
}

// What a query sees is what the rule says, block by block; each rank must hold exactly that, and its own.
TEST(SpSplit, ARankHoldsWhatItsQueriesSee) {
  for (const auto& format : {Format(3), Format(3, {2, 1}), Format(16)}) {
    const auto n_tiers = static_cast<int>(format->tiers.size());
    for (const int n_ranks : {1, 2, 3, 4}) {
      for (const int n_tokens : {65, 700, 1500}) {
        const SpSplit split(n_tokens, n_ranks);
        for (int rank = 0; rank < n_ranks; ++rank) {
          const HeldForms held = FormsHeldBy(*format, split, rank);
          std::vector<std::vector<bool>> seen(static_cast<std::size_t>(n_tiers) + 1,
                                              std::vector<bool>(static_cast<std::size_t>(split.n_blocks())));
          for (const TokenRange& range : split.Tokens(rank)) {
            for (int pos = range.begin; pos < range.end; ++pos) {
              for (int b = 0; b <= pos / 64; ++b) {
                int tier = -1;
                while (tier + 1 < n_tiers && b < format->BlocksAt(tier + 1, pos)) ++tier;
                seen[static_cast<std::size_t>(tier + 1)][static_cast<std::size_t>(b)] = true;
              }
            }
          }
          for (int b = 0; b < split.n_blocks(); ++b) {
            const bool own = split.OwnerOf(b) == rank;
            for (int tier = -1; tier < n_tiers; ++tier) {
              const auto& of = tier < 0 ? held.exact : held.tiers[static_cast<std::size_t>(tier)];
              const bool exists = static_cast<std::size_t>(b) < of.size();
              const bool is_lasting = tier + 1 == n_tiers;  // everybody holds these
              const bool want = exists && (own || is_lasting ||
                                           seen[static_cast<std::size_t>(tier + 1)][static_cast<std::size_t>(b)]);
              EXPECT_EQ(exists && of[static_cast<std::size_t>(b)], want)
                  << n_ranks << " ranks, rank " << rank << ", tier " << tier << ", block " << b;
              EXPECT_TRUE(exists || !seen[static_cast<std::size_t>(tier + 1)][static_cast<std::size_t>(b)]);
            }
          }
        }
      }
    }
  }
}

TEST(SpSplit, AShareTakesTheBlocksItHoldsAndReturnsThem) {
  const auto format = Format(3, {2});
  const SpSplit split(4096, 4);
  const auto pool = OwnedPool::Create(*format, 1, 4096, 4096).value();
  for (int rank = 0; rank < 4; ++rank) {
    const HeldForms held = FormsHeldBy(*format, split, rank);
    std::uint64_t n_held = 1;  // the sink
    n_held += static_cast<std::uint64_t>(std::count(held.exact.begin(), held.exact.end(), true));
    for (const auto& tier : held.tiers) {
      n_held += static_cast<std::uint64_t>(std::count(tier.begin(), tier.end(), true));
    }
    {
      const auto kv = SequenceKv::CreateShare(pool->pool(), format, split, rank).value();
      EXPECT_EQ(pool->pool().usage().n_blocks_used, 2 * n_held);
    }
    EXPECT_EQ(pool->pool().usage().n_blocks_used, 0U);
  }
  // Refused as a whole when there is no room.
  const auto small = OwnedPool::Create(*format, 1, 512, 512).value();
  EXPECT_EQ(SequenceKv::CreateShare(small->pool(), format, SpSplit(40960, 4), 1).status().code(),
            StatusCode::kResourceExhausted);
  EXPECT_EQ(small->pool().usage().n_blocks_used, 0U);
}

}  // namespace
}  // namespace zeroc
