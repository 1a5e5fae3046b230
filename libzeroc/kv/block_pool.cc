#include "libzeroc/kv/block_pool.h"

#include <string>

#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

constexpr std::size_t kUnitBytes = BlockRef::kUnitBytes;
constexpr std::size_t kSlabAlignment = 64;  // cache lines, for the blocks whose size keeps to them

}  // namespace

Result<std::unique_ptr<BlockPool>> BlockPool::Create(std::span<std::byte> arena, std::size_t slab_bytes) {
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
  return std::unique_ptr<BlockPool>(new BlockPool(arena, slab_bytes));
}

BlockPool::BlockPool(std::span<std::byte> arena, std::size_t slab_bytes)
    : arena_(arena), slab_bytes_(slab_bytes), slabs_(arena.size() / slab_bytes) {
  for (std::size_t i = 0; i < slabs_.size(); ++i) free_slabs_.insert(free_slabs_.end(), i);
}

bool BlockPool::TakeFromSlab(std::size_t slab_idx, std::size_t* n_wanted, std::vector<BlockRef>* out) {
  Slab& slab = slabs_[slab_idx];
  const std::size_t capacity = slab.in_use.size();
  std::size_t i = slab.first_free_hint;
  for (; i<capacity&& * n_wanted> 0; ++i) {
    if (slab.in_use[i]) continue;
    slab.in_use[i] = true;
    ++slab.n_used;
    --*n_wanted;
    const std::uint64_t offset = std::uint64_t{slab_idx} * slab_bytes_ + i * slab.block_bytes;
    out->push_back({static_cast<std::uint32_t>(offset / kUnitBytes)});
    bytes_used_ += slab.block_bytes;
    ++n_blocks_used_;
  }
  slab.first_free_hint = i;
  return slab.n_used == capacity;
}

Status BlockPool::Allocate(std::size_t block_bytes, std::size_t n, std::vector<BlockRef>* out) {
  if (block_bytes == 0 || block_bytes % kUnitBytes != 0 || block_bytes > slab_bytes_) {
    return InvalidArgument("block pool: a block of " + std::to_string(block_bytes) + " bytes does not fit slabs of " +
                           std::to_string(slab_bytes_) + " (in multiples of 16)");
  }
  if (n == 0) return OkStatus();
  const std::size_t per_slab = slab_bytes_ / block_bytes;
  auto& partial = partial_slabs_[block_bytes];
  std::size_t n_free = free_slabs_.size() * per_slab;
  for (const std::size_t slab_idx : partial) n_free += per_slab - slabs_[slab_idx].n_used;
  if (n_free < n) {
    return ResourceExhausted("block pool: " + std::to_string(n) + " blocks of " + std::to_string(block_bytes) +
                             " bytes asked, " + std::to_string(n_free) + " free");
  }
  std::size_t n_wanted = n;
  // Whole slabs first when the call fills some: long prompts then lie in one piece. The rest fills started slabs.
  while (n_wanted >= per_slab && !free_slabs_.empty()) {
    const std::size_t slab_idx = *free_slabs_.begin();
    free_slabs_.erase(free_slabs_.begin());
    slabs_[slab_idx] = Slab{block_bytes, std::vector<bool>(per_slab, false), 0, 0};
    TakeFromSlab(slab_idx, &n_wanted, out);
  }
  while (n_wanted > 0 && !partial.empty()) {
    const std::size_t slab_idx = *partial.begin();
    if (TakeFromSlab(slab_idx, &n_wanted, out)) partial.erase(slab_idx);
  }
  while (n_wanted > 0) {
    const std::size_t slab_idx = *free_slabs_.begin();
    free_slabs_.erase(free_slabs_.begin());
    slabs_[slab_idx] = Slab{block_bytes, std::vector<bool>(per_slab, false), 0, 0};
    if (!TakeFromSlab(slab_idx, &n_wanted, out)) partial.insert(slab_idx);
  }
  return OkStatus();
}

void BlockPool::Release(BlockRef ref) {
  const std::size_t slab_idx = ref.offset() / slab_bytes_;
  ZEROC_CHECK(ref.valid() && slab_idx < slabs_.size(), ref.unit);
  Slab& slab = slabs_[slab_idx];
  ZEROC_CHECK(slab.block_bytes != 0, ref.unit, slab_idx);
  const std::size_t offset_in_slab = ref.offset() - std::uint64_t{slab_idx} * slab_bytes_;
  const std::size_t i = offset_in_slab / slab.block_bytes;
  ZEROC_CHECK(offset_in_slab % slab.block_bytes == 0 && i < slab.in_use.size() && slab.in_use[i], ref.unit, i);
  slab.in_use[i] = false;
  --slab.n_used;
  if (i < slab.first_free_hint) slab.first_free_hint = i;
  bytes_used_ -= slab.block_bytes;
  --n_blocks_used_;
  auto& partial = partial_slabs_[slab.block_bytes];
  if (slab.n_used == 0) {
    partial.erase(slab_idx);
    slab = Slab{};
    free_slabs_.insert(slab_idx);
  } else {
    partial.insert(slab_idx);
  }
}

BlockPool::Usage BlockPool::usage() const {
  return {std::uint64_t{slabs_.size()} * slab_bytes_, bytes_used_, std::uint64_t{free_slabs_.size()} * slab_bytes_,
          n_blocks_used_};
}

}  // namespace zeroc
