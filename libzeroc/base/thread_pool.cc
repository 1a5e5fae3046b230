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
// Every thread may count one item too many.
constexpr std::size_t kItemsMax = 0xffff'0000U;

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

// Whoever comes takes the next item, and the round is over with its last item: a worker that the system does not run
// just now (more threads than processors, a quota) is not waited for unless it holds one.
struct ThreadPool::State {
  std::mutex mu;
  std::condition_variable start_cv;
  std::atomic<bool> stop{false};

  // Items of the round in the upper half, those taken in the lower: in one word, so that a worker that is late for a
  // round can only take an item of the next one, or none.
  std::atomic<std::uint64_t> taken{0};
  std::atomic<std::size_t> n_done{0};
  // Of the round. Written by the caller before `taken`, read by who holds an item, without which the round cannot end.
  const std::function<void(std::size_t, int)>* body = nullptr;

  std::vector<std::thread> workers;

  static std::size_t Items(std::uint64_t word) { return word >> 32; }
  static std::size_t Next(std::uint64_t word) { return word & 0xffff'ffffU; }

  bool HasItems() const {
    const std::uint64_t word = taken.load(std::memory_order_acquire);
    return Next(word) < Items(word);
  }

  void Drain(int thread_idx) {
    while (HasItems()) {
      const std::uint64_t word = taken.fetch_add(1, std::memory_order_acq_rel);
      if (Next(word) >= Items(word)) return;
      (*body)(Next(word), thread_idx);
      n_done.fetch_add(1, std::memory_order_release);
    }
  }

  void WorkerLoop(int thread_idx) {
    while (!stop.load(std::memory_order_acquire)) {
      for (int spin = 0; spin < kSpins && !HasItems(); ++spin) Pause();
      if (!HasItems()) {
        std::unique_lock<std::mutex> lock(mu);
        start_cv.wait(lock, [&] { return HasItems() || stop.load(std::memory_order_acquire); });
      }
      Drain(thread_idx);
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
  ZEROC_CHECK(n_items < kItemsMax, n_items);
  State& s = *state_;
  {
    const std::lock_guard<std::mutex> lock(s.mu);
    s.body = &body;
    s.n_done.store(0, std::memory_order_relaxed);
    s.taken.store(std::uint64_t{n_items} << 32, std::memory_order_release);
  }
  s.start_cv.notify_all();
  s.Drain(0);
  for (int spin = 0; s.n_done.load(std::memory_order_acquire) != n_items; ++spin) {
    if (spin < kSpins) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace zeroc
