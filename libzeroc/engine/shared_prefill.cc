#include "libzeroc/engine/shared_prefill.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace zeroc {
namespace {

// All of the prompt is computed in one step, so a block is final as soon as its layer is written.
class ShareForwarder final : public ForwardObserver {
 public:
  ShareForwarder(const SequenceKv& kv, PrefillListener& listener, const SpSplit& split, int rank)
      : kv_(kv), listener_(listener) {
    const int n_packed = kv.format().PackedBlocksAt(split.n_tokens());
    for (const BlockRange& range : split.Blocks(rank)) {
      ReadyBlocks ready;
      if (range.begin < n_packed) ready.packed.push_back({range.begin, std::min(range.end, n_packed)});
      ready.sink = range.begin == 0 && n_packed > 0 && kv.format().sink_tokens > 0;
      ready.exact_begin = std::max(range.begin - n_packed, 0);
      ready.exact_end = std::max(range.end - n_packed, 0);
      ready_.push_back(std::move(ready));
    }
  }
  void OnLayerWritten(int layer) override {
    for (ReadyBlocks& ready : ready_) {
      ready.layer = layer;
      listener_.OnBlocksReady(kv_, ready);
    }
  }

 private:
  const SequenceKv& kv_;
  PrefillListener& listener_;
  std::vector<ReadyBlocks> ready_;  // range by range
};

}  // namespace

Result<std::unique_ptr<SharedPrefill>> SharedPrefill::Create(const ModelConfig& config, BlockPool& pool, PrefillJob job,
                                                             const SpSplit& split, int rank) {
  ZEROC_RETURN_IF_ERROR(CheckPrefillJob(job, config));
  const std::shared_ptr<const KvFormat> format = job.format;
  std::unique_ptr<SharedPrefill> made(new SharedPrefill(std::move(job), split, rank));
  ZEROC_ASSIGN_OR_RETURN(made->kv_, SequenceKv::CreateShare(pool, format, split, rank));
  return made;
}

Status SharedPrefill::Run(Transformer& model, Communicator& comm, const SpOptions& options) {
  PrefillListener& listener = *job_.listener;
  listener.OnStarted(0);
  SpStep step(comm, options, *kv_, split_);
  ShareForwarder forwarder(*kv_, listener, split_, rank_);
  std::vector<float> logits(static_cast<std::size_t>(step.CountLogits() * model.config().vocab_size));
  const ForwardSequence sequence{kv_.get(), job_.tokens, step.CountLogits(), nullptr, &step};
  const Status status = model.Forward({&sequence, 1}, logits.data(), &forwarder);
  sent_ = step.sent();
  if (!status.ok()) {
    listener.OnFailed(status);
    return status;
  }
  if (rank_ != 0) return status;
  const Sampler sampler(job_.sampling, job_.tokens, job_.n_streamed);
  listener.OnFirstToken(*kv_, sampler.Sample(logits, split_.n_tokens()));
  return status;
}

}  // namespace zeroc
