// KV caches of a few sequences with memory of their own: for tools and tests that run a model in one process.
//
// Not thread-safe. The caches live as long as this object.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/kv/block_pool.h"
#include "libzeroc/kv/kv_format.h"
#include "libzeroc/kv/sequence_kv.h"

namespace zeroc {

class LocalCache {
 public:
  // Room for n_sequences sequences of max_tokens tokens each, written in steps of at most step_tokens_max.
  // kInvalidArgument for sizes below 1, kResourceExhausted when the system has no such memory.
  static Result<std::unique_ptr<LocalCache>> Create(std::shared_ptr<const KvFormat> format, int n_sequences,
                                                    int max_tokens, int step_tokens_max);

  int n_sequences() const { return static_cast<int>(sequences_.size()); }
  // Empties every sequence; references from kv() end. The memory stays, so a repeated run meets no page faults.
  Status Reset();
  SequenceKv& kv(int sequence_idx) { return *sequences_[static_cast<std::size_t>(sequence_idx)]; }

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };

  LocalCache(std::shared_ptr<const KvFormat> format, int max_tokens, int step_tokens_max)
      : format_(std::move(format)), max_tokens_(max_tokens), step_tokens_max_(step_tokens_max) {}

  std::shared_ptr<const KvFormat> format_;
  int max_tokens_;
  int step_tokens_max_;
  std::unique_ptr<std::byte, Free> arena_;
  std::unique_ptr<BlockPool> pool_;
  std::vector<std::unique_ptr<SequenceKv>> sequences_;
};

}  // namespace zeroc
