#include "libzeroc/handoff/sender.h"

#include <gtest/gtest.h>

#include "libzeroc/comm/checksum.h"
#include "libzeroc/handoff/test_support.h"
#include "libzeroc/kv/owned_pool.h"

namespace zeroc {
namespace {

using handoff_test::Arena;
using handoff_test::FakeDevice;
using handoff_test::FillBlock;
using handoff_test::HoldsBlock;
using handoff_test::kLayers;
using handoff_test::kModel;
using handoff_test::kPlan;
using handoff_test::MakeFormat;

constexpr LeaseKey kLease{77, 88};
constexpr std::int64_t kSecond = 1'000'000'000;
constexpr int kTokens = 700;

template <typename T>
int CountOf(const SenderActions& actions) {
  int n = 0;
  for (const SenderAction& action : actions) n += std::holds_alternative<T>(action) ? 1 : 0;
  return n;
}

template <typename T>
std::vector<T> Sent(const SenderActions& actions) {
  std::vector<T> found;
  for (const SenderAction& action : actions) {
    const auto* post = std::get_if<PostMessage>(&action);
    if (post == nullptr) continue;
    const Message message = ParseMessage(post->message.type, std::as_bytes(std::span(post->message.payload))).value();
    if (const T* one = std::get_if<T>(&message)) found.push_back(*one);
  }
  return found;
}

class SenderTest : public ::testing::Test {
 protected:
  struct Side {
    explicit Side(int step_tokens)
        : arena(4 << 20),
          pool(BlockPool::Create(arena.span(), 256 << 10).value()),
          kv(SequenceKv::Create(*pool, MakeFormat(4), kTokens, step_tokens).value()) {}
    Arena arena;
    std::unique_ptr<BlockPool> pool;
    std::unique_ptr<SequenceKv> kv;
  };

  SenderTest()
      : remote_(BlockTable::Of(*decode_.kv, kTokens, kModel, kPlan)),
        sender_({}, kLease, {0, 1, remote_.n_blocks()}, remote_, "decode") {
    for (std::size_t i = 0; i < prefill_.arena.span().size(); i += 64) prefill_.arena.span()[i] = std::byte(i >> 8);
  }

  SenderActions Ready(int layer) {
    const auto n_packed = static_cast<int>(remote_.layer(layer).blocks.n_packed());
    const auto n_exact = static_cast<int>(remote_.layer(layer).blocks.exact.size());
    return sender_.OnBlocksReady(*prefill_.kv, {layer, {{0, n_packed}}, true, 0, n_exact}, now_).value();
  }
  SenderActions AckAttach() { return sender_.OnMessage(AttachAckMessage{kLease, 0, OkStatus()}, now_); }
  SenderActions FirstTokenDrawn() { return sender_.OnFirstToken({5, -1, {}, 9, kTokens}, now_); }
  // Everything posted and under way; returns the number of writes.
  int PostAll(Delivery delivery) {
    sender_.OnPeerUp(delivery, now_);
    int n_writes = CountOf<PostWrite>(AckAttach());
    for (int layer = 0; layer < kLayers; ++layer) n_writes += CountOf<PostWrite>(Ready(layer));
    return n_writes;
  }

