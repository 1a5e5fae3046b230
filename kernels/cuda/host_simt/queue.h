// Where the emulation's launches go: they run at once, or into the graph that is being recorded on this host thread.
#pragma once

#include <functional>

namespace zeroc::kernels::cuda::simt {

void Enqueue(std::function<void()> work);

}  // namespace zeroc::kernels::cuda::simt
