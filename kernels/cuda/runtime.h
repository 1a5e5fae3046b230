// Memory, copies, streams and events of one GPU, as the ops and their tests need them: a thin wall before CUDA's
// runtime, with a twin in host memory for machines without one (host_simt). Plain functions; any thread; the current
// device is used. Nothing throws: a failure is a null pointer or a message that lives as long as the program.
#pragma once

#include <cstddef>

namespace zeroc::kernels::cuda {

// A cudaStream_t; null is the default stream. Work of one stream runs in order.
using Stream = void*;

// "cuda", or "simt" for the emulation.
const char* RuntimeName();

// Null if a GPU can be used, else why not, as the driver or the runtime says it.
const char* WhyUnavailable();

// "NVIDIA H200, compute capability 9.0, 132 SMs, 139 GiB", or what stands in for it; a buffer of the caller.
void DescribeDevice(char* text, std::size_t size);
int MultiprocessorCount();

// Device memory, 256-byte aligned. Null when there is none left. Contents are unspecified (NaN bytes in the emulation).
void* Allocate(std::size_t bytes);
// Null is fine. Waits for nothing: the caller has synchronised. In the emulation a write beside the buffer is a fault.
void Free(void* memory);
// Page-locked host memory that a stream copies from and to without a second copy.
void* AllocatePinned(std::size_t bytes);
void FreePinned(void* memory);
// The same for memory that is there already, until UnpinHost. False where the system refuses.
bool PinHost(void* memory, std::size_t bytes);
void UnpinHost(void* memory);

// Enqueued on the stream. From and to pageable memory they return when the copy is done. On the device the two ranges
// may not overlap. False with the runtime's message in the next Synchronize.
bool CopyToDevice(void* device, const void* host, std::size_t bytes, Stream stream);
bool CopyToHost(void* host, const void* device, std::size_t bytes, Stream stream);
bool CopyOnDevice(void* to, const void* from, std::size_t bytes, Stream stream);

// Waits for all work of the stream. Null, or what went wrong since the last call on this thread.
const char* Synchronize(Stream stream);

// Whether ordinary host code can follow addresses of device memory: in the emulation alone.
bool HostReachesDevice();

// Streams beside the default one: for what is recorded (graph.h) and what runs beside other work. Null when the device
// refuses. Destroyed when nobody waits for their work any more.
Stream CreateStream();
void DestroyStream(Stream stream);

// A cudaEvent_t: a place in a stream's work, for other streams and for the host. Recording it anew moves it.
using Event = void*;
Event CreateEvent();  // null when the device refuses
void DestroyEvent(Event event);
bool RecordEvent(Event event, Stream stream);
// Work that the stream is given from now on waits until the event is passed, as it is recorded now.
bool StreamWait(Stream stream, Event event);
enum class EventState { kPassed, kAhead, kFailed };  // kFailed: the device is in trouble, Synchronize says in which
EventState QueryEvent(Event event);                  // of its latest recording; waits for nothing

}  // namespace zeroc::kernels::cuda
