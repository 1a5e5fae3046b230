// A block pool with an arena of its own: for work that stays inside one process (tools, scoring, tests), and for the
// workers, whose transports bring theirs. Thread-safety as BlockPool. Sequences made from it must be destroyed first.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "libzeroc/base/status.h"
#include "libzeroc/kv/block_pool.h"
#include "libzeroc/kv/kv_format.h"
#include "libzeroc/kv/kv_memory.h"

namespace zeroc {

// Slab size that serves every block of the format with little waste: 1 MiB, or four of its largest block.
std::size_t SlabBytesFor(const KvFormat& format);

class OwnedPool {
 public:
  // Room for n_sequences of max_tokens tokens, written in steps of at most step_tokens_max, in the memory of the model
  // that will fill it. kResourceExhausted when that has no more.
  static Result<std::unique_ptr<OwnedPool>> Create(const KvFormat& format, int n_sequences, int max_tokens,
                                                   int step_tokens_max, KvMemory& memory = HostKvMemory());
  // Over a transport's memory, which outlives the pool: it is the arena where the model's memory is the host's, else
  // the wire side of an arena of the same size in the model's memory, and page-locked. kResourceExhausted when there is
  // no more of either, else as BlockPool::Create.
  static Result<std::unique_ptr<OwnedPool>> Over(std::span<std::byte> wire, std::size_t slab_bytes, KvMemory& memory);
  ~OwnedPool();
  OwnedPool(const OwnedPool&) = delete;
  OwnedPool& operator=(const OwnedPool&) = delete;

  BlockPool& pool() { return *pool_; }

 private:
  explicit OwnedPool(KvMemory& memory) : memory_(memory) {}
  KvMemory& memory_;
  std::span<std::byte> arena_;   // to be freed
  std::span<std::byte> pinned_;  // to be unpinned
  std::unique_ptr<BlockPool> pool_;
};

}  // namespace zeroc
