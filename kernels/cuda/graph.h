// A recorded sequence of launches: a decode step of fixed batch size is some hundred kernels of microseconds each, and
// a graph starts them with one call. Pointers and sizes are those of the recording; what they point to may change
// between launches (token ids, block tables, work lists), which is why plans lie in device arrays of fixed addresses.
//
// Not thread-safe; one launch at a time, in the order of its stream.
#pragma once

#include <functional>
#include <memory>

#include "kernels/cuda/runtime.h"
#include "kernels/ops.h"

namespace zeroc::kernels::cuda {

class Graph {
 public:
  // Records what `enqueue` puts on the stream, which is not the default one; nothing runs. Null, and *error says why
  // (static text), if enqueue does not return kOk or the device refuses.
  static std::unique_ptr<Graph> Record(Stream stream, const std::function<KernelStatus()>& enqueue, const char** error);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  // Enqueues all of it on the stream of the recording. kUnsupported where the device refuses.
  KernelStatus Launch();

 private:
  struct Impl;
  explicit Graph(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace zeroc::kernels::cuda
