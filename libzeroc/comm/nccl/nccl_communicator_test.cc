// The contract of communicators over NCCL's twin, with either bootstrap, and what only a device has: streams.
#include "libzeroc/comm/nccl/nccl_communicator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "kernels/cuda/runtime.h"
#include "libzeroc/comm/communicator_contract.h"
#include "libzeroc/comm/in_process_communicator.h"
#include "libzeroc/comm/loopback_transport.h"
#include "libzeroc/comm/transport_testing.h"

namespace zeroc {
namespace {

namespace cuda = kernels::cuda;

Communicator::TimePoint In(int milliseconds) {
  return std::chrono::steady_clock::now() + std::chrono::milliseconds(milliseconds);
}

// Over the groups of another harness. Ordinary memory is the emulated device's, too.
class NcclHarness final : public CommunicatorHarness {
 public:
  using MakeBootstraps = std::function<std::vector<std::unique_ptr<Communicator>>(int size)>;
  explicit NcclHarness(MakeBootstraps make) : make_(std::move(make)) {}

  std::vector<std::unique_ptr<Communicator>> MakeGroup(int size) override {
    auto group = make_(size);
    std::vector<std::thread> ranks;
    for (auto& communicator : group) {
      ranks.emplace_back([&communicator] {
        auto made = MakeNcclCommunicator(std::move(communicator), In(30'000));
        EXPECT_TRUE(made.ok()) << made.status().ToString();
        communicator = std::move(made).value();
      });
    }
    for (std::thread& rank : ranks) rank.join();
    return group;
  }

 private:
  const MakeBootstraps make_;
};

std::unique_ptr<CommunicatorHarness> OverThreads() {
  return std::make_unique<NcclHarness>([](int size) { return MakeInProcessCommunicators(size); });
}

std::unique_ptr<CommunicatorHarness> OverLoopback() {
  const auto hub = std::make_shared<LoopbackHub>();
  const auto ports = std::make_shared<PortHarness>([hub](TransportListener& listener) {
    auto transport = LoopbackTransport::Create({}, listener, hub, Delivery::kActiveMessage);
    return transport.ok() ? Result<std::unique_ptr<Transport>>(std::move(transport).value())
                          : Result<std::unique_ptr<Transport>>(transport.status());
  });
  return std::make_unique<NcclHarness>([ports](int size) { return ports->MakeGroup(size); });
}

INSTANTIATE_TEST_SUITE_P(Nccl, CommunicatorContract,
                         ::testing::Values(CommunicatorKind{"Threads", OverThreads},
                                           CommunicatorKind{"Loopback", OverLoopback}),
                         [](const auto& test) { return test.param.name; });

// Runs `rank_main` for both of two ranks.
void RunTwo(const std::function<void(Communicator&)>& rank_main) {
  const auto group = OverThreads()->MakeGroup(2);
  std::thread other([&] { rank_main(*group[1]); });
  rank_main(*group[0]);
  other.join();
}

struct Stream {
  cuda::Stream stream = cuda::CreateStream();
  Stream() = default;
  ~Stream() { cuda::DestroyStream(stream); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
};

TEST(NcclCommunicator, SaysWhereItsMessagesLie) {
  const auto host = MakeInProcessCommunicators(1);
  EXPECT_EQ(host[0]->memory(), CommMemory::kHost);
  RunTwo([](Communicator& comm) { EXPECT_EQ(comm.memory(), CommMemory::kDevice); });
}

// Nothing of the stream's work has been waited for when the messages are posted: pieces and whole, collectives and not.
TEST(NcclCommunicator, MessagesAreBehindTheWorkOfTheStreamThatItFollows) {
  RunTwo([](Communicator& comm) {
    const Stream work;
    comm.Follow(work.stream);
    const int peer = 1 - comm.rank();
    for (std::uint64_t round = 0; round < 3; ++round) {
      const auto made = PatternBytes(round * 2 + static_cast<std::uint64_t>(comm.rank()), 5'000);
      const auto wanted = PatternBytes(round * 2 + static_cast<std::uint64_t>(peer), 5'000);
      std::vector<std::byte> ours(5'000), got(5'000), all(5'000);
      cuda::CopyOnDevice(ours.data(), made.data(), made.size(), work.stream);
      EXPECT_NE(ours, made) << "the emulation is not lazy: the test shows nothing";
      const std::span<std::byte> bytes(ours), to(got);
      std::vector<CommOp> ops;
      if (round % 2 == 0) {
        ops = {comm.Recv(peer, 2 * round, {to.first(1'000), to.subspan(1'000)}), comm.Send(peer, 2 * round, {bytes})};
      } else {
        std::vector<Communicator::Places> places(2);
        places[static_cast<std::size_t>(peer)] = {to};
        ops = comm.AllGather(2 * round, {bytes.first(1), bytes.subspan(1)}, places);
      }
      ASSERT_TRUE(comm.WaitAll(ops, In(30'000)).ok());
      EXPECT_EQ(got, wanted);
      // What is received goes on to the stream's next work.
      cuda::CopyOnDevice(all.data(), got.data(), got.size(), work.stream);
      EXPECT_EQ(cuda::Synchronize(work.stream), nullptr);
      EXPECT_EQ(all, wanted);
    }
    ASSERT_TRUE(comm.Barrier(In(30'000)).ok());
    comm.Follow(nullptr);
  });
}

// NCCL would put the first message's bytes where the second one's belong.
TEST(NcclCommunicator, GroupsThatDifferEndTheGroup) {
  RunTwo([](Communicator& comm) {
    std::vector<std::byte> first(100), second(100);
    if (comm.rank() == 0) {
      const CommOp later = comm.Send(1, 2, {second});
      (void)comm.Wait(later, In(30'000));
      (void)comm.Wait(comm.Send(1, 1, {first}), In(30'000));
    } else {
      const CommOp ops[] = {comm.Recv(0, 1, {first}), comm.Recv(0, 2, {second})};
      const Status status = comm.WaitAll(ops, In(30'000));
      EXPECT_EQ(status.code(), StatusCode::kInternal) << status.ToString();
    }
    const auto until = In(30'000);  // the sender is done before the receiver finds out
    while (comm.Check().ok() && std::chrono::steady_clock::now() < until) std::this_thread::yield();
    EXPECT_EQ(comm.Check().code(), StatusCode::kInternal);
  });
}

TEST(NcclCommunicator, ARankThatDoesNotJoinEndsTheOthersInTime) {
  auto bootstraps = MakeInProcessCommunicators(3);
  std::vector<std::thread> ranks;
  for (std::size_t rank = 0; rank < 2; ++rank) {
    ranks.emplace_back([&bootstraps, rank] {
      const auto begin = std::chrono::steady_clock::now();
      const auto made = MakeNcclCommunicator(std::move(bootstraps[rank]), begin + std::chrono::milliseconds(100));
      EXPECT_EQ(made.status().code(), StatusCode::kDeadlineExceeded) << made.status().ToString();
      EXPECT_GE(std::chrono::steady_clock::now() - begin, std::chrono::milliseconds(90));
    });
  }
  for (std::thread& rank : ranks) rank.join();
  EXPECT_EQ(bootstraps[2]->Check().code(), StatusCode::kDeadlineExceeded);
}

}  // namespace
}  // namespace zeroc
