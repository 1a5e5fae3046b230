// A prefill worker without threads: what services/prefill/prefill_core does, on the virtual clock. It computes one job
// at a time, in the order of arrival, layer by layer.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "libzeroc/comm/fake_transport.h"
#include "libzeroc/kv/block_pool.h"
#include "libzeroc/kv/sequence_kv.h"
#include "tests/simulation/rpc.h"
#include "tests/simulation/seams.h"

namespace zeroc::simulation {

class World;

struct PrefillArgs {
  std::uint64_t request = 0;
  std::uint32_t attempt = 0;
  std::uint16_t rank = 0, n_ranks = 1;
  std::uint64_t content = 0;
  int n_prompt = 1;
  int format = 0;
  bool first_token_is_last = false;
  int first_token_position = -1;  // negative: behind the prompt
  GrantedLease lease;
};

class PrefillNode final : public TransportListener {
 public:
  PrefillNode(World& world, std::string name, std::span<std::byte> memory);

  void Run(const PrefillArgs& args, const CallPtr& call);

  std::string WhatIsLeft() const;
  std::uint64_t waiting_tokens() const;

  void OnPeerUp(PeerId peer, const PeerInfo& info) override;
  bool AcceptWrite(PeerId, const WriteTag&, std::uint64_t, std::uint64_t) override { return false; }
  void OnWriteDone(PeerId, const WriteTag&, std::uint64_t, std::uint64_t, const Status&) override {}
  Status OnMessage(PeerId peer, std::uint16_t type, std::span<const std::byte> payload) override;
  void OnProtocolError(PeerId, const Status& status) override;
  void OnPeerFailure(PeerId peer, const Status& status) override;

 private:
  using Key = std::pair<std::uint64_t, std::uint32_t>;
  // Which blocks of a layer this rank computes, as indices into the layer's lists.
  struct Part {
    BlockRange packed, exact;
    bool sink = false;
  };
  struct Job {
    PrefillArgs args;
    CallPtr call;
    std::unique_ptr<SenderSeam> sender;
    PeerId peer = PeerId::kNone;
    std::shared_ptr<std::int64_t> link_progress_ns;
    std::shared_ptr<BlockPool> pool;  // events of a dead process may hold on to its blocks
    std::unique_ptr<SequenceKv> kv;
    BlockTable local;
    std::vector<BlockExtent> extents;
    int chunk = 0, layer = 0;
    bool computed = false;
    bool first_token_final = false;
    int n_writes_open = 0, n_local_done = 0, n_ended = 0;
  };
  using JobPtr = std::shared_ptr<Job>;
  struct Connection {
    PeerId peer = PeerId::kNone;
    bool up = false;
    PeerInfo info;
    std::shared_ptr<std::int64_t> progress_ns = std::make_shared<std::int64_t>(0);
  };
  static constexpr int kChunks = 2;

  std::int64_t Now() const;
  void Post(double delay, std::function<void()> work);
  void Tick();
  static Part PartOf(const BlockTable::Layer& layer, int rank, int n_ranks, int chunk);
  static std::uint32_t ShareOf(const BlockTable& table, int rank, int n_ranks);

  void WakeEngine();
  void EngineStep();
  bool Compute(const JobPtr& job);  // one layer of one chunk; true: the job is computed
  void Fill(const JobPtr& job, std::size_t block_idx);
  void OnFirstToken(const JobPtr& job);
  void Do(const JobPtr& job, SenderActions actions);
  void OnLocalDone(const JobPtr& job);
  void OnEnded(const JobPtr& job, const Status& status);
  std::vector<JobPtr> JobsOf(PeerId peer) const;  // kNone: all

  World& world_;
  const std::string name_;
  std::span<std::byte> memory_;
  std::shared_ptr<BlockPool> pool_;
  std::map<Key, JobPtr> jobs_;
  std::deque<JobPtr> queue_;
  bool engine_awake_ = false;
  std::map<std::string, Connection> connections_;  // by address and arena
  std::shared_ptr<int> life_ = std::make_shared<int>(0);
  std::unique_ptr<FakeTransport> transport_;
};

}  // namespace zeroc::simulation
