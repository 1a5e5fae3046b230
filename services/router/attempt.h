// One attempt at serving a request: its workers, its lease, its calls, and what the workers have said so far.
//
// Not thread-safe: its flow's lock guards it. A flow has one current attempt; it stops the attempt before it goes on to
// the next one, and what a stopped attempt's workers still say is told to nobody. An answer to Reserve that comes too
// late gives its lease back.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "services/common/timers.h"
#include "services/router/worker_connection.h"
#include "services/router/worker_pool.h"
#include "zeroc/v1/worker.pb.h"

namespace zeroc {

// What the attempts of one request have in common, and where the next one has to begin.
struct AttemptPlan {
  std::string request_id;
  std::vector<std::uint32_t> token_ids;  // the prompt, then the n_streamed tokens that the client has already
  std::uint32_t n_streamed = 0;
  v1::SamplingParams sampling;  // of the tokens that are still to come: see SamplingBehind
  std::string profile;
  std::uint64_t layout_hash = 0;
  std::string plan_id;
  std::string model_fingerprint;
  std::int32_t priority = 0;
  bool local_prefill = false;  // the decode worker computes the prompt itself
  Deadline deadline;
};

// The parameters of a request's tokens behind the first n_streamed ones: max_tokens counts what is left. Seeds, forced
// ids and suppressed ids go by absolute position, so everything else stays.
v1::SamplingParams SamplingBehind(v1::SamplingParams sampling, std::uint32_t n_streamed);

class Attempt {
 public:
  // `number` is unique in the request. The timers outlive the attempt.
  Attempt(std::uint32_t number, AttemptPlan plan, Timers& timers)
      : transfer_accounted(plan.local_prefill), timers_(timers), number_(number), plan_(std::move(plan)) {}

  std::uint32_t number() const { return number_; }
  const AttemptPlan& plan() const { return plan_; }

  // Of the prompt, in the prefix caches of its workers by what they list; they may know better by now.
  std::uint32_t n_expected_at_prefill = 0;
  std::uint32_t n_expected_at_decode = 0;
  WorkerPool::Ref decode_worker;
  WorkerPool::Ref prefill_worker;  // none when local

  // Never cancelled: a grant that crossed with the cancel would be lost until it expires.
  void Reserve(Deadline deadline, UnaryDone<v1::ReserveResponse> done);
  bool reserving() const { return reserving_; }
  // The answer has come. A grant to a stopped attempt is given back.
  void TakeAnswer(const Status& status, const v1::ReserveResponse& response);

  // Both workers at once: decode waits for what prefill sends. Without StartPrefill when local.
  void StartDecode(OnEvent<v1::DecodeEvent> on_event, StreamDone done);
  void StartPrefill(OnEvent<v1::PrefillEvent> on_event, StreamDone done);
  bool running() const { return running_; }
  bool stopped() const { return stopped_; }
  void DecodeEnded() { decode_call_ = nullptr; }
  void PrefillEnded();
  bool prefill_open() const { return prefill_call_ != nullptr; }
  void LeaseEnded() { lease_.reset(); }  // by decode itself
  // Decode has nothing more to add.
  void CancelDecode();

  // Cancels the calls and gives the lease back. Calls that have said all they had to say end by themselves.
  void Stop(std::string_view reason);

  // Once decode has admitted the request, everything that prefill owed has arrived and was verified: its loss, with
  // the transfer's statistics perhaps, is no reason to try again.
  bool PrefillDidItsPart() const { return transfer_accounted || (first_token_seen && admitted); }
  std::uint32_t n_prompt_tokens() const { return static_cast<std::uint32_t>(plan_.token_ids.size()); }

  // Said so far.
  bool first_token_seen = false;
  std::uint32_t n_cached_tokens = 0;  // of the prompt, that were not computed; with the first token
  bool admitted = false;
  v1::Tokens early_tokens;  // from decode, before prefill's first token came
  v1::FinishReason decode_finish = v1::FINISH_REASON_UNSPECIFIED;
  bool transfer_accounted;  // or there is none
  v1::PrefillDone transfer;
  v1::KvBytes resident;       // as decode counted them
  double decode_seconds = 0;  // with decode_finish
  Status decode_failure;      // held back until prefill has said what it has to say

 private:
  void Release(const v1::Lease& lease, std::string_view reason) const;

  Timers& timers_;
  const std::uint32_t number_;
  const AttemptPlan plan_;
  bool reserving_ = false;
  bool running_ = false;
  bool stopped_ = false;
  std::uint32_t n_cached_at_decode_ = 0;  // of the prompt; they do not travel
  std::optional<v1::Lease> lease_;        // held: not yet ended by decode itself
  std::shared_ptr<WorkerCall> decode_call_;
  std::shared_ptr<WorkerCall> prefill_call_;
};

}  // namespace zeroc
