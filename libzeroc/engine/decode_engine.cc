#include "libzeroc/engine/decode_engine.h"

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "libzeroc/base/check.h"
#include "libzeroc/kv/kv_snapshot.h"

namespace zeroc {

namespace {

// A turn in this many steps at least, however many more urgent sequences there are.
constexpr std::uint64_t kTurnsMax = 16;

std::string Name(SequenceId id) { return "sequence " + std::to_string(static_cast<std::uint64_t>(id)); }

}  // namespace

struct DecodeEngine::Sequence {
  std::shared_ptr<const KvFormat> format;
  std::unique_ptr<SequenceKv> kv;      // null while preempted, and once failed
  std::optional<KvSnapshot> snapshot;  // while preempted
  int n_prompt_tokens = 0;
  int max_tokens = 0;
  int priority = 0;
  bool local_prefill = false;
  std::vector<std::int32_t> prompt;  // for the prefix cache; empty: not cached

  // From Admit on.
  std::unique_ptr<Sampler> sampler;
  SamplingParams sampling;
  DecodeListener* listener = nullptr;
  std::int32_t next_input = 0;  // the newest token; its keys and values are not computed yet
  int n_generated = 0;          // next_input included
  std::uint64_t last_step = 0;  // that it took part in
  std::uint64_t last_turn = 0;  // among all turns of all sequences

