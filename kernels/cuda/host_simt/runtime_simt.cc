// runtime.h in host memory. Buffers stand between canaries, which Free and Synchronize look at.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "kernels/cuda/host_simt/queue.h"
#include "kernels/cuda/host_simt/simt.h"
#include "kernels/cuda/runtime.h"

namespace zeroc::kernels::cuda {
namespace {

constexpr std::size_t kGuard = 256;  // on both sides; also the alignment
constexpr std::uint8_t kCanary = 0xcd;

struct Memory {
  std::size_t bytes;
  bool pinned;
};
std::mutex mutex;
std::map<const void*, Memory> buffers;  // guarded by mutex
thread_local std::string fault;

void CheckGuards(const void* memory, std::size_t bytes) {
  const auto* begin = static_cast<const std::uint8_t*>(memory);
  for (std::size_t i = 0; i < kGuard; ++i) {
    if (begin[i - kGuard] == kCanary && begin[bytes + i] == kCanary) continue;
    if (fault.empty()) fault = "a write beside a buffer of " + std::to_string(bytes) + " bytes";
    return;
  }
}

std::function<void()> CopyOf(void* to, const void* from, std::size_t bytes) {
  return [to, from, bytes] {
    if (bytes > 0) std::memcpy(to, from, bytes);
  };
}

}  // namespace

const char* RuntimeName() { return "simt"; }
const char* WhyUnavailable() { return nullptr; }
void DescribeDevice(char* text, std::size_t size) { std::snprintf(text, size, "no GPU: emulated on the CPU"); }
int MultiprocessorCount() { return 2; }

namespace {

void* AllocateAs(std::size_t bytes, bool pinned) {
  const std::size_t all = (bytes + kGuard - 1) / kGuard * kGuard + 2 * kGuard;
  auto* start = static_cast<std::uint8_t*>(std::aligned_alloc(kGuard, all));
  if (start == nullptr) return nullptr;
  std::memset(start, kCanary, all);
  std::memset(start + kGuard, 0xff, bytes);
  const std::lock_guard lock(mutex);
  buffers[start + kGuard] = {bytes, pinned};
  return start + kGuard;
}

bool IsPinned(const void* host) {
  const std::lock_guard lock(mutex);
  auto found = buffers.upper_bound(host);
  if (found == buffers.begin()) return false;
  --found;
  return found->second.pinned &&
         static_cast<const std::uint8_t*>(host) < static_cast<const std::uint8_t*>(found->first) + found->second.bytes;
}

}  // namespace

bool HostReachesDevice() { return true; }

void* Allocate(std::size_t bytes) { return AllocateAs(bytes, false); }

void Free(void* memory) {
  if (memory == nullptr) return;
  const std::lock_guard lock(mutex);
  const auto found = buffers.find(memory);
  if (found == buffers.end()) std::abort();
  CheckGuards(memory, found->second.bytes);
  buffers.erase(found);
  std::free(static_cast<std::uint8_t*>(memory) - kGuard);
}

void* AllocatePinned(std::size_t bytes) { return AllocateAs(bytes, true); }
void FreePinned(void* memory) { Free(memory); }
bool PinHost(void*, std::size_t) { return true; }
void UnpinHost(void*) {}

bool CopyToDevice(void* device, const void* host, std::size_t bytes, Stream stream) {
  if (stream == nullptr || IsPinned(host)) {
    simt::EnqueueUpload(stream, CopyOf(device, host, bytes));
    return true;
  }
  const auto* begin = static_cast<const std::uint8_t*>(host);  // which may change when this returns
  simt::EnqueueUpload(stream, [device, kept = std::vector<std::uint8_t>(begin, begin + bytes)] {
    if (!kept.empty()) std::memcpy(device, kept.data(), kept.size());
  });
  return true;
}

bool CopyToHost(void* host, const void* device, std::size_t bytes, Stream stream) {
  simt::Enqueue(stream, CopyOf(host, device, bytes));
  if (!IsPinned(host)) simt::Drain(stream);
  return true;
}

bool CopyOnDevice(void* to, const void* from, std::size_t bytes, Stream stream) {
  simt::Enqueue(stream, CopyOf(to, from, bytes));
  return true;
}

const char* Synchronize(Stream stream) {
  thread_local std::string message;
  simt::Drain(stream);
  {
    const std::lock_guard lock(mutex);
    for (const auto& [memory, about] : buffers) CheckGuards(memory, about.bytes);
  }
  message = simt::TakeFault();
  if (message.empty()) message = fault;
  fault.clear();
  return message.empty() ? nullptr : message.c_str();
}

}  // namespace zeroc::kernels::cuda
