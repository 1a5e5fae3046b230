#include "libzeroc/engine/prefill_engine.h"

#include <algorithm>
#include <string>

#include "libzeroc/base/check.h"

namespace zeroc {

struct PrefillEngine::Job {
  PrefillJobId id{};
  PrefillJob request;
  std::unique_ptr<SequenceKv> kv;  // null while waiting for blocks

  int n_tokens() const { return static_cast<int>(request.tokens.size()); }
  int n_done() const { return kv == nullptr ? 0 : kv->n_tokens(); }
};

namespace {

// Turns the forward pass's "layer written" into the job's "blocks ready".
class LayerForwarder : public ForwardObserver {
 public:
  // The chunk is the prompt's tokens [kv.n_tokens(), end); chunks begin at a block's first token.
  LayerForwarder(const SequenceKv& kv, PrefillListener& listener, int end, int n_prompt)
      : kv_(kv), listener_(listener) {
    const KvFormat& format = kv.format();
    const int n_tiers = static_cast<int>(format.tiers.size());
    for (int tier = n_tiers - 1; tier >= 0; --tier) {
      // Of the blocks that enter the tier in this step, those that are still in it when the prompt is done.
      const int older = tier + 1 < n_tiers ? format.BlocksAt(tier + 1, n_prompt) : 0;
      const int begin = std::max(format.BlocksAt(tier, kv.n_tokens()), older);
      const int packed_end = std::min(format.BlocksAt(tier, end), format.BlocksAt(tier, n_prompt));
      if (begin < packed_end) packed_.push_back({begin, packed_end});
    }
    sink_ = n_tiers > 0 && format.sink_tokens > 0 && format.PackedBlocksAt(kv.n_tokens()) == 0 &&
            format.PackedBlocksAt(end) > 0;
    const int tail = format.PackedBlocksAt(n_prompt);  // the blocks from here on stay exact
    const int full = end / kernels::kBlockTokens;
    const int written = end < n_prompt ? full : (end + kernels::kBlockTokens - 1) / kernels::kBlockTokens;
    exact_begin_ = std::max(kv.n_tokens() / kernels::kBlockTokens - tail, 0);
    exact_end_ = std::max(written - tail, exact_begin_);
  }

  void OnLayerWritten(int layer) override {
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

}  // namespace

PrefillEngine::PrefillEngine(Transformer& model, BlockPool& pool, const Options& options)
    : model_(model), pool_(pool), options_(options) {
  ZEROC_CHECK(options.chunk_tokens >= kernels::kBlockTokens && options.chunk_tokens % kernels::kBlockTokens == 0,
              options.chunk_tokens);
}

PrefillEngine::~PrefillEngine() = default;

Result<PrefillJobId> PrefillEngine::Submit(PrefillJob job) {
  ZEROC_CHECK(job.listener != nullptr && job.format != nullptr);
  const auto max_positions = static_cast<std::size_t>(model_.config().max_positions);
  if (job.tokens.empty() || job.tokens.size() > max_positions) {
    return InvalidArgument("a prompt of " + std::to_string(job.tokens.size()) + " tokens; the model takes 1 to " +
                           std::to_string(max_positions));
  }
  for (const std::int32_t id : job.tokens) {
    if (id < 0 || id >= model_.config().vocab_size) {
      return InvalidArgument("token id " + std::to_string(id) + " is not in [0, " +
                             std::to_string(model_.config().vocab_size) + ")");
    }
  }
  if (job.n_streamed < 0 || static_cast<std::size_t>(job.n_streamed) >= job.tokens.size()) {
    return InvalidArgument("n_streamed " + std::to_string(job.n_streamed) + " leaves nothing of a prompt of " +
                           std::to_string(job.tokens.size()) + " tokens");
  }
  ZEROC_RETURN_IF_ERROR(job.sampling.Validate(model_.config().vocab_size, job.n_streamed));
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

std::int64_t PrefillEngine::waiting_tokens() const {
  std::int64_t n = 0;
  for (const PrefillJobId id : waiting_) {
    const Job& job = *jobs_.at(id);
    n += job.n_tokens() - job.n_done();
  }
  return n;
}

PrefillEngine::StartResult PrefillEngine::Start(Job& job) {
  Result<std::unique_ptr<SequenceKv>> kv =
      SequenceKv::Create(pool_, job.request.format, job.n_tokens(), std::min(options_.chunk_tokens, job.n_tokens()));
  if (kv.ok()) {
    job.kv = std::move(kv).value();
    job.request.listener->OnStarted();
    return StartResult::kStarted;
  }
  const bool others_hold_blocks = pool_.usage().n_blocks_used > 0;
  if (kv.status().code() == StatusCode::kResourceExhausted && others_hold_blocks) return StartResult::kMustWait;
  std::erase(waiting_, job.id);
  job.request.listener->OnFailed(kv.status());  // may release the job
  return StartResult::kFailed;
}

void PrefillEngine::RunChunk(Job& job) {
  const PrefillJobId id = job.id;
  const int n_new = std::min(options_.chunk_tokens, job.n_tokens() - job.kv->n_tokens());
  const bool last = job.kv->n_tokens() + n_new == job.n_tokens();
  const ForwardSequence sequence{
      job.kv.get(),
      std::span(job.request.tokens)
          .subspan(static_cast<std::size_t>(job.kv->n_tokens()), static_cast<std::size_t>(n_new)),
      last ? 1 : 0};
  logits_.resize(static_cast<std::size_t>(model_.config().vocab_size));
  LayerForwarder forwarder(*job.kv, *job.request.listener, job.kv->n_tokens() + n_new, job.n_tokens());
  const Status status = model_.Forward({&sequence, 1}, logits_.data(), &forwarder);
  if (!status.ok()) {
    std::erase(waiting_, id);
    job.request.listener->OnFailed(status);
    return;
  }
  if (!last) return;
  std::erase(waiting_, id);
  const Sampler sampler(job.request.sampling, job.request.tokens, job.request.n_streamed);
  job.request.listener->OnFirstToken(*job.kv, sampler.Sample(logits_, job.n_tokens()));
}

bool PrefillEngine::Step() {
  while (!waiting_.empty()) {
    Job& job = *jobs_.at(waiting_.front());
    const StartResult started = job.kv == nullptr ? Start(job) : StartResult::kStarted;
    if (started == StartResult::kMustWait) return false;  // the Release of another job wakes the loop
    if (started == StartResult::kFailed) continue;
    RunChunk(job);
    return true;
  }
  return false;
}

}  // namespace zeroc
