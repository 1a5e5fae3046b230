// Streams, events and graphs of the emulation.
#include <chrono>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/cuda/graph.h"
#include "kernels/cuda/host_simt/queue.h"

namespace zeroc::kernels::cuda {
namespace {

using Works = std::vector<std::function<void()>>;

thread_local Works* recording = nullptr;
thread_local std::int64_t lost = -1;
thread_local std::int64_t n_works = 0;

// Work by number. A stream that waits for another one holds both mutexes; they do not wait for each other in circles.
class Line {
 public:
  void Add(std::function<bool()> advance) {
    const std::lock_guard lock(mutex_);
    works_.push_back(std::move(advance));
  }
  std::uint64_t n_added() {
    const std::lock_guard lock(mutex_);
    return n_done_ + works_.size();
  }
  // Whether the first n are done, after doing of them what can be done.
  bool Advance(std::uint64_t n) {
    const std::lock_guard lock(mutex_);
    while (n_done_ < n) {
      if (!works_.front()()) return false;
      works_.pop_front();
      ++n_done_;
    }
    return true;
  }

 private:
  std::mutex mutex_;
  std::deque<std::function<bool()>> works_;
  std::uint64_t n_done_ = 0;
};

using LinePtr = std::shared_ptr<Line>;  // others may still wait for a stream that is gone

LinePtr LineOf(Stream stream) { return stream == nullptr ? nullptr : *static_cast<LinePtr*>(stream); }

void Put(Stream stream, std::function<void()> work) {
  const LinePtr line = LineOf(stream);
  if (line == nullptr) return work();
  line->Add([work = std::move(work)] {
    work();
    return true;
  });
}

struct Mark {
  LinePtr line;  // null: of the default stream, or not recorded
  std::uint64_t n = 0;
  bool IsPassed() const { return line == nullptr || line->Advance(n); }
};

}  // namespace

namespace simt {
void LoseWork(std::int64_t idx) {
  lost = idx;
  n_works = 0;
}
std::int64_t CountWork() { return n_works; }

void Enqueue(Stream stream, std::function<void()> work) {
  if (n_works++ != lost) EnqueueUpload(stream, std::move(work));
}

void EnqueueUpload(Stream stream, std::function<void()> work) {
  if (recording == nullptr) return Put(stream, std::move(work));
  recording->push_back(std::move(work));
}

void EnqueueShared(Stream stream, std::function<bool()> advance) {
  const LinePtr line = LineOf(stream);
  if (line == nullptr || recording != nullptr) std::abort();
  line->Add(std::move(advance));
}

void Advance(Stream stream) {
  const LinePtr line = LineOf(stream);
  if (line != nullptr) line->Advance(line->n_added());
}

void Drain(Stream stream) {
  const LinePtr line = LineOf(stream);
  if (line == nullptr || recording != nullptr) return;
  const std::uint64_t n = line->n_added();
  while (!line->Advance(n)) std::this_thread::sleep_for(std::chrono::microseconds(20));
}
}  // namespace simt

Stream CreateStream() { return new LinePtr(std::make_shared<Line>()); }
void DestroyStream(Stream stream) { delete static_cast<LinePtr*>(stream); }

Event CreateEvent() { return new Mark; }
void DestroyEvent(Event event) { delete static_cast<Mark*>(event); }

bool RecordEvent(Event event, Stream stream) {
  Mark& mark = *static_cast<Mark*>(event);
  mark.line = LineOf(stream);
  mark.n = mark.line == nullptr ? 0 : mark.line->n_added();
  return true;
}

bool StreamWait(Stream stream, Event event) {
  const Mark mark = *static_cast<Mark*>(event);
  const LinePtr line = LineOf(stream);
  if (mark.line == nullptr || mark.line == line) return true;
  if (line == nullptr) std::abort();  // the default stream waits for nobody here
  line->Add([mark] { return mark.IsPassed(); });
  return true;
}

EventState QueryEvent(Event event) {
  return static_cast<Mark*>(event)->IsPassed() ? EventState::kPassed : EventState::kAhead;
}

struct Graph::Impl {
  Stream stream;
  Works works;
};

Graph::Graph(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Graph::~Graph() = default;

std::unique_ptr<Graph> Graph::Record(Stream stream, const std::function<KernelStatus()>& enqueue, const char** error) {
  auto impl = std::make_unique<Impl>(Impl{stream, {}});
  recording = &impl->works;
  const KernelStatus status = enqueue();
  recording = nullptr;
  if (status == KernelStatus::kOk) return std::unique_ptr<Graph>(new Graph(std::move(impl)));
  *error = "an op refused its arguments while the graph was recorded";
  return nullptr;
}

KernelStatus Graph::Launch() {
  for (const auto& work : impl_->works) Put(impl_->stream, work);
  return KernelStatus::kOk;
}

}  // namespace zeroc::kernels::cuda
