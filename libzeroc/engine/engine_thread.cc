#include "libzeroc/engine/engine_thread.h"

#include <pthread.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "libzeroc/base/check.h"

namespace zeroc {

struct EngineThread::State {
  std::mutex mu;
  std::condition_variable wake;
  std::deque<std::function<void()>> posted;
  bool stopping = false;
  std::function<bool()> step;
  std::thread thread;

  // Everything posted so far, in order. False when the thread shall end.
  bool RunPosted(bool wait) {
    std::deque<std::function<void()>> batch;
    bool stop;
    {
      std::unique_lock<std::mutex> lock(mu);
      if (wait) wake.wait(lock, [this] { return stopping || !posted.empty(); });
      batch.swap(posted);
      stop = stopping;
    }
    for (auto& function : batch) function();
    return !stop;
  }

  void Loop() {
    bool busy = false;
    while (RunPosted(!busy)) busy = step();
    RunPosted(false);  // what came between the last batch and the stop
  }
};

EngineThread::EngineThread(std::string name, std::function<bool()> step) : state_(std::make_unique<State>()) {
  state_->step = std::move(step);
  state_->thread = std::thread([s = state_.get()] { s->Loop(); });
  pthread_setname_np(state_->thread.native_handle(), name.substr(0, 15).c_str());
}

EngineThread::~EngineThread() { Stop(); }

bool EngineThread::Post(std::function<void()> function) {
  {
    const std::lock_guard<std::mutex> lock(state_->mu);
    if (state_->stopping) return false;
    state_->posted.push_back(std::move(function));
  }
  state_->wake.notify_one();
  return true;
}

void EngineThread::CheckNotOwnThread() const {
  ZEROC_CHECK(std::this_thread::get_id() != state_->thread.get_id(), "Call from the engine's own thread");
}

void EngineThread::Stop() {
  {
    const std::lock_guard<std::mutex> lock(state_->mu);
    state_->stopping = true;
  }
  state_->wake.notify_one();
  if (state_->thread.joinable()) state_->thread.join();
}

}  // namespace zeroc
