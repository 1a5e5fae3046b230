#include "libzeroc/kv/owned_pool.h"

#include <algorithm>
#include <set>

#include "libzeroc/kv/sequence_kv.h"

namespace zeroc {
namespace {

// Of all blocks that a sequence of this format may take.
std::set<std::int64_t> BlockSizes(const KvFormat& format) {
  std::set<std::int64_t> sizes{format.exact.block_bytes, format.sink.block_bytes};
  for (const KvTier& tier : format.tiers) {
    for (const auto& layout : tier.layouts) sizes.insert(layout.block_bytes);
  }
  return sizes;
}

}  // namespace

std::size_t SlabBytesFor(const KvFormat& format) {
  return std::max<std::size_t>(std::size_t{1} << 20, 4 * static_cast<std::size_t>(*BlockSizes(format).rbegin()));
}

Result<std::unique_ptr<OwnedPool>> OwnedPool::Create(const KvFormat& format, int n_sequences, int max_tokens,
                                                     int step_tokens_max, KvMemory& memory) {
  const std::size_t slab = SlabBytesFor(format);
  const std::uint64_t blocks =
      static_cast<std::uint64_t>(n_sequences) * SequenceKv::BytesNeeded(format, max_tokens, step_tokens_max);
  // Blocks do not straddle slabs: up to a quarter of a slab is lost at its end, and every block size starts slabs anew.
  const std::uint64_t n_slabs = (blocks + blocks / 3) / slab + BlockSizes(format).size() + 1;
  std::unique_ptr<OwnedPool> owned(new OwnedPool(memory));
  ZEROC_ASSIGN_OR_RETURN(owned->arena_, memory.Allocate(n_slabs * slab));
  ZEROC_ASSIGN_OR_RETURN(owned->pool_, BlockPool::Create(owned->arena_, slab, memory));
  return owned;
}

Result<std::unique_ptr<OwnedPool>> OwnedPool::Over(std::span<std::byte> wire, std::size_t slab_bytes,
                                                   KvMemory& memory) {
  std::unique_ptr<OwnedPool> owned(new OwnedPool(memory));
  if (!memory.is_host()) {
    ZEROC_ASSIGN_OR_RETURN(owned->arena_, memory.Allocate(wire.size()));
    ZEROC_RETURN_IF_ERROR(memory.Pin(wire));
    owned->pinned_ = wire;
  }
  ZEROC_ASSIGN_OR_RETURN(owned->pool_,
                         BlockPool::Create(memory.is_host() ? wire : owned->arena_, slab_bytes, memory, wire));
  return owned;
}

OwnedPool::~OwnedPool() {
  pool_.reset();
  if (!pinned_.empty()) memory_.Unpin(pinned_);
  if (!arena_.empty()) memory_.Free(arena_);
}

}  // namespace zeroc
