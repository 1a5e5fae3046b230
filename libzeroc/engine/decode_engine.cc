#include "libzeroc/engine/decode_engine.h"

#include <algorithm>
#include <string>

#include "libzeroc/base/check.h"

namespace zeroc {

struct DecodeEngine::Sequence {
  std::unique_ptr<SequenceKv> kv;
  int n_prompt_tokens = 0;
  int max_tokens = 0;

  // From Admit on.
  std::unique_ptr<Sampler> sampler;
  SamplingParams sampling;
  DecodeListener* listener = nullptr;
  std::int32_t next_input = 0;  // the newest token; its keys and values are not computed yet
  int n_generated = 0;          // next_input included
};

bool EndsRequest(const SamplingParams& sampling, std::span<const int> eos_ids, std::int32_t id, int n_generated,
                 FinishReason* reason) {
  const bool is_stop = std::find(sampling.stop_ids.begin(), sampling.stop_ids.end(), id) != sampling.stop_ids.end();
  const bool is_eos = !sampling.ignore_eos && std::find(eos_ids.begin(), eos_ids.end(), id) != eos_ids.end();
  if (is_stop || is_eos) {
    *reason = FinishReason::kStop;
    return true;
  }
  *reason = FinishReason::kLength;
  return n_generated >= sampling.max_tokens;
}

bool EndsRequest(const SamplingParams& sampling, std::span<const int> eos_ids, const SampledToken& token,
                 int n_generated, FinishReason* reason) {
  if (!token.forced) return EndsRequest(sampling, eos_ids, token.id, n_generated, reason);
  *reason = FinishReason::kLength;
  return n_generated >= sampling.max_tokens;
}

DecodeEngine::DecodeEngine(Transformer& model, BlockPool& pool, const Options& options)
    : model_(model), pool_(pool), options_(options) {
  ZEROC_CHECK(options.batch_max >= 1, options.batch_max);
}

DecodeEngine::~DecodeEngine() = default;

Result<SequenceId> DecodeEngine::Reserve(std::shared_ptr<const KvFormat> format, int n_prompt_tokens, int max_tokens) {
  const std::int64_t max_positions = model_.config().max_positions;
  if (n_prompt_tokens < 1 || max_tokens < 1 || std::int64_t{n_prompt_tokens} + max_tokens > max_positions) {
    return InvalidArgument("a prompt of " + std::to_string(n_prompt_tokens) + " and an output of " +
                           std::to_string(max_tokens) + " tokens do not fit " + std::to_string(max_positions) +
                           " positions");
  }
  // The last sampled token is never fed back, so its keys and values need no room.
  const int n_held = std::max(n_prompt_tokens, n_prompt_tokens + max_tokens - 1);
  ZEROC_ASSIGN_OR_RETURN(std::unique_ptr<SequenceKv> kv, SequenceKv::Create(pool_, std::move(format), n_held, 1));
  const SequenceId id{next_id_++};
  auto sequence = std::make_unique<Sequence>();
  sequence->kv = std::move(kv);
  sequence->n_prompt_tokens = n_prompt_tokens;
  sequence->max_tokens = max_tokens;
  sequences_[id] = std::move(sequence);
  return id;
}

const SequenceKv* DecodeEngine::kv(SequenceId id) const {
  const auto found = sequences_.find(id);
  return found == sequences_.end() ? nullptr : found->second->kv.get();
}

Status DecodeEngine::Admit(SequenceId id, DecodeStart start) {
  ZEROC_CHECK(start.listener != nullptr);
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) return NotFound("no sequence " + std::to_string(static_cast<std::uint64_t>(id)));
  Sequence& sequence = *found->second;
  if (sequence.listener != nullptr) return FailedPrecondition("the sequence was admitted before");
  if (start.n_streamed < 0 || start.n_streamed >= start.n_prompt_tokens) {
    return InvalidArgument("n_streamed " + std::to_string(start.n_streamed) + " leaves nothing of a prompt of " +
                           std::to_string(start.n_prompt_tokens) + " tokens");
  }
  ZEROC_RETURN_IF_ERROR(start.sampling.Validate(model_.config().vocab_size, start.n_streamed));
  const bool knows_prompt = start.prompt.size() == static_cast<std::size_t>(start.n_prompt_tokens);
  if (!knows_prompt && start.sampling.LooksAtPrompt(start.n_streamed)) {
    return InvalidArgument("the sampling's penalties look at a prompt of " + std::to_string(start.n_prompt_tokens) +
                           " tokens, and " + std::to_string(start.prompt.size()) + " were given");
  }
  if (start.n_prompt_tokens != sequence.n_prompt_tokens || start.sampling.max_tokens > sequence.max_tokens) {
    return InvalidArgument("reserved for " + std::to_string(sequence.n_prompt_tokens) + " + " +
                           std::to_string(sequence.max_tokens) + " tokens, admitted with " +
                           std::to_string(start.n_prompt_tokens) + " + " + std::to_string(start.sampling.max_tokens));
  }
  if (start.first_token.id < 0 || start.first_token.id >= model_.config().vocab_size) {
    return InvalidArgument("first token " + std::to_string(start.first_token.id) + " is not in the vocabulary");
  }
  sequence.kv->AdoptPrompt(start.n_prompt_tokens);
  sequence.sampler = std::make_unique<Sampler>(start.sampling, start.prompt, start.n_streamed);
  sequence.sampler->Accept(start.first_token.id);
  sequence.sampling = std::move(start.sampling);
  sequence.listener = start.listener;
  sequence.next_input = start.first_token.id;
  sequence.n_generated = 1;
  FinishReason reason;
  start.first_token.forced = sequence.sampling.IsForced(start.n_prompt_tokens);
  if (EndsRequest(sequence.sampling, model_.config().eos_ids, start.first_token, 1, &reason)) {
    sequence.listener->OnFinished(reason);
  } else {
    running_.push_back(id);
  }
  return OkStatus();
}

