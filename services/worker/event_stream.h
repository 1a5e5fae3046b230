// An EventSink over a gRPC server stream. Heavy: include it only where RPCs are served.
//
// The reactor lives until gRPC's OnDone, the sink as long as the core holds it; both share this queue. The queue is
// bounded by what a request may produce (max_tokens events), so a slow client costs no more than its own answer.
#pragma once

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <utility>

#include "libzeroc/base/mutex.h"
#include "services/common/grpc_status.h"
#include "services/worker/event_sink.h"

namespace zeroc {

// The call's deadline on the monotonic clock, in nanoseconds; 0 when it has none.
inline std::int64_t MonotonicDeadlineNs(const grpc::CallbackServerContext& context) {
  using std::chrono::nanoseconds;
  const auto deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return 0;
  const auto left = std::chrono::duration_cast<nanoseconds>(deadline - std::chrono::system_clock::now());
  const auto now = std::chrono::duration_cast<nanoseconds>(std::chrono::steady_clock::now().time_since_epoch());
  // Beyond a year nobody waits, and the sum stays in range.
  return (now + std::min<nanoseconds>(left, std::chrono::hours(24 * 365))).count();
}

template <typename Event>
class EventStream final : public EventSink<Event> {
 public:
  // Reacts to gRPC and deletes itself. on_cancel runs at most once, and not after End: the client is gone or its
  // deadline has passed.
  class Reactor final : public grpc::ServerWriteReactor<Event> {
   public:
    Reactor(std::shared_ptr<EventStream> stream, std::function<void()> on_cancel)
        : stream_(std::move(stream)), on_cancel_(std::move(on_cancel)) {}
    void OnWriteDone(bool ok) override { stream_->OnWritten(ok); }
    void OnCancel() override {
      if (!stream_->ended()) on_cancel_();
    }
    void OnDone() override {
      stream_->Detach();
      delete this;
    }

   private:
    const std::shared_ptr<EventStream> stream_;
    const std::function<void()> on_cancel_;
  };

  void Attach(Reactor* reactor) {
    MutexLock lock(mu_);
    reactor_ = reactor;
    Pump();
  }
  void Send(Event event) override {
    MutexLock lock(mu_);
    if (end_.has_value()) return;
    queue_.push_back(std::move(event));
    Pump();
  }
  void End(const Status& status) override {
    MutexLock lock(mu_);
    if (end_.has_value()) return;
    end_ = status;
    Pump();
  }

 private:
  bool ended() {
    MutexLock lock(mu_);
    return end_.has_value();
  }
  void Detach() {
    MutexLock lock(mu_);
    reactor_ = nullptr;
  }
  void OnWritten(bool ok) {
    MutexLock lock(mu_);
    writing_ = false;
    if (!ok) queue_.clear();
    Pump();
  }
  // StartWrite and Finish run no reaction inline, so the lock may be held.
  void Pump() ZEROC_REQUIRES(mu_) {
    if (reactor_ == nullptr || writing_) return;
    if (!queue_.empty()) {
      sending_ = std::move(queue_.front());
      queue_.pop_front();
      writing_ = true;
      reactor_->StartWrite(&sending_);
    } else if (end_.has_value()) {
      reactor_->Finish(ToGrpc(*end_));
      reactor_ = nullptr;
    }
  }

  Mutex mu_;
  Reactor* reactor_ ZEROC_GUARDED_BY(mu_) = nullptr;
  std::deque<Event> queue_ ZEROC_GUARDED_BY(mu_);
  Event sending_ ZEROC_GUARDED_BY(mu_);
  bool writing_ ZEROC_GUARDED_BY(mu_) = false;
  std::optional<Status> end_ ZEROC_GUARDED_BY(mu_);
};

}  // namespace zeroc
