#include "libzeroc/base/thread_pool.h"

#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

// About 20 us on a 3 GHz core: longer than the gap between two ops of a layer, far shorter than a scheduling quantum.
constexpr int kSpins = 2000;

int AllowedProcessors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
  const unsigned n = std::thread::hardware_concurrency();
  return n > 0 ? static_cast<int>(n) : 1;
}

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

struct ThreadPool::State {
  std::mutex mu;
  std::condition_variable start_cv;
  std::atomic<std::uint64_t> epoch{0};  // grows by one per ParallelFor; workers wait for it to move
  std::atomic<bool> stop{false};

  // Written by the caller before epoch moves, read by workers after they saw it move.
  const std::function<void(std::size_t, int)>* body = nullptr;
  std::size_t n_items = 0;
  std::atomic<std::size_t> next_item{0};
  std::atomic<int> n_working{0};

  std::vector<std::thread> workers;

  void Drain(int thread_idx) {
    for (std::size_t i = next_item.fetch_add(1, std::memory_order_relaxed); i < n_items;
         i = next_item.fetch_add(1, std::memory_order_relaxed)) {
      (*body)(i, thread_idx);
    }
  }

  void WorkerLoop(int thread_idx) {
    std::uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && epoch.load(std::memory_order_acquire) == seen; ++spin) Pause();
      if (epoch.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mu);
        start_cv.wait(lock, [&] { return epoch.load(std::memory_order_acquire) != seen; });
      }
      ++seen;
      if (stop.load(std::memory_order_acquire)) return;
      Drain(thread_idx);
      n_working.fetch_sub(1, std::memory_order_release);
    }
  }
};

ThreadPool::ThreadPool(int n_threads)
    : n_threads_(n_threads == 0 ? AllowedProcessors() : n_threads), state_(std::make_unique<State>()) {
  ZEROC_CHECK(n_threads_ >= 1, n_threads);
  for (int i = 1; i < n_threads_; ++i) state_->workers.emplace_back([s = state_.get(), i] { s->WorkerLoop(i); });
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard<std::mutex> lock(state_->mu);
    state_->stop.store(true, std::memory_order_release);
    state_->epoch.fetch_add(1, std::memory_order_release);
  }
  state_->start_cv.notify_all();
  for (std::thread& worker : state_->workers) worker.join();
}

void ThreadPool::ParallelFor(std::size_t n_items, const std::function<void(std::size_t, int)>& body) {
  if (n_items == 0) return;
  if (n_threads_ == 1 || n_items == 1) {
    for (std::size_t i = 0; i < n_items; ++i) body(i, 0);
    return;
  }
  State& s = *state_;
  {
    const std::lock_guard<std::mutex> lock(s.mu);
    s.body = &body;
    s.n_items = n_items;
    s.next_item.store(0, std::memory_order_relaxed);
    s.n_working.store(n_threads_ - 1, std::memory_order_relaxed);
    s.epoch.fetch_add(1, std::memory_order_release);
  }
  s.start_cv.notify_all();
  s.Drain(0);
  for (int spin = 0; s.n_working.load(std::memory_order_acquire) != 0; ++spin) {
    if (spin < kSpins) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace zeroc
