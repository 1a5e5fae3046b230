// A peer in another process dies (SIGKILL) or stops (SIGSTOP) in the middle of a stream of writes. The helper is exec'd
// by posix_spawn: a fork of a process that uses UCX would share its sockets and threads.
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <iostream>
#include <sstream>
#include <thread>

#include "libzeroc/comm/transport_testing.h"
#include "libzeroc/comm/ucx/ucx_transport.h"

extern char** environ;

namespace zeroc {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double CpuSeconds() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

std::string FromHex(const std::string& hex) {
  std::string bytes;
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2) {
    bytes.push_back(static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
  }
  return bytes;
}

// The helper process; killed when the object goes.
class Victim {
 public:
  Victim(const std::string& tls, const std::string& devices, std::uint64_t arena_bytes) {
    int in[2], out[2];
    if (::pipe2(in, O_CLOEXEC) != 0 || ::pipe2(out, O_CLOEXEC) != 0) return;
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in[0], 0);
    posix_spawn_file_actions_adddup2(&actions, out[1], 1);
    const std::string bytes = std::to_string(arena_bytes);
    std::string path = ZEROC_UCX_PEER;
    std::vector<char*> argv = {path.data(), const_cast<char*>(tls.c_str()), const_cast<char*>(devices.c_str()),
                               const_cast<char*>(bytes.c_str()), nullptr};
    if (::posix_spawn(&pid_, path.c_str(), &actions, nullptr, argv.data(), environ) != 0) pid_ = 0;
    posix_spawn_file_actions_destroy(&actions);
    ::close(in[0]);
    ::close(out[1]);
    stdin_ = in[1];
    std::string line;
    char c = 0;
    while (::read(out[0], &c, 1) == 1) {
      if (c != '\n') {
        line.push_back(c);
      } else if (line.starts_with("PEER ")) {
        break;
      } else {
        line.clear();
      }
    }
    ::close(out[0]);
    std::istringstream words(line);
    std::string tag, address_hex, key_hex;
    words >> tag >> address_hex >> key_hex >> arena.base >> arena.bytes;
    address.bytes = FromHex(address_hex);
    arena.key = FromHex(key_hex);
  }
  ~Victim() {
    if (pid_ > 0) {
      Signal(SIGKILL);
      ::waitpid(pid_, nullptr, 0);
    }
    if (stdin_ >= 0) ::close(stdin_);
  }
  void Signal(int number) const { ::kill(pid_, number); }
  bool started() const { return pid_ > 0 && arena.bytes > 0; }

  PeerAddress address;
  RemoteArena arena;

 private:
  pid_t pid_ = 0;
  int stdin_ = -1;
};

struct Lanes {
  std::string name, tls, devices;
};

class UcxFailure : public ::testing::TestWithParam<Lanes> {
 protected:
  static constexpr std::uint64_t kArenaBytes = 16 << 20;

  void SetUp() override {
    UcxTransportOptions options;
    options.name = "survivor";
    options.tls = GetParam().tls;
    options.net_devices = GetParam().devices;
    options.close_timeout_ms = 2'000;
    auto transport = CreateUcxTransport(options, hears_);
    ASSERT_TRUE(transport.ok()) << transport.status().ToString();
    transport_ = std::move(transport).value();
  }

  std::unique_ptr<Victim> Spawn() { return std::make_unique<Victim>(GetParam().tls, GetParam().devices, kArenaBytes); }

  PeerId Join(const Victim& victim) {
    const auto peer = transport_->Connect(victim.address, victim.arena, "victim");
    EXPECT_TRUE(peer.ok());
    EXPECT_TRUE(WaitOnThreads([&] { return hears_.up().contains(*peer); }, 20));
    std::cout << "[ lanes    ] " << hears_.up()[*peer].description << '\n';
    return *peer;
  }

  // Writes without end until `stop`: each completion posts the next.
  void Stream(PeerId peer) {
    transport_->Write(peer, {1, 1}, source_, 0, [this, peer](const Status& status) {
      ++completed_;
      if (!status.ok()) {
        ++failed_;
        return;
      }
      Stream(peer);
    });
  }

  const std::vector<std::byte> source_ = PatternBytes(1, 9 << 20);
  RecordingListener hears_;
  std::atomic<int> completed_{0}, failed_{0};
  std::unique_ptr<Transport> transport_;  // before what its callbacks use
};

