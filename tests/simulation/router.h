// The router and its clients: reserve, then prefill and decode at once, then stream. A lost prefill is tried again with
// a new lease, a lost decode by prefilling the prompt and the tokens that the client has. Follows services/router/
// request_flow, on the virtual clock.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "tests/simulation/rpc.h"
#include "tests/simulation/world.h"

namespace zeroc::simulation {

class Router {
 public:
  explicit Router(World& world) : world_(world) { Tick(); }

  void Begin(const RequestSpec& spec);
  void Cancel(std::uint64_t request);  // by the client; unknown and ended ones are fine
  // All clients and calls are lost, grants under way too.
  void Restart();

  bool ended(std::uint64_t request) const { return !running_.contains(request); }
  std::size_t n_running() const { return running_.size(); }
  std::vector<std::uint64_t> Running() const;
  Status outcome(std::uint64_t request) const { return outcomes_.at(request); }  // of one that ended

 private:
  struct Attempt {
    std::uint32_t number = 0;
    int n_prompt = 0;    // tokens that the client has streamed included
    int n_streamed = 0;  // of them
    std::string decode;
    std::vector<std::string> prefills;  // [n_ranks]
    bool leased = false;                // and not ended by decode itself
    GrantedLease lease;
    CallPtr decode_call;
    std::vector<CallPtr> prefill_calls;  // [n_ranks]
    int n_prefills_done = 0;
    bool first_token_seen = false, admitted = false, final_seen = false, over = false;
    std::vector<std::int32_t> early_tokens;  // from decode, before prefill's first token came
  };
  using AttemptPtr = std::shared_ptr<Attempt>;
  struct Request {
    RequestSpec spec;
    std::uint64_t content = 0;
    std::vector<std::int32_t> tokens;  // what the client has
    std::uint32_t n_attempts = 0;
    int n_waits = 0;  // for room or for workers
    AttemptPtr attempt;
  };

  Request* Find(std::uint64_t id);
  void Later(double seconds, std::function<void()> work);
  void TryAttempt(std::uint64_t id);
  void WaitForRoom(std::uint64_t id, const Status& why);
  std::vector<std::string> Pick(bool decode, std::size_t n, const std::string& wanted);
  void Reserve(std::uint64_t id, const AttemptPtr& attempt);
  void Start(std::uint64_t id, const AttemptPtr& attempt);
  void OnPrefillEvent(std::uint64_t id, const AttemptPtr& attempt, const RpcEvent& event);
  void OnPrefillDone(std::uint64_t id, const AttemptPtr& attempt, const Status& status);
  void OnDecodeEvent(std::uint64_t id, const AttemptPtr& attempt, const RpcEvent& event);
  bool PrefillDidItsPart(const Attempt& attempt) const;
  void Emit(std::uint64_t id, std::int32_t token);
  void AttemptFailed(std::uint64_t id, const AttemptPtr& attempt, const Status& why);
  void Drop(const AttemptPtr& attempt);
  void ReleaseLease(const GrantedLease& lease);
  void End(std::uint64_t id, const Status& status);
  void Tick();

  World& world_;
  std::map<std::uint64_t, Request> running_;
  std::map<std::uint64_t, Status> outcomes_;
};

}  // namespace zeroc::simulation
