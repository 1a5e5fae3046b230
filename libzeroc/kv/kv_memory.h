// Where the arenas of KV blocks lie: in this process's memory, or on a device that only its kernels and these calls
// reach. Pools hand out addresses of either kind; who follows them is the model that the memory belongs to, everybody
// else copies through here.
//
// Not thread-safe: the engine's step loop owns it, as it owns the pools. Outlives its arenas. Copies are done when they
// return, and come behind everything that the owner has enqueued on the blocks before; those of one call may run in any
// order, so they may not overlap.
#pragma once

#include <cstddef>
#include <span>

#include "libzeroc/base/status.h"

namespace zeroc {

struct KvCopy {
  std::byte* to;
  const std::byte* from;
  std::size_t bytes;
};

class KvMemory {
 public:
  virtual ~KvMemory() = default;

  // Addresses are this process's own: anybody may follow them.
  virtual bool is_host() const = 0;

  // An arena at a multiple of 64 bytes, contents unspecified. kResourceExhausted when there is no such memory left.
  virtual Result<std::span<std::byte>> Allocate(std::size_t bytes) = 0;
  virtual void Free(std::span<std::byte> arena) = 0;  // of Allocate; no block of it is in use

  // Between blocks, from blocks into this process's memory, from there into blocks. They fail only with the device
  // itself (kInternal); what was copied is then unspecified.
  virtual Status Copy(std::span<const KvCopy> copies) = 0;
  virtual Status Read(std::span<const KvCopy> copies) = 0;
  virtual Status Write(std::span<const KvCopy> copies) = 0;

  // Prepares memory of this process, until Unpin, for being read into and written from at full speed: page-locked, so
  // all of it takes room at once. kResourceExhausted where the system refuses.
  virtual Status Pin(std::span<std::byte> host) = 0;
  virtual void Unpin(std::span<std::byte> host) = 0;
};

// Ordinary memory. Any thread; pages come when they are first touched.
KvMemory& HostKvMemory();

}  // namespace zeroc
