// Where the emulation's launches and copies go. The default stream does them at once. Every other stream does nothing
// before somebody waits for it (Synchronize, QueryEvent, another stream that waits for an event of it), and then no
// more than is waited for: what should wait for a stream and does not finds nothing done. What is recorded on this
// host thread goes into the graph.
//
// A launch can be lost, to prove that a test would notice it. Any thread; a stream's work runs on one of those that
// wait for it.
#pragma once

#include <cstdint>
#include <functional>

#include "kernels/cuda/runtime.h"

namespace zeroc::kernels::cuda::simt {

void Enqueue(Stream stream, std::function<void()> work);
// The same for what comes from the host. Never lost: kernels that follow pointers which did not arrive end the process.
void EnqueueUpload(Stream stream, std::function<void()> work);
// Work in which others have a part: called again and again until it returns true, with work behind it waiting. Not for
// the default stream, and not recorded.
void EnqueueShared(Stream stream, std::function<bool()> advance);
// Does of the stream's work what can be done now, as a device does by itself.
void Advance(Stream stream);
// Does all of it, waiting for others where they have a part.
void Drain(Stream stream);

// From now on, on this host thread: the Enqueue of this index is not done, counted from 0; -1: all are.
void LoseWork(std::int64_t idx);
// Enqueues since LoseWork.
std::int64_t CountWork();

}  // namespace zeroc::kernels::cuda::simt
