#include "libzeroc/kv/block_pool.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <random>

namespace zeroc {
namespace {

class Arena {
 public:
  explicit Arena(std::size_t bytes) : data_(static_cast<std::byte*>(std::aligned_alloc(64, bytes))), bytes_(bytes) {}
  ~Arena() { std::free(data_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  std::span<std::byte> span() const { return {data_, bytes_}; }

 private:
  std::byte* data_;
  std::size_t bytes_;
};

TEST(BlockPoolTest, RefusesUnusableArenas) {
  const Arena arena(4096);
  EXPECT_EQ(BlockPool::Create(arena.span(), 100).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(BlockPool::Create(arena.span(), 8192).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(BlockPool::Create(arena.span().subspan(8), 1024).status().code(), StatusCode::kInvalidArgument);
}

TEST(BlockPoolTest, AllocatesAllOrNothing) {
  const Arena arena(4 * 1024);
  auto pool = BlockPool::Create(arena.span(), 1024).value();
  std::vector<BlockRef> refs;
  ASSERT_TRUE(pool->Allocate(256, 9, &refs).ok());
  EXPECT_EQ(refs.size(), 9u);
  EXPECT_EQ(pool->Allocate(512, 3, &refs).code(), StatusCode::kResourceExhausted);  // one slab of two is left
  EXPECT_EQ(refs.size(), 9u);
  EXPECT_TRUE(pool->Allocate(512, 2, &refs).ok());
  EXPECT_EQ(pool->Allocate(2048, 1, &refs).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(pool->Allocate(100, 1, &refs).code(), StatusCode::kInvalidArgument);
  for (const BlockRef ref : refs) pool->Release(ref);
  EXPECT_EQ(pool->usage().bytes_used, 0u);
  EXPECT_EQ(pool->usage().bytes_reclaimable, 4096u);
}

TEST(BlockPoolTest, LongRunsLieInOnePiece) {
  const Arena arena(8 * 1024);
  auto pool = BlockPool::Create(arena.span(), 1024).value();
  std::vector<BlockRef> refs;
  ASSERT_TRUE(pool->Allocate(256, 12, &refs).ok());
  for (std::size_t i = 1; i < refs.size(); ++i) EXPECT_EQ(refs[i].offset(), refs[i - 1].offset() + 256);
}

TEST(BlockPoolDeathTest, DoubleReleaseIsABug) {
  const Arena arena(1024);
  auto pool = BlockPool::Create(arena.span(), 1024).value();
  std::vector<BlockRef> refs;
  ASSERT_TRUE(pool->Allocate(256, 2, &refs).ok());
  pool->Release(refs[0]);
  EXPECT_DEATH(pool->Release(refs[0]), "check failed");
  EXPECT_DEATH(pool->Release({refs[1].unit + 1}), "check failed");
}

TEST(BlockPoolDeathTest, UsersAndKeepsAreCountedApart) {
  const Arena arena(4096);
  auto pool = BlockPool::Create(arena.span(), 1024).value();
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

// Random allocations of many sizes: blocks never overlap, accounting is exact, everything comes back.
TEST(BlockPoolTest, RandomUseKeepsBlocksApart) {
  for (unsigned seed = 1; seed <= 20; ++seed) {
    std::mt19937 rng(seed);
    const Arena arena(64 * 1024);
    auto pool = BlockPool::Create(arena.span(), 4096).value();
    std::map<std::uint64_t, std::size_t> live;  // offset -> bytes
    std::vector<BlockRef> refs;
    for (int step = 0; step < 2000; ++step) {
      if (rng() % 2 == 0 || refs.empty()) {
        const std::size_t bytes = 64 * (1 + rng() % 64);
        const std::size_t n = 1 + rng() % 9;
        std::vector<BlockRef> got;
        if (!pool->Allocate(bytes, n, &got).ok()) continue;
        ASSERT_EQ(got.size(), n);
        for (const BlockRef ref : got) {
          const auto [it, inserted] = live.emplace(ref.offset(), bytes);
          ASSERT_TRUE(inserted) << "seed " << seed;
          ASSERT_LE(ref.offset() + bytes, arena.span().size());
          if (it != live.begin()) {
            ASSERT_LE(std::prev(it)->first + std::prev(it)->second, ref.offset());
          }
          if (std::next(it) != live.end()) {
            ASSERT_LE(ref.offset() + bytes, std::next(it)->first);
          }
          refs.push_back(ref);
        }
      } else {
        const std::size_t i = rng() % refs.size();
        live.erase(refs[i].offset());
        pool->Release(refs[i]);
        refs[i] = refs.back();
        refs.pop_back();
      }
      std::uint64_t bytes = 0;
      for (const auto& [offset, size] : live) bytes += size;
      ASSERT_EQ(pool->usage().bytes_used, bytes);
      ASSERT_EQ(pool->usage().n_blocks_used, live.size());
    }
    for (const BlockRef ref : refs) pool->Release(ref);
    EXPECT_EQ(pool->usage().bytes_reclaimable, 64u * 1024);
  }
}

}  // namespace
}  // namespace zeroc
