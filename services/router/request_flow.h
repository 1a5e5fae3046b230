// One request through the system: tokenise, check, choose, reserve, prefill and decode at once, stream, account.
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
#include "libzeroc/tokenizer/stop_matcher.h"
#include "services/common/metrics.h"
#include "services/common/timer_thread.h"
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
};

// Shared by all flows and outlives them.
struct FlowContext {
  const ServedModel& model;
  WorkerPool& pool;
  Metrics& metrics;
  TimerThread& timers;
  const FlowConfig config;
};

class RequestFlow : public std::enable_shared_from_this<RequestFlow> {
 public:
  // request_id is set. on_end runs once, with the flow's lock held: it must not call back.
  // After it the flow touches its context no more.
  RequestFlow(const FlowContext& context, v1::GenerateRequest request, std::optional<Deadline> client_deadline,
              std::shared_ptr<ResponseSink> sink, std::function<void()> on_end);

  void Start();
  // Ends the flow with `why` unless it has ended.
  void Cancel(const Status& why);
  const std::string& id() const { return request_.request_id(); }

 private:
  struct Choice;
  Result<Choice> Choose();
  void Reserve() ZEROC_REQUIRES(mu_);
  void OnReserved(const Status& status, const v1::ReserveResponse& response);
  bool RetryReserve(const Status& status) ZEROC_REQUIRES(mu_);
  bool PrefillDidItsPart() const ZEROC_REQUIRES(mu_);
  void StartWorkers() ZEROC_REQUIRES(mu_);

  void OnPrefillEvent(const v1::PrefillEvent& event);
  void OnPrefillDone(const Status& status);
  void OnFirstToken(const v1::FirstToken& first) ZEROC_REQUIRES(mu_);
  void OnDecodeEvent(const v1::DecodeEvent& event);
  void OnDecodeDone(const Status& status);
  void OnWorkerLost(const char* role);

  void Emit(const v1::Tokens& tokens) ZEROC_REQUIRES(mu_);
  void SetFinish(v1::FinishReason reason) ZEROC_REQUIRES(mu_);
  void FinishWhenAccounted() ZEROC_REQUIRES(mu_);
  void Finish() ZEROC_REQUIRES(mu_);
  void Fail(const Status& status, ErrorOrigin origin = ErrorOrigin::kRequest) ZEROC_REQUIRES(mu_);
  void FailAt(const char* role, const Status& status) ZEROC_REQUIRES(mu_);  // names the worker and the phase
  void End(const Status& status, std::string_view release_reason) ZEROC_REQUIRES(mu_);
  void Release(WorkerConnection& connection, const v1::Lease& lease, std::string_view reason) const;
  void Account(const Status& status) ZEROC_REQUIRES(mu_);
  v1::RequestStats Stats() const ZEROC_REQUIRES(mu_);
  const char* Phase() const ZEROC_REQUIRES(mu_);

  const FlowContext& context_;
  const v1::GenerateRequest request_;
  const std::shared_ptr<ResponseSink> sink_;
  const std::function<void()> on_end_;
  const Deadline deadline_;

  Mutex mu_;
  bool ended_ ZEROC_GUARDED_BY(mu_) = false;
  RequestTimes times_ ZEROC_GUARDED_BY(mu_);
  TimerId deadline_timer_ ZEROC_GUARDED_BY(mu_) = TimerId::kNone;
  TimerId stats_timer_ ZEROC_GUARDED_BY(mu_) = TimerId::kNone;

  // Fixed by Choose.
  std::vector<std::uint32_t> prompt_ids_ ZEROC_GUARDED_BY(mu_);
  v1::SamplingParams sampling_ ZEROC_GUARDED_BY(mu_);
  std::set<std::uint32_t> stop_token_ids_ ZEROC_GUARDED_BY(mu_);
  const Rung* rung_ ZEROC_GUARDED_BY(mu_) = nullptr;
  std::string reason_ ZEROC_GUARDED_BY(mu_);
  double budget_ ZEROC_GUARDED_BY(mu_) = 0;

  // Workers and calls.
  std::uint32_t attempt_ ZEROC_GUARDED_BY(mu_) = 0;
  bool reserving_ ZEROC_GUARDED_BY(mu_) = false;
  std::set<std::string> refused_by_ ZEROC_GUARDED_BY(mu_);
  WorkerPool::Ref decode_worker_ ZEROC_GUARDED_BY(mu_);
  WorkerPool::Ref prefill_worker_ ZEROC_GUARDED_BY(mu_);
  std::optional<v1::Lease> lease_ ZEROC_GUARDED_BY(mu_);  // held: not yet ended by decode itself
  std::shared_ptr<WorkerCall> decode_call_ ZEROC_GUARDED_BY(mu_);
  std::shared_ptr<WorkerCall> prefill_call_ ZEROC_GUARDED_BY(mu_);

  // The answer.
  std::unique_ptr<TextStream> text_ ZEROC_GUARDED_BY(mu_);
  StopMatcher stops_ ZEROC_GUARDED_BY(mu_);
  bool first_token_seen_ ZEROC_GUARDED_BY(mu_) = false;
  v1::Tokens early_tokens_ ZEROC_GUARDED_BY(mu_);  // from decode, before prefill's first token came
  std::uint32_t n_output_tokens_ ZEROC_GUARDED_BY(mu_) = 0;
  v1::FinishReason finish_reason_ ZEROC_GUARDED_BY(mu_) = v1::FINISH_REASON_UNSPECIFIED;
  v1::FinishReason decode_finish_ ZEROC_GUARDED_BY(mu_) = v1::FINISH_REASON_UNSPECIFIED;
  bool transfer_accounted_ ZEROC_GUARDED_BY(mu_) = false;
  v1::PrefillDone transfer_ ZEROC_GUARDED_BY(mu_);
  v1::KvBytes resident_ ZEROC_GUARDED_BY(mu_);  // as decode counted them
};

}  // namespace zeroc
