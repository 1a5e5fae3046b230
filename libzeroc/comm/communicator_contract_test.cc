// The contract of communicators between threads and over the loopback transport.
#include "libzeroc/comm/communicator_contract.h"

#include "libzeroc/comm/in_process_communicator.h"
#include "libzeroc/comm/loopback_transport.h"

namespace zeroc {
namespace {

class InProcessHarness final : public CommunicatorHarness {
 public:
  std::vector<std::unique_ptr<Communicator>> MakeGroup(int size) override { return MakeInProcessCommunicators(size); }
};

std::unique_ptr<CommunicatorHarness> LoopbackHarness() {
  const auto hub = std::make_shared<LoopbackHub>();
  return std::make_unique<PortHarness>([hub](TransportListener& listener) -> Result<std::unique_ptr<Transport>> {
    ZEROC_ASSIGN_OR_RETURN(auto transport, LoopbackTransport::Create({}, listener, hub, Delivery::kActiveMessage));
    return std::unique_ptr<Transport>(std::move(transport));
  });
}

INSTANTIATE_TEST_SUITE_P(InProcess, CommunicatorContract,
                         ::testing::Values(CommunicatorKind{"Threads",
                                                            [] { return std::make_unique<InProcessHarness>(); }},
                                           CommunicatorKind{"Loopback", LoopbackHarness}),
                         [](const auto& test) { return test.param.name; });

// --- what only ranks in different processes can meet ---

struct TwoPorts {
  std::shared_ptr<LoopbackHub> hub = std::make_shared<LoopbackHub>();
  std::unique_ptr<CommPort> ports[2];
  std::vector<CommMember> members;

  explicit TwoPorts(std::uint64_t unexpected_bytes_max = 1 << 20) {
    for (auto& port : ports) {
      const auto make = [this](TransportListener& listener) -> Result<std::unique_ptr<Transport>> {
        ZEROC_ASSIGN_OR_RETURN(auto transport, LoopbackTransport::Create({}, listener, hub, Delivery::kActiveMessage));
        return std::unique_ptr<Transport>(std::move(transport));
      };
      port = CommPort::Open(make, {unexpected_bytes_max}).value();
      members.push_back({port->address(), "port" + std::to_string(members.size())});
    }
  }
  std::unique_ptr<Communicator> Join(std::uint64_t epoch, int rank) {
    return ports[rank]->Join(epoch, rank, members).value();
  }
};

Communicator::TimePoint In(int seconds) { return std::chrono::steady_clock::now() + std::chrono::seconds(seconds); }

TEST(CommPort, ADeadProcessEndsTheGroupAndTheNextGroupWorks) {
  TwoPorts two;
  for (std::uint64_t epoch = 1; epoch <= 3; ++epoch) {
    const auto a = two.Join(epoch, 0), b = two.Join(epoch, 1);
    std::vector<std::byte> bytes(10);
    (void)b->Wait(b->Send(0, 1, {bytes}), In(30));
    ASSERT_TRUE(a->Wait(a->Recv(1, 1, {bytes}), In(30)).ok());
    two.hub->Cut(two.members[1].address);  // as if the process had died; the next one has its address
    const Status status = a->Wait(a->Recv(1, 2, {bytes}), In(30));
    EXPECT_EQ(status.code(), StatusCode::kUnavailable) << status.ToString();
    EXPECT_NE(status.message().find("rank 1 (port1)"), std::string_view::npos) << status.ToString();
    // The other side hears of it as well, before anything new begins.
    EXPECT_FALSE(b->Wait(b->Recv(0, 2, {bytes}), In(30)).ok());
  }
}

TEST(CommPort, WhatAnOlderGroupSentIsDropped) {
  TwoPorts two;
  const auto old_b = two.Join(1, 1);
  const auto a = two.Join(2, 0);
  std::vector<std::byte> stale(8, std::byte{1}), fresh(8, std::byte{2}), got(8);
  (void)old_b->Wait(old_b->Send(0, 1, {stale}), In(30));
  const auto b = two.Join(2, 1);
  EXPECT_EQ(old_b->Barrier(In(30)).code(), StatusCode::kCancelled);
  (void)b->Wait(b->Send(0, 1, {fresh}), In(30));
  ASSERT_TRUE(a->Wait(a->Recv(1, 1, {got}), In(30)).ok());
  EXPECT_EQ(got, fresh);
  EXPECT_EQ(two.ports[1]->Join(2, 1, two.members).status().code(), StatusCode::kInvalidArgument);
}

TEST(CommPort, WhatNobodyWaitsForIsBounded) {
  TwoPorts two(/*unexpected_bytes_max=*/10'000);
  const auto a = two.Join(1, 0), b = two.Join(1, 1);
  std::vector<std::byte> bytes(9'000);
  for (std::uint64_t tag = 0; tag < 2; ++tag) (void)b->Wait(b->Send(0, tag, {bytes}), In(30));
  EXPECT_EQ(b->Wait(b->Recv(0, 1, {bytes}), In(30)).code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(a->Barrier(In(30)).code(), StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace zeroc
