#include "libzeroc/kv/kv_memory.h"

#include <sys/mman.h>

#include <cstring>
#include <string>

namespace zeroc {
namespace {

class HostMemory final : public KvMemory {
 public:
  Result<std::span<std::byte>> Allocate(std::size_t bytes) override {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      return ResourceExhausted("KV cache: the system refused " + std::to_string(bytes) + " bytes");
    }
    return std::span(static_cast<std::byte*>(memory), bytes);
  }
  void Free(std::span<std::byte> arena) override { munmap(arena.data(), arena.size()); }

  Status Copy(std::byte* to, const std::byte* from, std::size_t bytes) override {
    std::memcpy(to, from, bytes);
    return OkStatus();
  }
  Status Read(std::byte* host, const std::byte* from, std::size_t bytes) override { return Copy(host, from, bytes); }
  Status Write(std::byte* to, const std::byte* host, std::size_t bytes) override { return Copy(to, host, bytes); }
};

}  // namespace

KvMemory& HostKvMemory() {
  static HostMemory memory;
  return memory;
}

}  // namespace zeroc
