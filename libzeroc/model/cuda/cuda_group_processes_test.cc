// One prompt on two ranks, each a process with a model on the device: over NCCL on a GPU, where both may share the card
// (NCCL takes processes with a NCCL_HOSTID each for two machines), and on the emulation over the bootstrap itself,
// whose memory that is. Their blocks against those of one rank.
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cuda/runtime.h"
#include "libzeroc/checkpoint/checkpoint_testing.h"
#include "libzeroc/comm/nccl/nccl_communicator.h"
#include "libzeroc/comm/transport_communicator.h"
#include "libzeroc/comm/ucx/ucx_transport.h"
#include "libzeroc/model/cuda/cuda_testing.h"
#include "libzeroc/model/sp_testing.h"

extern char** environ;

namespace zeroc {
namespace {

using testing::BlockBytes;
using testing::DeviceTestShape;
using testing::MakePlan;
using testing::RandomIds;
using testing::RankOutcome;
using testing::TempDir;
using testing::TinyModel;
using testing::ZProfile;

constexpr int kRanks = 2;
constexpr int kTokens = 330;
constexpr const char* kProfile = "z0";
constexpr std::chrono::seconds kPatience(120);  // a bound against hanging: NCCL's first start may take long

std::string Env(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

Communicator::TimePoint Until() { return std::chrono::steady_clock::now() + kPatience; }

// The same in every process.
struct Setting {
  TinyModel tiny{DeviceTestShape(), 12};
  ThreadPool threads{1};
  std::unique_ptr<Transformer> device;
  std::vector<std::int32_t> ids;

  Setting() {
    const std::shared_ptr<const Checkpoint> checkpoint = Checkpoint::Open(tiny.dir()).value();
    const auto plain = Transformer::Open(checkpoint, nullptr, kernels::ReferenceOps(), threads).value();
    device = OpenCudaTransformer(checkpoint, MakePlan(*plain, {ZProfile(GeometryOf(checkpoint->config()), 0)})).value();
    ids = RandomIds(kTokens, checkpoint->config().vocab_size, 3);
  }
};

// --- files between the processes ---

void Put(const std::string& path, const std::string& bytes) {
  std::ofstream(path + ".new", std::ios::binary) << bytes;
  std::filesystem::rename(path + ".new", path);
}

std::string Get(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string Await(const std::string& path) {
  const auto until = Until();
  while (!std::filesystem::exists(path) && std::chrono::steady_clock::now() < until) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return Get(path);
}

// Layer, name, size and bytes of each block, one after the other.
std::string Encode(const std::vector<BlockBytes>& layers) {
  std::string out;
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    for (const auto& [name, bytes] : layers[layer]) {
      out += std::to_string(layer) + "\n" + name + "\n" + std::to_string(bytes.size()) + "\n";
      out.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    }
  }
  return out;
}

std::vector<BlockBytes> Decode(const std::string& text) {
  std::vector<BlockBytes> layers;
  for (std::size_t at = 0; at < text.size();) {
    std::array<std::string, 3> lines;
    for (std::string& line : lines) {
      const std::size_t end = text.find('\n', at);
      line = text.substr(at, end - at);
      at = end + 1;
    }
    const std::size_t layer = std::stoul(lines[0]), n = std::stoul(lines[2]);
    layers.resize(std::max(layers.size(), layer + 1));
    layers[layer][lines[1]].assign(text.begin() + static_cast<std::ptrdiff_t>(at),
                                   text.begin() + static_cast<std::ptrdiff_t>(at + n));
    at += n;
  }
  return layers;
}

// --- a rank ---

std::unique_ptr<Communicator> Join(CommPort& port, const std::string& dir, int rank) {
  Put(dir + "/address" + std::to_string(rank), port.address().bytes);
  std::vector<CommMember> members;
  for (int r = 0; r < kRanks; ++r) {
    const std::string name = std::to_string(r);
    members.push_back({{Await(dir + "/address" + name)}, "process" + name});
  }
  auto bootstrap = port.Join(/*epoch=*/7, rank, members).value();
  Put(dir + "/joined" + std::to_string(rank), "yes");
  for (int r = 0; r < kRanks; ++r) EXPECT_EQ(Await(dir + "/joined" + std::to_string(r)), "yes");
  if (kernels::cuda::HostReachesDevice()) return bootstrap;
  auto made = MakeNcclCommunicator(std::move(bootstrap), Until());
  EXPECT_TRUE(made.ok()) << made.status().ToString();
  return made.ok() ? std::move(made).value() : nullptr;
}

TEST(GroupProcess, Rank) {
  const std::string rank_name = Env("ZEROC_TEST_RANK"), dir = Env("ZEROC_TEST_DIR");
  if (rank_name.empty()) GTEST_SKIP() << "what GroupProcesses starts";
  Setting setting;
  const auto port = CommPort::Open(
                        [](TransportListener& listener) {
                          UcxTransportOptions options;
                          options.tls = "tcp";
                          options.net_devices = "lo";
                          return CreateUcxTransport(options, listener);
                        },
                        {})
                        .value();
  const auto comm = Join(*port, dir, std::stoi(rank_name));
  ASSERT_NE(comm, nullptr);
  const RankOutcome outcome =
      testing::RunRank(*setting.device, *comm, {SpScheme::kRing, 1, kPatience, true}, kProfile, setting.ids);
  ASSERT_TRUE(outcome.status.ok()) << outcome.status.ToString();
  EXPECT_EQ(static_cast<double>(comm->bytes_sent()), outcome.sent.total());
  Put(dir + "/blocks" + rank_name, Encode(outcome.layers));
  ASSERT_TRUE(comm->Barrier(Until()).ok()) << "the other one still receives";
}

// --- who starts them ---

pid_t Start(int rank, const std::string& dir) {
  std::vector<std::string> environment = {"ZEROC_TEST_RANK=" + std::to_string(rank), "ZEROC_TEST_DIR=" + dir,
                                          "NCCL_HOSTID=zeroc-test-" + std::to_string(rank), "NCCL_IB_DISABLE=1",
                                          "NCCL_SOCKET_IFNAME=lo"};
  for (char** entry = environ; *entry != nullptr; ++entry) {
    if (!std::string(*entry).starts_with("GTEST_")) environment.emplace_back(*entry);  // reports, shards
  }
  std::vector<char*> pointers;
  for (std::string& entry : environment) pointers.push_back(entry.data());
  pointers.push_back(nullptr);
  std::string self = std::filesystem::read_symlink("/proc/self/exe"), filter = "--gtest_filter=GroupProcess.Rank";
  char* const argv[] = {self.data(), filter.data(), nullptr};
  pid_t pid = 0;
  EXPECT_EQ(::posix_spawn(&pid, self.c_str(), nullptr, nullptr, argv, pointers.data()), 0);
  return pid;
}

// The exit status of a child, which is killed when it takes too long.
int Finish(pid_t pid) {
  const auto until = Until();
  for (int status = 0;; std::this_thread::sleep_for(std::chrono::milliseconds(5))) {
    if (::waitpid(pid, &status, WNOHANG) == pid) return status;
    if (std::chrono::steady_clock::now() > until) ::kill(pid, SIGKILL);
  }
}

TEST(GroupProcesses, BlocksAreThoseOfOneRank) {
  if (const char* why = kernels::cuda::WhyUnavailable()) GTEST_SKIP() << "no GPU: " << why;
  const TempDir dir;
  std::vector<pid_t> ranks;
  for (int rank = 0; rank < kRanks; ++rank) ranks.push_back(Start(rank, dir.path()));
  for (const pid_t rank : ranks) EXPECT_EQ(Finish(rank), 0);
  if (HasFailure()) return;
  std::vector<RankOutcome> outcomes(kRanks);
  for (std::size_t rank = 0; rank < kRanks; ++rank) {
    outcomes[rank].layers = Decode(Get(dir.path() + "/blocks" + std::to_string(rank)));
  }
  const std::vector<BlockBytes> many = testing::JoinBlocks(outcomes);

  Setting setting;
  const auto format = setting.device->Format(kProfile).value();
  const auto pool = OwnedPool::Create(*format, 1, kTokens, kTokens, setting.device->kv_memory()).value();
  const auto kv = SequenceKv::Create(pool->pool(), format, kTokens, kTokens).value();
  const ForwardSequence sequence{kv.get(), setting.ids, 0};
  ASSERT_TRUE(setting.device->Forward({&sequence, 1}, nullptr).ok());
  const std::vector<BlockBytes> one = testing::ReadBlocks(*kv, [](int) { return true; });
  ASSERT_EQ(many.size(), one.size());
  // A GPU's matrix products may sum in another order for another number of rows, and turn a code here and there.
  const double most = kernels::cuda::HostReachesDevice() ? 0 : 0.01;
  for (std::size_t layer = 0; layer < one.size(); ++layer) {
    const double share = testing::ShareOfDifferentBytes(one[layer], many[layer]);
    std::printf("[ blocks    ] layer %zu: %zu blocks, %.3g %% of the bytes differ\n", layer, one[layer].size(),
                100 * share);
    EXPECT_LE(share, most) << "layer " << layer;
  }
}

}  // namespace
}  // namespace zeroc
