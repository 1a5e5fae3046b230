// Where the arenas of KV blocks lie: in this process's memory, or on a device that only its kernels and these calls
// reach. Pools hand out addresses of either kind; who follows them is the model that the memory belongs to, everybody
// else copies through here.
//
// Not thread-safe: the engine's step loop owns it, as it owns the pools. Outlives its arenas. Copies are done when they
// return, and come behind everything that the owner has enqueued on the blocks before.
#pragma once

#include <cstddef>
#include <span>

#include "libzeroc/base/status.h"

namespace zeroc {

class KvMemory {
 public:
  virtual ~KvMemory() = default;

  // An arena at a multiple of 64 bytes, contents unspecified. kResourceExhausted when there is no such memory left.
  virtual Result<std::span<std::byte>> Allocate(std::size_t bytes) = 0;
  virtual void Free(std::span<std::byte> arena) = 0;  // of Allocate; no block of it is in use

  // Between blocks, from a block, into a block. They fail only with the device itself (kInternal).
  virtual Status Copy(std::byte* to, const std::byte* from, std::size_t bytes) = 0;
  virtual Status Read(std::byte* host, const std::byte* from, std::size_t bytes) = 0;
  virtual Status Write(std::byte* to, const std::byte* host, std::size_t bytes) = 0;
};

// Ordinary memory. Any thread; pages come when they are first touched.
KvMemory& HostKvMemory();

}  // namespace zeroc
