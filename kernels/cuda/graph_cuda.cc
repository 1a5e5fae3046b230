#include <cuda_runtime_api.h>

#include <utility>

#include "kernels/cuda/graph.h"

namespace zeroc::kernels::cuda {

struct Graph::Impl {
  cudaGraphExec_t exec;
  cudaStream_t stream;
};

Graph::Graph(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Graph::~Graph() { cudaGraphExecDestroy(impl_->exec); }

std::unique_ptr<Graph> Graph::Record(Stream stream, const std::function<KernelStatus()>& enqueue, const char** error) {
  auto* on = static_cast<cudaStream_t>(stream);
  cudaError_t status = cudaStreamBeginCapture(on, cudaStreamCaptureModeThreadLocal);
  if (status != cudaSuccess) {
    *error = cudaGetErrorString(status);
    return nullptr;
  }
  const KernelStatus enqueued = enqueue();
  cudaGraph_t graph = nullptr;
  status = cudaStreamEndCapture(on, &graph);  // in any case, or the stream stays unusable
  cudaGraphExec_t exec = nullptr;
  if (status == cudaSuccess && enqueued == KernelStatus::kOk) status = cudaGraphInstantiate(&exec, graph, 0);
  if (graph != nullptr) cudaGraphDestroy(graph);
  if (status == cudaSuccess && exec != nullptr)
    return std::unique_ptr<Graph>(new Graph(std::make_unique<Impl>(Impl{exec, on})));
  *error =
      status == cudaSuccess ? "an op refused its arguments while the graph was recorded" : cudaGetErrorString(status);
  return nullptr;
}

KernelStatus Graph::Launch() {
  return cudaGraphLaunch(impl_->exec, impl_->stream) == cudaSuccess ? KernelStatus::kOk : KernelStatus::kUnsupported;
}

}  // namespace zeroc::kernels::cuda
