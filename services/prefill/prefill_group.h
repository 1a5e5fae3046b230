// A prefill group: a leader, which the router knows, and followers that compute prompts with it
// (docs/sequence_parallel.md).
//
// The leader forms the group: it asks every follower for the address of its communicator, chooses an epoch, and holds
// a call open to each. The group lives and dies as one: a lost call, a failed share, or a failure of the communicator
// ends what is computed with an error everywhere, and the leader forms the group anew, with a new epoch, as soon as all
// followers answer. Until then prompts are computed by the leader alone.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "libzeroc/base/mutex.h"
#include "libzeroc/base/status.h"
#include "libzeroc/comm/communicator.h"
#include "libzeroc/comm/transport_communicator.h"
#include "libzeroc/model/sp_scheme.h"
#include "services/common/grpc_server.h"
#include "services/worker/event_sink.h"
#include "services/worker/worker.h"
#include "zeroc/v1/worker.pb.h"

namespace zeroc {

struct PrefillGroupOptions {
  std::vector<std::string> followers;  // gRPC addresses of ranks 1, 2, ..; empty: no group
  SpScheme scheme = SpScheme::kAuto;
  std::chrono::milliseconds patience{10'000};  // for an answer, and for another rank during a prompt
  std::chrono::milliseconds retry{500};        // between attempts to form the group
  GrpcSecurity security;
};

// The leader's side. Any thread.
class PrefillGroup {
 public:
  // Forms the group in the background, again and again. name: the leader's, for messages.
  PrefillGroup(const PrefillGroupOptions& options, std::string name, std::string model_fingerprint, std::string plan_id,
               std::unique_ptr<CommPort> port);
  ~PrefillGroup();  // Stop()

  // Ends what is under way; the group does not form again.
  void Stop();

  const PrefillGroupOptions& options() const { return options_; }
  int size() const { return static_cast<int>(options_.followers.size()) + 1; }
  int ready_ranks() const { return ready_ ? size() : 1; }

  struct Begun {
    std::shared_ptr<Communicator> comm;
    std::uint32_t number = 0;
  };
  // Every follower has taken its share: the caller computes its own now, then calls Ended. Waits for the followers'
  // answers, up to the patience each. kUnavailable while the group is not formed; what a follower refuses with ends the
  // group.
  Result<Begun> Begin(const v1::PrefillRequest& request, SpScheme scheme, std::chrono::milliseconds timeout);

  // The leader's own share is over and its request knows how, also when Begin failed. A failure ends the group, for
  // everybody; it forms anew.
  void Ended(const Status& status);

 private:
  void Break(const Status& why);
  struct Follower;

  void Manage();
  Status Form();
  void Read(Follower& follower);
  void Dissolve();

  const PrefillGroupOptions options_;
  const std::string name_, model_fingerprint_, plan_id_;
  const std::unique_ptr<CommPort> port_;

  mutable Mutex mu_;
  CondVar changed_;
  bool stopping_ ZEROC_GUARDED_BY(mu_) = false;
  bool computing_ ZEROC_GUARDED_BY(mu_) = false;  // from Begin to Ended
  std::uint64_t epoch_ ZEROC_GUARDED_BY(mu_) = 0;
  std::uint32_t n_begun_ ZEROC_GUARDED_BY(mu_) = 0;
  int n_formed_ ZEROC_GUARDED_BY(mu_) = 0;  // followers that said so
  Status broken_ ZEROC_GUARDED_BY(mu_);     // of this epoch
  std::shared_ptr<Communicator> comm_ ZEROC_GUARDED_BY(mu_);
  std::atomic<bool> ready_ = false;

  std::vector<std::unique_ptr<Follower>> followers_;  // constant
  std::thread manager_;
};

// A follower's side; every prefill worker can be one. Any thread.
class GroupMember {
 public:
  using Sink = std::shared_ptr<EventSink<v1::GroupEvent>>;
  struct Rank {
    std::shared_ptr<Communicator> comm;
    int rank = 0, size = 0;
  };

  explicit GroupMember(TransportFactory transport) : transport_(std::move(transport)) {}
  ~GroupMember() { Stop(); }

  // Leaves the group; whoever waits for its other ranks is freed.
  void Stop();
  // Opens the communicator's port at the first call.
  Result<PeerAddress> Join();
  // Enters the group; its first event and its end go to the sink.
  void Serve(const v1::ServeGroupRequest& request, Sink sink);
  // The leader has gone.
  void Leave(std::uint64_t epoch, const Status& why);
  // kUnavailable when this worker is not in that group (any more).
  Result<Rank> Find(std::uint64_t epoch) const;
  // A share ended with an error: the leader is told.
  void Report(std::uint64_t epoch, std::uint32_t number, const Status& status);

 private:
  const TransportFactory transport_;
  mutable Mutex mu_;
  std::unique_ptr<CommPort> port_ ZEROC_GUARDED_BY(mu_);
  std::uint64_t epoch_ ZEROC_GUARDED_BY(mu_) = 0;
  Rank rank_ ZEROC_GUARDED_BY(mu_);
  Sink sink_ ZEROC_GUARDED_BY(mu_);
};

}  // namespace zeroc
