#include "libzeroc/engine/local_cache.h"

#include <algorithm>
#include <set>
#include <string>

namespace zeroc {
namespace {

// 32 blocks of the largest size: what a slab cannot fill, because no block size divides it, stays under 1/32.
constexpr std::size_t kBlocksPerSlab = 32;

}  // namespace

Result<std::unique_ptr<LocalCache>> LocalCache::Create(std::shared_ptr<const KvFormat> format, int n_sequences,
                                                       int max_tokens, int step_tokens_max) {
  if (n_sequences < 1 || max_tokens < 1 || step_tokens_max < 1) {
    return InvalidArgument("KV cache for " + std::to_string(n_sequences) + " sequences of " +
                           std::to_string(max_tokens) + " tokens: both must be at least 1");
  }
  std::set<std::size_t> block_sizes = {static_cast<std::size_t>(format->exact.block_bytes)};
  if (format->sink_tokens > 0) block_sizes.insert(static_cast<std::size_t>(format->sink.block_bytes));
  for (const kernels::KvBlockLayout& layout : format->packed) {
    block_sizes.insert(static_cast<std::size_t>(layout.block_bytes));
  }
  const std::size_t slab_bytes = kBlocksPerSlab * *block_sizes.rbegin();
  const std::uint64_t needed =
      SequenceKv::BytesNeeded(*format, max_tokens, step_tokens_max) * static_cast<std::uint64_t>(n_sequences);
  // Every size may leave one slab partly empty. Pages that nothing is written to cost nothing.
  const std::uint64_t n_slabs = (needed + needed / (kBlocksPerSlab - 1)) / slab_bytes + 1 + block_sizes.size();
  const std::uint64_t arena_bytes = n_slabs * slab_bytes;
  std::unique_ptr<LocalCache> cache(new LocalCache(std::move(format), max_tokens, step_tokens_max));
  constexpr std::size_t kAlignment = 64;  // BlockPool's, which also divides a slab
  cache->arena_.reset(static_cast<std::byte*>(std::aligned_alloc(kAlignment, arena_bytes)));
  if (cache->arena_ == nullptr) {
    return ResourceExhausted("KV cache: the system has no " + std::to_string(arena_bytes >> 20) + " MiB for " +
                             std::to_string(n_sequences) + " sequences of " + std::to_string(max_tokens) + " tokens");
  }
  ZEROC_ASSIGN_OR_RETURN(cache->pool_, BlockPool::Create({cache->arena_.get(), arena_bytes}, slab_bytes));
  cache->sequences_.resize(static_cast<std::size_t>(n_sequences));
  ZEROC_RETURN_IF_ERROR(cache->Reset());
  return cache;
}

Status LocalCache::Reset() {
  for (std::unique_ptr<SequenceKv>& sequence : sequences_) sequence.reset();
  for (std::unique_ptr<SequenceKv>& sequence : sequences_) {
    ZEROC_ASSIGN_OR_RETURN(sequence, SequenceKv::Create(*pool_, format_, max_tokens_, step_tokens_max_));
  }
  return OkStatus();
}

}  // namespace zeroc
