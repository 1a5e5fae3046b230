// Blocks of any size out of one arena: the memory that prefill packs into, that decode attends to, and that the wire
// fills.
//
// The arena is cut into slabs of one size; a slab serves blocks of one byte size while any of them is in use and
// returns to the common stock with the last, so that profiles with different block sizes share memory without a split
// fixed at start. Blocks of one call lie side by side where they can, which lets transfers coalesce.
//
// A block is held by users (sequences) and by keeps (the prefix cache), each counted; it is free when both are gone. A
// block that is only kept counts as available: Allocate asks the reclaimer for such blocks before it refuses.
//
// Not thread-safe: the engine's step loop owns it. The arena outlives the pool. Blocks are 16-byte aligned, and
// 64-byte aligned where their size is a multiple of 64. The pool never looks into the arena, which may lie on a device.
//
// Transports and checksums reach this machine's memory only. A pool on a device therefore may have a *wire side*: host
// memory where every block has the same offset as in the arena. Blocks are taken there when they are to be sent
// (ToWire), and up from there when they have come (FromWire); else either side keeps what it held. A pool in host
// memory is its own wire side, and nothing is copied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/kv/kv_memory.h"

namespace zeroc {

// A block's place in the arena, in units of 16 bytes: small, comparable, and meaningful to a remote writer.
struct BlockRef {
  static constexpr std::uint32_t kNone = 0xffffffffu;
  static constexpr std::uint32_t kUnitBytes = 16;
  std::uint32_t unit = kNone;

  bool valid() const { return unit != kNone; }
  std::uint64_t offset() const { return std::uint64_t{unit} * kUnitBytes; }
  static BlockRef At(std::uint64_t offset) { return {static_cast<std::uint32_t>(offset / kUnitBytes)}; }
  friend bool operator==(const BlockRef&, const BlockRef&) = default;
};

struct BlockSpan {
  BlockRef ref;
  std::size_t bytes = 0;
};

// Gives kept blocks up when the pool runs short. Called from Allocate; must not allocate.
class BlockReclaimer {
 public:
  virtual ~BlockReclaimer() = default;
  // Drops its least valuable keeps until blocks of `bytes` in all have become free; returns the bytes freed, 0 when
  // every block that it keeps has a user too.
  virtual std::uint64_t Reclaim(std::uint64_t bytes) = 0;
};

class BlockPool {
 public:
  struct Usage {
    std::uint64_t bytes_total = 0;        // slabs' bytes
    std::uint64_t bytes_used = 0;         // blocks with users, kept or not
    std::uint64_t bytes_kept = 0;         // blocks that are only kept
    std::uint64_t bytes_reclaimable = 0;  // free slabs, which any block size can take
    std::uint64_t n_blocks_used = 0;
    std::uint64_t n_blocks_kept = 0;  // only kept
  };

  // kInvalidArgument if the arena holds not one slab, is misaligned (64 bytes) or too large for BlockRef (64 GiB).
  // `memory` is where it lies. wire: its wire side, of the same size, or none (in host memory: none).
  static Result<std::unique_ptr<BlockPool>> Create(std::span<std::byte> arena, std::size_t slab_bytes,
                                                   KvMemory& memory = HostKvMemory(), std::span<std::byte> wire = {});

  // Appends n blocks of block_bytes (a multiple of 16, at most slab_bytes) to *out, all or none, each with one user.
  // kResourceExhausted when they do not fit even without the kept blocks; kInvalidArgument for a bad size.
  Status Allocate(std::size_t block_bytes, std::size_t n, std::vector<BlockRef>* out);

  // One user more, or one less. A ref that is not held, or has no user to release, is a bug and is checked.
  void AddUser(BlockRef ref);
  void Release(BlockRef ref);

  // The same for keeps.
  void Keep(BlockRef ref);
  void Drop(BlockRef ref);

  // Users of a block that is held.
  std::uint32_t n_users(BlockRef ref) const;

  // Null: nothing is reclaimed. The reclaimer outlives the pool or takes itself out.
  void SetReclaimer(BlockReclaimer* reclaimer) { reclaimer_ = reclaimer; }

  // An address in memory(): for its owner's kernels, and for its copies.
  std::byte* Data(BlockRef ref) const { return arena_.data() + ref.offset(); }
  KvMemory& memory() const { return memory_; }

  // Where this machine's processors find the block's bytes: Data in host memory, else on the wire side, which there
  // must be. Fail with the device only (kInternal).
  std::byte* WireData(BlockRef ref) const { return wire_.data() + ref.offset(); }
  Status ToWire(std::span<const BlockSpan> blocks) const;
  Status FromWire(std::span<const BlockSpan> blocks) const;

  std::size_t slab_bytes() const { return slab_bytes_; }
  Usage usage() const;

 private:
  struct Holds {
    std::uint32_t users = 0, keeps = 0;
    bool any() const { return users + keeps > 0; }
  };
  struct Slab {
    std::size_t block_bytes = 0;  // 0: in the common stock
    std::vector<Holds> holds;     // [slab_bytes / block_bytes]
    std::size_t n_held = 0;
    std::size_t first_free_hint = 0;  // no free block lies before it
  };
  struct Place {
    std::size_t slab_idx = 0, i = 0;
  };

  BlockPool(std::span<std::byte> arena, std::size_t slab_bytes, KvMemory& memory, std::span<std::byte> wire);
  bool TakeFromSlab(std::size_t slab_idx, std::size_t* n_wanted, std::vector<BlockRef>* out);
  std::size_t CountFree(std::size_t block_bytes) const;
  Place Find(BlockRef ref) const;  // of a block that is held; checked
  void FreeIfUnheld(const Place& place);

  std::span<std::byte> arena_, wire_;
  KvMemory& memory_;
  std::size_t slab_bytes_;
  std::vector<Slab> slabs_;
  std::set<std::size_t> free_slabs_;                            // lowest first: keeps the arena's tail untouched
  std::map<std::size_t, std::set<std::size_t>> partial_slabs_;  // by block size: slabs with room
  std::uint64_t bytes_used_ = 0;
  std::uint64_t n_blocks_used_ = 0;
  std::uint64_t bytes_kept_ = 0;  // only kept
  std::uint64_t n_blocks_kept_ = 0;
  BlockReclaimer* reclaimer_ = nullptr;
};

}  // namespace zeroc
