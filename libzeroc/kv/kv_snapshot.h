// The keys and values of one sequence in ordinary memory, while others need its blocks more.
//
// What a sequence holds depends on its length alone, so the bytes of its live blocks, in the order of BlocksAt, are all
// there is to keep. Not thread-safe; independent of the pool once taken.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "libzeroc/base/status.h"
#include "libzeroc/kv/sequence_kv.h"

namespace zeroc {

class KvSnapshot {
 public:
  // Copies HeldBytes() of a sequence between steps. kResourceExhausted when the system has no memory; else fails as the
  // pool's KvMemory does.
  static Result<KvSnapshot> Take(const SequenceKv& kv);

  // Into an empty sequence of the same format, with room.
  Status Restore(SequenceKv& kv) const;

  int n_tokens() const { return n_tokens_; }
  std::uint64_t bytes() const { return bytes_; }

 private:
  std::unique_ptr<std::byte[]> data_;
  std::uint64_t bytes_ = 0;
  int n_tokens_ = 0;
};

}  // namespace zeroc
