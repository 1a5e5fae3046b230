#include <utility>
#include <vector>

#include "kernels/cuda/graph.h"
#include "kernels/cuda/host_simt/queue.h"

namespace zeroc::kernels::cuda {

using Works = std::vector<std::function<void()>>;

namespace {
thread_local Works* recording = nullptr;
}  // namespace

namespace simt {
void Enqueue(std::function<void()> work) {
  if (recording == nullptr) return work();
  recording->push_back(std::move(work));
}
}  // namespace simt

Stream CreateStream() { return new int; }
void DestroyStream(Stream stream) { delete static_cast<int*>(stream); }

struct Graph::Impl {
  Works works;
};

Graph::Graph(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Graph::~Graph() = default;

std::unique_ptr<Graph> Graph::Record(Stream, const std::function<KernelStatus()>& enqueue, const char** error) {
  auto impl = std::make_unique<Impl>();
  recording = &impl->works;
  const KernelStatus status = enqueue();
  recording = nullptr;
  if (status == KernelStatus::kOk) return std::unique_ptr<Graph>(new Graph(std::move(impl)));
  *error = "an op refused its arguments while the graph was recorded";
  return nullptr;
}

KernelStatus Graph::Launch() {
  for (const auto& work : impl_->works) work();
  return KernelStatus::kOk;
}

}  // namespace zeroc::kernels::cuda
