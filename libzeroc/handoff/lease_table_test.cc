#include "libzeroc/handoff/lease_table.h"

#include <gtest/gtest.h>

#include "libzeroc/comm/checksum.h"
#include "libzeroc/handoff/test_support.h"

namespace zeroc {
namespace {

using handoff_test::Arena;
using handoff_test::kModel;
using handoff_test::kPlan;
using handoff_test::MakeFormat;

constexpr PeerId kWriter{1};
constexpr PeerId kStranger{2};
constexpr std::int64_t kSecond = 1'000'000'000;

template <typename T>
std::vector<T> Of(const LeaseActions& actions) {
  std::vector<T> found;
  for (const LeaseAction& action : actions) {
    if (const T* one = std::get_if<T>(&action)) found.push_back(*one);
  }
  return found;
}

template <typename T>
std::vector<T> Sent(const LeaseActions& actions) {
  std::vector<T> found;
  for (const SendMessage& send : Of<SendMessage>(actions)) {
    const Message message = ParseMessage(send.message.type, std::as_bytes(std::span(send.message.payload))).value();
    if (const T* one = std::get_if<T>(&message)) found.push_back(*one);
  }
  return found;
}

class LeaseTableTest : public ::testing::Test {
 protected:
  LeaseTableTest()
      : arena_(4 << 20),
        pool_(BlockPool::Create(arena_.span(), 256 << 10).value()),
        kv_(SequenceKv::Create(*pool_, MakeFormat(4), 400, 1).value()),
        layout_(BlockTable::Of(*kv_, 300, kModel, kPlan)),
        extents_(layout_.Extents()),
        table_({}, 12345) {
    key_ = table_.Create(layout_, now_).value();
  }

  LeaseActions Message_(const Message& message, PeerId peer = kWriter) {
    return table_.OnMessage(peer, message, now_).value();
  }
  LeaseActions Attach(Delivery delivery = Delivery::kActiveMessage, PeerId peer = kWriter) {
    return Message_(AttachMessage{key_, 0, 1, delivery, 300, layout_.identity().layout_hash}, peer);
  }
  bool Write(std::size_t block_idx, PeerId peer = kWriter) {
    const BlockExtent& extent = extents_[block_idx];
    if (!table_.AcceptWrite(peer, key_.tag(), extent.offset, extent.bytes, now_)) return false;
    handoff_test::FillBlock(7, block_idx, arena_.span().subspan(extent.offset, extent.bytes));
    EXPECT_TRUE(table_.OnWriteDone(key_.tag(), extent.bytes, OkStatus(), now_).empty());
    return true;
  }
  CommitMessage Commit() {
    CommitMessage commit{key_, 0, 0, 1, true, {5, -1, {}, 3, 300}, {}};
    for (std::uint32_t i = 0; i < extents_.size(); ++i) {
      std::vector<std::byte> bytes(extents_[i].bytes);
      handoff_test::FillBlock(7, i, bytes);
      commit.blocks.push_back({i, Checksum64(bytes)});
    }
    return commit;
  }
  void WriteAll() {
    for (std::size_t i = 0; i < extents_.size(); ++i) ASSERT_TRUE(Write(i));
  }
  // To the verdict over the arena's bytes.
  LeaseActions Verify(const LeaseActions& actions) {
    const auto verify = Of<VerifyLease>(actions);
    EXPECT_EQ(verify.size(), 1u);
    if (verify.empty()) return {};
    return table_.OnVerified(key_, VerifyBlocks(arena_.span(), verify[0].blocks), now_);
  }

