#include "libzeroc/comm/communicator_contract.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <random>
#include <thread>

#include "libzeroc/comm/transport_testing.h"

namespace zeroc {
namespace {

using std::chrono::milliseconds;

// A bound against hanging, not a promise.
Communicator::TimePoint Patience() { return std::chrono::steady_clock::now() + std::chrono::seconds(30); }

std::uint64_t SeedOf(int from, int to, std::uint64_t tag) {
  return static_cast<std::uint64_t>(from) * 1'000'003 + static_cast<std::uint64_t>(to) * 101 + tag;
}

// Cuts bytes into `n` pieces, some of them empty.
template <typename T>
std::vector<std::span<T>> Cut(std::span<T> bytes, std::size_t n) {
  std::vector<std::span<T>> pieces;
  for (std::size_t i = 0; i < n; ++i) {
    const std::size_t begin = bytes.size() * i / n, end = bytes.size() * (i + 1) / n;
    pieces.push_back(bytes.subspan(begin, end - begin));
  }
  pieces.insert(pieces.begin() + static_cast<std::ptrdiff_t>(n / 2), std::span<T>());
  return pieces;
}

Communicator::Parts PartsOf(const std::vector<std::byte>& bytes, std::size_t n = 1) {
  return Cut(std::span<const std::byte>(bytes), n);
}

Communicator::Places PlacesOf(std::vector<std::byte>& bytes, std::size_t n = 1) { return Cut(std::span(bytes), n); }

}  // namespace

std::vector<std::unique_ptr<Communicator>> PortHarness::MakeGroup(int size) {
  std::vector<CommMember> members;
  for (std::size_t rank = 0; rank < static_cast<std::size_t>(size); ++rank) {
    if (rank == ports_.size()) {
      auto port = CommPort::Open(make_transport_, {});
      EXPECT_TRUE(port.ok()) << port.status().ToString();
      ports_.push_back(std::move(port).value());
    }
    members.push_back({ports_[rank]->address(), "member" + std::to_string(rank)});
  }
  ++epoch_;
  std::vector<std::unique_ptr<Communicator>> group;
  for (int rank = 0; rank < size; ++rank) {
    auto communicator = ports_[static_cast<std::size_t>(rank)]->Join(epoch_, rank, members);
    EXPECT_TRUE(communicator.ok()) << communicator.status().ToString();
    group.push_back(std::move(communicator).value());
  }
  return group;
}

void CommunicatorContract::Run(int size, const std::function<void(Communicator&)>& rank_main) {
  group_.clear();
  group_ = harness_->MakeGroup(size);
  std::vector<std::thread> ranks;
  for (const auto& communicator : group_) ranks.emplace_back([&] { rank_main(*communicator); });
  for (std::thread& rank : ranks) rank.join();
}

TEST_P(CommunicatorContract, MessagesOfAnySizeArriveWhereTheyBelong) {
  const std::size_t sizes[] = {0, 1, 63, 4096, 70'001, (std::size_t{7} << 19) + 5};
  Run(3, [&](Communicator& comm) {
    for (const bool receive_first : {false, true}) {
      std::vector<CommOp> ops;
      std::vector<std::vector<std::byte>> sent, got;
      sent.reserve(64), got.reserve(64);  // pieces point into them
      const auto post = [&](bool is_send, int peer) {
        for (std::size_t i = 0; i < std::size(sizes); ++i) {
          const std::uint64_t tag = i + (receive_first ? 100 : 0);
          if (is_send) {
            sent.push_back(PatternBytes(SeedOf(comm.rank(), peer, tag), sizes[i]));
            ops.push_back(comm.Send(peer, tag, PartsOf(sent.back(), 1 + i)));
          } else {
            got.emplace_back(sizes[i]);
            ops.push_back(comm.Recv(peer, tag, PlacesOf(got.back(), 4 - i % 4)));
          }
        }
      };
      for (const bool is_send : {!receive_first, receive_first}) {
        for (int peer = 0; peer < comm.size(); ++peer) {
          if (peer != comm.rank()) post(is_send, peer);
        }
      }
      std::reverse(ops.begin(), ops.end());
      ASSERT_TRUE(comm.WaitAll(ops, Patience()).ok());
      std::size_t at = 0;
      for (int peer = 0; peer < comm.size(); ++peer) {
        if (peer == comm.rank()) continue;
        for (std::size_t i = 0; i < std::size(sizes); ++i) {
          const std::uint64_t tag = i + (receive_first ? 100 : 0);
          EXPECT_EQ(got[at++], PatternBytes(SeedOf(peer, comm.rank(), tag), sizes[i])) << peer << " " << tag;
        }
      }
    }
  });
}

TEST_P(CommunicatorContract, MessagesAreToldApartByTagWhateverTheOrder) {
  constexpr int kMessages = 200;
  Run(2, [](Communicator& comm) {
    std::mt19937 rng(static_cast<unsigned>(comm.rank()) + 7);
    const int peer = 1 - comm.rank();
    const auto size_of = [](std::uint64_t tag) { return static_cast<std::size_t>(tag * 7919 % 5000); };
    std::vector<std::vector<std::byte>> sent, got(kMessages);
    std::vector<int> order(2 * kMessages);  // sends, then receives
    for (int i = 0; i < 2 * kMessages; ++i) order[static_cast<std::size_t>(i)] = i;
    std::shuffle(order.begin(), order.end(), rng);
    for (std::uint64_t tag = 0; tag < kMessages; ++tag) {
      sent.push_back(PatternBytes(SeedOf(comm.rank(), peer, tag), size_of(tag)));
    }
    std::vector<CommOp> ops;
    for (const int what : order) {
      const auto i = static_cast<std::size_t>(what % kMessages);
      got[i].resize(size_of(i));
      ops.push_back(what < kMessages ? comm.Send(peer, i, PartsOf(sent[i])) : comm.Recv(peer, i, PlacesOf(got[i])));
    }
    ASSERT_TRUE(comm.WaitAll(ops, Patience()).ok());
    for (std::uint64_t tag = 0; tag < kMessages; ++tag) {
      EXPECT_EQ(got[tag], PatternBytes(SeedOf(peer, comm.rank(), tag), size_of(tag))) << tag;
    }
  });
}

TEST_P(CommunicatorContract, CollectivesOfUnevenSizes) {
  const auto gathered = [](int rank) { return static_cast<std::size_t>(rank) * 1000; };
  const auto exchanged = [](int from, int to) { return static_cast<std::size_t>(from * 777 + to * 13); };
  for (const int size : {1, 2, 4}) {
    Run(size, [&](Communicator& comm) {
      const auto n = static_cast<std::size_t>(comm.size());
      const std::vector<std::byte> ours = PatternBytes(SeedOf(comm.rank(), 0, 1), gathered(comm.rank()));
      std::vector<std::vector<std::byte>> all(n), sent(n), got(n);
      std::vector<Communicator::Places> all_places(n), places(n);
      std::vector<Communicator::Parts> parts(n);
      for (int peer = 0; peer < comm.size(); ++peer) {
        const auto i = static_cast<std::size_t>(peer);
        all[i].resize(gathered(peer));
        all_places[i] = PlacesOf(all[i], 3);
        sent[i] = PatternBytes(SeedOf(comm.rank(), peer, 2), exchanged(comm.rank(), peer));
        parts[i] = PartsOf(sent[i], 3);
        got[i].resize(exchanged(peer, comm.rank()));
        places[i] = PlacesOf(got[i], 2);
      }
      std::vector<CommOp> ops = comm.AllGather(1, PartsOf(ours, 2), all_places);
      const std::vector<CommOp> more = comm.AllToAll(2, parts, places);
      ops.insert(ops.end(), more.begin(), more.end());
      ASSERT_TRUE(comm.WaitAll(ops, Patience()).ok());
      std::uint64_t n_sent = 0;
      for (int peer = 0; peer < comm.size(); ++peer) {
        if (peer == comm.rank()) continue;
        const auto i = static_cast<std::size_t>(peer);
        EXPECT_EQ(all[i], PatternBytes(SeedOf(peer, 0, 1), gathered(peer)));
        EXPECT_EQ(got[i], PatternBytes(SeedOf(peer, comm.rank(), 2), exchanged(peer, comm.rank())));
        n_sent += ours.size() + sent[i].size();
      }
      EXPECT_EQ(comm.bytes_sent(), n_sent);
    });
  }
}

TEST_P(CommunicatorContract, TestAndCheckWaitForNothing) {
  Run(2, [](Communicator& comm) {
    EXPECT_TRUE(comm.Check().ok());
    if (comm.rank() == 1) {
      ASSERT_TRUE(comm.Barrier(Patience()).ok());
      const auto sent = PatternBytes(4, 100);
      EXPECT_TRUE(comm.Wait(comm.Send(0, 1, {sent}), Patience()).ok());
      return;
    }
    std::vector<std::byte> bytes(100), more(1);
    const CommOp early = comm.Recv(1, 1, {bytes});
    EXPECT_FALSE(comm.Test(early));
    ASSERT_TRUE(comm.Barrier(Patience()).ok());
    while (!comm.Test(early)) std::this_thread::yield();
    EXPECT_TRUE(comm.Wait(early, Patience()).ok());
    EXPECT_EQ(bytes, PatternBytes(4, 100));
    const CommOp never = comm.Recv(1, 2, {more});
    EXPECT_FALSE(comm.Test(never));
    comm.Abort(Cancelled("enough"));
    EXPECT_TRUE(comm.Test(never));
    EXPECT_EQ(comm.Check().code(), StatusCode::kCancelled);
    EXPECT_EQ(comm.Wait(never, Patience()).code(), StatusCode::kCancelled);
  });
}

TEST_P(CommunicatorContract, NobodyLeavesABarrierBeforeAllHaveCome) {
  std::atomic<int> n_come = 0;
  Run(4, [&](Communicator& comm) {
    for (int round = 1; round <= 20; ++round) {
      if (round % 4 == comm.rank()) std::this_thread::sleep_for(milliseconds(2));
      ++n_come;
      ASSERT_TRUE(comm.Barrier(Patience()).ok());
      EXPECT_GE(n_come, round * comm.size());
    }
  });
}

TEST_P(CommunicatorContract, ABarrierThatOneMissesEndsAtItsDeadline) {
  Run(3, [](Communicator& comm) {
    if (comm.rank() == 2) return;
    const auto begin = std::chrono::steady_clock::now();
    const Status status = comm.Barrier(begin + milliseconds(100));
    EXPECT_EQ(status.code(), StatusCode::kDeadlineExceeded) << status.ToString();
    EXPECT_NE(status.message().find("rank 2"), std::string_view::npos) << status.ToString();
    EXPECT_GE(std::chrono::steady_clock::now() - begin, milliseconds(90));
  });
  // The group has ended for the one that was late, too; what had been sent to it before may still be there.
  std::vector<std::byte> bytes(1);
  EXPECT_EQ(group_[2]->Wait(group_[2]->Recv(0, 1, {bytes}), Patience()).code(), StatusCode::kDeadlineExceeded);
}

TEST_P(CommunicatorContract, AbortFreesEveryWaitingRankWithItsReason) {
  Run(4, [](Communicator& comm) {
    std::vector<std::byte> bytes(1000);
    if (comm.rank() == 1) {
      std::this_thread::sleep_for(milliseconds(30));
      comm.Abort(ResourceExhausted("no memory on the second rank"));
      comm.Abort(Internal("a second reason"));
    }
    const int from = comm.rank() == 0 ? 3 : 0;
    const Status status = comm.Wait(comm.Recv(from, 5, {bytes}), Patience());
    EXPECT_EQ(status.code(), StatusCode::kResourceExhausted) << status.ToString();
    EXPECT_EQ(status.message(), "no memory on the second rank");
    EXPECT_EQ(comm.Barrier(Patience()).code(), StatusCode::kResourceExhausted);
  });
}

TEST_P(CommunicatorContract, AbortFromAnotherThreadWhileBytesAreUnderWay) {
  for (unsigned seed = 0; seed < 10; ++seed) {
    Run(2, [&](Communicator& comm) {
      std::thread other([&] {
        std::this_thread::sleep_for(std::chrono::microseconds(seed * 200));
        if (comm.rank() == 0) comm.Abort(Cancelled("enough"));
      });
      const int peer = 1 - comm.rank();
      for (std::uint64_t tag = 0;; ++tag) {
        std::vector<std::byte> out(300'000), in(300'000);
        const CommOp ops[] = {comm.Send(peer, tag, {out}), comm.Recv(peer, tag, {in})};
        if (comm.WaitAll(ops, Patience()).ok()) continue;
        // Nothing is written any more: the sanitizers watch the vectors go.
        break;
      }
      other.join();
    });
  }
}

TEST_P(CommunicatorContract, NothingIsWrittenAfterAnAbort) {
  std::atomic<bool> aborted = false;
  Run(2, [&](Communicator& comm) {
    std::vector<std::byte> bytes(5000, std::byte{0x55});
    if (comm.rank() == 0) {
      const CommOp op = comm.Recv(1, 9, {bytes});
      comm.Abort(Cancelled("not wanted"));
      aborted = true;
      EXPECT_EQ(comm.Wait(op, Patience()).code(), StatusCode::kCancelled);
      std::this_thread::sleep_for(milliseconds(30));
      EXPECT_EQ(std::count(bytes.begin(), bytes.end(), std::byte{0x55}), 5000);
    } else {
      while (!aborted) std::this_thread::yield();
      const Status status = comm.Wait(comm.Send(0, 9, {bytes}), Patience());
      EXPECT_TRUE(status.ok() || status.code() == StatusCode::kCancelled);
    }
  });
}

TEST_P(CommunicatorContract, AMessageOfAnotherSizeEndsTheGroup) {
  for (const std::size_t wanted : {std::size_t{999}, std::size_t{1001}, std::size_t{0}}) {
    Run(2, [&](Communicator& comm) {
      std::vector<std::byte> bytes(comm.rank() == 0 ? 1000 : wanted);
      if (comm.rank() == 0) {
        (void)comm.Wait(comm.Send(1, 1, {bytes}), Patience());
        std::vector<std::byte> answer(1);
        EXPECT_EQ(comm.Wait(comm.Recv(1, 2, {answer}), Patience()).code(), StatusCode::kInternal);
      } else {
        const Status status = comm.Wait(comm.Recv(0, 1, {bytes}), Patience());
        EXPECT_EQ(status.code(), StatusCode::kInternal);
        EXPECT_NE(status.message().find("1000 bytes"), std::string_view::npos) << status.ToString();
      }
    });
  }
}

TEST_P(CommunicatorContract, ARankThatLeavesEndsTheGroup) {
  auto group = harness_->MakeGroup(3);
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < 2; ++rank) {
    ranks.emplace_back([&group, rank] {
      const Status status = group[static_cast<std::size_t>(rank)]->Barrier(Patience());
      EXPECT_EQ(status.code(), StatusCode::kCancelled) << status.ToString();
      EXPECT_NE(status.message().find("rank 2"), std::string_view::npos) << status.ToString();
    });
  }
  std::this_thread::sleep_for(milliseconds(30));
  group[2].reset();
  for (std::thread& rank : ranks) rank.join();
}

}  // namespace zeroc
