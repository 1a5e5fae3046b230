#include <cuda_runtime_api.h>

#include <cstdio>

#include "kernels/cuda/runtime.h"

namespace zeroc::kernels::cuda {
namespace {

// The first failure of this thread that nobody has been told of.
thread_local cudaError_t pending = cudaSuccess;

bool Note(cudaError_t error) {
  if (error != cudaSuccess && pending == cudaSuccess) pending = error;
  return error == cudaSuccess;
}

}  // namespace

const char* RuntimeName() { return "cuda"; }

const char* WhyUnavailable() {
  int n_devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&n_devices);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (n_devices == 0) return "the driver reports no device";
  int major = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess || major < 8) {
    return "the device is older than compute capability 8.0";
  }
  return nullptr;
}

void DescribeDevice(char* text, std::size_t size) {
  cudaDeviceProp properties;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
    std::snprintf(text, size, "no device");
    return;
  }
  std::snprintf(text, size, "%s, compute capability %d.%d, %d SMs, %.0f GiB", properties.name, properties.major,
                properties.minor, properties.multiProcessorCount,
                static_cast<double>(properties.totalGlobalMem) / (1024.0 * 1024.0 * 1024.0));
}

int MultiprocessorCount() {
  int device = 0, count = 1;
  if (!Note(cudaGetDevice(&device))) return 1;
  Note(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

void* Allocate(std::size_t bytes) {
  void* memory = nullptr;
  // An allocation that does not fit is the caller's to report, not an error of the stream.
  if (cudaMalloc(&memory, bytes) == cudaSuccess) return memory;
  cudaGetLastError();
  return nullptr;
}

void Free(void* memory) { Note(cudaFree(memory)); }

void* AllocatePinned(std::size_t bytes) {
  void* memory = nullptr;
  if (cudaMallocHost(&memory, bytes) == cudaSuccess) return memory;
  cudaGetLastError();
  return nullptr;
}

void FreePinned(void* memory) { Note(cudaFreeHost(memory)); }

bool PinHost(void* memory, std::size_t bytes) {
  if (cudaHostRegister(memory, bytes, cudaHostRegisterDefault) == cudaSuccess) return true;
  cudaGetLastError();
  return false;
}

void UnpinHost(void* memory) { Note(cudaHostUnregister(memory)); }

bool CopyToDevice(void* device, const void* host, std::size_t bytes, Stream stream) {
  return Note(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)));
}

bool CopyToHost(void* host, const void* device, std::size_t bytes, Stream stream) {
  return Note(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream)));
}

bool CopyOnDevice(void* to, const void* from, std::size_t bytes, Stream stream) {
  return Note(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)));
}

const char* Synchronize(Stream stream) {
  Note(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
  Note(cudaGetLastError());
  const cudaError_t error = pending;
  pending = cudaSuccess;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

bool HostReachesDevice() { return false; }

Stream CreateStream() {
  cudaStream_t stream = nullptr;
  return cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess ? stream : nullptr;
}

void DestroyStream(Stream stream) {
  if (stream != nullptr) cudaStreamDestroy(static_cast<cudaStream_t>(stream));
}

Event CreateEvent() {
  cudaEvent_t event = nullptr;
  return cudaEventCreateWithFlags(&event, cudaEventDisableTiming) == cudaSuccess ? event : nullptr;
}

void DestroyEvent(Event event) {
  if (event != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(event));
}

bool RecordEvent(Event event, Stream stream) {
  return Note(cudaEventRecord(static_cast<cudaEvent_t>(event), static_cast<cudaStream_t>(stream)));
}

bool StreamWait(Stream stream, Event event) {
  return Note(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(event), 0));
}

EventState QueryEvent(Event event) {
  const cudaError_t error = cudaEventQuery(static_cast<cudaEvent_t>(event));
  if (error == cudaErrorNotReady) {
    cudaGetLastError();  // no error: nobody is to find it
    return EventState::kAhead;
  }
  return Note(error) ? EventState::kPassed : EventState::kFailed;
}

}  // namespace zeroc::kernels::cuda