  // The last sampled token is never fed back, so its keys and values need no room.
  int n_held_max() const { return n_prompt_tokens + max_tokens - 1; }
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

DecodeEngine::DecodeEngine(Transformer& model, BlockPool& pool, const Options& options, PrefixCache* cache)
    : model_(model), pool_(pool), options_(options), cache_(cache) {
  ZEROC_CHECK(options.batch_max >= 1 && options.headroom_tokens >= 1, options.batch_max, options.headroom_tokens);
}

DecodeEngine::~DecodeEngine() = default;

DecodeEngine::Sequence* DecodeEngine::Find(SequenceId id) {
  const auto found = sequences_.find(id);
  return found == sequences_.end() ? nullptr : found->second.get();
}
const DecodeEngine::Sequence* DecodeEngine::Find(SequenceId id) const {
  return const_cast<DecodeEngine*>(this)->Find(id);
}

Result<SequenceId> DecodeEngine::Reserve(std::shared_ptr<const KvFormat> format, int n_prompt_tokens, int max_tokens,
                                         int priority, std::vector<std::int32_t> prompt, int local_step_tokens) {
  const std::int64_t max_positions = model_.config().max_positions;
  if (n_prompt_tokens < 1 || max_tokens < 1 || std::int64_t{n_prompt_tokens} + max_tokens > max_positions) {
    return InvalidArgument("a prompt of " + std::to_string(n_prompt_tokens) + " and an output of " +
                           std::to_string(max_tokens) + " tokens do not fit " + std::to_string(max_positions) +
                           " positions");
  }
  if (!prompt.empty() && prompt.size() != static_cast<std::size_t>(n_prompt_tokens)) {
    return InvalidArgument(std::to_string(prompt.size()) + " ids of a prompt of " + std::to_string(n_prompt_tokens));
  }
  auto sequence = std::make_unique<Sequence>();
  sequence->format = std::move(format);
  sequence->n_prompt_tokens = n_prompt_tokens;
  sequence->max_tokens = max_tokens;
  sequence->priority = priority;
  sequence->local_prefill = local_step_tokens > 0;
  // The long steps of a prompt are over before the output grows; then their room is given back.
  const int step_tokens = std::max(1, std::min(local_step_tokens, n_prompt_tokens));
  const int room = RoomFor(*sequence, n_prompt_tokens);
  const std::uint64_t bytes = std::max(SequenceKv::BytesNeeded(*sequence->format, sequence->n_held_max(), 1),
                                       SequenceKv::BytesNeeded(*sequence->format, room, step_tokens));
  if (bytes > pool_.usage().bytes_total) {
    return Status(StatusCode::kOutOfRange, "a prompt of " + std::to_string(n_prompt_tokens) + " and an output of " +
                                               std::to_string(max_tokens) + " tokens take " + std::to_string(bytes) +
                                               " KV bytes, more than this worker's " +
                                               std::to_string(pool_.usage().bytes_total));
  }
  for (const SequenceId id : preempted_) {
    if (sequences_.at(id)->priority >= priority) {
      return ResourceExhausted(std::to_string(preempted_.size()) + " preempted sequences wait for blocks");
    }
  }
  if (cache_ != nullptr) sequence->prompt = std::move(prompt);
  const bool shares = !sequence->prompt.empty() && !sequence->local_prefill;  // all of a local one is written
  ZEROC_ASSIGN_OR_RETURN(sequence->kv, shares ? cache_->CreateSharing(sequence->format, sequence->prompt, room, 1)
                                              : SequenceKv::Create(pool_, sequence->format, room, step_tokens));
  const SequenceId id{next_id_++};
  sequences_[id] = std::move(sequence);
  return id;
}

const SequenceKv* DecodeEngine::kv(SequenceId id) const {
  const Sequence* found = Find(id);
  return found == nullptr ? nullptr : found->kv.get();
}

SequenceKv* DecodeEngine::local_prefill_kv(SequenceId id) {
  const Sequence* sequence = Find(id);
  return sequence != nullptr && sequence->local_prefill && sequence->listener == nullptr ? sequence->kv.get() : nullptr;
}

Status DecodeEngine::Admit(SequenceId id, DecodeStart start) {
  ZEROC_CHECK(start.listener != nullptr);
  Sequence* found = Find(id);
  if (found == nullptr) return NotFound("no " + Name(id));
  Sequence& sequence = *found;
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
  if (!start.prompt.empty() && !sequence.prompt.empty() && start.prompt != sequence.prompt) {
    return InvalidArgument("admitted with another prompt than the one that was reserved for");
  }
  if (start.first_token.id < 0 || start.first_token.id >= model_.config().vocab_size) {
    return InvalidArgument("first token " + std::to_string(start.first_token.id) + " is not in the vocabulary");
  }
  if (sequence.kv->n_tokens() == 0) sequence.kv->AdoptPrompt(start.n_prompt_tokens);
  ZEROC_CHECK(sequence.kv->n_tokens() == start.n_prompt_tokens, sequence.kv->n_tokens(), start.n_prompt_tokens);
  const Status shrunk = sequence.kv->Resize(sequence.kv->max_tokens(), 1);  // only gives back
  ZEROC_CHECK(shrunk.ok(), shrunk.ToString());
  KeepPrompt(sequence);
  sequence.sampler = std::make_unique<Sampler>(start.sampling, start.prompt, start.n_streamed);
  sequence.sampler->Accept(start.first_token.id);
  sequence.sampling = std::move(start.sampling);
  sequence.listener = start.listener;
  sequence.next_input = start.first_token.id;
  sequence.n_generated = 1;
  sequence.last_step = n_steps_;
  sequence.last_turn = ++n_turns_;
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
  const Sequence* sequence = Find(id);
  if (sequence == nullptr) return;
  std::erase(running_, id);
  std::erase(preempted_, id);
  if (sequence->sampler != nullptr) KeepPrompt(*sequence);
  if (sequence->snapshot.has_value()) swapped_bytes_ -= sequence->snapshot->bytes();
  sequences_.erase(id);
}

// Blocks with tokens of the answer are not kept: they were computed row by row, and prefill, which would compute them
// in chunks, may round differently.
void DecodeEngine::KeepPrompt(const Sequence& sequence) {
  if (sequence.prompt.empty() || sequence.kv == nullptr) return;
  const SequenceKv& kv = *sequence.kv;
  cache_->KeepLasting(
      kv, sequence.prompt,
      std::min(sequence.n_prompt_tokens / kernels::kBlockTokens, kv.format().LastingBlocksAt(kv.n_tokens())));
}

int DecodeEngine::n_running() const { return static_cast<int>(running_.size()); }

void DecodeEngine::Deliver(SequenceId id, const SampledToken& token) {
  Sequence* found = Find(id);
  if (found == nullptr) return;  // released by a listener earlier in this step
  Sequence& sequence = *found;
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

// --- blocks ---

bool DecodeEngine::Before(SequenceId a, SequenceId b) const {
  const int priority_a = sequences_.at(a)->priority, priority_b = sequences_.at(b)->priority;
  return priority_a != priority_b ? priority_a > priority_b : a < b;
}

SequenceId DecodeEngine::LowestRunning() const {
  return *std::max_element(running_.begin(), running_.end(),
                           [this](SequenceId a, SequenceId b) { return Before(a, b); });
}

int DecodeEngine::RoomFor(const Sequence& sequence, int n_tokens) const {
  return static_cast<int>(
      std::min(std::int64_t{sequence.n_held_max()}, std::int64_t{n_tokens} + options_.headroom_tokens));
}

// What the sequence will ask for next.
std::uint64_t DecodeEngine::GrowthBytes(const Sequence& sequence) const {
  const int room = sequence.kv->max_tokens();
  return SequenceKv::BytesNeeded(*sequence.format, RoomFor(sequence, room), 1) -
         SequenceKv::BytesNeeded(*sequence.format, room, 1);
}

void DecodeEngine::MakeRoom(SequenceId id) {
  for (;;) {
    Sequence* sequence = Find(id);
    if (sequence == nullptr || sequence->kv == nullptr) return;
    SequenceKv& kv = *sequence->kv;
    if (kv.n_tokens() < kv.max_tokens() || kv.Resize(RoomFor(*sequence, kv.n_tokens()), 1).ok()) return;
    Preempt(LowestRunning());  // perhaps itself
  }
}

void DecodeEngine::Preempt(SequenceId id) {
  Sequence& sequence = *sequences_.at(id);
  ++n_preemptions_;
  std::erase(running_, id);
  const std::uint64_t bytes = sequence.kv->HeldBytes();
  if (swapped_bytes_ + bytes > options_.swap_bytes) {
    return FailPreempted(id, std::to_string(swapped_bytes_) + " of " + std::to_string(options_.swap_bytes) +
                                 " swap bytes are taken and it holds " + std::to_string(bytes));
  }
  Result<KvSnapshot> snapshot = KvSnapshot::Take(*sequence.kv);
  if (!snapshot.ok()) return FailPreempted(id, std::string(snapshot.status().message()));
  sequence.snapshot = std::move(*snapshot);
  sequence.kv.reset();
  swapped_bytes_ += bytes;
  preempted_.push_back(id);
}

void DecodeEngine::FailPreempted(SequenceId id, const std::string& why) {
  Sequence& sequence = *sequences_.at(id);
  std::erase(preempted_, id);
  sequence.kv.reset();  // at once: others wait for the blocks
  sequence.listener->OnFailed(ResourceExhausted("preempted after " + std::to_string(sequence.n_generated) +
                                                " tokens of output: the KV memory is full, " + why));
}

bool DecodeEngine::Resume(SequenceId id) {
  Sequence& sequence = *sequences_.at(id);
  const int room = RoomFor(sequence, sequence.snapshot->n_tokens());
  // With room for what the others will ask for next: else it would be out again before it got anywhere.
  std::uint64_t bytes = SequenceKv::BytesNeeded(*sequence.format, room, 1);
  for (const SequenceId other : running_) bytes += GrowthBytes(*sequences_.at(other));
  const BlockPool::Usage usage = pool_.usage();
  if (bytes > usage.bytes_total - usage.bytes_used) return false;
  Result<std::unique_ptr<SequenceKv>> kv = SequenceKv::Create(pool_, sequence.format, room, 1);
  if (!kv.ok()) return false;
  sequence.kv = std::move(*kv);
  const Status restored = sequence.snapshot->Restore(*sequence.kv);
  swapped_bytes_ -= sequence.snapshot->bytes();
  sequence.snapshot.reset();
  if (!restored.ok()) {
    FailPreempted(id, std::string(restored.message()));
    return true;  // nothing of it waits any more
  }
  std::erase(preempted_, id);
  running_.push_back(id);
  return true;
}

void DecodeEngine::ResumePreempted() {
  while (!preempted_.empty()) {
    const SequenceId first = *std::min_element(preempted_.begin(), preempted_.end(),
                                               [this](SequenceId a, SequenceId b) { return Before(a, b); });
    if (Resume(first)) continue;
    if (pool_.usage().n_blocks_used > 0) return;  // they come back
    Sequence& sequence = *sequences_.at(first);
    swapped_bytes_ -= sequence.snapshot->bytes();
    sequence.snapshot.reset();
    FailPreempted(first, "and it does not fit alone");
  }
}

// --- the step ---

std::vector<SequenceId> DecodeEngine::NextBatch() {
  std::vector<SequenceId> order = running_;
  const auto key = [this](SequenceId id) {
    const Sequence& s = *sequences_.at(id);
    const bool overdue = n_steps_ - s.last_step >= kTurnsMax;
    return std::tuple(overdue ? 0 : 1, overdue ? std::int64_t{0} : -std::int64_t{s.priority}, s.last_turn);
  };
  const std::size_t n = std::min(order.size(), static_cast<std::size_t>(options_.batch_max));
  if (n < order.size()) {
    std::sort(order.begin(), order.end(), [&](SequenceId a, SequenceId b) { return key(a) < key(b); });
    order.resize(n);
  }
  // Room first for the first in rank: those that it takes blocks from have taken none of this step's.
  std::vector<SequenceId> by_rank = order;
  std::sort(by_rank.begin(), by_rank.end(), [this](SequenceId a, SequenceId b) { return Before(a, b); });
  for (const SequenceId id : by_rank) MakeRoom(id);
  std::erase_if(order, [this](SequenceId id) { return kv(id) == nullptr; });
  for (const SequenceId id : order) {
    sequences_.at(id)->last_step = n_steps_;
    sequences_.at(id)->last_turn = ++n_turns_;
  }
  return order;
}

void DecodeEngine::RunBatch(const std::vector<SequenceId>& batch) {
  std::vector<ForwardSequence> inputs;
  for (const SequenceId id : batch) {
    Sequence& sequence = *sequences_.at(id);
    inputs.push_back({sequence.kv.get(), {&sequence.next_input, 1}, 1});
  }
  const auto vocab = static_cast<std::size_t>(model_.config().vocab_size);
  logits_.resize(batch.size() * vocab);
  last_step_tokens_ = static_cast<int>(batch.size());
  const Status status = model_.Forward(inputs, logits_.data());
  for (std::size_t i = 0; i < batch.size(); ++i) {
    Sequence* sequence = Find(batch[i]);
    if (sequence == nullptr) continue;
    if (!status.ok()) {
      std::erase(running_, batch[i]);
      sequence->listener->OnFailed(status);
      continue;
    }
    const int position = sequence->n_prompt_tokens + sequence->n_generated;
    Deliver(batch[i], sequence->sampler->Sample({logits_.data() + i * vocab, vocab}, position));
  }
}

bool DecodeEngine::Step() {
  last_step_tokens_ = 0;
  ResumePreempted();
  if (running_.empty()) return false;
  ++n_steps_;
  const std::uint64_t n_before = n_preemptions_;
  const std::vector<SequenceId> batch = NextBatch();
  if (!batch.empty()) RunBatch(batch);
  // Blocks of the preempted may let another come back. Else whoever waits is woken by the Release that it waits for.
  return !batch.empty() || n_preemptions_ != n_before;
}

}  // namespace zeroc
