#include "libzeroc/kv/kv_snapshot.h"

#include <new>
#include <string>
#include <vector>

#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

// Calls visit(block, bytes) for every block that holds tokens, in the same order for equal lengths.
template <typename Visit>
void ForEachLiveBlock(const SequenceKv& kv, int n_tokens, Visit visit) {
  const KvFormat& format = kv.format();
  for (int layer = 0; layer < format.n_layers; ++layer) {
    const LayerBlocks blocks = kv.BlocksAt(layer, n_tokens);
    for (const TierBlocks& tier : blocks.packed) {
      for (const BlockRef ref : tier.refs) visit(kv.pool().Data(ref), std::size_t{tier.block_bytes});
    }
    for (const BlockRef ref : blocks.exact) {
      visit(kv.pool().Data(ref), static_cast<std::size_t>(format.exact.block_bytes));
    }
    if (!blocks.sink.valid() || format.sink_tokens == 0) continue;
    visit(kv.pool().Data(blocks.sink), static_cast<std::size_t>(format.sink.block_bytes));
  }
}

}  // namespace

Result<KvSnapshot> KvSnapshot::Take(const SequenceKv& kv) {
  ZEROC_CHECK(!kv.in_step() && kv.n_tokens() > 0, kv.n_tokens());
  KvSnapshot snapshot;
  snapshot.n_tokens_ = kv.n_tokens();
  snapshot.bytes_ = kv.HeldBytes();
  snapshot.data_.reset(new (std::nothrow) std::byte[snapshot.bytes_]);
  if (snapshot.data_ == nullptr) {
    return ResourceExhausted("no memory for a copy of " + std::to_string(snapshot.bytes_) + " KV bytes");
  }
  std::uint64_t at = 0;
  std::vector<KvCopy> copies;
  ForEachLiveBlock(kv, kv.n_tokens(), [&](const std::byte* block, std::size_t bytes) {
    copies.push_back({snapshot.data_.get() + at, block, bytes});
    at += bytes;
  });
  ZEROC_CHECK(at == snapshot.bytes_, at, snapshot.bytes_);
  ZEROC_RETURN_IF_ERROR(kv.pool().memory().Read(copies));
  return snapshot;
}

Status KvSnapshot::Restore(SequenceKv& kv) const {
  kv.AdoptPrompt(n_tokens_);
  ZEROC_CHECK(kv.HeldBytes() == bytes_, kv.HeldBytes(), bytes_);
  std::uint64_t at = 0;
  std::vector<KvCopy> copies;
  ForEachLiveBlock(kv, n_tokens_, [&](std::byte* block, std::size_t bytes) {
    copies.push_back({block, data_.get() + at, bytes});
    at += bytes;
  });
  return kv.pool().memory().Write(copies);
}

}  // namespace zeroc