  std::int64_t now_ = 50 * kSecond;
  Side prefill_{512};
  Side decode_{1};
  BlockTable remote_;
  Sender sender_;
};

TEST_F(SenderTest, PostsNothingBeforeTheLeaseIsAttached) {
  EXPECT_TRUE(Ready(0).empty());
  EXPECT_EQ(Sent<AttachMessage>(sender_.OnPeerUp(Delivery::kPut, now_)).size(), 1u);
  EXPECT_TRUE(Ready(1).empty());
  const SenderActions posted = AckAttach();
  EXPECT_GT(CountOf<PostWrite>(posted), 0);
  EXPECT_EQ(sender_.stats().n_blocks, remote_.layer(2).first_block);
}

TEST_F(SenderTest, NeighboursTravelTogetherAndEveryBlockOnce) {
  sender_.OnPeerUp(Delivery::kActiveMessage, now_);
  AckAttach();
  std::vector<PostWrite> writes;
  for (int layer = 0; layer < kLayers; ++layer) {
    for (const SenderAction& action : Ready(layer)) {
      if (const auto* write = std::get_if<PostWrite>(&action)) writes.push_back(*write);
    }
  }
  EXPECT_LT(writes.size(), remote_.n_blocks() / 2);
  std::vector<std::byte> arrived(decode_.arena.span().size());
  std::uint64_t bytes = 0;
  for (const PostWrite& write : writes) {
    EXPECT_LE(write.local.size(), std::size_t{1} << 20);
    std::copy(write.local.begin(), write.local.end(),
              arrived.begin() + static_cast<std::ptrdiff_t>(write.remote_offset));
    bytes += write.local.size();
  }
  EXPECT_EQ(bytes, remote_.n_bytes());
  const auto from = BlockTable::Of(*prefill_.kv, kTokens, kModel, kPlan).Extents();
  const auto to = remote_.Extents();
  for (std::size_t i = 0; i < to.size(); ++i) {
    EXPECT_TRUE(std::equal(arrived.begin() + static_cast<std::ptrdiff_t>(to[i].offset),
                           arrived.begin() + static_cast<std::ptrdiff_t>(to[i].offset + to[i].bytes),
                           prefill_.arena.span().begin() + static_cast<std::ptrdiff_t>(from[i].offset)))
        << "block " << i;
  }
}

TEST_F(SenderTest, BlocksOfADeviceTravelFromTheWireSide) {
  FakeDevice device;
  const Arena wire(4 << 20);
  {
    const auto owned = OwnedPool::Over(wire.span(), 256 << 10, device).value();
    EXPECT_EQ(device.n_pinned, 1);
    const auto kv = SequenceKv::Create(owned->pool(), MakeFormat(4), kTokens, 512).value();
    const BlockTable local = BlockTable::Of(*kv, kTokens, kModel, kPlan);
    const std::vector<BlockExtent> extents = local.Extents();
    for (std::size_t i = 0; i < extents.size(); ++i) {
      FillBlock(7, i, {owned->pool().Data(BlockRef::At(extents[i].offset)), extents[i].bytes});
    }
    sender_.OnPeerUp(Delivery::kActiveMessage, now_);
    AckAttach();
    std::vector<std::byte> arrived(decode_.arena.span().size());
    for (int layer = 0; layer < kLayers; ++layer) {
      const auto& blocks = remote_.layer(layer).blocks;
      const FinalBlocks final{
          layer, {{0, static_cast<int>(blocks.n_packed())}}, true, 0, static_cast<int>(blocks.exact.size())};
      const SenderActions actions = sender_.OnBlocksReady(*kv, final, now_).value();
      for (const SenderAction& action : actions) {
        const auto& write = std::get<PostWrite>(action);
        EXPECT_TRUE(write.local.data() >= wire.span().data() &&
                    write.local.data() + write.local.size() <= wire.span().data() + wire.span().size());
        std::copy(write.local.begin(), write.local.end(),
                  arrived.begin() + static_cast<std::ptrdiff_t>(write.remote_offset));
      }
    }
    EXPECT_LT(device.n_copies, extents.size() / 2);  // neighbours in one
    const std::vector<BlockExtent> to = remote_.Extents();
    for (std::size_t i = 0; i < to.size(); ++i) {
      EXPECT_TRUE(HoldsBlock(7, i, std::span(arrived).subspan(to[i].offset, to[i].bytes))) << "block " << i;
    }
  }
  EXPECT_EQ(device.n_pinned, 0);
}

TEST_F(SenderTest, ALostDeviceIsAnErrorOfTheTransfer) {
  FakeDevice device;
  const Arena wire(4 << 20);
  const auto owned = OwnedPool::Over(wire.span(), 256 << 10, device).value();
  const auto kv = SequenceKv::Create(owned->pool(), MakeFormat(4), kTokens, 512).value();
  device.is_lost = true;
  EXPECT_EQ(sender_.OnBlocksReady(*kv, {0, {{0, 1}}, false, 0, 0}, now_).status().code(), StatusCode::kInternal);
}

TEST_F(SenderTest, PresentBlocksAreNeitherSentNorCommitted) {
  constexpr int kPresent = 5;
  const BlockTable remote = BlockTable::Of(*decode_.kv, kTokens, kModel, kPlan, kPresent);
  Sender sender({}, kLease, {0, 1, remote.n_blocks()}, remote, "decode");
  sender.OnPeerUp(Delivery::kActiveMessage, now_);
  sender.OnMessage(AttachAckMessage{kLease, 0, OkStatus()}, now_);
  int n_writes = 0;
  for (int layer = 0; layer < kLayers; ++layer) {
    const auto n_packed = static_cast<int>(remote_.layer(layer).blocks.n_packed());
    const auto n_exact = static_cast<int>(remote_.layer(layer).blocks.exact.size());
    // In two calls, the border inside the present blocks.
    for (const FinalBlocks& blocks :
         {FinalBlocks{layer, {{0, 3}}, true, 0, 0}, FinalBlocks{layer, {{3, n_packed}}, false, 0, n_exact}}) {
      n_writes += CountOf<PostWrite>(sender.OnBlocksReady(*prefill_.kv, blocks, now_).value());
    }
  }
  EXPECT_EQ(sender.stats().bytes_posted, remote.n_bytes());
  EXPECT_LT(remote.n_bytes(), remote_.n_bytes());
  sender.OnFirstToken({5, -1, {}, 9, kTokens}, now_);
  for (int i = 0; i < n_writes; ++i) sender.OnWriteDone(OkStatus(), now_);
  const auto commits = Sent<CommitMessage>(sender.OnFlushDone(OkStatus(), now_));
  ASSERT_EQ(commits.size(), 1u);
  const auto from = BlockTable::Of(*prefill_.kv, kTokens, kModel, kPlan, kPresent).Extents();
  ASSERT_EQ(commits[0].blocks.size(), from.size());
  for (const BlockChecksum& block : commits[0].blocks) {
    const BlockExtent& extent = from[block.block_idx];
    EXPECT_EQ(block.checksum, Checksum64(prefill_.arena.span().subspan(extent.offset, extent.bytes)));
  }
}

TEST_F(SenderTest, CommitsOnlyAfterTheFlushAndAllWrites) {
  const int n_writes = PostAll(Delivery::kPut);
  ASSERT_GT(n_writes, 1);
  EXPECT_EQ(CountOf<PostFlush>(FirstTokenDrawn()), 1);
  for (int i = 0; i + 1 < n_writes; ++i) EXPECT_TRUE(sender_.OnWriteDone(OkStatus(), now_).empty());
  EXPECT_TRUE(sender_.OnFlushDone(OkStatus(), now_).empty()) << "a write is still under way";
  const SenderActions end = sender_.OnWriteDone(OkStatus(), now_);
  EXPECT_EQ(CountOf<LocalDone>(end), 1);
  const auto commits = Sent<CommitMessage>(end);
  ASSERT_EQ(commits.size(), 1u);
  EXPECT_EQ(commits[0].blocks.size(), remote_.n_blocks());
  EXPECT_EQ(commits[0].first_token.id, 5);
  const auto from = BlockTable::Of(*prefill_.kv, kTokens, kModel, kPlan).Extents();
  for (const BlockChecksum& block : commits[0].blocks) {
    const BlockExtent& extent = from[block.block_idx];
    EXPECT_EQ(block.checksum, Checksum64(prefill_.arena.span().subspan(extent.offset, extent.bytes)));
  }
  const SenderActions acked = sender_.OnMessage(CommitAckMessage{kLease, 0, OkStatus()}, now_);
  ASSERT_EQ(CountOf<SenderEnded>(acked), 1);
  EXPECT_TRUE(std::get<SenderEnded>(acked.back()).status.ok());
  EXPECT_TRUE(sender_.OnMessage(CommitAckMessage{kLease, 0, OkStatus()}, now_).empty()) << "a duplicate";
}

TEST_F(SenderTest, WireTimeLeavesOutThePausesInWhichItWaitsForBlocks) {
  const std::int64_t start = now_;
  int n_pending = 0;
  const auto finish_writes = [&](std::int64_t at) {
    for (; n_pending > 0; --n_pending) sender_.OnWriteDone(OkStatus(), start + at);
  };
  sender_.OnPeerUp(Delivery::kActiveMessage, now_);
  AckAttach();
  EXPECT_EQ(sender_.WireNs(start + 90), 0);
  now_ = start + 100;
  n_pending = CountOf<PostWrite>(Ready(0));
  ASSERT_GT(n_pending, 0);
  EXPECT_EQ(sender_.WireNs(start + 110), 10);
  finish_writes(130);
  EXPECT_EQ(sender_.WireNs(start + 400), 30) << "nothing is under way";
  for (int layer = 1; layer < kLayers; ++layer) {
    now_ = start + 500 + layer;
    n_pending += CountOf<PostWrite>(Ready(layer));
  }
  now_ = start + 541;
  EXPECT_EQ(CountOf<PostFlush>(FirstTokenDrawn()), 1);
  EXPECT_EQ(sender_.WireNs(now_), 70) << "what prefill's computation hides";
  finish_writes(560);
  EXPECT_EQ(CountOf<LocalDone>(sender_.OnFlushDone(OkStatus(), start + 580)), 1);
  sender_.OnMessage(CommitAckMessage{kLease, 0, OkStatus()}, start + 601);
  ASSERT_TRUE(sender_.ended());
  EXPECT_EQ(sender_.WireNs(start + 601), 130) << "the flush and the commit count: decode waits for them";
  EXPECT_EQ(sender_.WireNs(start + 9000), 130) << "it is over";
}

TEST_F(SenderTest, AConnectionClosedForAnotherJobIsALossAndNoCancel) {
  const int n_writes = PostAll(Delivery::kActiveMessage);
  for (int i = 0; i < n_writes; ++i) sender_.OnWriteDone(Cancelled("closed locally"), now_);
  const SenderActions end = sender_.OnPeerFailure(Unavailable("closed"), now_);
  ASSERT_EQ(CountOf<SenderEnded>(end), 1);
  const Status& status = std::get<SenderEnded>(end.back()).status;
  EXPECT_EQ(status.code(), StatusCode::kUnavailable) << status.ToString();
  EXPECT_NE(status.ToString().find("closed locally"), std::string::npos) << status.ToString();
}

TEST_F(SenderTest, WaitsForTheFlushWhenWritesAreOverLocally) {
  const int n_writes = PostAll(Delivery::kPut);
  FirstTokenDrawn();
  for (int i = 0; i < n_writes; ++i) EXPECT_TRUE(sender_.OnWriteDone(OkStatus(), now_).empty());
  EXPECT_EQ(Sent<CommitMessage>(sender_.OnFlushDone(OkStatus(), now_)).size(), 1u);
}

TEST_F(SenderTest, AFlushThatFailedForAnotherJobIsRepeated) {
  const int n_writes = PostAll(Delivery::kActiveMessage);
  FirstTokenDrawn();
  EXPECT_TRUE(sender_.OnFlushDone(FailedPrecondition("another lease"), now_).empty());
  for (int i = 0; i + 1 < n_writes; ++i) EXPECT_TRUE(sender_.OnWriteDone(OkStatus(), now_).empty());
  EXPECT_EQ(CountOf<PostFlush>(sender_.OnWriteDone(OkStatus(), now_)), 1);
  EXPECT_EQ(Sent<CommitMessage>(sender_.OnFlushDone(OkStatus(), now_)).size(), 1u);
}

TEST_F(SenderTest, ACancelledPutTransferLetsGoAfterWritesAndFlush) {
  const int n_writes = PostAll(Delivery::kPut);
  const SenderActions cancelled = sender_.Cancel(Cancelled("client went away"), now_);
  EXPECT_EQ(Sent<AbortMessage>(cancelled).size(), 1u);
  EXPECT_EQ(CountOf<LocalDone>(cancelled), 0);
  for (int i = 0; i + 1 < n_writes; ++i) EXPECT_TRUE(sender_.OnWriteDone(OkStatus(), now_).empty());
  const SenderActions last = sender_.OnWriteDone(OkStatus(), now_);
  EXPECT_EQ(CountOf<LocalDone>(last), 1);
  EXPECT_EQ(CountOf<PostFlush>(last), 1);
  EXPECT_TRUE(Sent<ReleasedMessage>(last).empty()) << "a put may still be on its way";
  EXPECT_EQ(Sent<ReleasedMessage>(sender_.OnFlushDone(OkStatus(), now_)).size(), 1u);
  now_ += 2 * kSecond;
  EXPECT_EQ(Sent<ReleasedMessage>(sender_.Tick(now_)).size(), 1u) << "again, until it is answered";
  const SenderActions ended = sender_.OnMessage(LeaseEndedMessage{kLease, 0, Cancelled("over"), false}, now_);
  ASSERT_EQ(CountOf<SenderEnded>(ended), 1);
  EXPECT_EQ(std::get<SenderEnded>(ended.back()).status.message(), "client went away");
}

TEST_F(SenderTest, ASilentPeerIsClosedAndFreesTheBytes) {
  const int n_writes = PostAll(Delivery::kPut);
  now_ += 16 * kSecond;
  EXPECT_EQ(Sent<AbortMessage>(sender_.Tick(now_)).size(), 1u);
  now_ += 6 * kSecond;
  EXPECT_EQ(CountOf<ClosePeer>(sender_.Tick(now_)), 1);
  EXPECT_EQ(CountOf<ClosePeer>(sender_.Tick(now_)), 0);
  EXPECT_TRUE(sender_.OnPeerFailure(Unavailable("closed"), now_).empty()) << "writes are still under way";
  SenderActions last;
  for (int i = 0; i < n_writes; ++i) last = sender_.OnWriteDone(Cancelled("closed"), now_);
  EXPECT_EQ(CountOf<LocalDone>(last), 1);
  ASSERT_EQ(CountOf<SenderEnded>(last), 1);
  EXPECT_EQ(std::get<SenderEnded>(last.back()).status.code(), StatusCode::kUnavailable);
}

// A stop that waited behind other requests' writes on a slow link used to close the connection under all of them.
TEST_F(SenderTest, ABusyLinkIsNotASilentPeer) {
  PostAll(Delivery::kPut);
  for (int i = 0; i < 20; ++i) {
    now_ += kSecond;
    EXPECT_FALSE(sender_.stopping()) << "after " << i << " s of other requests' progress";
    sender_.Tick(now_, now_);
  }
  EXPECT_EQ(Sent<AbortMessage>(sender_.Cancel(Cancelled("client went away"), now_)).size(), 1u);
  for (int i = 0; i < 49; ++i) {
    now_ += kSecond;
    EXPECT_EQ(CountOf<ClosePeer>(sender_.Tick(now_, now_)), 0);
  }
  now_ += 2 * kSecond;
  EXPECT_EQ(CountOf<ClosePeer>(sender_.Tick(now_, now_)), 1) << "a write of ours is lost";
}

TEST_F(SenderTest, HeartbeatsGoOnWhilePrefillComputes) {
  sender_.OnPeerUp(Delivery::kPut, now_);
  AckAttach();
  for (int i = 0; i < 5; ++i) {
    now_ += 6 * kSecond;
    EXPECT_EQ(Sent<AttachMessage>(sender_.Tick(now_)).size(), 1u);
    AckAttach();
  }
  EXPECT_FALSE(sender_.stopping());
}

TEST_F(SenderTest, ALeaseOfAnotherShapeIsRefused) {
  const Side other(512);
  const auto kv = SequenceKv::Create(*other.pool, MakeFormat(3), kTokens, 512).value();
  const Status late = sender_.OnBlocksReady(*kv, {0, {{0, 1}}, false, 0, 0}, now_).status();
  EXPECT_EQ(late.code(), StatusCode::kFailedPrecondition);
}

TEST(AnswerWithoutSenderTest, OnlyToWhoWaitsForIt) {
  EXPECT_TRUE(AnswerWithoutSender(LeaseEndedMessage{kLease, 0, Cancelled("over"), true}).has_value());
  EXPECT_FALSE(AnswerWithoutSender(LeaseEndedMessage{kLease, 0, Cancelled("over"), false}).has_value());
  EXPECT_FALSE(AnswerWithoutSender(CommitAckMessage{kLease, 0, OkStatus()}).has_value());
}

}  // namespace
}  // namespace zeroc
