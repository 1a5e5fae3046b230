// A fixed team of compute threads. The caller is one of them, so a pool of size 1 starts no thread.
//
// ParallelFor may be called from one thread at a time (the engine's step loop); bodies must not call back into the
// same pool. Waiting workers spin briefly (a layer's ops follow each other within microseconds), then sleep, so that
// an idle server burns nothing.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

namespace zeroc {

class ThreadPool {
 public:
  // n_threads >= 1, the caller included. 0 takes the number of processors this process may run on.
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return n_threads_; }

  // Runs body(item, thread_idx) for every item in [0, n_items), items taken one by one in order, and returns when all
  // are done. thread_idx is in [0, size()); body must not throw.
  void ParallelFor(std::size_t n_items, const std::function<void(std::size_t item, int thread_idx)>& body);

 private:
  struct State;
  int n_threads_;
  std::unique_ptr<State> state_;
};

}  // namespace zeroc
