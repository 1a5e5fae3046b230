// One request through the system: tokenise, check, choose, reserve, prefill and decode at once, stream, account.
//
// The flow decides; an Attempt holds the workers, the lease and the calls of one try, the Answer what the client has
// been given. When a worker fails or is lost, the flow goes on with another attempt elsewhere: the prompt and all
// tokens that are out are prefilled again, and the stream continues behind them without a gap or a repetition.
//
// Event driven: no thread waits for anything. Thread-safe; events from workers, client and timers meet under one mutex
// and after the end all of them are ignored, except that a lease granted too late is given back. Every flow ends: by
// its last token, by an error, by Cancel, or at its deadline. Whatever the end, calls to workers are cancelled, the
// lease is released and the sink hears exactly one Final or Error.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "libzeroc/base/mutex.h"
#include "services/common/metrics.h"
#include "services/common/timers.h"
#include "services/router/admission_queue.h"
#include "services/router/answer.h"
#include "services/router/attempt.h"
#include "services/router/audit.h"
#include "services/router/estimates.h"
#include "services/router/policy.h"
#include "services/router/request_check.h"
#include "services/router/request_stats.h"
#include "services/router/response_sink.h"
#include "services/router/served_model.h"
#include "services/router/worker_pool.h"

namespace zeroc {

struct FlowConfig {
  RequestLimits limits;
  double default_max_ppl_increase = 0.1;  // absolute
  std::chrono::milliseconds reserve_timeout{5'000};
  std::chrono::milliseconds request_timeout{600'000};
  // Once the last token is out: how long the final message may wait for the prefill worker's account of the transfer.
  std::chrono::milliseconds stats_timeout{1'000};
  // How long a decode worker's word that prefill has let go of the lease waits for prefill's own word.
  std::chrono::milliseconds held_failure_timeout{1'000};
  int retries_max = 2;  // after a worker failed, beyond the first attempt
  // Before a worker that has just failed is tried again because there is no other.
  std::chrono::milliseconds retry_delay{200};
  // How long a request may wait for room while all decode workers are full.
  std::chrono::milliseconds queue_timeout{30'000};
  // False: always the fewest bytes within the budget, whatever was measured.
  bool adaptive = true;
  // Prompts of at most so many tokens are prefilled on the decode worker itself, and longer ones, up to the factor,
  // when they would wait longer than local_prefill_queue for any prefill worker. 0: none.
  std::uint32_t local_prefill_tokens = 0;
  std::uint32_t local_prefill_overload_factor = 16;
  std::chrono::milliseconds local_prefill_queue{1'000};
  // Prompts of at least so many tokens may be computed by all ranks of a prefill group; 0: none.
  std::uint32_t sp_min_tokens = 2'048;
};

// Shared by all flows and outlives them.
struct FlowContext {
  const ServedModel& model;
  WorkerPool& pool;
  Metrics& metrics;
  Timers& timers;
  Estimates& estimates;
  AdmissionQueue& queue;
  Audit& audit;
  const FlowConfig config;
};

// An audit's own requests are no client's: they are logged, but no metric of served requests counts them.
enum class RequestKind { kClient, kAudit };

class RequestFlow : public std::enable_shared_from_this<RequestFlow> {
 public:
  // request_id is set. on_end runs once, with the flow's lock held: it must not call back.
  // After it the flow touches its context no more.
  RequestFlow(const FlowContext& context, v1::GenerateRequest request, std::optional<Deadline> client_deadline,
              std::shared_ptr<ResponseSink> sink, std::function<void()> on_end,
              RequestKind kind = RequestKind::kClient);

  void Start();
  // Ends the flow with `why` unless it has ended.
  void Cancel(const Status& why);
  const std::string& id() const { return request_.request_id(); }

 private:
  using AttemptPtr = std::shared_ptr<Attempt>;
  enum class Role { kPrefill, kDecode };
  struct Choice {
    std::vector<std::uint32_t> prompt_ids;
    v1::SamplingParams sampling;
  };
  struct Decision {
    PolicyDecision policy;
    bool local_prefill = false;
    std::string prefill, decode;  // names; empty: the pool chooses by load
    bool all_ranks = false;       // of the prefill worker's group, if it has one
  };

  // Decode workers are asked one after the other until one has room: what those said that had none.
  struct Round {
    std::set<std::string> refused_by;
    bool any_full = false;      // it has room when others end
    bool all_too_small = true;  // none ever has
  };

  Result<Choice> Choose() const;
  WorkerPool::Choice Wanted(Role role, std::uint64_t n_prompt, std::uint32_t max_tokens) const ZEROC_REQUIRES(mu_);
  bool MayTakeAllRanks(std::uint64_t n_prompt) const ZEROC_REQUIRES(mu_);
  bool PrefillsLocally(std::uint64_t n_prompt, const std::vector<WorkerPool::View>& prefills) const;
  std::optional<std::string> RequestedProfile() const ZEROC_REQUIRES(mu_);
  Result<Decision> DecideNow(std::uint64_t n_prompt, std::uint32_t max_tokens) ZEROC_REQUIRES(mu_);
  Result<AttemptPtr> NewAttempt() ZEROC_REQUIRES(mu_);

  // In the queue for room at decode.
  void AskForRoom(AttemptPtr attempt) ZEROC_REQUIRES(mu_);
  void OnTurn();
  void Wait(const Status& refusal) ZEROC_REQUIRES(mu_);
  void OnQueueTimeout() ZEROC_REQUIRES(mu_);
  void Reserve(AttemptPtr attempt) ZEROC_REQUIRES(mu_);
  void OnReserved(const AttemptPtr& attempt, const Status& status, const v1::ReserveResponse& response);
  void OnRefused(const Status& status) ZEROC_REQUIRES(mu_);
  bool TryElsewhere(const Status& status) ZEROC_REQUIRES(mu_);
  void SendStarted() ZEROC_REQUIRES(mu_);
  void RunAttempt() ZEROC_REQUIRES(mu_);

  // What one attempt's workers say; ignored unless it is the current one.
  void OnPrefillEvent(const AttemptPtr& attempt, const v1::PrefillEvent& event);
  void OnPrefillDone(const AttemptPtr& attempt, const Status& status);
  void OnFirstToken(const v1::FirstToken& first) ZEROC_REQUIRES(mu_);
  void OnDecodeEvent(const AttemptPtr& attempt, const v1::DecodeEvent& event);
  void OnDecodeTokens(const v1::Tokens& tokens) ZEROC_REQUIRES(mu_);
  void OnDecodeDone(const AttemptPtr& attempt, const Status& status);
  void OnWorkerLost(const AttemptPtr& attempt, Role role);
  bool IsCurrent(const AttemptPtr& attempt) const ZEROC_REQUIRES(mu_) {
    return !ended_ && attempt == attempt_ && !attempt->stopped();
  }

  // Another attempt when that can help, else the end.
  void OnWorkerFailed(Role role, const Status& status) ZEROC_REQUIRES(mu_);
  bool MayRetry(Role role, const Status& status) const ZEROC_REQUIRES(mu_);
  bool PrefillMayExplain(const Status& status) const ZEROC_REQUIRES(mu_);
  void HoldDecodeFailure(const Status& status) ZEROC_REQUIRES(mu_);
  void ActOnHeldFailure() ZEROC_REQUIRES(mu_);
  void Retry() ZEROC_REQUIRES(mu_);
  Status Name(Role role, const Status& status) const ZEROC_REQUIRES(mu_);  // adds the worker and the phase

  void Emit(const v1::Tokens& tokens) ZEROC_REQUIRES(mu_);
  void SetFinish(v1::FinishReason reason) ZEROC_REQUIRES(mu_);
  void FinishWhenAccounted() ZEROC_REQUIRES(mu_);
  void Finish() ZEROC_REQUIRES(mu_);
  void Fail(const Status& status, ErrorOrigin origin = ErrorOrigin::kRequest) ZEROC_REQUIRES(mu_);
  void FailAt(Role role, const Status& status) ZEROC_REQUIRES(mu_);
  void End(const Status& status, std::string_view release_reason) ZEROC_REQUIRES(mu_);
  void EndIfQuiet() ZEROC_REQUIRES(mu_);
  // Runs `then` after `delay`, with the lock held, unless the flow has ended by then. Keeps the flow alive until then.
  TimerId After(Timers::Clock::duration delay, void (RequestFlow::*then)());
  void Account(const Status& status) ZEROC_REQUIRES(mu_);
  void CountMetrics(const std::string& outcome, const v1::RequestStats& stats) ZEROC_REQUIRES(mu_);
  void Learn() const ZEROC_REQUIRES(mu_);
  bool is_client() const { return kind_ == RequestKind::kClient; }
  v1::RequestStats Stats() const ZEROC_REQUIRES(mu_);
  const char* Phase() const ZEROC_REQUIRES(mu_);

  const FlowContext& context_;
  const v1::GenerateRequest request_;
  const std::shared_ptr<ResponseSink> sink_;
  const std::function<void()> on_end_;
  const Deadline deadline_;
  const RequestKind kind_;

  Mutex mu_;
  bool ended_ ZEROC_GUARDED_BY(mu_) = false;
  RequestTimes times_ ZEROC_GUARDED_BY(mu_);
  TimerId deadline_timer_ ZEROC_GUARDED_BY(mu_) = TimerId::kNone;
  TimerId stats_timer_ ZEROC_GUARDED_BY(mu_) = TimerId::kNone;
  TimerId retry_timer_ ZEROC_GUARDED_BY(mu_) = TimerId::kNone;
  TimerId queue_timer_ ZEROC_GUARDED_BY(mu_) = TimerId::kNone;
  TimerId held_timer_ ZEROC_GUARDED_BY(mu_) = TimerId::kNone;

  // Fixed by Choose.
  std::vector<std::uint32_t> prompt_ids_ ZEROC_GUARDED_BY(mu_);
  v1::SamplingParams sampling_ ZEROC_GUARDED_BY(mu_);
  // Fixed with the first reservation that is granted.
  const Rung* rung_ ZEROC_GUARDED_BY(mu_) = nullptr;
  std::string reason_ ZEROC_GUARDED_BY(mu_);
  double budget_ ZEROC_GUARDED_BY(mu_) = 0;
  std::optional<Prediction> predicted_ ZEROC_GUARDED_BY(mu_);

  // Attempts.
  AttemptPtr attempt_ ZEROC_GUARDED_BY(mu_);  // null before the first; stopped while the next one waits
  std::uint32_t n_attempts_ ZEROC_GUARDED_BY(mu_) = 0;
  int n_reserving_ ZEROC_GUARDED_BY(mu_) = 0;  // of stopped attempts too
  int n_retries_ ZEROC_GUARDED_BY(mu_) = 0;
  std::uint32_t n_elsewhere_ ZEROC_GUARDED_BY(mu_) = 0;  // attempts after failed ones; full workers are no failure
  Round round_ ZEROC_GUARDED_BY(mu_);
  // Names of workers that an attempt was lost with: others are taken where there are others.
  std::set<std::string> avoided_prefill_ ZEROC_GUARDED_BY(mu_);
  std::set<std::string> avoided_decode_ ZEROC_GUARDED_BY(mu_);
  Status last_failure_ ZEROC_GUARDED_BY(mu_);
  AdmissionQueue::Ticket ticket_ ZEROC_GUARDED_BY(mu_) = AdmissionQueue::kNoTicket;

  Answer answer_ ZEROC_GUARDED_BY(mu_);
  bool started_sent_ ZEROC_GUARDED_BY(mu_) = false;
  std::uint32_t n_cached_tokens_ ZEROC_GUARDED_BY(mu_) = 0;  // of the prompt, by the attempt that began the answer
};

}  // namespace zeroc
