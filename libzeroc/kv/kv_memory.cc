#include "libzeroc/kv/kv_memory.h"

#include <sys/mman.h>

#include <cstring>
#include <string>

namespace zeroc {
namespace {

class HostMemory final : public KvMemory {
 public:
  bool is_host() const override { return true; }

  Result<std::span<std::byte>> Allocate(std::size_t bytes) override {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      return ResourceExhausted("KV cache: the system refused " + std::to_string(bytes) + " bytes");
    }
    return std::span(static_cast<std::byte*>(memory), bytes);
  }
  void Free(std::span<std::byte> arena) override { munmap(arena.data(), arena.size()); }

  Status Copy(std::span<const KvCopy> copies) override {
    for (const KvCopy& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
    return OkStatus();
  }
  Status Read(std::span<const KvCopy> copies) override { return Copy(copies); }
  Status Write(std::span<const KvCopy> copies) override { return Copy(copies); }

  Status Pin(std::span<std::byte>) override { return OkStatus(); }
  void Unpin(std::span<std::byte>) override {}
};

}  // namespace

KvMemory& HostKvMemory() {
  static HostMemory memory;
  return memory;
}

}  // namespace zeroc
