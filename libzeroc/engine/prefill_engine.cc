#include "libzeroc/engine/prefill_engine.h"

#include <algorithm>
#include <iterator>
#include <string>

#include "libzeroc/base/check.h"

namespace zeroc {

struct PrefillEngine::Job {
  PrefillJobId id{};
  PrefillJob request;
  std::unique_ptr<SequenceKv> own;  // unless request.into
  SequenceKv* kv = nullptr;         // null until started

  int n_planned = 0;     // tokens of the step that is being planned
  bool refused = false;  // its blocks, in this step
  bool waited = false;   // for blocks, once at least
  int n_overtakes = 0;   // jobs that started since

  int n_shared_tokens = 0;  // an earlier prompt began with these: others may as well
  int n_kept_tokens = 0;    // of the last state in the prefix cache

  int n_tokens() const { return static_cast<int>(request.tokens.size()); }
  int n_left() const { return n_tokens() - (kv == nullptr ? 0 : kv->n_tokens()) - n_planned; }
};

namespace {

constexpr int kSlotTokens = kernels::kBlockTokens;  // chunks end at a block's end, except a prompt's last
// Enough that short prompts pass while a long one waits for blocks, few enough that its wait stays that of a few jobs.
constexpr int kOvertakesMax = 8;

enum class Slot : std::uint8_t { kFirst, kShortest, kOldest };
constexpr Slot kPattern[] = {Slot::kFirst, Slot::kShortest, Slot::kFirst, Slot::kShortest,
                             Slot::kFirst, Slot::kShortest, Slot::kFirst, Slot::kOldest};

// Turns the forward pass's "layer written" into the job's "blocks ready".
class LayerForwarder {
 public:
  // The chunk is the prompt's tokens [first, end); chunks begin at a block's first token.
  LayerForwarder(const SequenceKv& kv, PrefillListener& listener, int first, int end, int n_prompt)
      : kv_(kv), listener_(listener) {
    const KvFormat& format = kv.format();
    const int n_tiers = static_cast<int>(format.tiers.size());
    for (int tier = n_tiers - 1; tier >= 0; --tier) {
      // Of the blocks that enter the tier in this step, those that are still in it when the prompt is done.
      const int older = tier + 1 < n_tiers ? format.BlocksAt(tier + 1, n_prompt) : 0;
      const int begin = std::max(format.BlocksAt(tier, first), older);
      const int packed_end = std::min(format.BlocksAt(tier, end), format.BlocksAt(tier, n_prompt));
      if (begin < packed_end) packed_.push_back({begin, packed_end});
    }
    sink_ =
        n_tiers > 0 && format.sink_tokens > 0 && format.PackedBlocksAt(first) == 0 && format.PackedBlocksAt(end) > 0;
    const int tail = format.PackedBlocksAt(n_prompt);  // the blocks from here on stay exact
    const int full = end / kernels::kBlockTokens;
    const int written = end < n_prompt ? full : (end + kernels::kBlockTokens - 1) / kernels::kBlockTokens;
    exact_begin_ = std::max(first / kernels::kBlockTokens - tail, 0);
    exact_end_ = std::max(written - tail, exact_begin_);
  }

  void OnLayerWritten(int layer) {
    if (packed_.empty() && !sink_ && exact_begin_ >= exact_end_) return;
    listener_.OnBlocksReady(kv_, {layer, packed_, sink_, exact_begin_, exact_end_});
  }

