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

TEST(BlockTableTest, PresentBlocksAreNotListed) {
  for (const int bits : {16, 4, 2}) {
    const Side side(700, bits, 512);
    const KvFormat& format = side.kv->format();
    const BlockTable all = BlockTable::Of(*side.kv, 650, kModel, kPlan);
    for (const int n_present : {1, 2, std::min(format.LastingBlocksAt(650), 10)}) {
      BlockTable table = BlockTable::Of(*side.kv, 650, kModel, kPlan, n_present);
      table.set_prompt_hash(0x123456789abcdef0);
      EXPECT_EQ(table.n_present_tokens(), 64 * n_present);
      const std::string bytes = table.Serialise();
      const auto parsed = BlockTable::Parse(AsBytes(bytes));
      ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
      EXPECT_EQ(parsed->Extents(), table.Extents());
      EXPECT_EQ(parsed->prompt_hash(), table.prompt_hash());
      EXPECT_EQ(parsed->n_present_bytes(), table.n_present_bytes());
      EXPECT_TRUE(parsed->CheckSameShape(table).ok());
      EXPECT_NE(table.CheckSameShape(all).message().find("present"), std::string_view::npos);
      // What is missing are the first blocks of every layer, and the sinks.
      std::uint64_t missing = 0;
      for (int l = 0; l < table.n_layers(); ++l) {
        const LayerBlocks from = side.kv->BlocksAt(l, 650), to = table.layer(l).blocks;
        const auto& lasting = format.packs ? from.packed[0].refs : from.exact;
        const auto& listed = format.packs ? to.packed[0].refs : to.exact;
        EXPECT_TRUE(std::equal(lasting.begin() + n_present, lasting.end(), listed.begin(), listed.end()));
        EXPECT_FALSE(to.sink.valid());
        missing += static_cast<std::uint64_t>(n_present) *
                   static_cast<std::uint64_t>(format.packs ? from.packed[0].block_bytes : format.exact.block_bytes);
        if (from.sink.valid() && format.sink_tokens > 0) missing += static_cast<std::uint64_t>(format.sink.block_bytes);
      }
      EXPECT_EQ(table.n_present_bytes(), missing);
      EXPECT_EQ(table.n_bytes() + missing, all.n_bytes());
      std::string damaged = bytes;
      const std::size_t at = 4 + 2 + 3 * 2 + std::size(kModel) - 1 + std::size(kPlan) - 1 + 4 + 8 + 8 + 4;
      damaged[at] = static_cast<char>(n_present + 1);
      EXPECT_EQ(BlockTable::Parse(AsBytes(damaged)).status().code(), StatusCode::kInvalidArgument);
      damaged[at] = 11;  // as many as the prompt has
      EXPECT_EQ(BlockTable::Parse(AsBytes(damaged)).status().code(), StatusCode::kInvalidArgument);
    }
  }
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
