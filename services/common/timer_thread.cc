#include "services/common/timer_thread.h"

namespace zeroc {

TimerThread::TimerThread() : thread_([this] { Run(); }) {}

TimerThread::~TimerThread() {
  {
    MutexLock lock(mu_);
    stopping_ = true;
    wake_.NotifyAll();
  }
  thread_.join();
}

TimerId TimerThread::Schedule(Clock::time_point when, std::function<void()> callback) {
  MutexLock lock(mu_);
  const auto id = static_cast<TimerId>(next_id_++);
  queue_.emplace(Key{when, id}, std::move(callback));
  when_.emplace(id, when);
  if (queue_.begin()->first.second == id) wake_.NotifyAll();
  return id;
}

void TimerThread::Cancel(TimerId id) {
  std::function<void()> dropped;  // destroyed outside the lock: it may own objects that call back into this one
  MutexLock lock(mu_);
  const auto when = when_.find(id);
  if (when == when_.end()) return;
  const auto entry = queue_.find({when->second, id});
  dropped = std::move(entry->second);
  queue_.erase(entry);
  when_.erase(when);
}

void TimerThread::Run() {
  mu_.lock();
  while (!stopping_) {
    if (queue_.empty()) {
      wake_.Wait(mu_);
      continue;
    }
    const auto next = queue_.begin();
    const Clock::time_point due = next->first.first;  // a copy: Cancel may drop the entry while this waits
    if (due > Clock::now()) {
      wake_.WaitUntil(mu_, due);
      continue;
    }
    std::function<void()> callback = std::move(next->second);
    when_.erase(next->first.second);
    queue_.erase(next);
    mu_.unlock();
    callback();
    callback = nullptr;
    mu_.lock();
  }
  mu_.unlock();
}

}  // namespace zeroc
