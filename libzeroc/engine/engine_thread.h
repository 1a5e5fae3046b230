// Runs one engine on a thread of its own and carries other threads' calls to it, in order, between steps.
//
// Post and Call may be used from any thread, also from the engine's own (Post only). Stop runs what was posted before.
#pragma once

#include <functional>
#include <future>
#include <memory>
#include <string>

namespace zeroc {

class EngineThread {
 public:
  // step: one unit of work, false when idle (the thread then sleeps until something is posted).
  EngineThread(std::string name, std::function<bool()> step);
  ~EngineThread();  // Stop()
  EngineThread(const EngineThread&) = delete;
  EngineThread& operator=(const EngineThread&) = delete;

  // False after Stop: the function will not run.
  bool Post(std::function<void()> function);

  // Runs `function` on the engine's thread and returns its result; never from that thread itself (it would wait for
  // itself: checked). After Stop, a default-constructed R.
  template <typename R>
  R Call(std::function<R()> function) {
    auto result = std::make_shared<std::promise<R>>();
    std::future<R> future = result->get_future();
    CheckNotOwnThread();
    if (!Post([result, function = std::move(function)] { result->set_value(function()); })) return R();
    return future.get();
  }

  void Stop();

 private:
  struct State;
  void CheckNotOwnThread() const;
  std::unique_ptr<State> state_;
};

}  // namespace zeroc