void DecodeEngine::Release(SequenceId id) {
  std::erase(running_, id);
  sequences_.erase(id);
}

int DecodeEngine::n_running() const { return static_cast<int>(running_.size()); }

void DecodeEngine::Deliver(SequenceId id, const SampledToken& token) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) return;  // released by a listener earlier in this step
  Sequence& sequence = *found->second;
  sequence.sampler->Accept(token.id);
  sequence.next_input = token.id;
  ++sequence.n_generated;
  DecodeListener* listener = sequence.listener;
  FinishReason reason;
  const bool ends = EndsRequest(sequence.sampling, model_.config().eos_ids, token, sequence.n_generated, &reason);
  if (ends) std::erase(running_, id);
  listener->OnToken(token);  // may release the sequence
  if (ends && sequences_.contains(id)) listener->OnFinished(reason);
}

bool DecodeEngine::Step() {
  if (running_.empty()) return false;
  // Everyone gets a turn: with more than batch_max running, each step starts where the last one ended.
  const std::size_t n = std::min(running_.size(), static_cast<std::size_t>(options_.batch_max));
  std::vector<SequenceId> batch;
  std::vector<ForwardSequence> inputs;
  for (std::size_t i = 0; i < n; ++i) {
    batch.push_back(running_[(next_in_turn_ + i) % running_.size()]);
    Sequence& sequence = *sequences_.at(batch.back());
    inputs.push_back({sequence.kv.get(), {&sequence.next_input, 1}, 1});
  }
  next_in_turn_ = n == running_.size() ? 0 : (next_in_turn_ + n) % running_.size();
  const auto vocab = static_cast<std::size_t>(model_.config().vocab_size);
  logits_.resize(n * vocab);
  const Status status = model_.Forward(inputs, logits_.data());
  for (std::size_t i = 0; i < n; ++i) {
    const auto found = sequences_.find(batch[i]);
    if (found == sequences_.end()) continue;
    Sequence& sequence = *found->second;
    if (!status.ok()) {
      std::erase(running_, batch[i]);
      sequence.listener->OnFailed(status);
      continue;
    }
    const int position = sequence.n_prompt_tokens + sequence.n_generated;
    Deliver(batch[i], sequence.sampler->Sample({logits_.data() + i * vocab, vocab}, position));
  }
  return true;
}

}  // namespace zeroc
