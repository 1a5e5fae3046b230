#include "libzeroc/compression/prefix_hash.h"

#include <gtest/gtest.h>

#include <numeric>
#include <set>

namespace zeroc {
namespace {

std::vector<std::int32_t> Counting(int n) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(n));
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

// Two processes of different builds compare these: the values are part of the protocol.
TEST(PrefixHashTest, ValuesAreStable) {
  const std::uint64_t root = PrefixHashRoot("model", "plan", "q4");
  EXPECT_EQ(root, 11317946695962633271u);
  EXPECT_EQ(PrefixHashes(root, Counting(130)),
            (std::vector<std::uint64_t>{15196555293825460724u, 7870912349244169146u}));
}

TEST(PrefixHashTest, OneHashForEveryWholeBlock) {
  for (const int n : {0, 1, 63, 64, 65, 128, 200}) {
    EXPECT_EQ(PrefixHashes(1, Counting(n)).size(), static_cast<std::size_t>(n / 64)) << n;
  }
}

TEST(PrefixHashTest, StandsForEverythingBeforeIt) {
  const auto ids = Counting(256);
  const std::uint64_t root = PrefixHashRoot("m", "p", "q4");
  const auto hashes = PrefixHashes(root, ids);
  std::set<std::uint64_t> seen(hashes.begin(), hashes.end());
  ASSERT_EQ(seen.size(), 4u);
  for (std::size_t at = 0; at < ids.size(); at += 37) {
    auto changed = ids;
    changed[at] += 1;
    const auto other = PrefixHashes(root, changed);
    for (std::size_t i = 0; i < 4; ++i) EXPECT_EQ(other[i] == hashes[i], i < at / 64) << at;
  }
  // The texts do not run into each other.
  for (const std::uint64_t other : {PrefixHashRoot("mp", "", "q4"), PrefixHashRoot("m", "p", "q3"),
                                    PrefixHashRoot("m", "pq", "4"), PrefixHashRoot("", "", "")}) {
    EXPECT_NE(other, root);
    EXPECT_NE(PrefixHashes(other, ids)[3], hashes[3]);
  }
}

}  // namespace
}  // namespace zeroc
