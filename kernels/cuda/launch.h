// Starts a kernel: on a GPU, or in the emulation. For the .cu files only.
#pragma once

#include "kernels/cuda/device.h"
#include "kernels/cuda/runtime.h"
#include "kernels/ops.h"

#ifndef __CUDACC__
#include "kernels/cuda/host_simt/queue.h"
#endif

namespace zeroc::kernels::cuda {

struct LaunchShape {
  std::int64_t n_blocks;
  int n_threads;
  int shared_bytes = 0;
  int n_blocks_y = 1;
};

// kUnsupported where the device refuses the launch: no device, or less shared memory than asked for. What a kernel does
// wrong shows in Synchronize. No blocks: nothing is done.
template <typename Params>
KernelStatus Launch(void (*kernel)(Params), const LaunchShape& shape, Stream stream, Params params) {
  if (shape.n_blocks == 0 || shape.n_blocks_y == 0) return KernelStatus::kOk;
#ifdef __CUDACC__
  constexpr int kWithoutAsking = 48 * 1024;
  if (shape.shared_bytes > kWithoutAsking) {
    const auto asked = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
    if (asked != cudaSuccess) return KernelStatus::kUnsupported;
  }
  void* args[] = {&params};
  const dim3 grid(static_cast<unsigned>(shape.n_blocks), static_cast<unsigned>(shape.n_blocks_y));
  const auto launched =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(static_cast<unsigned>(shape.n_threads)), args,
                       static_cast<std::size_t>(shape.shared_bytes), static_cast<cudaStream_t>(stream));
  return launched == cudaSuccess ? KernelStatus::kOk : KernelStatus::kUnsupported;
#else
  simt::Enqueue(stream, [kernel, params, shape] {
    simt::Run({static_cast<int>(shape.n_blocks), shape.n_blocks_y, shape.n_threads, shape.shared_bytes},
              [kernel, &params] { kernel(params); });
  });
  return KernelStatus::kOk;
#endif
}

}  // namespace zeroc::kernels::cuda
