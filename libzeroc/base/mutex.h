// Annotated mutex, so that clang's -Wthread-safety proves who holds what. Plain std types underneath.
#pragma once

#include <condition_variable>
#include <mutex>

#if defined(__clang__)
#define ZEROC_TS_(x) __attribute__((x))
#else
#define ZEROC_TS_(x)
#endif
#define ZEROC_CAPABILITY(x) ZEROC_TS_(capability(x))
#define ZEROC_SCOPED_CAPABILITY ZEROC_TS_(scoped_lockable)
#define ZEROC_GUARDED_BY(x) ZEROC_TS_(guarded_by(x))
#define ZEROC_REQUIRES(...) ZEROC_TS_(requires_capability(__VA_ARGS__))
#define ZEROC_ACQUIRE(...) ZEROC_TS_(acquire_capability(__VA_ARGS__))
#define ZEROC_RELEASE(...) ZEROC_TS_(release_capability(__VA_ARGS__))
#define ZEROC_EXCLUDES(...) ZEROC_TS_(locks_excluded(__VA_ARGS__))
#define ZEROC_NO_THREAD_SAFETY_ANALYSIS ZEROC_TS_(no_thread_safety_analysis)

namespace zeroc {

class ZEROC_CAPABILITY("mutex") Mutex {
 public:
  void lock() ZEROC_ACQUIRE() { mu_.lock(); }
  void unlock() ZEROC_RELEASE() { mu_.unlock(); }

 private:
  friend class CondVar;
  std::mutex mu_;
};

class ZEROC_SCOPED_CAPABILITY MutexLock {
 public:
  explicit MutexLock(Mutex& mu) ZEROC_ACQUIRE(mu) : mu_(mu) { mu_.lock(); }
  ~MutexLock() ZEROC_RELEASE() { mu_.unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex& mu_;
};

class CondVar {
 public:
  // The caller holds mu. Spurious wake-ups happen: wait in a loop on the condition.
  void Wait(Mutex& mu) ZEROC_REQUIRES(mu) {
    std::unique_lock<std::mutex> lock(mu.mu_, std::adopt_lock);
    cv_.wait(lock);
    lock.release();
  }
  // False when `deadline` passed first.
  template <typename Clock, typename Duration>
  bool WaitUntil(Mutex& mu, const std::chrono::time_point<Clock, Duration>& deadline) ZEROC_REQUIRES(mu) {
    std::unique_lock<std::mutex> lock(mu.mu_, std::adopt_lock);
    const bool in_time = cv_.wait_until(lock, deadline) == std::cv_status::no_timeout;
    lock.release();
    return in_time;
  }
  void NotifyOne() { cv_.notify_one(); }
  void NotifyAll() { cv_.notify_all(); }

 private:
  std::condition_variable cv_;
};

}  // namespace zeroc
