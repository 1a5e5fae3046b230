// The keys and values of one sequence, kept as blocks of a profile's format or by a method with its own attention.
//
// What scoring and local generation need to run both through the same steps. Not thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "libzeroc/base/status.h"
#include "libzeroc/kv/block_pool.h"
#include "libzeroc/kv/kv_format.h"
#include "libzeroc/kv/sequence_kv.h"
#include "libzeroc/model/sequence_attention.h"
#include "libzeroc/model/transformer.h"

namespace zeroc {

class SequenceCache {
 public:
  // In blocks of the pool, which outlives it. Errors of SequenceKv::Create.
  static Result<SequenceCache> InBlocks(BlockPool& pool, std::shared_ptr<const KvFormat> format, int max_tokens,
                                        int step_tokens_max);
  // Errors of NewSequence.
  static Result<SequenceCache> Of(const AttentionMethod& method, int max_tokens);

  // For the next step of Forward. The tokens and this cache outlive it.
  ForwardSequence Step(std::span<const std::int32_t> tokens, int n_logits) {
    return {.kv = kv_.get(), .tokens = tokens, .n_logits = n_logits, .attention = attention_.get()};
  }
  // Between steps, once: what follows is decode.
  void EndPrompt();
  int n_tokens() const { return kv_ != nullptr ? kv_->n_tokens() : attention_->n_tokens(); }
  std::uint64_t HeldBytes() const { return kv_ != nullptr ? kv_->HeldBytes() : attention_->HeldBytes(); }

 private:
  std::unique_ptr<SequenceKv> kv_;  // one of the two
  std::unique_ptr<SequenceAttention> attention_;
};

}  // namespace zeroc
