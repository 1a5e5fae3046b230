// Matrix products on a GPU: cuBLAS, and in the emulation a plain loop.
#pragma once

#include <memory>

#include "kernels/cuda/runtime.h"
#include "kernels/ops.h"

namespace zeroc::kernels::cuda {

// One stream's products. Not thread-safe; a stream has one. Owns cuBLAS's handle and its work space on the device.
class Linear {
 public:
  // Null, and *error says why (static text), when cuBLAS cannot start: no device, no memory.
  static std::unique_ptr<Linear> Open(Stream stream, const char** error);
  ~Linear();
  Linear(const Linear&) = delete;
  Linear& operator=(const Linear&) = delete;

  // LinearArgs with device pointers: x and w bf16, y f32; sums in f32. kBadShape for bad arguments and sizes beyond
  // 2^31, kUnsupported where cuBLAS refuses.
  KernelStatus Run(const LinearArgs& args);

 private:
  struct Impl;
  explicit Linear(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace zeroc::kernels::cuda
