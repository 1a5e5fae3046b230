#include "libzeroc/kv/block_pool.h"

#include <algorithm>
#include <string>

#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

constexpr std::size_t kUnitBytes = BlockRef::kUnitBytes;
constexpr std::size_t kSlabAlignment = 64;  // cache lines, for the blocks whose size keeps to them

}  // namespace

Result<std::unique_ptr<BlockPool>> BlockPool::Create(std::span<std::byte> arena, std::size_t slab_bytes,
                                                     KvMemory& memory, std::span<std::byte> wire) {
  if (slab_bytes == 0 || slab_bytes % kSlabAlignment != 0) {
    return InvalidArgument("block pool: slab of " + std::to_string(slab_bytes) + " bytes is not a multiple of 64");
  }
  if (reinterpret_cast<std::uintptr_t>(arena.data()) % kSlabAlignment != 0) {
    return InvalidArgument("block pool: the arena is not 64-byte aligned");
  }
  if (arena.size() < slab_bytes) {
    return InvalidArgument("block pool: an arena of " + std::to_string(arena.size()) + " bytes holds no slab of " +
                           std::to_string(slab_bytes));
  }
  if (arena.size() / kUnitBytes >= BlockRef::kNone) {
    return InvalidArgument("block pool: an arena of " + std::to_string(arena.size()) + " bytes is over 64 GiB");
  }
  if (memory.is_host()) wire = arena;
  ZEROC_CHECK(wire.empty() || wire.size() == arena.size(), wire.size(), arena.size());
  return std::unique_ptr<BlockPool>(new BlockPool(arena, slab_bytes, memory, wire));
}

BlockPool::BlockPool(std::span<std::byte> arena, std::size_t slab_bytes, KvMemory& memory, std::span<std::byte> wire)
    : arena_(arena), wire_(wire), memory_(memory), slab_bytes_(slab_bytes), slabs_(arena.size() / slab_bytes) {
  for (std::size_t i = 0; i < slabs_.size(); ++i) free_slabs_.insert(free_slabs_.end(), i);
}

bool BlockPool::TakeFromSlab(std::size_t slab_idx, std::size_t* n_wanted, std::vector<BlockRef>* out) {
  Slab& slab = slabs_[slab_idx];
  const std::size_t capacity = slab.holds.size();
  std::size_t i = slab.first_free_hint;
  for (; i<capacity&& * n_wanted> 0; ++i) {
    if (slab.holds[i].any()) continue;
    slab.holds[i].users = 1;
    ++slab.n_held;
    --*n_wanted;
    const std::uint64_t offset = std::uint64_t{slab_idx} * slab_bytes_ + i * slab.block_bytes;
    out->push_back({static_cast<std::uint32_t>(offset / kUnitBytes)});
    bytes_used_ += slab.block_bytes;
    ++n_blocks_used_;
  }
  slab.first_free_hint = i;
  return slab.n_held == capacity;
}

std::size_t BlockPool::CountFree(std::size_t block_bytes) const {
  const std::size_t per_slab = slab_bytes_ / block_bytes;
  std::size_t n_free = free_slabs_.size() * per_slab;
  const auto partial = partial_slabs_.find(block_bytes);
  if (partial == partial_slabs_.end()) return n_free;
  for (const std::size_t slab_idx : partial->second) n_free += per_slab - slabs_[slab_idx].n_held;
  return n_free;
}

Status BlockPool::Allocate(std::size_t block_bytes, std::size_t n, std::vector<BlockRef>* out) {
  if (block_bytes == 0 || block_bytes % kUnitBytes != 0 || block_bytes > slab_bytes_) {
    return InvalidArgument("block pool: a block of " + std::to_string(block_bytes) + " bytes does not fit slabs of " +
                           std::to_string(slab_bytes_) + " (in multiples of 16)");
  }
  if (n == 0) return OkStatus();
  const std::size_t per_slab = slab_bytes_ / block_bytes;
  std::size_t n_free = CountFree(block_bytes);
  // What the users leave could not hold it: then nothing is given up for it.
  const bool may_fit = n <= (slabs_.size() * slab_bytes_ - bytes_used_) / block_bytes;
  while (n_free < n && may_fit && reclaimer_ != nullptr && reclaimer_->Reclaim((n - n_free) * block_bytes) > 0) {
    n_free = CountFree(block_bytes);
  }
  if (n_free < n) {
    return ResourceExhausted("block pool: " + std::to_string(n) + " blocks of " + std::to_string(block_bytes) +
                             " bytes asked, " + std::to_string(n_free) + " free");
  }
  auto& partial = partial_slabs_[block_bytes];
  std::size_t n_wanted = n;
  // Whole slabs first when the call fills some: long prompts then lie in one piece. The rest fills started slabs.
  while (n_wanted >= per_slab && !free_slabs_.empty()) {
    const std::size_t slab_idx = *free_slabs_.begin();
    free_slabs_.erase(free_slabs_.begin());
    slabs_[slab_idx] = Slab{block_bytes, std::vector<Holds>(per_slab), 0, 0};
    TakeFromSlab(slab_idx, &n_wanted, out);
  }
  while (n_wanted > 0 && !partial.empty()) {
    const std::size_t slab_idx = *partial.begin();
    if (TakeFromSlab(slab_idx, &n_wanted, out)) partial.erase(slab_idx);
  }
  while (n_wanted > 0) {
    const std::size_t slab_idx = *free_slabs_.begin();
    free_slabs_.erase(free_slabs_.begin());
    slabs_[slab_idx] = Slab{block_bytes, std::vector<Holds>(per_slab), 0, 0};
    if (!TakeFromSlab(slab_idx, &n_wanted, out)) partial.insert(slab_idx);
  }
  return OkStatus();
}

