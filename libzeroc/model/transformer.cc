#include "libzeroc/model/transformer.h"

#include "libzeroc/base/check.h"

namespace zeroc {

Status Transformer::CheckPlan(const Checkpoint& checkpoint, const Plan* plan) {
  if (plan == nullptr || plan->model_fingerprint() == checkpoint.fingerprint()) return OkStatus();
  return FailedPrecondition("plan " + plan->plan_id() + " belongs to model " + plan->model_fingerprint() + ", not to " +
                            checkpoint.fingerprint() + " in " + checkpoint.dir());
}

Result<std::shared_ptr<const KvFormat>> Transformer::Format(const std::string& profile) {
  const auto found = formats_.find(profile);
  if (found != formats_.end()) return found->second;
  const int exact_bits = ops_.act_bytes == 4 ? 32 : 16;
  Result<std::shared_ptr<const KvFormat>> format =
      NotFound("profile '" + profile + "': the model was opened without a plan");
  if (plan_ != nullptr) {
    format = KvFormat::FromPlan(config(), *plan_, profile, exact_bits);
  } else if (profile == "none" || profile == "bf16") {
    format = KvFormat::Uncompressed(config(), exact_bits);
  }
  if (format.ok()) formats_[profile] = *format;
  return format;
}

Status Transformer::CheckBatch(std::span<const ForwardSequence> sequences) {
  for (const ForwardSequence& sequence : sequences) {
    const bool attends_itself = sequences.front().attention != nullptr;
    ZEROC_CHECK((sequence.kv != nullptr) != attends_itself && (sequence.attention != nullptr) == attends_itself,
                attends_itself);
    ZEROC_CHECK(!sequence.tokens.empty() && sequence.n_logits >= 0 &&
                    static_cast<std::size_t>(sequence.n_logits) <= sequence.tokens.size(),
                sequence.tokens.size(), sequence.n_logits);
    ZEROC_CHECK(sequence.sp == nullptr ||
                    (sequences.size() == 1 && &sequence.sp->kv() == sequence.kv && sequence.kv->n_tokens() == 0 &&
                     std::ssize(sequence.tokens) == sequence.kv->max_tokens() &&
                     sequence.n_logits == sequence.sp->CountLogits()),
                sequences.size(), sequence.tokens.size(), sequence.n_logits);
    // Somebody else's memory may not be there to write to.
    ZEROC_CHECK(sequence.kv == nullptr || &sequence.kv->pool().memory() == &kv_memory());
    const int n_held = attends_itself ? sequence.attention->n_tokens() : sequence.kv->n_tokens();
    const std::int64_t n_positions = n_held + static_cast<std::int64_t>(sequence.tokens.size());
    if (!config().has_rope() && n_positions > config().max_positions) {
      return InvalidArgument("a sequence of " + std::to_string(n_positions) + " tokens: the model has " +
                             std::to_string(config().max_positions) + " learned positions");
    }
    for (const std::int32_t id : sequence.tokens) {
      if (id < 0 || id >= config().vocab_size) {
        return InvalidArgument("token id " + std::to_string(id) + " is not in [0, " +
                               std::to_string(config().vocab_size) + ")");
      }
    }
  }
  return OkStatus();
}

Status Transformer::Forward(std::span<const ForwardSequence> sequences, float* logits, ForwardObserver* observer,
                            const LayerRange& layers) {
  if (sequences.empty()) return OkStatus();
  ZEROC_RETURN_IF_ERROR(CheckBatch(sequences));
  return Step(sequences, logits, observer, layers);
}

}  // namespace zeroc
