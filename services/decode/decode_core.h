// The decode worker behind its RPCs: leases, the KV arena, the transport's receiving end and the engines.
//
// Threads. One mutex guards the lease table and the requests; it is held for table look-ups only, so AcceptWrite on the
// transport's thread stays fast. Blocks, checksums and sequences belong to the engine's thread. Every method may be
// called from any thread and none blocks on the engine.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "libzeroc/base/mutex.h"
#include "libzeroc/base/status.h"
#include "libzeroc/comm/transport.h"
#include "libzeroc/engine/decode_engine.h"
#include "libzeroc/engine/engine_thread.h"
#include "libzeroc/engine/prefill_engine.h"
#include "libzeroc/handoff/lease_table.h"
#include "libzeroc/kv/owned_pool.h"
#include "services/common/metrics.h"
#include "services/common/timer_thread.h"
#include "services/worker/event_sink.h"
#include "services/worker/prefix_hints.h"
#include "services/worker/worker.h"
#include "services/worker/worker_model.h"
#include "zeroc/v1/worker.pb.h"

namespace zeroc {

class DecodeCore final : private TransportListener {
 public:
  struct Options {
    std::uint64_t kv_bytes = std::uint64_t{1} << 30;
    int batch_max = 64;
    std::uint64_t swap_bytes = std::uint64_t{1} << 30;
    int local_prefill_chunk_tokens = 256;
    int local_prefill_queue_max = 64;
    double prefix_cache_share = 1.0;  // of kv_bytes; 0: no prefix cache
    std::int64_t lease_expiry_ms = 30'000;
  };

  // kUnavailable (transport), kResourceExhausted (arena), kInvalidArgument (an arena smaller than one slab).
  static Result<std::unique_ptr<DecodeCore>> Create(const Options& options, WorkerModel& model, Metrics& metrics,
                                                    const TransportFactory& transport);
  ~DecodeCore() override;  // no request may be running

  // `done` runs once, on this thread or the engine's.
  void Reserve(const v1::ReserveRequest& request, std::function<void(Result<v1::ReserveResponse>)> done);
  // Events and the end go to `sink`, also for a lease that is unknown or over. deadline_ns (monotonic; 0: none): a
  // prompt that this worker has not computed by then is dropped.
  void Generate(const v1::DecodeRequest& request, std::shared_ptr<EventSink<v1::DecodeEvent>> sink,
                std::int64_t deadline_ns = 0);
  // Ends a lease from outside; unknown leases are fine.
  void Release(const LeaseKey& key, const std::string& reason);

  void FillLoad(v1::WorkerLoad* load) const;
  void UpdateGauges(Metrics& metrics) const;
  std::string Describe() const;
  std::uint64_t kv_bytes_total() const { return arena_.size(); }
  std::size_t in_flight() const;
  void StopAccepting() { draining_ = true; }
  void CancelAll(const Status& why);

  // For tests: the bytes that the wire fills.
  std::span<const std::byte> arena() const { return arena_; }
  BlockPool::Usage usage() const;  // as of the engine's last change

 private:
  struct Request;
  using RequestPtr = std::shared_ptr<Request>;

  DecodeCore(const Options& options, WorkerModel& model, Metrics& metrics);
  Status Open(const TransportFactory& transport);

  void OnPeerUp(PeerId peer, const PeerInfo& info) override;
  bool AcceptWrite(PeerId peer, const WriteTag& tag, std::uint64_t offset, std::uint64_t bytes) override;
  void OnWriteDone(PeerId peer, const WriteTag& tag, std::uint64_t offset, std::uint64_t bytes,
                   const Status& status) override;
  Status OnMessage(PeerId peer, std::uint16_t type, std::span<const std::byte> payload) override;
  void OnProtocolError(PeerId peer, const Status& status) override;
  void OnPeerFailure(PeerId peer, const Status& status) override;

  Status CheckReserve(const v1::ReserveRequest& request, std::shared_ptr<const KvFormat>* format) const;
  Status CheckGenerate(const v1::DecodeRequest& request, const SamplingParams& sampling) const;
  Result<v1::ReserveResponse> ReserveOnEngine(const v1::ReserveRequest& request,
                                              const std::shared_ptr<const KvFormat>& format);

  // Carries out what the lease table asked for; without mu_.
  void Do(LeaseActions actions);
  void Verify(const VerifyLease& verify);
  void OnReady(const LeaseReady& ready);
  void OnFailed(const LeaseFailed& failed);
  void OnReturn(const LeaseKey& key);
  void EndLease(const LeaseKey& key, const Status& why);

  // Both sides are there: the verified lease and the caller of Generate.
  void StartIfComplete(const RequestPtr& request);
  void AdmitOnEngine(const RequestPtr& request);
  // A request without a prefill worker: its prompt is computed into the lease's own blocks.
  void PrefillOnEngine(const RequestPtr& request, std::int64_t deadline_ns);
  void AdmitLocalOnEngine(Request& request, const SampledToken& token);
  void Admit(Request& request, v1::DecodeEvent admitted, SampledToken first_token);
  bool StepEngines();
  void ScheduleTick();
  void PublishUsage();

  const Options options_;
  WorkerModel& model_;
  Metrics& metrics_;

  std::span<std::byte> arena_;                    // the transport's: the pool's wire side
  std::unique_ptr<OwnedPool> pool_;               // engine thread
  std::unique_ptr<PrefixCache> cache_;            // engine thread; perhaps none
  std::unique_ptr<DecodeEngine> engine_;          // engine thread
  std::unique_ptr<PrefillEngine> local_prefill_;  // engine thread; between decode steps, a chunk at a time
  std::unique_ptr<EngineThread> engine_thread_;
  std::unique_ptr<TimerThread> timers_;

  mutable Mutex mu_;
  LeaseTable leases_ ZEROC_GUARDED_BY(mu_);
  std::map<std::uint64_t, RequestPtr> requests_ ZEROC_GUARDED_BY(mu_);  // by lease id
  std::map<std::uint64_t, Status> failed_ ZEROC_GUARDED_BY(mu_);        // why a lease is gone, for a late Generate
  std::deque<std::uint64_t> failed_order_ ZEROC_GUARDED_BY(mu_);

  std::atomic<bool> draining_ = false;
  std::atomic<std::uint64_t> bytes_used_ = 0;
  std::atomic<std::uint64_t> blocks_used_ = 0;
  std::atomic<int> n_running_ = 0;
  std::atomic<int> n_preempted_ = 0;
  std::atomic<std::uint64_t> swapped_bytes_ = 0;
  std::atomic<std::int64_t> waiting_tokens_ = 0;
  std::uint64_t n_preemptions_ = 0;  // engine thread; counted so far
  PrefixHints hints_;

  std::unique_ptr<Transport> transport_;  // the first to go: until then it calls this object
};

}  // namespace zeroc
