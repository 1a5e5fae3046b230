// The twin is NCCL in what a communicator can do wrong with it.
#include "libzeroc/comm/nccl/nccl_link.h"

#include <gtest/gtest.h>

#include <vector>

#include "kernels/cuda/runtime.h"

namespace zeroc {
namespace {

namespace cuda = kernels::cuda;

class Rank {
 public:
  Rank(const NcclId& id, int rank, int size) {
    std::string error;
    link_ = NcclLink::Open(id, rank, size, &error);
    EXPECT_NE(link_, nullptr) << error;
  }
  ~Rank() {
    link_->Abort();
    EXPECT_EQ(cuda::Synchronize(stream_), nullptr);
    for (const cuda::Event event : events_) cuda::DestroyEvent(event);
    cuda::DestroyStream(stream_);
  }
  Rank(const Rank&) = delete;
  Rank& operator=(const Rank&) = delete;

  // Returns what to ask IsOver with.
  cuda::Event Exchange(const std::vector<NcclLink::Transfer>& transfers) {
    link_->Exchange(transfers, stream_);
    EXPECT_EQ(link_->Poll(), NcclLink::State::kBusy) << "NCCL may take its time; so does the twin";
    EXPECT_EQ(link_->Poll(), NcclLink::State::kReady);
    events_.push_back(cuda::CreateEvent());
    cuda::RecordEvent(events_.back(), stream_);
    return events_.back();
  }
  static bool IsOver(cuda::Event event) { return cuda::QueryEvent(event) == cuda::EventState::kPassed; }
  NcclLink& link() { return *link_; }

 private:
  std::unique_ptr<NcclLink> link_;
  cuda::Stream stream_ = cuda::CreateStream();
  std::vector<cuda::Event> events_;
};

NcclId NewId() {
  NcclId id;
  std::string error;
  EXPECT_TRUE(NcclLink::MakeId(&id, &error)) << error;
  return id;
}

NcclLink::Transfer Send(int peer, std::vector<std::byte>& bytes) { return {true, peer, bytes.data(), bytes.size()}; }
NcclLink::Transfer Recv(int peer, std::vector<std::byte>& bytes) { return {false, peer, bytes.data(), bytes.size()}; }

TEST(NcclLinkTwin, NobodyIsReadyBeforeAllHaveJoined) {
  const NcclId id = NewId();
  Rank a(id, 0, 2);
  EXPECT_EQ(a.link().Poll(), NcclLink::State::kBusy);
  Rank b(id, 1, 2);
  EXPECT_EQ(a.link().Poll(), NcclLink::State::kReady);
  EXPECT_EQ(b.link().Poll(), NcclLink::State::kReady);
  std::string error;
  EXPECT_EQ(NcclLink::Open(id, 2, 3, &error), nullptr);
  EXPECT_FALSE(error.empty());
}

TEST(NcclLinkTwin, MessagesMeetInTheOrderOfTheirPairWhateverTheirGroups) {
  const NcclId id = NewId();
  Rank a(id, 0, 2), b(id, 1, 2);
  std::vector<std::byte> x(3, std::byte{1}), y(3, std::byte{2}), first(3), second(3);
  const cuda::Event sent = a.Exchange({Send(1, x), Send(1, y)});
  const cuda::Event one = b.Exchange({Recv(0, first)}), two = b.Exchange({Recv(0, second)});
  EXPECT_FALSE(Rank::IsOver(sent)) << "nobody receives yet";
  EXPECT_TRUE(Rank::IsOver(one));
  EXPECT_FALSE(Rank::IsOver(sent)) << "a group ends as a whole";
  EXPECT_TRUE(Rank::IsOver(two));
  EXPECT_TRUE(Rank::IsOver(sent));
  EXPECT_EQ(first, x);
  EXPECT_EQ(second, y);
}

TEST(NcclLinkTwin, WhatIsNotInOneGroupCanWaitForEver) {
  const NcclId id = NewId();
  Rank a(id, 0, 2), b(id, 1, 2);
  std::vector<std::byte> x(3), y(3), to_a(3), to_b(3);
  // Both send first and receive behind it: each stream waits for the other's second exchange.
  const cuda::Event a_sent = a.Exchange({Send(1, x)});
  a.Exchange({Recv(1, to_a)});
  const cuda::Event b_sent = b.Exchange({Send(0, y)});
  b.Exchange({Recv(0, to_b)});
  for (int i = 0; i < 3; ++i) {
    EXPECT_FALSE(Rank::IsOver(a_sent));
    EXPECT_FALSE(Rank::IsOver(b_sent));
  }
  a.link().Abort();
  EXPECT_TRUE(Rank::IsOver(a_sent)) << "kernels of an aborted communicator end";
  EXPECT_FALSE(Rank::IsOver(b_sent)) << "the other's do not";
}

TEST(NcclLinkTwin, SizesThatDifferNeverMeet) {
  const NcclId id = NewId();
  Rank a(id, 0, 2), b(id, 1, 2);
  std::vector<std::byte> x(3), y(4);
  const cuda::Event sent = a.Exchange({Send(1, x)}), received = b.Exchange({Recv(0, y)});
  EXPECT_FALSE(Rank::IsOver(sent) || Rank::IsOver(received) || Rank::IsOver(sent));
}

}  // namespace
}  // namespace zeroc
