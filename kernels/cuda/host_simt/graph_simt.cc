#include <utility>
#include <vector>

#include "kernels/cuda/graph.h"
#include "kernels/cuda/host_simt/queue.h"

namespace zeroc::kernels::cuda {

using Works = std::vector<std::function<void()>>;

namespace {
thread_local Works* recording = nullptr;
thread_local std::int64_t lost = -1;
thread_local std::int64_t n_works = 0;
}  // namespace

namespace simt {
void LoseWork(std::int64_t idx) {
  lost = idx;
  n_works = 0;
}
std::int64_t CountWork() { return n_works; }

void Enqueue(std::function<void()> work) {
  if (n_works++ != lost) EnqueueUpload(std::move(work));
}

void EnqueueUpload(std::function<void()> work) {
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