BlockPool::Place BlockPool::Find(BlockRef ref) const {
  const std::size_t slab_idx = ref.offset() / slab_bytes_;
  ZEROC_CHECK(ref.valid() && slab_idx < slabs_.size(), ref.unit);
  const Slab& slab = slabs_[slab_idx];
  ZEROC_CHECK(slab.block_bytes != 0, ref.unit, slab_idx);
  const std::size_t offset_in_slab = ref.offset() - std::uint64_t{slab_idx} * slab_bytes_;
  const std::size_t i = offset_in_slab / slab.block_bytes;
  ZEROC_CHECK(offset_in_slab % slab.block_bytes == 0 && i < slab.holds.size() && slab.holds[i].any(), ref.unit, i);
  return {slab_idx, i};
}

void BlockPool::AddUser(BlockRef ref) {
  const Place at = Find(ref);
  Slab& slab = slabs_[at.slab_idx];
  if (slab.holds[at.i].users++ > 0) return;
  bytes_kept_ -= slab.block_bytes;
  --n_blocks_kept_;
  bytes_used_ += slab.block_bytes;
  ++n_blocks_used_;
}

void BlockPool::Release(BlockRef ref) {
  const Place at = Find(ref);
  Slab& slab = slabs_[at.slab_idx];
  Holds& holds = slab.holds[at.i];
  ZEROC_CHECK(holds.users > 0, ref.unit);
  if (--holds.users > 0) return;
  bytes_used_ -= slab.block_bytes;
  --n_blocks_used_;
  if (holds.keeps > 0) {
    bytes_kept_ += slab.block_bytes;
    ++n_blocks_kept_;
  }
  FreeIfUnheld(at);
}

void BlockPool::Keep(BlockRef ref) {
  const Place at = Find(ref);
  ++slabs_[at.slab_idx].holds[at.i].keeps;
}

void BlockPool::Drop(BlockRef ref) {
  const Place at = Find(ref);
  Slab& slab = slabs_[at.slab_idx];
  Holds& holds = slab.holds[at.i];
  ZEROC_CHECK(holds.keeps > 0, ref.unit);
  if (--holds.keeps > 0 || holds.users > 0) return;
  bytes_kept_ -= slab.block_bytes;
  --n_blocks_kept_;
  FreeIfUnheld(at);
}

std::uint32_t BlockPool::n_users(BlockRef ref) const {
  const Place at = Find(ref);
  return slabs_[at.slab_idx].holds[at.i].users;
}

void BlockPool::FreeIfUnheld(const Place& place) {
  Slab& slab = slabs_[place.slab_idx];
  if (slab.holds[place.i].any()) return;
  --slab.n_held;
  if (place.i < slab.first_free_hint) slab.first_free_hint = place.i;
  auto& partial = partial_slabs_[slab.block_bytes];
  if (slab.n_held == 0) {
    partial.erase(place.slab_idx);
    slab = Slab{};
    free_slabs_.insert(place.slab_idx);
  } else {
    partial.insert(place.slab_idx);
  }
}

BlockPool::Usage BlockPool::usage() const {
  Usage usage;
  usage.bytes_total = std::uint64_t{slabs_.size()} * slab_bytes_;
  usage.bytes_used = bytes_used_;
  usage.bytes_kept = bytes_kept_;
  usage.bytes_reclaimable = std::uint64_t{free_slabs_.size()} * slab_bytes_;
  usage.n_blocks_used = n_blocks_used_;
  usage.n_blocks_kept = n_blocks_kept_;
  return usage;
}

namespace {

// Neighbours in one piece.
std::vector<KvCopy> Copies(std::span<std::byte> to, std::span<std::byte> from, std::span<const BlockSpan> blocks) {
  std::vector<KvCopy> copies;
  std::uint64_t end = 0;  // of the last piece
  for (const BlockSpan& block : blocks) {
    const std::uint64_t begin = block.ref.offset();
    ZEROC_CHECK(begin + block.bytes <= std::min(to.size(), from.size()), begin, block.bytes, to.size(), from.size());
    if (!copies.empty() && begin == end) {
      copies.back().bytes += block.bytes;
    } else {
      copies.push_back({to.data() + begin, from.data() + begin, block.bytes});
    }
    end = begin + block.bytes;
  }
  return copies;
}

}  // namespace

Status BlockPool::ToWire(std::span<const BlockSpan> blocks) const {
  return wire_.data() == arena_.data() ? OkStatus() : memory_.Read(Copies(wire_, arena_, blocks));
}

Status BlockPool::FromWire(std::span<const BlockSpan> blocks) const {
  return wire_.data() == arena_.data() ? OkStatus() : memory_.Write(Copies(arena_, wire_, blocks));
}

}  // namespace zeroc
