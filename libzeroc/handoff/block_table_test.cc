#include "libzeroc/handoff/block_table.h"

#include <gtest/gtest.h>

#include <random>

#include "libzeroc/handoff/byte_codec.h"
#include "libzeroc/handoff/test_support.h"

namespace zeroc {
namespace {

using handoff_test::Arena;
using handoff_test::kModel;
using handoff_test::kPlan;
using handoff_test::MakeFormat;

struct Side {
  explicit Side(int n_tokens, int bits, int step_tokens)
      : arena(8 << 20),
        pool(BlockPool::Create(arena.span(), 256 << 10).value()),
        kv(SequenceKv::Create(*pool, MakeFormat(bits), n_tokens, step_tokens).value()) {}
  Arena arena;
  std::unique_ptr<BlockPool> pool;
  std::unique_ptr<SequenceKv> kv;
};

TEST(BlockTableTest, BothSidesDeriveTheSameShape) {
  for (const int bits : {16, 4, 2}) {
    for (const int n : {1, 63, 64, 65, 191, 192, 193, 300, 700}) {
      // The sender steps in chunks, the receiver token by token, with other room behind the prompt.
      const Side prefill(n, bits, 512);
      const Side decode(n + 100, bits, 1);
      const BlockTable local = BlockTable::Of(*prefill.kv, n, kModel, kPlan);
      const BlockTable remote = BlockTable::Of(*decode.kv, n, kModel, kPlan);
      EXPECT_TRUE(local.CheckSameShape(remote).ok()) << bits << ' ' << n;
      EXPECT_EQ(local.n_bytes(), remote.n_bytes());
      EXPECT_TRUE(remote.CheckPlaces(decode.arena.span().size()).ok());
      std::uint64_t bytes = 0;
      for (const BlockExtent& extent : remote.Extents()) bytes += extent.bytes;
      EXPECT_EQ(bytes, remote.n_bytes());
      decode.kv->AdoptPrompt(n);
      EXPECT_EQ(remote.n_bytes(), decode.kv->HeldBytes()) << bits << ' ' << n;
    }
  }
}

TEST(BlockTableTest, SurvivesTheWire) {
  const Side side(700, 4, 512);
  const BlockTable table = BlockTable::Of(*side.kv, 650, kModel, kPlan);
  const std::string bytes = table.Serialise();
  const auto parsed = BlockTable::Parse(AsBytes(bytes));
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  EXPECT_EQ(parsed->Serialise(), bytes);
  EXPECT_EQ(parsed->Extents(), table.Extents());
  EXPECT_EQ(parsed->identity(), table.identity());
  EXPECT_EQ(parsed->n_prompt_tokens(), 650);
  EXPECT_TRUE(table.CheckSameShape(*parsed).ok());
}

TEST(BlockTableTest, NamesWhatDiffers) {
  const Side side(700, 4, 512);
  const Side other_bits(700, 3, 512);
  const BlockTable table = BlockTable::Of(*side.kv, 650, kModel, kPlan);
  const auto message = [&](const BlockTable& other) {
    const Status status = table.CheckSameShape(other);
    EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
    return std::string(status.message());
  };
  EXPECT_NE(message(BlockTable::Of(*side.kv, 650, "other", kPlan)).find("model"), std::string::npos);
  EXPECT_NE(message(BlockTable::Of(*side.kv, 650, kModel, "other")).find("plan"), std::string::npos);
  EXPECT_NE(message(BlockTable::Of(*side.kv, 649, kModel, kPlan)).find("prompt"), std::string::npos);
  EXPECT_NE(message(BlockTable::Of(*other_bits.kv, 650, kModel, kPlan)).find("layout"), std::string::npos);
}

TEST(BlockTableTest, PlacesOutsideTheArenaOrOnTopOfEachOtherAreRefused) {
  const Side side(700, 4, 512);
  const BlockTable table = BlockTable::Of(*side.kv, 650, kModel, kPlan);
  EXPECT_TRUE(table.CheckPlaces(8 << 20).ok());
  EXPECT_EQ(table.CheckPlaces(1000).code(), StatusCode::kOutOfRange);
  std::string bytes = table.Serialise();
  bytes.replace(bytes.size() - 4, 4, bytes, bytes.size() - 8, 4);  // the last exact block where the one before it is
  const auto twice = BlockTable::Parse(AsBytes(bytes));
  ASSERT_TRUE(twice.ok()) << twice.status().ToString();
  EXPECT_EQ(twice->CheckPlaces(8 << 20).code(), StatusCode::kInvalidArgument);
}

TEST(BlockTableTest, TruncatedAndDamagedBytesAreRefusedOrHarmless) {
  const Side side(700, 4, 512);
  const std::string bytes = BlockTable::Of(*side.kv, 650, kModel, kPlan).Serialise();
  for (std::size_t n = 0; n < bytes.size(); ++n) {
    EXPECT_EQ(BlockTable::Parse(AsBytes(bytes.substr(0, n))).status().code(), StatusCode::kInvalidArgument);
  }
  EXPECT_FALSE(BlockTable::Parse(AsBytes(bytes + 'x')).ok());
  std::mt19937 rng(9);
  for (int i = 0; i < 20'000; ++i) {
    std::string damaged = bytes;
    for (int k = 0; k < 2; ++k) damaged[rng() % damaged.size()] = static_cast<char>(rng());
    const auto parsed = BlockTable::Parse(AsBytes(damaged));
    if (!parsed.ok()) continue;
    EXPECT_LE(parsed->Extents().size(), bytes.size() / 4);
    (void)parsed->CheckPlaces(8 << 20).ok();
  }
}

}  // namespace
}  // namespace zeroc
