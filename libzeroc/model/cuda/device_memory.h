// Memory of a device as a step loop needs it: buffers that grow, the many small arrays of a step in one copy, and the
// arenas of KV blocks. Everything belongs to one stream and one thread.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/cuda/runtime.h"
#include "kernels/ops.h"
#include "libzeroc/base/status.h"
#include "libzeroc/kv/kv_memory.h"

namespace zeroc {

// Waits for the stream. kInternal with the runtime's message for whatever failed on this thread since the last wait:
// work of the stream may then be undone, and mostly the device is lost.
Status WaitFor(kernels::cuda::Stream stream);

// Of an op's launch. kInternal where the device refused it; a shape that an op refuses is a bug of ours.
Status Launched(kernels::KernelStatus status, const char* op);

// Grows only; contents are lost when it does.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  ~DeviceBuffer() { kernels::cuda::Free(data_); }
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  // Nothing that uses the old contents may be under way. kResourceExhausted naming `what`.
  Status Reserve(std::size_t bytes, const char* what);
  template <typename T>
  T* As() const {
    return static_cast<T*>(data_);
  }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// A buffer with a copy of host values, for good. The copy is done when it returns.
template <typename T>
Result<DeviceBuffer> CopyToDevice(std::span<const T> values, const char* what, kernels::cuda::Stream stream) {
  DeviceBuffer buffer;
  ZEROC_RETURN_IF_ERROR(buffer.Reserve(values.size_bytes(), what));
  kernels::cuda::CopyToDevice(buffer.As<void>(), values.data(), values.size_bytes(), stream);
  ZEROC_RETURN_IF_ERROR(WaitFor(stream));
  return buffer;
}

// Small arrays of one step, gathered on the host and taken over by one copy. First all that is to be there is added,
// then Place gives it addresses, then Upload enqueues the copy. Arrays get room for the next power of two, so that they
// mostly keep their places when they grow: launches that were recorded then still find them.
class DeviceTables {
 public:
  DeviceTables() = default;
  ~DeviceTables() { kernels::cuda::FreePinned(pinned_); }
  DeviceTables(const DeviceTables&) = delete;
  DeviceTables& operator=(const DeviceTables&) = delete;

  void Clear() { bytes_.clear(); }

  // Where the array is, from the start: for At, once placed.
  template <typename T>
  std::size_t Add(std::span<const T> values) {
    static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= kAlignment);
    const std::size_t at = bytes_.size();
    bytes_.resize(at + std::bit_ceil(std::max(values.size_bytes(), kAlignment)));
    if (!values.empty()) std::memcpy(bytes_.data() + at, values.data(), values.size_bytes());
    return at;
  }
  template <typename T>
  std::size_t Add(const std::vector<T>& values) {
    return Add(std::span<const T>(values));
  }

  // Nothing that uses the tables of the last step may be under way. kResourceExhausted naming `what`.
  Status Place(const char* what);
  template <typename T>
  T* At(std::size_t offset) const {
    return reinterpret_cast<T*>(device_.As<std::byte>() + offset);
  }
  void Upload(kernels::cuda::Stream stream);

 private:
  static constexpr std::size_t kAlignment = 16;
  std::vector<std::byte> bytes_;
  void* pinned_ = nullptr;
  std::size_t pinned_bytes_ = 0;
  DeviceBuffer device_;
};

// Arenas of KV blocks on the device. Copies are enqueued behind the stream's work, and waited for together.
class DeviceKvMemory final : public KvMemory {
 public:
  explicit DeviceKvMemory(kernels::cuda::Stream stream) : stream_(stream) {}

  bool is_host() const override { return false; }
  Result<std::span<std::byte>> Allocate(std::size_t bytes) override;
  void Free(std::span<std::byte> arena) override { kernels::cuda::Free(arena.data()); }
  Status Copy(std::span<const KvCopy> copies) override;
  Status Read(std::span<const KvCopy> copies) override;
  Status Write(std::span<const KvCopy> copies) override;
  Status Pin(std::span<std::byte> host) override;
  void Unpin(std::span<std::byte> host) override { kernels::cuda::UnpinHost(host.data()); }

 private:
  kernels::cuda::Stream stream_;
};

}  // namespace zeroc
