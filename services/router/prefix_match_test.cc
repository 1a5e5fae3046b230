#include "services/router/prefix_match.h"

#include <gtest/gtest.h>

#include <numeric>

#include "libzeroc/compression/prefix_hash.h"
#include "services/router/test_router.h"

namespace zeroc {
namespace {

std::vector<std::uint32_t> Ids(std::size_t n) {
  std::vector<std::uint32_t> ids(n);
  std::iota(ids.begin(), ids.end(), 1);
  return ids;
}

// As a worker makes them.
PrefixHashSet Listed(const char* profile, std::size_t n_tokens, std::vector<std::size_t> places) {
  std::vector<std::int32_t> ids(n_tokens);
  std::iota(ids.begin(), ids.end(), 1);
  const auto hashes = PrefixHashes(PrefixHashRoot("model", "plan", profile), ids);
  PrefixHashSet set;
  for (const std::size_t place : places) set.insert(hashes.at(place / 64 - 1));
  return set;
}

using Tokens = std::vector<std::uint32_t>;

TEST(PromptPrefixes, FindsTheLongestBeginningOfEachProfile) {
  const PromptPrefixes prompt(TestModel(), Ids(1000), std::nullopt);
  PrefixHashSet known = Listed("q4", 900, {128, 512, 896});
  EXPECT_EQ(prompt.CachedTokens(&known), (Tokens{0, 896, 0})) << "not every place is listed";
  known.merge(Listed("bf16", 900, {64}));
  EXPECT_EQ(prompt.CachedTokens(&known), (Tokens{64, 896, 0}));
}

TEST(PromptPrefixes, KnowsNothingOfStrangers) {
  const PromptPrefixes prompt(TestModel(), Ids(1000), std::nullopt);
  EXPECT_EQ(prompt.CachedTokens(nullptr), Tokens());
  PrefixHashSet known{1, 2, 3};
  EXPECT_EQ(prompt.CachedTokens(&known), Tokens());
  std::vector<std::uint32_t> other = Ids(1000);
  other[5] = 7;  // in the first block: every hash is another
  known = Listed("q4", 900, {64, 896});
  EXPECT_EQ(PromptPrefixes(TestModel(), other, std::nullopt).CachedTokens(&known), Tokens());
  other = Ids(1000);
  other[500] = 7;
  EXPECT_EQ(PromptPrefixes(TestModel(), other, std::nullopt).CachedTokens(&known), (Tokens{0, 64, 0}));
}

TEST(PromptPrefixes, TheLastTokenIsAlwaysLeft) {
  const PrefixHashSet known = Listed("q4", 128, {64, 128});
  EXPECT_EQ(PromptPrefixes(TestModel(), Ids(128), std::nullopt).CachedTokens(&known), (Tokens{0, 64, 0}));
  EXPECT_EQ(PromptPrefixes(TestModel(), Ids(129), std::nullopt).CachedTokens(&known), (Tokens{0, 128, 0}));
  EXPECT_EQ(PromptPrefixes(TestModel(), Ids(64), std::nullopt).CachedTokens(&known), Tokens());
  EXPECT_EQ(PromptPrefixes(TestModel(), {}, std::nullopt).CachedTokens(&known), Tokens());
}

TEST(PromptPrefixes, LooksAtARequestedProfileOnly) {
  PrefixHashSet known = Listed("q4", 900, {896});
  EXPECT_EQ(PromptPrefixes(TestModel(), Ids(1000), "q2").CachedTokens(&known), Tokens());
  EXPECT_EQ(PromptPrefixes(TestModel(), Ids(1000), "q4").CachedTokens(&known), (Tokens{0, 896, 0}));
}

}  // namespace
}  // namespace zeroc