  std::int64_t now_ = 100 * kSecond;
  Arena arena_;
  std::unique_ptr<BlockPool> pool_;
  std::unique_ptr<SequenceKv> kv_;
  BlockTable layout_;
  std::vector<BlockExtent> extents_;
  LeaseTable table_;
  LeaseKey key_;
};

TEST_F(LeaseTableTest, ReachesItsEndOnce) {
  EXPECT_EQ(table_.n_in(LeaseState::kReserved), 1u);
  EXPECT_TRUE(Sent<AttachAckMessage>(Attach()).at(0).status.ok());
  WriteAll();
  const LeaseActions ready = Verify(Message_(Commit()));
  ASSERT_EQ(Of<LeaseReady>(ready).size(), 1u);
  EXPECT_EQ(Of<LeaseReady>(ready)[0].first_token, (FirstToken{5, -1, {}, 3, 300}));
  EXPECT_EQ(Of<LeaseReady>(ready)[0].facts.bytes_received, layout_.n_bytes());
  EXPECT_TRUE(Sent<CommitAckMessage>(ready).at(0).status.ok());
  EXPECT_FALSE(Write(0)) << "a committed block may not change";
  EXPECT_TRUE(table_.Admit(key_).ok());
  EXPECT_EQ(table_.Admit(key_).code(), StatusCode::kFailedPrecondition);
  now_ += 3600 * kSecond;
  EXPECT_TRUE(table_.Tick(now_).empty()) << "an admitted request has no expiry";
  EXPECT_EQ(Of<ReturnBlocks>(table_.Release(key_, OkStatus(), now_)).size(), 1u);
  EXPECT_TRUE(table_.Release(key_, OkStatus(), now_).empty());
  EXPECT_EQ(table_.n_leases(), 0u);
  // A commit that comes again, however late, is answered as before.
  EXPECT_TRUE(Sent<CommitAckMessage>(Message_(Commit())).at(0).status.ok());
}

TEST_F(LeaseTableTest, RefusesWritesThatAreNotTheLeases) {
  EXPECT_FALSE(Write(0)) << "nobody attached";
  Attach();
  EXPECT_TRUE(Write(0));
  EXPECT_FALSE(Write(0, kStranger));
  const BlockExtent& block = extents_[0];
  const WriteTag tag = key_.tag();
  EXPECT_FALSE(table_.AcceptWrite(kWriter, {tag.lease_id, tag.generation + 1}, block.offset, block.bytes, now_));
  EXPECT_FALSE(table_.AcceptWrite(kWriter, {tag.lease_id + 1, tag.generation}, block.offset, block.bytes, now_));
  // Inside the arena, but not the lease's own bytes.
  std::uint64_t end = 0;
  for (const BlockExtent& extent : extents_) end = std::max(end, extent.offset + extent.bytes);
  EXPECT_FALSE(table_.AcceptWrite(kWriter, tag, end, 64, now_));
  EXPECT_FALSE(table_.AcceptWrite(kWriter, tag, end - 64, 128, now_));
  EXPECT_FALSE(table_.AcceptWrite(kWriter, tag, UINT64_MAX - 63, 128, now_));
  EXPECT_FALSE(table_.AcceptWrite(kWriter, tag, block.offset, UINT64_MAX, now_));
  EXPECT_TRUE(table_.AcceptWrite(kWriter, tag, end - 64, 64, now_));
}

// Blocks that another sequence holds too are in no list, so neither a write nor a commit can name them.
TEST_F(LeaseTableTest, BlocksThatAreSharedCanNotBeWritten) {
  constexpr int kPresent = 2;
  const BlockTable layout = BlockTable::Of(*kv_, 300, kModel, kPlan, kPresent);
  table_.Release(key_, OkStatus(), now_);
  key_ = table_.Create(layout, now_).value();
  Attach();
  const std::vector<BlockExtent> listed = layout.Extents();
  int n_refused = 0;
  for (std::size_t i = 0; i < extents_.size(); ++i) {
    const bool is_listed = std::find(listed.begin(), listed.end(), extents_[i]) != listed.end();
    EXPECT_EQ(Write(i), is_listed) << "block " << i;
    n_refused += is_listed ? 0 : 1;
  }
  EXPECT_EQ(n_refused, handoff_test::kLayers * (kPresent + 1)) << "of every layer two blocks and the sink";
  // A write that begins in a listed block may not run into a shared one, and the other way round.
  const BlockExtent& first = extents_[0];
  EXPECT_FALSE(table_.AcceptWrite(kWriter, key_.tag(), first.offset, (kPresent + 1) * first.bytes, now_));
  CommitMessage commit = Commit();
  const LeaseActions failed = Message_(commit);
  ASSERT_EQ(Of<LeaseFailed>(failed).size(), 1u);
  EXPECT_NE(Of<LeaseFailed>(failed)[0].status.message().find("not there"), std::string_view::npos);
}

TEST_F(LeaseTableTest, WrongBytesAreNeverAdmitted) {
  Attach();
  WriteAll();
  arena_.span()[extents_[3].offset + 11] ^= std::byte{1};
  const LeaseActions failed = Verify(Message_(Commit()));
  ASSERT_EQ(Of<LeaseFailed>(failed).size(), 1u);
  EXPECT_EQ(Of<LeaseFailed>(failed)[0].status.code(), StatusCode::kDataLoss);
  EXPECT_EQ(Sent<CommitAckMessage>(failed).at(0).status.code(), StatusCode::kDataLoss);
  EXPECT_TRUE(Of<LeaseReady>(failed).empty());
  EXPECT_EQ(Of<ReturnBlocks>(failed).size(), 1u);
  EXPECT_EQ(Sent<CommitAckMessage>(Message_(Commit())).at(0).status.code(), StatusCode::kDataLoss);
}

TEST_F(LeaseTableTest, ACommitMustNameEveryBlockOnceAndTheRightToken) {
  const auto outcome = [&](auto change) {
    const LeaseKey kept = key_;
    key_ = table_.Create(layout_, now_).value();
    Attach();
    CommitMessage commit = Commit();
    change(commit);
    const LeaseActions actions = Message_(commit);
    EXPECT_TRUE(Of<VerifyLease>(actions).empty());
    EXPECT_EQ(Of<ReturnBlocks>(actions).size(), 1u);
    key_ = kept;
    return Of<LeaseFailed>(actions).at(0).status.code();
  };
  EXPECT_EQ(outcome([](auto& c) { c.blocks.pop_back(); }), StatusCode::kFailedPrecondition);
  EXPECT_EQ(outcome([](auto& c) { c.blocks[1] = c.blocks[0]; }), StatusCode::kFailedPrecondition);
  EXPECT_EQ(outcome([](auto& c) { c.blocks[1].block_idx = 1u << 30; }), StatusCode::kFailedPrecondition);
  EXPECT_EQ(outcome([](auto& c) { c.has_first_token = false; }), StatusCode::kFailedPrecondition);
  EXPECT_EQ(outcome([](auto& c) { c.first_token.position = 299; }), StatusCode::kFailedPrecondition);
}

TEST_F(LeaseTableTest, AStaleGenerationIsRefusedAndHarmsNothing) {
  Attach();
  CommitMessage stale = Commit();
  stale.lease.generation -= 1;
  EXPECT_EQ(Sent<CommitAckMessage>(Message_(stale)).at(0).status.code(), StatusCode::kFailedPrecondition);
  AbortMessage abort{stale.lease, 0, Cancelled("old")};
  EXPECT_TRUE(Message_(abort).empty());
  EXPECT_TRUE(Message_(AbortMessage{key_, 0, Cancelled("not yours")}, kStranger).empty());
  EXPECT_EQ(table_.n_in(LeaseState::kReceiving), 1u);
}

TEST_F(LeaseTableTest, TwoRanksAndPartsInAnyOrder) {
  const auto attach = [&](std::uint16_t rank, PeerId peer) {
    Message_(AttachMessage{key_, rank, 2, Delivery::kActiveMessage, 300, layout_.identity().layout_hash}, peer);
  };
  attach(1, kStranger);
  attach(0, kWriter);
  for (std::size_t i = 0; i < extents_.size(); ++i) ASSERT_TRUE(Write(i, i % 2 == 0 ? kWriter : kStranger));
  const CommitMessage whole = Commit();
  const auto part = [&](std::uint16_t rank, std::uint16_t part_idx) {
    CommitMessage commit{key_, rank, part_idx, 2, rank == 0 && part_idx == 0, whole.first_token, {}};
    for (std::uint32_t i = 0; i < whole.blocks.size(); ++i) {
      if (i % 2 == rank && i / 2 % 2 == part_idx) commit.blocks.push_back(whole.blocks[i]);
    }
    return commit;
  };
  EXPECT_TRUE(Message_(part(0, 1), kWriter).empty());
  EXPECT_TRUE(Message_(part(1, 0), kStranger).empty());
  EXPECT_TRUE(Message_(part(1, 0), kStranger).empty()) << "a duplicate changes nothing";
  EXPECT_TRUE(Message_(part(0, 0), kWriter).empty());
  const LeaseActions ready = Verify(Message_(part(1, 1), kStranger));
  EXPECT_EQ(Of<LeaseReady>(ready).size(), 1u);
  EXPECT_EQ(Sent<CommitAckMessage>(ready).size(), 2u);
}

TEST_F(LeaseTableTest, SilenceExpiresALeaseAndHeartbeatsDoNotKeepItForEver) {
  now_ += 29 * kSecond;
  EXPECT_TRUE(table_.Tick(now_).empty());
  Attach();
  now_ += 29 * kSecond;
  EXPECT_TRUE(table_.Tick(now_).empty());
  now_ += 2 * kSecond;
  const LeaseActions expired = table_.Tick(now_);
  ASSERT_EQ(Of<LeaseFailed>(expired).size(), 1u);
  EXPECT_TRUE(Of<LeaseFailed>(expired)[0].expired);
  EXPECT_EQ(Of<LeaseFailed>(expired)[0].status.code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(Sent<LeaseEndedMessage>(expired).size(), 1u);
  EXPECT_EQ(Of<ReturnBlocks>(expired).size(), 1u);
  key_ = table_.Create(layout_, now_).value();
  for (int i = 0; i < 60; ++i) {
    Attach();
    now_ += 10 * kSecond;
    if (!table_.Tick(now_).empty()) break;
  }
  EXPECT_EQ(table_.n_leases(), 0u);
}

TEST_F(LeaseTableTest, OneSidedWritersKeepBlocksInQuarantine) {
  Attach(Delivery::kPut);
  now_ += 31 * kSecond;
  EXPECT_TRUE(Of<ReturnBlocks>(table_.Tick(now_)).empty());
  EXPECT_EQ(table_.n_in(LeaseState::kQuarantined), 1u);
  now_ += 3600 * kSecond;
  const LeaseActions again = table_.Tick(now_);
  EXPECT_EQ(Sent<LeaseEndedMessage>(again).size(), 1u) << "it is told again";
  EXPECT_TRUE(Of<ReturnBlocks>(again).empty()) << "a stopped writer may still write";
  EXPECT_FALSE(Sent<CommitAckMessage>(Message_(Commit())).at(0).status.ok());
  const LeaseActions released = Message_(ReleasedMessage{key_, 0});
  EXPECT_EQ(Of<ReturnBlocks>(released).size(), 1u);
  EXPECT_EQ(Sent<LeaseEndedMessage>(released).size(), 1u);
  EXPECT_EQ(Sent<LeaseEndedMessage>(Message_(ReleasedMessage{key_, 0})).size(), 1u) << "answered again";
}

TEST_F(LeaseTableTest, ADeadOneSidedWriterIsWaitedFor) {
  Attach(Delivery::kPut);
  const LeaseActions lost = table_.OnPeerFailure(kWriter, Unavailable("gone"), now_);
  EXPECT_EQ(Of<LeaseFailed>(lost).at(0).status.code(), StatusCode::kUnavailable);
  EXPECT_TRUE(Of<ReturnBlocks>(lost).empty());
  for (int i = 0; i < 19; ++i) EXPECT_TRUE(table_.Tick(now_ += kSecond / 10).empty());
  EXPECT_EQ(Of<ReturnBlocks>(table_.Tick(now_ += kSecond / 10)).size(), 1u);
}

// A clock that jumped (a machine that was moved) used to end the wait at once, with writes still under way.
TEST_F(LeaseTableTest, AClockThatJumpsDoesNotShortenTheWaitForADeadWriter) {
  Attach(Delivery::kPut);
  table_.OnPeerFailure(kWriter, Unavailable("gone"), now_);
  EXPECT_TRUE(Of<ReturnBlocks>(table_.Tick(now_ += 1000 * kSecond)).empty());
  for (int i = 0; i < 17; ++i) EXPECT_TRUE(Of<ReturnBlocks>(table_.Tick(now_ += kSecond / 10)).empty());
  EXPECT_EQ(Of<ReturnBlocks>(table_.Tick(now_ += kSecond / 10)).size(), 1u);
}

TEST_F(LeaseTableTest, BlocksWaitForThePieceThatIsBeingCopied) {
  Attach();
  ASSERT_TRUE(table_.AcceptWrite(kWriter, key_.tag(), extents_[0].offset, 64, now_));
  const LeaseActions released = table_.Release(key_, Cancelled("client went away"), now_);
  EXPECT_TRUE(Of<ReturnBlocks>(released).empty());
  EXPECT_TRUE(Of<LeaseFailed>(released).empty()) << "the owner knows";
  EXPECT_EQ(Sent<LeaseEndedMessage>(released).size(), 1u);
  EXPECT_FALSE(table_.AcceptWrite(kWriter, key_.tag(), extents_[1].offset, 64, now_));
  EXPECT_EQ(Of<ReturnBlocks>(table_.OnWriteDone(key_.tag(), 64, Unavailable("died"), now_)).size(), 1u);
}

TEST_F(LeaseTableTest, AReleaseDuringVerificationWaitsForTheReader) {
  Attach();
  WriteAll();
  const LeaseActions commit = Message_(Commit());
  EXPECT_TRUE(table_.Release(key_, Cancelled("client went away"), now_).empty());
  const LeaseActions verdict = Verify(commit);
  EXPECT_TRUE(Of<LeaseReady>(verdict).empty());
  EXPECT_TRUE(Of<LeaseFailed>(verdict).empty());
  EXPECT_EQ(Sent<CommitAckMessage>(verdict).at(0).status.code(), StatusCode::kCancelled);
  EXPECT_EQ(Of<ReturnBlocks>(verdict).size(), 1u);
}

TEST_F(LeaseTableTest, ACommittedLeaseThatNobodyClaimsExpires) {
  Attach();
  WriteAll();
  Verify(Message_(Commit()));
  now_ += 31 * kSecond;
  const LeaseActions expired = table_.Tick(now_);
  EXPECT_TRUE(Of<LeaseFailed>(expired).at(0).expired);
  EXPECT_EQ(Of<ReturnBlocks>(expired).size(), 1u);
  EXPECT_EQ(table_.Admit(key_).code(), StatusCode::kFailedPrecondition);
}

TEST_F(LeaseTableTest, ALeaseThatItsOwnerFillsLetsNobodyWrite) {
  ASSERT_TRUE(table_.AdmitLocal(key_).ok());
  EXPECT_EQ(table_.n_in(LeaseState::kAdmitted), 1u);
  EXPECT_EQ(table_.AdmitLocal(key_).code(), StatusCode::kFailedPrecondition);
  const auto acks = Sent<AttachAckMessage>(Attach());
  ASSERT_EQ(acks.size(), 1u);
  EXPECT_EQ(acks[0].status.code(), StatusCode::kFailedPrecondition);
  EXPECT_FALSE(table_.AcceptWrite(kWriter, key_.tag(), extents_[0].offset, extents_[0].bytes, now_));
  EXPECT_TRUE(Of<LeaseFailed>(Message_(AbortMessage{key_, 0, Cancelled("not mine")})).empty());
  now_ += 700 * kSecond;
  EXPECT_TRUE(table_.Tick(now_).empty()) << "claimed: only its owner ends it";
  EXPECT_EQ(Of<ReturnBlocks>(table_.Release(key_, OkStatus(), now_)).size(), 1u);
}

TEST_F(LeaseTableTest, ALeaseWithAWriterIsNotTheOwnersToFill) {
  Attach();
  EXPECT_EQ(table_.AdmitLocal(key_).code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(table_.n_in(LeaseState::kReceiving), 1u);
}

TEST_F(LeaseTableTest, AnotherLayoutOrConnectionMayNotAttach) {
  const auto refused = [&](const AttachMessage& message, PeerId peer) {
    return Sent<AttachAckMessage>(Message_(message, peer)).at(0).status.code() == StatusCode::kFailedPrecondition;
  };
  const std::uint64_t hash = layout_.identity().layout_hash;
  EXPECT_TRUE(refused({key_, 0, 1, Delivery::kPut, 299, hash}, kWriter));
  EXPECT_TRUE(refused({key_, 0, 1, Delivery::kPut, 300, hash + 1}, kWriter));
  Attach();
  EXPECT_TRUE(refused({key_, 0, 1, Delivery::kPut, 300, hash}, kStranger));
  EXPECT_TRUE(refused({key_, 0, 2, Delivery::kPut, 300, hash}, kWriter));
}

TEST(LeaseIdsTest, ProcessesDoNotRepeatEachOther) {
  const Arena arena(1 << 20);
  auto pool = BlockPool::Create(arena.span(), 256 << 10).value();
  const auto kv = SequenceKv::Create(*pool, MakeFormat(16), 10, 1).value();
  const BlockTable layout = BlockTable::Of(*kv, 10, kModel, kPlan);
  LeaseTable a({}, 1);
  LeaseTable b({}, 2);
  const LeaseKey a1 = a.Create(layout, 0).value();
  const LeaseKey a2 = a.Create(layout, 0).value();
  const LeaseKey b1 = b.Create(layout, 0).value();
  EXPECT_NE(a1.lease_id, a2.lease_id);
  EXPECT_NE(a1.generation, a2.generation);
  EXPECT_NE(a1.generation, b1.generation);
  EXPECT_NE(a2.generation, b1.generation);
}

}  // namespace
}  // namespace zeroc
