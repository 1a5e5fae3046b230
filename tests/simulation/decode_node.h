// A decode worker without threads: what services/decode/decode_core does, on the virtual clock.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "libzeroc/comm/fake_transport.h"
#include "libzeroc/kv/block_pool.h"
#include "libzeroc/kv/sequence_kv.h"
#include "tests/simulation/model.h"
#include "tests/simulation/rpc.h"
#include "tests/simulation/seams.h"

namespace zeroc::simulation {

class World;

// A prompt that decode computes itself.
struct LocalPrompt {
  std::uint64_t content = 0;
  int n_prompt = 1;
};

class DecodeNode final : public TransportListener {
 public:
  DecodeNode(World& world, std::string name, std::span<std::byte> memory, std::uint64_t seed);

  void Reserve(std::uint64_t request, int n_prompt, int max_tokens, int format, const CallPtr& call);
  void Generate(const LeaseKey& key, std::uint64_t request, int max_tokens, const CallPtr& call);
  void GenerateLocally(const LeaseKey& key, std::uint64_t request, int max_tokens, const LocalPrompt& prompt,
                       const CallPtr& call);
  void Release(const LeaseKey& key) { EndLease(key, Cancelled("released by the router")); }

  // Empty when nothing is left.
  std::string WhatIsLeft() const;
  void CheckArena();  // every byte is free and poisoned
  std::uint64_t bytes_free() const { return arena_.size() - pool_->usage().bytes_used; }
  std::size_t n_quarantined() const { return leases_.n_in(LeaseState::kQuarantined); }

  void OnPeerUp(PeerId, const PeerInfo&) override {}
  bool AcceptWrite(PeerId peer, const WriteTag& tag, std::uint64_t offset, std::uint64_t bytes) override;
  void OnWriteDone(PeerId peer, const WriteTag& tag, std::uint64_t offset, std::uint64_t bytes,
                   const Status& status) override;
  Status OnMessage(PeerId peer, std::uint16_t type, std::span<const std::byte> payload) override;
  void OnProtocolError(PeerId, const Status& status) override;
  void OnPeerFailure(PeerId peer, const Status& status) override;

 private:
  struct Request {
    LeaseKey key;
    std::uint64_t id = 0;
    int n_prompt = 0;
    std::shared_ptr<BlockPool> pool;  // events of a dead process may hold on to its blocks
    std::unique_ptr<SequenceKv> kv;
    AttendedKv attended;
    CallPtr call;  // of Generate
    int max_tokens = 0;
    std::optional<LeaseReady> ready;
    bool started = false;
    bool told = false;  // the caller knows the end
    bool over = false;  // the blocks went back
  };
  using RequestPtr = std::shared_ptr<Request>;

  // The request of the lease, claimed by the call; null, and the call has ended, when that cannot be.
  RequestPtr Claim(const LeaseKey& key, std::uint64_t request, int max_tokens, const CallPtr& call);
  void ComputeLocally(const RequestPtr& request, const LocalPrompt& prompt);
  std::int64_t Now() const;
  double EngineDelay();
  void Post(double delay, std::function<void()> work);  // on this process's engine
  void Do(LeaseActions actions);
  void StartIfComplete(const RequestPtr& request);
  void Step(const RequestPtr& request, int n_generated);
  void EndLease(const LeaseKey& key, const Status& why);
  void EndCall(const RequestPtr& request, const Status& status);
  void OnFailed(const LeaseFailed& failed);
  void OnReturn(const LeaseKey& key);
  void CheckFree(const BlockExtent& extent, const char* when);
  void Tick();

  World& world_;
  const std::string name_;
  std::span<std::byte> arena_;
  std::shared_ptr<BlockPool> pool_;
  LeaseSeam leases_;
  std::map<std::uint64_t, RequestPtr> requests_;
  std::map<std::uint64_t, Status> failed_;  // why a lease is gone, for a late Generate
  std::shared_ptr<int> life_ = std::make_shared<int>(0);
  std::unique_ptr<FakeTransport> transport_;
};

}  // namespace zeroc::simulation
