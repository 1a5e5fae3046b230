#include "libzeroc/engine/sequence_cache.h"

#include <utility>

namespace zeroc {

Result<SequenceCache> SequenceCache::InBlocks(BlockPool& pool, std::shared_ptr<const KvFormat> format, int max_tokens,
                                              int step_tokens_max) {
  SequenceCache cache;
  ZEROC_ASSIGN_OR_RETURN(cache.kv_, SequenceKv::Create(pool, std::move(format), max_tokens, step_tokens_max));
  return cache;
}

Result<SequenceCache> SequenceCache::Of(const AttentionMethod& method, int max_tokens) {
  SequenceCache cache;
  ZEROC_ASSIGN_OR_RETURN(cache.attention_, method.NewSequence(max_tokens));
  return cache;
}

void SequenceCache::EndPrompt() {
  if (attention_ != nullptr) attention_->EndPrompt();
}

}  // namespace zeroc
