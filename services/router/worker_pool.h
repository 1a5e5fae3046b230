// The workers that are registered and alive, and the choice among them.
//
// Thread-safe. Free of I/O and of clocks: every call that depends on time is given it. Requests that use a worker hold
// a WorkerRef and are told when the worker's heartbeats stop; a broken registration stream alone takes the worker out
// of the pool but does not fail its requests, whose own streams know better.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "libzeroc/base/mutex.h"
#include "libzeroc/base/status.h"
#include "services/router/prefix_match.h"
#include "services/router/worker_connection.h"
#include "zeroc/v1/worker.pb.h"

namespace zeroc {

enum class WorkerId : std::uint64_t { kNone = 0 };

class WorkerPool {
 public:
  using Time = std::chrono::steady_clock::time_point;

  // Workers must match both; heartbeats older than `expiry` mean that the worker is lost.
  WorkerPool(std::string model_fingerprint, std::string plan_id, std::chrono::milliseconds expiry);

  // kInvalidArgument for a malformed description, kFailedPrecondition for another model or plan (both values named).
  Status CheckInfo(const v1::WorkerInfo& info) const;

  // A worker of the same role and name is replaced. The info has passed CheckInfo.
  WorkerId Add(const v1::WorkerInfo& info, const v1::WorkerLoad& load, std::shared_ptr<WorkerConnection> connection,
               Time now);
  // False when the worker is not in the pool (replaced or expired): its stream should end.
  bool Update(WorkerId id, const v1::WorkerLoad& load, Time now);
  void Remove(WorkerId id);
  // Takes out the workers without a heartbeat since now - expiry, tells their requests, and returns their names.
  std::vector<std::string> Expire(Time now);

  // A chosen worker and one request's share of its load, returned when it is destroyed. Movable.
  class Ref;

  struct Choice {
    std::uint64_t n_tokens = 0;           // prompt + output for decode, prompt for prefill
    std::set<std::string> excluded = {};  // names
    std::set<std::string> avoided = {};   // names: taken only when there is no other
    std::string preferred = {};           // name: taken when it may be
    bool all_ranks = false;               // of the worker's prefill group, when it has one
    // Runs at most once, without locks held, when the worker's heartbeats stop while the Ref lives.
    std::function<void()> on_lost = nullptr;
  };
  // The decode worker with the most free KV bytes / the prefill worker with the fewest tokens to do. kUnavailable when
  // there is none that could ever take the request (and why).
  Result<Ref> PickDecode(Choice choice);
  Result<Ref> PickPrefill(Choice choice);

  // What the policy chooses among: the workers that may be taken, without the avoided ones if there are others.
  struct View {
    std::string name;
    v1::WorkerLoad load;
    std::uint64_t kv_bytes_total = 0;
    std::uint64_t assigned_tokens = 0;                   // by this router, running
    std::uint64_t n_requests = 0;                        // as far as this router knows
    std::shared_ptr<const PrefixHashSet> prefixes = {};  // load.prefix_hashes, which are taken out of `load`
  };
  std::vector<View> Candidates(v1::WorkerRole role, const Choice& choice) const;

  // OK when there is at least one worker of each role that takes work (with `local_prefill`, a decode worker is
  // enough); kUnavailable saying what is missing.
  Status Ready(bool local_prefill = false) const;
  std::size_t Count(v1::WorkerRole role) const;

 private:
  struct Worker {
    v1::WorkerInfo info;
    v1::WorkerLoad load;  // without prefix_hashes
    std::shared_ptr<const PrefixHashSet> prefixes;
    std::shared_ptr<WorkerConnection> connection;
    Time last_heartbeat;
    std::uint64_t assigned_tokens = 0;  // of this router's running requests
    std::uint64_t n_assigned = 0;
    std::map<std::uint64_t, std::function<void()>> on_lost;  // by ref number
  };
  Result<Ref> Pick(v1::WorkerRole role, Choice choice);
  static void SetLoad(const v1::WorkerLoad& load, Worker* worker);
  static bool Better(const Worker& x, const Worker& y);
  void Return(WorkerId id, std::uint64_t ref, std::uint64_t n_tokens);

  const std::string model_fingerprint_;
  const std::string plan_id_;
  const std::chrono::milliseconds expiry_;

  mutable Mutex mu_;
  std::map<WorkerId, Worker> workers_ ZEROC_GUARDED_BY(mu_);
  std::uint64_t next_id_ ZEROC_GUARDED_BY(mu_) = 1;
};

class WorkerPool::Ref {
 public:
  Ref() = default;
  Ref(Ref&& other) noexcept { *this = std::move(other); }
  Ref& operator=(Ref&& other) noexcept;
  ~Ref() { Reset(); }
  void Reset();

  explicit operator bool() const { return pool_ != nullptr; }
  const std::string& name() const { return name_; }
  WorkerConnection& connection() const { return *connection_; }
  std::uint32_t n_ranks() const { return n_ranks_; }  // that it was chosen for

 private:
  friend class WorkerPool;
  WorkerPool* pool_ = nullptr;
  WorkerId id_ = WorkerId::kNone;
  std::uint64_t ref_ = 0;
  std::uint64_t n_tokens_ = 0;
  std::uint32_t n_ranks_ = 1;
  std::string name_;
  std::shared_ptr<WorkerConnection> connection_;
};

}  // namespace zeroc
