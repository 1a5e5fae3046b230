// Where the emulation's launches and copies go: they run at once, or into the graph that is being recorded on this host
// thread. One of them can be lost, to prove that a test would notice it.
#pragma once

#include <cstdint>
#include <functional>

namespace zeroc::kernels::cuda::simt {

void Enqueue(std::function<void()> work);
// The same for what comes from the host. Never lost: kernels that follow pointers which did not arrive end the process.
void EnqueueUpload(std::function<void()> work);

// From now on, on this host thread: the Enqueue of this index is not done, counted from 0; -1: all are.
void LoseWork(std::int64_t idx);
// Enqueues since LoseWork.
std::int64_t CountWork();

}  // namespace zeroc::kernels::cuda::simt
