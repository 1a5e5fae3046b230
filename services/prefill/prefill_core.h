// The prefill worker behind its RPCs: the engine, connections to decode workers, one transfer per request.
//
// Threads. mu_ guards the table of requests and connections; each request has a mutex of its own that guards its Sender
// and is held while the Sender's actions are posted, so that a flush never overtakes a write. Lock order: mu_ is never
// taken with a request's mutex held. The engine's listener calls run on the engine's thread, the transport's on the
// transport's; neither waits for the other. Every public method may be called from any thread and none blocks.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "libzeroc/base/mutex.h"
#include "libzeroc/base/status.h"
#include "libzeroc/comm/transport.h"
#include "libzeroc/engine/engine_thread.h"
#include "libzeroc/engine/prefill_engine.h"
#include "libzeroc/handoff/sender.h"
#include "libzeroc/kv/owned_pool.h"
#include "services/common/metrics.h"
#include "services/common/timer_thread.h"
#include "services/prefill/prefill_group.h"
#include "services/worker/event_sink.h"
#include "services/worker/prefix_hints.h"
#include "services/worker/worker.h"
#include "services/worker/worker_model.h"
#include "zeroc/v1/worker.pb.h"

namespace zeroc {

class PrefillCore final : private TransportListener {
 public:
  struct Options {
    std::uint64_t kv_bytes = std::uint64_t{1} << 30;
    int chunk_tokens = 512;
    int queue_max = 64;
    double prefix_cache_share = 1.0;  // of kv_bytes; 0: no prefix cache
    Sender::Options sender;
    std::string name = "prefill";  // for messages of a prefill group
    PrefillGroupOptions group;     // that this worker leads
  };
  using Key = std::pair<std::string, std::uint32_t>;  // request id, attempt
  using Sink = std::shared_ptr<EventSink<v1::PrefillEvent>>;

  // kUnavailable (transport), kResourceExhausted (memory), kInvalidArgument (less memory than one slab).
  static Result<std::unique_ptr<PrefillCore>> Create(const Options& options, WorkerModel& model, Metrics& metrics,
                                                     const TransportFactory& transport);
  ~PrefillCore() override;  // no request may be running

  // Events and the end go to `sink`, refusals too. A prompt that is not computed by deadline_ns (monotonic; 0: none) is
  // dropped.
  void Run(const v1::PrefillRequest& request, Sink sink, std::int64_t deadline_ns = 0);
  // Another leader's calls (PrefillGroup): this worker as a rank of its group.
  Status JoinGroup(const v1::JoinGroupRequest& request, v1::JoinGroupResponse* response);
  void ServeGroup(const v1::ServeGroupRequest& request, const GroupMember::Sink& sink);
  void LeaveGroup(std::uint64_t epoch, const Status& why) { member_->Leave(epoch, why); }
  Status RunShare(const v1::ShareRequest& request);
  PrefillGroup* group() { return group_.get(); }  // that this worker leads; perhaps none

  // Unknown requests are fine.
  void Cancel(const Key& key, const Status& why);

  void FillLoad(v1::WorkerLoad* load) const;
  void UpdateGauges(Metrics& metrics) const;
  std::string Describe() const;
  std::uint64_t kv_bytes_total() const { return memory_bytes_; }
  std::size_t in_flight() const;
  void StopAccepting() { draining_ = true; }
  void CancelAll(const Status& why);

  BlockPool::Usage usage() const;  // as of the engine's last change
  // For tests: breaks every connection as if the decode workers had gone.
  void ClosePeers();

 private:
  struct Request;
  using RequestPtr = std::shared_ptr<Request>;
  struct Place {
    int rank = 0, n_ranks = 1;
  };
  // A prompt that several ranks compute, waiting for its turn here.
  struct Share {
    RequestPtr request;
    PrefillJob job;
    SpOptions options;
    Place place;
    v1::PrefillRequest for_followers;  // the leader's
    std::uint64_t epoch = 0;           // a follower's, with its communicator
    std::shared_ptr<Communicator> comm;
  };
  struct Connection {
    PeerId peer = PeerId::kNone;
    bool up = false;
    PeerInfo info;
    // When a write or flush on it was last over; shared with the requests that use it.
    std::shared_ptr<std::atomic<std::int64_t>> progress_ns = std::make_shared<std::atomic<std::int64_t>>(0);
  };

  PrefillCore(const Options& options, WorkerModel& model, Metrics& metrics)
      : options_(options), model_(model), metrics_(metrics) {}
  Status Open(const TransportFactory& transport);

  void OnPeerUp(PeerId peer, const PeerInfo& info) override;
  bool AcceptWrite(PeerId, const WriteTag&, std::uint64_t, std::uint64_t) override { return false; }
  void OnWriteDone(PeerId, const WriteTag&, std::uint64_t, std::uint64_t, const Status&) override {}
  Status OnMessage(PeerId peer, std::uint16_t type, std::span<const std::byte> payload) override;
  void OnProtocolError(PeerId peer, const Status& status) override;
  void OnPeerFailure(PeerId peer, const Status& status) override;

  Result<RequestPtr> MakeRequest(const v1::PrefillRequest& request, Sink sink, const Place& place) const;
  PrefillJob JobOf(const v1::PrefillRequest& request, const RequestPtr& added, std::int64_t deadline_ns) const;
  Result<SpOptions> OptionsForLeader(const v1::PrefillRequest& request) const;
  void AddShare(Share share);
  bool StepShare();
  void EndShare(const Status& status);
  Status Connect(const v1::PrefillRequest& request, const RequestPtr& added, Connection* connection);
  void SubmitOnEngine(const RequestPtr& request, PrefillJob job);
  void ForgetConnection(PeerId peer);
  std::vector<RequestPtr> RequestsOf(PeerId peer) const;  // kNone: all
  RequestPtr FindByLease(const LeaseKey& key) const;

  void OnLocalDone(const RequestPtr& request);
  void OnEnded(const RequestPtr& request);
  void ScheduleTick();
  void PublishUsage();

  const Options options_;
  WorkerModel& model_;
  Metrics& metrics_;

  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::uint64_t memory_bytes_ = 0;
  std::unique_ptr<OwnedPool> pool_;        // engine thread; memory_ is its wire side
  std::unique_ptr<PrefixCache> cache_;     // engine thread; perhaps none
  std::unique_ptr<PrefillEngine> engine_;  // engine thread
  std::deque<Share> shares_;               // engine thread
  bool share_had_turn_ = false;            // engine thread: the last step was a share's
  std::unique_ptr<PrefillGroup> group_;  // they outlive the engine's thread, which waits inside of their communicators
  std::unique_ptr<GroupMember> member_;
  std::unique_ptr<EngineThread> engine_thread_;
  std::unique_ptr<TimerThread> timers_;

  mutable Mutex mu_;
  std::map<Key, RequestPtr> requests_ ZEROC_GUARDED_BY(mu_);
  std::map<std::string, Connection> connections_ ZEROC_GUARDED_BY(mu_);  // by address and arena

  std::atomic<bool> draining_ = false;
  std::atomic<std::uint64_t> bytes_used_ = 0;
  std::atomic<std::uint64_t> blocks_used_ = 0;
  std::atomic<int> n_waiting_ = 0;
  std::atomic<std::int64_t> waiting_tokens_ = 0;
  PrefixHints hints_;

  std::unique_ptr<Transport> transport_;  // the first to go: until then it calls this object
};

}  // namespace zeroc