 private:
  const SequenceKv& kv_;
  PrefillListener& listener_;
  std::vector<BlockRange> packed_;
  bool sink_ = false;
  int exact_begin_, exact_end_;
};

// One forward pass may hold chunks of several jobs.
class StepForwarder : public ForwardObserver {
 public:
  std::vector<LayerForwarder> jobs;
  void OnLayerWritten(int layer) override {
    for (LayerForwarder& job : jobs) job.OnLayerWritten(layer);
  }
};

}  // namespace

PrefillEngine::PrefillEngine(Transformer& model, BlockPool& pool, const Options& options, PrefixCache* cache)
    : model_(model), pool_(pool), options_(options), cache_(cache) {
  ZEROC_CHECK(options.chunk_tokens >= kernels::kBlockTokens && options.chunk_tokens % kernels::kBlockTokens == 0,
              options.chunk_tokens);
}

PrefillEngine::~PrefillEngine() = default;

Status CheckPrefillJob(const PrefillJob& job, const ModelConfig& config) {
  const auto max_positions = static_cast<std::size_t>(config.max_positions);
  if (job.tokens.empty() || job.tokens.size() > max_positions) {
    return InvalidArgument("a prompt of " + std::to_string(job.tokens.size()) + " tokens; the model takes 1 to " +
                           std::to_string(max_positions));
  }
  for (const std::int32_t id : job.tokens) {
    if (id < 0 || id >= config.vocab_size) {
      return InvalidArgument("token id " + std::to_string(id) + " is not in [0, " + std::to_string(config.vocab_size) +
                             ")");
    }
  }
  if (job.n_streamed < 0 || static_cast<std::size_t>(job.n_streamed) >= job.tokens.size()) {
    return InvalidArgument("n_streamed " + std::to_string(job.n_streamed) + " leaves nothing of a prompt of " +
                           std::to_string(job.tokens.size()) + " tokens");
  }
  return job.sampling.Validate(config.vocab_size, job.n_streamed);
}

Result<PrefillJobId> PrefillEngine::Submit(PrefillJob job) {
  ZEROC_CHECK(job.listener != nullptr && (job.format != nullptr || job.into != nullptr));
  ZEROC_RETURN_IF_ERROR(CheckPrefillJob(job, model_.config()));
  if (n_waiting() >= options_.queue_max) {
    return ResourceExhausted("prefill queue: " + std::to_string(options_.queue_max) + " prompts wait already");
  }
  const PrefillJobId id{next_id_++};
  auto owned = std::make_unique<Job>();
  owned->id = id;
  owned->request = std::move(job);
  jobs_[id] = std::move(owned);
  waiting_.push_back(id);
  return id;
}

void PrefillEngine::Release(PrefillJobId id) {
  jobs_.erase(id);
  std::erase(waiting_, id);
}

int PrefillEngine::n_queued() const {
  return static_cast<int>(
      std::count_if(waiting_.begin(), waiting_.end(), [this](PrefillJobId id) { return jobs_.at(id)->kv == nullptr; }));
}

std::int64_t PrefillEngine::waiting_tokens() const {
  std::int64_t n = 0;
  for (const PrefillJobId id : waiting_) n += jobs_.at(id)->n_left();
  return n;
}

void PrefillEngine::Fail(Job& job, const Status& status) {
  std::erase(waiting_, job.id);
  job.request.listener->OnFailed(status);  // may release the job
}

void PrefillEngine::DropLate(std::int64_t now_ns) {
  const std::vector<PrefillJobId> ids = waiting_;
  for (const PrefillJobId id : ids) {
    const auto found = jobs_.find(id);
    if (found == jobs_.end()) continue;
    Job& job = *found->second;
    if (job.request.deadline_ns == 0 || now_ns < job.request.deadline_ns) continue;
    const int n_done = job.n_tokens() - job.n_left();
    Fail(job, DeadlineExceeded("the deadline passed with " + std::to_string(n_done) + " of " +
                               std::to_string(job.n_tokens()) + " prompt tokens computed"));
  }
}

Status PrefillEngine::TakeBlocks(Job& job) {
  if (job.request.into != nullptr) {
    ZEROC_RETURN_IF_ERROR(job.request.into->Unshare());
    job.kv = job.request.into;
    return OkStatus();
  }
  const int n_tokens = job.n_tokens(), step_tokens = std::min(options_.chunk_tokens, n_tokens);
  PrefixCache::Found found;
  // Only where a step of a prompt on its own ends: what follows is then computed in the same steps, cached or not.
  ZEROC_ASSIGN_OR_RETURN(job.own, cache_ != nullptr
                                      ? cache_->CreateResumed(job.request.format, job.request.tokens, n_tokens,
                                                              step_tokens, options_.chunk_tokens, &found)
                                      : SequenceKv::Create(pool_, job.request.format, n_tokens, step_tokens));
  job.kv = job.own.get();
  job.n_kept_tokens = job.kv->n_tokens();
  job.n_shared_tokens = found.n_shared_tokens;
  return OkStatus();
}

// At multiples of the chunk that the last step reached: the prompt's last one, the last one that an earlier prompt had
// too, and some between (docs/prefix_cache.md).
void PrefillEngine::KeepStates(Job& job, int step_begin) {
  if (cache_ == nullptr) return;
  const int grain = options_.chunk_tokens;
  const int spacing = PrefixCache::StateSpacing(job.kv->format());
  for (int n = (step_begin / grain + 1) * grain; n <= job.kv->n_tokens(); n += grain) {
    const bool is_last = n + grain > job.n_tokens();
    const bool parts_here = n <= job.n_shared_tokens && n + grain > job.n_shared_tokens;
    if (!is_last && !parts_here && n - job.n_kept_tokens < spacing) continue;
    if (cache_->KeepState(*job.kv, job.request.tokens, n)) job.n_kept_tokens = n;
  }
}

PrefillEngine::StartResult PrefillEngine::Start(Job& job) {
  const Status status = TakeBlocks(job);
  if (status.ok()) {
    for (const PrefillJobId id : waiting_) {
      Job& other = *jobs_.at(id);
      if (other.waited && other.kv == nullptr) ++other.n_overtakes;
    }
    const int n_cached = job.kv->n_tokens();
    job.request.listener->OnStarted(n_cached);
    LayerForwarder forwarder(*job.kv, *job.request.listener, 0, n_cached, job.n_tokens());
    for (int layer = 0; layer < job.kv->format().n_layers; ++layer) forwarder.OnLayerWritten(layer);
    return StartResult::kStarted;
  }
  const bool others_hold_blocks = pool_.usage().n_blocks_used > 0;
  if (status.code() == StatusCode::kResourceExhausted && others_hold_blocks) {
    job.refused = job.waited = true;
    return StartResult::kMustWait;
  }
  Fail(job, status);
  return StartResult::kFailed;
}

PrefillEngine::Job* PrefillEngine::Next(int budget) {
  const Job* overtaken = nullptr;
  for (const PrefillJobId id : waiting_) {
    const Job& job = *jobs_.at(id);
    if (overtaken == nullptr && job.kv == nullptr && job.n_overtakes >= kOvertakesMax) overtaken = &job;
  }
  const Slot slot = kPattern[slot_ % std::size(kPattern)];
  const auto better = [slot](const Job& a, const Job& b) {  // b is older
    if (slot == Slot::kOldest) return false;
    if (a.request.priority != b.request.priority) return a.request.priority > b.request.priority;
    return slot == Slot::kShortest && a.n_left() < b.n_left();
  };
  Job* best = nullptr;
  for (const PrefillJobId id : waiting_) {
    Job& job = *jobs_.at(id);
    const int n_next = std::min(job.n_left(), kSlotTokens);
    if (n_next == 0 || n_next > budget || job.refused) continue;
    if (job.kv == nullptr && overtaken != nullptr && overtaken != &job) continue;
    if (best == nullptr || better(job, *best)) best = &job;
  }
  return best;
}

std::vector<PrefillEngine::Chunk> PrefillEngine::PlanStep() {
  for (const PrefillJobId id : waiting_) {
    Job& job = *jobs_.at(id);
    job.n_planned = 0;
    job.refused = false;
  }
  std::vector<Chunk> chunks;
  int budget = options_.chunk_tokens;
  while (Job* job = Next(budget)) {
    const StartResult started = job->kv == nullptr ? Start(*job) : StartResult::kStarted;
    if (started != StartResult::kStarted) continue;
    const int n = std::min(job->n_left(), kSlotTokens);
    const auto same = std::find_if(chunks.begin(), chunks.end(), [job](const Chunk& c) { return c.id == job->id; });
    if (same == chunks.end()) {
      chunks.push_back({job->id, n});
    } else {
      same->n_tokens += n;
    }
    job->n_planned += n;
    budget -= n;
    ++slot_;
  }
  return chunks;
}

void PrefillEngine::RunStep(const std::vector<Chunk>& chunks) {
  std::vector<ForwardSequence> sequences;
  std::vector<bool> is_last;
  StepForwarder forwarder;
  last_step_tokens_ = 0;
  for (const Chunk& chunk : chunks) {
    Job& job = *jobs_.at(chunk.id);
    job.n_planned = 0;
    const int begin = job.kv->n_tokens(), end = begin + chunk.n_tokens;
    is_last.push_back(end == job.n_tokens());
    const auto tokens = std::span<const std::int32_t>(job.request.tokens)
                            .subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(chunk.n_tokens));
    sequences.push_back({job.kv, tokens, is_last.back() ? 1 : 0});
    forwarder.jobs.emplace_back(*job.kv, *job.request.listener, begin, end, job.n_tokens());
    last_step_tokens_ += chunk.n_tokens;
  }
  const auto vocab = static_cast<std::size_t>(model_.config().vocab_size);
  logits_.resize(vocab * static_cast<std::size_t>(std::count(is_last.begin(), is_last.end(), true)));
  const Status status = model_.Forward(sequences, logits_.data(), &forwarder);
  std::span<const float> logits(logits_);
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    const auto found = jobs_.find(chunks[i].id);
    const bool is_there = found != jobs_.end();
    if (is_there && !status.ok()) Fail(*found->second, status);
    if (!is_last[i] || !status.ok()) continue;
    if (is_there) Finish(*found->second, logits.first(vocab));
    logits = logits.subspan(vocab);
  }
  if (!status.ok()) return;
  // Last, because the first tokens need not wait for it.
  for (const Chunk& chunk : chunks) {
    const auto found = jobs_.find(chunk.id);
    if (found == jobs_.end()) continue;
    Job& job = *found->second;
    KeepStates(job, job.kv->n_tokens() - chunk.n_tokens);
  }
}

void PrefillEngine::Finish(Job& job, std::span<const float> logits) {
  std::erase(waiting_, job.id);
  const Sampler sampler(job.request.sampling, job.request.tokens, job.request.n_streamed);
  job.request.listener->OnFirstToken(*job.kv, sampler.Sample(logits, job.n_tokens()));  // may release the job
}

bool PrefillEngine::Step(std::int64_t now_ns) {
  DropLate(now_ns);
  const std::vector<Chunk> chunks = PlanStep();
  if (chunks.empty()) return false;  // a Submit, or the Release of another job, wakes the loop
  RunStep(chunks);
  return true;
}

}  // namespace zeroc
