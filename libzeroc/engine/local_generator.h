// A prompt to its completion in one process: prefill and decode share one KV cache, as on a worker that does both.
// The tokens are those of the split engines for the same sampling and format.
//
// Not thread-safe; uses the model, so nobody else may meanwhile.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/engine/decode_engine.h"
#include "libzeroc/engine/sampler.h"
#include "libzeroc/kv/kv_format.h"
#include "libzeroc/model/sequence_attention.h"
#include "libzeroc/model/transformer.h"

namespace zeroc {

// Sees every token as it is drawn, the last included; returning false ends the completion (kStop).
using TokenFn = std::function<bool(const SampledToken& token)>;

struct Completion {
  std::vector<std::int32_t> ids;  // drawn tokens, the one that ended the completion included
  FinishReason reason = FinishReason::kLength;
  double kv_bytes_per_token = 0;  // bytes held at the end / tokens held; the last token drawn is not held
};

// kInvalidArgument for an empty prompt, ids out of range, bad sampling, or more positions than the model has;
// kResourceExhausted without memory. chunk_tokens: prompt tokens per forward pass.
Result<Completion> GenerateLocally(Transformer& model, std::shared_ptr<const KvFormat> format,
                                   std::span<const std::int32_t> prompt, const SamplingParams& sampling,
                                   const TokenFn& on_token = nullptr, int chunk_tokens = 512);

// The same with a method that attends for itself.
Result<Completion> GenerateLocally(Transformer& model, const AttentionMethod& attention,
                                   std::span<const std::int32_t> prompt, const SamplingParams& sampling,
                                   const TokenFn& on_token = nullptr, int chunk_tokens = 512);

}  // namespace zeroc
