#include "libzeroc/engine/local_generator.h"

#include <algorithm>
#include <string>

#include "libzeroc/base/check.h"
#include "libzeroc/engine/sequence_cache.h"
#include "libzeroc/kv/owned_pool.h"

namespace zeroc {
namespace {

Status CheckRequest(const Transformer& model, std::span<const std::int32_t> prompt, const SamplingParams& sampling) {
  const ModelConfig& config = model.config();
  ZEROC_RETURN_IF_ERROR(sampling.Validate(config.vocab_size));
  if (prompt.empty()) return InvalidArgument("the prompt has no tokens");
  const std::int64_t n_positions = static_cast<std::int64_t>(prompt.size()) + sampling.max_tokens;
  if (n_positions > config.max_positions) {
    return InvalidArgument("a prompt of " + std::to_string(prompt.size()) + " and an output of " +
                           std::to_string(sampling.max_tokens) + " tokens do not fit the model's " +
                           std::to_string(config.max_positions) + " positions");
  }
  return OkStatus();
}

// The logits behind the last token of the prompt.
Status Prefill(Transformer& model, SequenceCache& cache, std::span<const std::int32_t> prompt, int chunk_tokens,
               float* logits) {
  const auto chunk = static_cast<std::size_t>(chunk_tokens);
  for (std::size_t begin = 0; begin < prompt.size(); begin += chunk) {
    const std::size_t n = std::min(chunk, prompt.size() - begin);
    const ForwardSequence sequence = cache.Step(prompt.subspan(begin, n), begin + n == prompt.size() ? 1 : 0);
    ZEROC_RETURN_IF_ERROR(model.Forward({&sequence, 1}, logits));
  }
  cache.EndPrompt();
  return OkStatus();
}

// The last drawn token is never fed back, so it needs no room.
int TokensHeld(std::span<const std::int32_t> prompt, const SamplingParams& sampling) {
  return static_cast<int>(prompt.size()) + sampling.max_tokens - 1;
}

Result<Completion> Generate(Transformer& model, SequenceCache& cache, std::span<const std::int32_t> prompt,
                            const SamplingParams& sampling, const TokenFn& on_token, int chunk_tokens) {
  const int n_prompt = static_cast<int>(prompt.size());
  std::vector<float> logits(static_cast<std::size_t>(model.config().vocab_size));
  ZEROC_RETURN_IF_ERROR(Prefill(model, cache, prompt, chunk_tokens, logits.data()));

  Completion completion;
  Sampler sampler(sampling, prompt);
  for (;;) {
    const int n_generated = static_cast<int>(completion.ids.size());
    const SampledToken token = sampler.Sample(logits, n_prompt + n_generated);
    sampler.Accept(token.id);
    completion.ids.push_back(token.id);
    const bool ends = EndsRequest(sampling, model.config().eos_ids, token, n_generated + 1, &completion.reason);
    if (on_token != nullptr && !on_token(token)) {
      completion.reason = FinishReason::kStop;
      break;
    }
    if (ends) break;
    const ForwardSequence step = cache.Step({&completion.ids.back(), 1}, 1);
    ZEROC_RETURN_IF_ERROR(model.Forward({&step, 1}, logits.data()));
  }
  completion.kv_bytes_per_token = static_cast<double>(cache.HeldBytes()) / cache.n_tokens();
  return completion;
}

}  // namespace

Result<Completion> GenerateLocally(Transformer& model, std::shared_ptr<const KvFormat> format,
                                   std::span<const std::int32_t> prompt, const SamplingParams& sampling,
                                   const TokenFn& on_token, int chunk_tokens) {
  ZEROC_CHECK(chunk_tokens >= 1, chunk_tokens);
  ZEROC_RETURN_IF_ERROR(CheckRequest(model, prompt, sampling));
  chunk_tokens = std::min(chunk_tokens, static_cast<int>(prompt.size()));
  const int n_held = TokensHeld(prompt, sampling);
  ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<OwnedPool> pool,
                         OwnedPool::Create(*format, 1, n_held, chunk_tokens, model.kv_memory()));
  ZEROC_ASSIGN_OR_RETURN(SequenceCache cache,
                         SequenceCache::InBlocks(pool->pool(), std::move(format), n_held, chunk_tokens));
  return Generate(model, cache, prompt, sampling, on_token, chunk_tokens);
}

Result<Completion> GenerateLocally(Transformer& model, const AttentionMethod& attention,
                                   std::span<const std::int32_t> prompt, const SamplingParams& sampling,
                                   const TokenFn& on_token, int chunk_tokens) {
  ZEROC_CHECK(chunk_tokens >= 1, chunk_tokens);
  ZEROC_RETURN_IF_ERROR(CheckRequest(model, prompt, sampling));
  ZEROC_ASSIGN_OR_RETURN(SequenceCache cache, SequenceCache::Of(attention, TokensHeld(prompt, sampling)));
  return Generate(model, cache, prompt, sampling, on_token, chunk_tokens);
}

}  // namespace zeroc
