#include "libzeroc/tokenizer/bpe.h"

#include <gtest/gtest.h>

#include <chrono>
#include <map>
#include <random>
#include <string>

namespace zeroc {
namespace {

std::array<int, 256> ByteIds() {
  std::array<int, 256> ids;
  for (int i = 0; i < 256; ++i) ids[static_cast<std::size_t>(i)] = i;
  return ids;
}

std::vector<int> Encode(const Bpe& bpe, std::string_view word) {
  Bpe::Scratch scratch;
  std::vector<int> ids;
  bpe.Encode(word, &scratch, &ids);
  return ids;
}

// By the definition: look at all pairs, join the leftmost of lowest rank, begin again.
std::vector<int> EncodeSlowly(const std::map<std::pair<int, int>, std::pair<int, int>>& merges, std::string_view word) {
  std::vector<int> ids;
  for (const char c : word) ids.push_back(static_cast<unsigned char>(c));
  for (;;) {
    auto best = merges.end();
    std::size_t where = 0;
    for (std::size_t i = 0; i + 1 < ids.size(); ++i) {
      const auto it = merges.find({ids[i], ids[i + 1]});
      if (it != merges.end() && (best == merges.end() || it->second < best->second)) {
        best = it;
        where = i;
      }
    }
    if (best == merges.end()) return ids;
    ids[where] = best->second.second;
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(where) + 1);
  }
}

TEST(BpeTest, EqualsTheDefinitionOnRandomMerges) {
  std::mt19937 random(3);
  for (int round = 0; round < 200; ++round) {
    // Random merges over the letters a to d and over each other's results.
    std::vector<BpeMerge> list;
    std::map<std::pair<int, int>, std::pair<int, int>> map;  // pair -> (rank, result)
    std::vector<int> known = {'a', 'b', 'c', 'd'};
    for (int rank = 0; rank < 30; ++rank) {
      const int left = known[random() % known.size()];
      const int right = known[random() % known.size()];
      if (map.contains({left, right})) continue;
      const int result = 256 + static_cast<int>(list.size());
      map[{left, right}] = {static_cast<int>(list.size()), result};
      list.push_back({left, right, result});
      known.push_back(result);
    }
    const Bpe bpe(ByteIds(), list);
    for (int i = 0; i < 20; ++i) {
      std::string word(random() % 40, 'a');
      for (char& c : word) c = static_cast<char>('a' + random() % 5);  // 'e' is in no merge
      ASSERT_EQ(Encode(bpe, word), EncodeSlowly(map, word)) << word;
    }
  }
}

TEST(BpeTest, EmptyAndSingleByteWords) {
  const Bpe bpe(ByteIds(), {});
  EXPECT_TRUE(Encode(bpe, "").empty());
  EXPECT_EQ(Encode(bpe, "\xff"), std::vector<int>{255});
}

TEST(BpeTest, RepeatedPairTakesItsLastRank) {
  const std::vector<BpeMerge> merges = {{'a', 'b', 256}, {'b', 'c', 257}, {'a', 'b', 256}};
  EXPECT_EQ(Encode(Bpe(ByteIds(), merges), "abc"), (std::vector<int>{'a', 257}));
}

// One word of 1 MiB; a quadratic merge loop would take hours. Doubling merges make the heap as busy as it can be.
TEST(BpeTest, LongWordTakesNearLinearTime) {
  std::vector<BpeMerge> merges = {{'a', 'a', 256}};
  for (int i = 0; i < 10; ++i) merges.push_back({256 + i, 256 + i, 257 + i});
  const Bpe bpe(ByteIds(), merges);
  const auto start = std::chrono::steady_clock::now();
  const std::vector<int> ids = Encode(bpe, std::string(1 << 20, 'a'));
  const auto took = std::chrono::steady_clock::now() - start;
  EXPECT_EQ(ids, std::vector<int>(512, 266));  // 2^11 bytes each
  EXPECT_LT(took, std::chrono::seconds(20)) << "generous: sanitizers and busy machines";
}

}  // namespace
}  // namespace zeroc