TEST_P(UcxFailure, AKilledPeerFailsEverythingInBoundedTimeAndASuccessorIsReached) {
  for (int round = 0; round < 4; ++round) {
    auto victim = Spawn();
    ASSERT_TRUE(victim->started());
    const PeerId peer = Join(*victim);
    completed_ = failed_ = 0;
    for (int i = 0; i < 8; ++i) Stream(peer);
    ASSERT_TRUE(WaitOnThreads([&] { return completed_ > 20; }, 20));
    victim->Signal(SIGKILL);
    const auto killed = Clock::now();
    ASSERT_TRUE(WaitOnThreads([&] { return failed_ == 8 && hears_.failures().contains(peer); }, 10)) << failed_;
    std::cout << "[ detected ] " << SecondsSince(killed) * 1e3 << " ms: " << hears_.failures()[peer].ToString() << '\n';
    EXPECT_LT(SecondsSince(killed), 5.0);
    EXPECT_EQ(hears_.failures()[peer].code(), StatusCode::kUnavailable);
    EXPECT_NE(hears_.failures()[peer].message().find("victim"), std::string_view::npos);
  }
  EXPECT_EQ(hears_.failure_calls(), 4u);
}

TEST_P(UcxFailure, AnIdlePeerThatIsKilledIsNoticed) {
  auto victim = Spawn();
  ASSERT_TRUE(victim->started());
  const PeerId peer = Join(*victim);
  victim->Signal(SIGKILL);
  const auto killed = Clock::now();
  ASSERT_TRUE(WaitOnThreads([&] { return hears_.failures().contains(peer); }, 20));
  std::cout << "[ detected ] " << SecondsSince(killed) * 1e3 << " ms: " << hears_.failures()[peer].ToString() << '\n';
  EXPECT_EQ(hears_.failures()[peer].code(), StatusCode::kUnavailable);
}

TEST_P(UcxFailure, CloseOfAStoppedPeerIsBoundedAndTheBytesAreFree) {
  auto victim = Spawn();
  ASSERT_TRUE(victim->started());
  const PeerId peer = Join(*victim);
  const bool put = hears_.up()[peer].delivery == Delivery::kPut;
  for (int i = 0; i < 8; ++i) Stream(peer);
  ASSERT_TRUE(WaitOnThreads([&] { return completed_ > 20; }, 20));
  victim->Signal(SIGSTOP);
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  const int before = completed_;
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  if (!put) {
    EXPECT_EQ(completed_, before) << "nothing completes while the peer is stopped";
  }
  EXPECT_TRUE(hears_.failures().empty()) << "and nothing fails";
  const auto closing = Clock::now();
  Outcomes closed;
  transport_->Close(peer, closed.Next());
  ASSERT_TRUE(WaitOnThreads([&] { return closed.all() && failed_ == 8; }, 10));
  std::cout << "[ closed   ] " << SecondsSince(closing) * 1e3 << " ms\n";
  EXPECT_LT(SecondsSince(closing), 3.0);

  // The abandoned link burns nothing, survives the peer's return, and its death.
  const double cpu = CpuSeconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(1000));
  EXPECT_LT(CpuSeconds() - cpu, 0.3);
  victim->Signal(SIGCONT);
  const PeerId again = Join(*victim);
  Outcomes outcomes;
  transport_->Write(again, {1, 1}, source_, 0, outcomes.Next());
  transport_->Flush(again, outcomes.Next());
  ASSERT_TRUE(WaitOnThreads([&] { return outcomes.all(); }, 20));
  EXPECT_TRUE(outcomes.AllOk());
  victim->Signal(SIGKILL);
  ASSERT_TRUE(WaitOnThreads([&] { return hears_.failures().contains(again); }, 10));
}

TEST_P(UcxFailure, AnAddressWithNobodyBehindItFailsInBoundedTime) {
  auto victim = Spawn();
  ASSERT_TRUE(victim->started());
  const PeerAddress address = victim->address;
  const RemoteArena arena = victim->arena;
  victim.reset();
  const auto start = Clock::now();
  const auto peer = transport_->Connect(address, arena, "victim");
  ASSERT_TRUE(peer.ok());
  ASSERT_TRUE(WaitOnThreads([&] { return hears_.failures().contains(*peer); }, 15));
  std::cout << "[ detected ] " << SecondsSince(start) * 1e3 << " ms: " << hears_.failures()[*peer].ToString() << '\n';
}

TEST_P(UcxFailure, AnIdleConnectionBurnsNoProcessor) {
  auto victim = Spawn();
  ASSERT_TRUE(victim->started());
  Join(*victim);
  const double cpu = CpuSeconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  std::cout << "[ idle cpu ] " << (CpuSeconds() - cpu) / 1.5 * 100 << " %\n";
  EXPECT_LT(CpuSeconds() - cpu, 0.15);
}

INSTANTIATE_TEST_SUITE_P(Ucx, UcxFailure,
                         ::testing::Values(Lanes{"Tcp", "tcp", "lo"}, Lanes{"Shm", "posix,cma,self", "auto"},
                                           Lanes{"Auto", "auto", "lo"}),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace zeroc
