// A simulated cluster: decode workers (real LeaseTable, BlockPool, SequenceKv and transport over a small arena),
// prefill workers (real Sender), a router and its clients, on the fake network's virtual clock. One thread; the same
// options give the same run.
//
// Held at every moment, else Failed: no client gets a wrong token, a gap or a duplicate; every request ends once; a
// free block is never written; blocks come back once and all; nothing is left behind; whoever waits for a lease is told
// when it fails; without a fault that could cost an attempt (options.calm) every first attempt succeeds.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "libzeroc/comm/fake_transport.h"
#include "libzeroc/handoff/lease_table.h"
#include "libzeroc/handoff/sender.h"
#include "libzeroc/handoff/test_support.h"
#include "tests/simulation/mutation.h"
#include "tests/simulation/rpc.h"

namespace zeroc::simulation {

class DecodeNode;
class PrefillNode;
class RouterNode;

inline constexpr std::byte kPoison{0xa5};  // of free blocks

enum class Fault : std::uint8_t {
  kKill,           // for `seconds`, then a new process on the same address and memory
  kStall,          // SIGSTOP, then SIGCONT after `seconds`
  kCut,            // the link between `node` and `other`
  kClockJump,      // of the node's clock, by `seconds`
  kCancelStorm,    // of `share` of the running requests
  kBreakCalls,     // of `share` of the open calls
  kRouterRestart,  // all clients and calls are lost
};
struct FaultEvent {
  Fault fault = Fault::kKill;
  double at = 0;
  std::string node = {}, other = {};
  double seconds = 0;
  double share = 1;
};

struct WorldOptions {
  std::uint64_t seed = 1;
  Delivery delivery = Delivery::kActiveMessage;
  int n_decode = 2, n_prefill = 3;
  int ranks_max = 1;
  std::size_t decode_arena_bytes = 1 << 20, prefill_arena_bytes = 1 << 20;
  FakeFaults network;
  int pieces_in_flight_max = 64;  // with the delays it is a connection's bandwidth
  double rpc_delay_max_seconds = 0.002;
  double compute_seconds = 0.005;  // prefill: one layer of one chunk
  double step_seconds = 0.02;      // decode
  int n_requests = 100;
  double arrival_seconds = 0.05;  // mean distance
  int prompt_tokens_max = 260;
  int output_tokens_max = 8;
  double cancel_probability = 0;
  int local_prefill_tokens = 0;  // the router's
  LeaseTable::Options leases;
  Sender::Options sender;
  std::vector<FaultEvent> faults;
  bool calm = true;  // nothing happens that may cost a request that was not cancelled an attempt
  Mistake mistake = Mistake::kNone;
  bool log = false;

  // Times an order of magnitude shorter than in the field, so that expiries happen in a short run.
  WorldOptions();
};

struct Violation {
  std::string kind;
  std::string text;
  double at = 0;
};

struct WorldReport {
  int n_requests = 0, n_ok = 0, n_cancelled = 0, n_failed = 0;
  int n_attempts = 0, n_migrations = 0, n_refused = 0;  // reservations that found no room
  int n_local = 0;                                      // prompts that decode computes itself
  int n_lease_failures = 0, n_lease_expiries = 0, n_bad_checksums = 0;
  int n_quarantined = 0;  // leases seen in quarantine at a tick
  std::uint64_t n_steps_checked = 0;
  double seconds = 0;
  std::optional<Violation> violation;
  void Add(const WorldReport& other);
};

struct RequestSpec {
  std::uint64_t id = 0;
  int n_prompt = 1;
  int n_output = 1;
  int n_ranks = 1;
  int format = 0;
  double cancel_after = -1;  // seconds; negative: never
  std::string decode = {};   // empty: the router chooses
  std::string prefill = {};  // rank 0
  bool must_succeed = false;
};

class World {
 public:
  explicit World(const WorldOptions& options);
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  // A whole random life: arrivals, the faults, healing, probes of every pair of workers, and the end.
  WorldReport Run();

  // --- for scripts ---
  std::uint64_t Submit(RequestSpec spec);  // 0 as id: chosen
  RequestSpec RandomRequest();
  void RunFor(double seconds);
  bool RunUntil(const std::function<bool()>& condition, double seconds_max);
  void Apply(const FaultEvent& fault);
  // Ends all faults, probes every pair of workers and waits until nothing is left.
  WorldReport Finish();

  // --- for nodes ---
  FakeNetwork& network() { return network_; }
  RouterNode& router() { return *router_; }
  std::mt19937_64& rng() { return rng_; }
  const WorldOptions& options() const { return options_; }
  WorldReport& report() { return report_; }
  double Random(double max) { return std::uniform_real_distribution<double>(0, max)(rng_); }
  bool Chance(double p) { return p > 0 && Random(1) < p; }
  std::int64_t NowNs(const std::string& node) const;  // the node's own clock
  void Failed(const std::string& kind, const std::string& text);
  bool failed() const { return report_.violation.has_value(); }
  bool logging() const { return options_.log; }
  void Log(const std::string& text);
  const std::deque<std::string>& log() const { return log_; }

  // nullptr while dead.
  DecodeNode* decode(const std::string& name);
  PrefillNode* prefill(const std::string& name);
  std::vector<std::string> Names(bool decode) const;
  void Heartbeat(const std::string& name);
  bool Alive(const std::string& name) const;  // as the router sees it, by heartbeats
  bool Serves(const std::string& name) const { return !Dead(slots_.at(name)); }
  CallPtr NewCall(const std::string& worker);
  void BreakCalls();  // all of them, at once
  static const std::vector<std::shared_ptr<const KvFormat>>& Formats();

 private:
  struct Slot {
    bool is_decode = false;
    std::unique_ptr<handoff_test::Arena> memory;  // the same for every process on this address
    std::unique_ptr<DecodeNode> decode;
    std::unique_ptr<PrefillNode> prefill;
    int lives = 0;
    bool stalled = false;
    std::int64_t clock_offset_ns = 0;
    double last_heartbeat = 0;
  };
  void Boot(const std::string& name);
  void Kill(const std::string& name);
  bool Dead(const Slot& slot) const { return slot.decode == nullptr && slot.prefill == nullptr; }
  void Heal();
  void Probe();
  void CheckNothingLeft();
  std::string WhatIsLeft();

  const WorldOptions options_;
  std::mt19937_64 rng_;
  WorldReport report_;
  std::deque<std::string> log_;
  FakeNetwork network_;
  std::map<std::string, Slot> slots_;
  std::vector<std::weak_ptr<Call>> calls_;
  std::unique_ptr<RouterNode> router_;
  std::uint64_t next_request_ = 1;
};

}  // namespace zeroc::simulation
