#include "libzeroc/model/cuda/device_memory.h"

#include "libzeroc/base/check.h"

namespace zeroc {

using kernels::KernelStatus;
namespace cuda = kernels::cuda;

namespace {

Status NoMemory(std::size_t bytes, const char* what) {
  return ResourceExhausted(std::string(cuda::RuntimeName()) + ": no " + std::to_string(bytes) +
                           " bytes of device memory for " + what);
}

}  // namespace

Status WaitFor(cuda::Stream stream) {
  const char* error = cuda::Synchronize(stream);
  return error == nullptr ? OkStatus() : Internal(std::string(cuda::RuntimeName()) + ": " + error);
}

Status Launched(KernelStatus status, const char* op) {
  ZEROC_CHECK(status != KernelStatus::kBadShape, op);
  if (status == KernelStatus::kOk) return OkStatus();
  return Internal(std::string(cuda::RuntimeName()) + ": the device refused " + op);
}

Status DeviceBuffer::Reserve(std::size_t bytes, const char* what) {
  if (bytes <= bytes_ && data_ != nullptr) return OkStatus();
  cuda::Free(std::exchange(data_, nullptr));
  bytes_ = 0;
  data_ = cuda::Allocate(bytes > 0 ? bytes : 1);
  if (data_ == nullptr) return NoMemory(bytes, what);
  bytes_ = bytes;
  return OkStatus();
}

Status DeviceTables::Place(const char* what) {
  // Half as much again: tables grow with the sequences, block by block.
  if (bytes_.size() > device_.bytes()) {
    ZEROC_RETURN_IF_ERROR(device_.Reserve(bytes_.size() + bytes_.size() / 2, what));
  }
  if (bytes_.size() <= pinned_bytes_) return OkStatus();
  cuda::FreePinned(std::exchange(pinned_, nullptr));
  pinned_bytes_ = 0;
  pinned_ = cuda::AllocatePinned(device_.bytes());
  if (pinned_ == nullptr) {
    return ResourceExhausted("no " + std::to_string(device_.bytes()) + " bytes of page-locked memory for " + what);
  }
  pinned_bytes_ = device_.bytes();
  return OkStatus();
}

void DeviceTables::Upload(cuda::Stream stream) {
  if (bytes_.empty()) return;
  std::memcpy(pinned_, bytes_.data(), bytes_.size());
  cuda::CopyToDevice(device_.As<void>(), pinned_, bytes_.size(), stream);
}

Result<std::span<std::byte>> DeviceKvMemory::Allocate(std::size_t bytes) {
  void* memory = cuda::Allocate(bytes);
  if (memory == nullptr) return NoMemory(bytes, "KV blocks");
  return std::span(static_cast<std::byte*>(memory), bytes);
}

Status DeviceKvMemory::Copy(std::span<const KvCopy> copies) {
  for (const KvCopy& copy : copies) cuda::CopyOnDevice(copy.to, copy.from, copy.bytes, stream_);
  return WaitFor(stream_);
}

Status DeviceKvMemory::Read(std::span<const KvCopy> copies) {
  for (const KvCopy& copy : copies) cuda::CopyToHost(copy.to, copy.from, copy.bytes, stream_);
  return WaitFor(stream_);
}

Status DeviceKvMemory::Write(std::span<const KvCopy> copies) {
  for (const KvCopy& copy : copies) cuda::CopyToDevice(copy.to, copy.from, copy.bytes, stream_);
  return WaitFor(stream_);
}

Status DeviceKvMemory::Pin(std::span<std::byte> host) {
  if (cuda::PinHost(host.data(), host.size())) return OkStatus();
  return ResourceExhausted(std::string(cuda::RuntimeName()) + ": the system page-locks no " +
                           std::to_string(host.size()) + " bytes beside the KV memory on the device");
}

}  // namespace zeroc
