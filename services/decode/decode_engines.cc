// What DecodeCore does on the engine's thread.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "services/decode/decode_core.h"
#include "services/decode/decode_request.h"

namespace zeroc {
namespace {

// Of the places that the router is told: an eighth of the blocks, so that 512 hashes speak of 4,096 blocks.
constexpr int kHintGrainTokens = 512;

double Seconds(std::int64_t ns) { return static_cast<double>(ns) * 1e-9; }

}  // namespace

// At most one chunk of prompts between two decode steps: that bounds what a prompt costs those that decode.
bool DecodeCore::StepEngines() {
  const bool decoded = engine_->Step();
  if (engine_->last_step_tokens() > 0) metrics_.ObserveIterationTokens(engine_->last_step_tokens());
  const bool prefilled = local_prefill_->Step(DecodeNowNs());
  if (prefilled) metrics_.ObserveIterationTokens(local_prefill_->last_step_tokens());
  PublishUsage();
  return decoded || prefilled;
}

void DecodeCore::PublishUsage() {
  const BlockPool::Usage now = pool_->pool().usage();
  bytes_used_ = now.bytes_used;
  blocks_used_ = now.n_blocks_used;
  n_running_ = engine_->n_running();
  n_preempted_ = engine_->n_preempted();
  swapped_bytes_ = engine_->swapped_bytes();
  waiting_tokens_ = local_prefill_->waiting_tokens();
  metrics_.CountPreemption(static_cast<int>(engine_->n_preemptions() - n_preemptions_));
  n_preemptions_ = engine_->n_preemptions();
  if (cache_ != nullptr) hints_.Publish(*cache_, PrefixCache::Use::kShare, kHintGrainTokens);
}

void DecodeCore::Verify(const VerifyLease& verify) {
  Status status = VerifyBlocks(arena_, verify.blocks);
  if (!status.ok()) metrics_.CountChecksumFailure();
  if (status.ok()) {
    std::vector<BlockSpan> came;
    for (const ExpectedBlock& block : verify.blocks)
      came.push_back({BlockRef::At(block.extent.offset), block.extent.bytes});
    status = pool_->pool().FromWire(came);
  }
  LeaseActions actions;
  {
    MutexLock lock(mu_);
    actions = leases_.OnVerified(verify.lease, status, DecodeNowNs());
  }
  Do(std::move(actions));
}

// Released meanwhile: the engine no longer knows the sequence, and whoever released it has ended the stream.
void DecodeCore::AdmitOnEngine(const RequestPtr& request) {
  if (engine_->kv(request->sequence) == nullptr) return;
  const LeaseReady& ready = *request->ready;
  if (ready.first_token.seed != request->sampling.seed) {
    return request->OnFailed(FailedPrecondition("prefill sampled with seed " + std::to_string(ready.first_token.seed) +
                                                ", decode was asked for " + std::to_string(request->sampling.seed)));
  }
  v1::DecodeEvent event;
  v1::Admitted* admitted = event.mutable_admitted();
  const double wire_seconds = Seconds(ready.facts.last_write_ns - ready.facts.first_write_ns);
  admitted->set_wire_seconds(wire_seconds);
  admitted->set_admit_seconds(Seconds(DecodeNowNs() - ready.facts.committed_ns));
  admitted->mutable_kv_bytes()->set_wire(ready.facts.bytes_received);
  metrics_.ObserveKvTransfer(wire_seconds);
  Admit(*request, std::move(event), {ready.first_token.id, ready.first_token.logprob, ready.first_token.top});
}

void DecodeCore::Admit(Request& request, v1::DecodeEvent event, SampledToken first_token) {
  request.admitted_ns = DecodeNowNs();
  event.mutable_admitted()->mutable_kv_bytes()->set_raw(model_.RawKvBytes(request.n_prompt_tokens));
  event.mutable_admitted()->mutable_kv_bytes()->set_packed(request.kv_bytes);
  request.sink->Send(std::move(event));
  DecodeStart start;
  start.sampling = request.sampling;
  start.prompt = std::move(request.prompt);
  start.n_prompt_tokens = request.n_prompt_tokens;
  start.first_token = std::move(first_token);
  start.listener = &request;
  start.n_streamed = request.n_streamed;
  const Status status = engine_->Admit(request.sequence, std::move(start));
  PublishUsage();
  if (!status.ok()) request.OnFailed(status);
}

// --- a prompt that is computed here ---

void DecodeCore::PrefillOnEngine(const RequestPtr& request, std::int64_t deadline_ns) {
  SequenceKv* const kv = engine_->local_prefill_kv(request->sequence);
  if (kv == nullptr) return;  // released meanwhile
  PrefillJob job;
  job.tokens = request->prompt;
  job.sampling = request->sampling;
  job.listener = request.get();
  job.n_streamed = request->n_streamed;
  job.priority = request->priority;
  job.deadline_ns = deadline_ns;
  job.into = kv;
  const Result<PrefillJobId> id = local_prefill_->Submit(std::move(job));
  if (!id.ok()) return request->OnFailed(id.status());
  request->prefill_job = *id;
  PublishUsage();
}

void DecodeCore::AdmitLocalOnEngine(Request& request, const SampledToken& token) {
  local_prefill_->Release(*request.prefill_job);
  v1::DecodeEvent event;
  event.mutable_admitted()->set_admit_seconds(Seconds(DecodeNowNs() - request.computed_ns));
  Admit(request, std::move(event), token);
}

}  // namespace zeroc
