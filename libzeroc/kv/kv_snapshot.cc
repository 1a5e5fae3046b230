#include "libzeroc/kv/kv_snapshot.h"

#include <new>
#include <string>

#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

// Calls visit(block, bytes) for every block that holds tokens, in the same order for equal lengths, until one fails.
template <typename Visit>
Status ForEachLiveBlock(const SequenceKv& kv, int n_tokens, Visit visit) {
  const KvFormat& format = kv.format();
  for (int layer = 0; layer < format.n_layers; ++layer) {
    const LayerBlocks blocks = kv.BlocksAt(layer, n_tokens);
    for (const TierBlocks& tier : blocks.packed) {
      for (const BlockRef ref : tier.refs)
        ZEROC_RETURN_IF_ERROR(visit(kv.pool().Data(ref), std::size_t{tier.block_bytes}));
    }
    for (const BlockRef ref : blocks.exact) {
      ZEROC_RETURN_IF_ERROR(visit(kv.pool().Data(ref), static_cast<std::size_t>(format.exact.block_bytes)));
    }
    if (!blocks.sink.valid() || format.sink_tokens == 0) continue;
    const auto sink_bytes = static_cast<std::size_t>(format.sink.block_bytes);
    ZEROC_RETURN_IF_ERROR(visit(kv.pool().Data(blocks.sink), sink_bytes));
  }
  return OkStatus();
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
  ZEROC_RETURN_IF_ERROR(ForEachLiveBlock(kv, kv.n_tokens(), [&](const std::byte* block, std::size_t bytes) {
    ZEROC_CHECK(at + bytes <= snapshot.bytes_, at, bytes, snapshot.bytes_);
    const Status read = kv.pool().memory().Read(snapshot.data_.get() + at, block, bytes);
    at += bytes;
    return read;
  }));
  ZEROC_CHECK(at == snapshot.bytes_, at, snapshot.bytes_);
  return snapshot;
}

Status KvSnapshot::Restore(SequenceKv& kv) const {
  kv.AdoptPrompt(n_tokens_);
  ZEROC_CHECK(kv.HeldBytes() == bytes_, kv.HeldBytes(), bytes_);
  std::uint64_t at = 0;
  return ForEachLiveBlock(kv, n_tokens_, [&](std::byte* block, std::size_t bytes) {
    const Status written = kv.pool().memory().Write(block, data_.get() + at, bytes);
    at += bytes;
    return written;
  });
}

}  // namespace zeroc
