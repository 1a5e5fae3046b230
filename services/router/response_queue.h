// What a streaming gRPC call has still to send: the one place where answers of flows meet gRPC's writer.
//
// Thread-safe. The reactor lives until gRPC's OnDone, the flows that answer as long as they please: the queue is shared
// by both. Internal to the router's gRPC services.
#pragma once

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <cstddef>
#include <deque>
#include <optional>
#include <utility>

#include "libzeroc/base/mutex.h"
#include "libzeroc/base/status.h"
#include "services/common/grpc_status.h"

namespace zeroc {

// Reactor: grpc::ServerWriteReactor or grpc::ServerBidiReactor of Response.
template <typename Reactor, typename Response>
class ResponseQueue {
 public:
  // A client that is further behind is cut off with CANCELLED.
  explicit ResponseQueue(std::size_t queued_bytes_max) : queued_bytes_max_(queued_bytes_max) {}

  // `context` is used only while the reactor is attached.
  void Attach(Reactor* reactor, grpc::CallbackServerContext* context) {
    MutexLock lock(mu_);
    reactor_ = reactor;
    context_ = context;
    Pump();
  }
  // In OnDone: from here on gRPC may delete the reactor at any time.
  void Detach() {
    MutexLock lock(mu_);
    reactor_ = nullptr;
  }

  void Push(Response response) {
    MutexLock lock(mu_);
    // What waits already counts, not this one: who reads is not behind because a message is large. Flows may not be
    // called from here; cancelling the call comes back through the reactor's OnCancel.
    if (queued_bytes_ > queued_bytes_max_ && reactor_ != nullptr && !too_slow_) {
      too_slow_ = true;
      context_->TryCancel();
    }
    queued_bytes_ += response.ByteSizeLong();
    queue_.push_back(std::move(response));
    Pump();
  }
  // The first status counts, and comes after the queue.
  void End(const Status& status) {
    MutexLock lock(mu_);
    if (!end_.has_value()) end_ = status;
    Pump();
  }
  // In OnWriteDone.
  void OnWritten(bool ok) {
    MutexLock lock(mu_);
    writing_ = false;
    if (!ok) queue_.clear();
    Pump();
  }
  bool too_slow() const {
    MutexLock lock(mu_);
    return too_slow_;
  }

 private:
  // StartWrite and Finish do not run reactions inline, so the lock may be held.
  void Pump() ZEROC_REQUIRES(mu_) {
    if (reactor_ == nullptr || writing_) return;
    if (!queue_.empty()) {
      sending_ = std::move(queue_.front());
      queue_.pop_front();
      queued_bytes_ -= std::min(queued_bytes_, sending_.ByteSizeLong());
      writing_ = true;
      reactor_->StartWrite(&sending_);
      return;
    }
    if (!end_.has_value()) return;
    std::exchange(reactor_, nullptr)->Finish(ToGrpc(*end_));
  }

  const std::size_t queued_bytes_max_;
  mutable Mutex mu_;
  Reactor* reactor_ ZEROC_GUARDED_BY(mu_) = nullptr;
  grpc::CallbackServerContext* context_ ZEROC_GUARDED_BY(mu_) = nullptr;
  std::deque<Response> queue_ ZEROC_GUARDED_BY(mu_);
  Response sending_ ZEROC_GUARDED_BY(mu_);
  std::size_t queued_bytes_ ZEROC_GUARDED_BY(mu_) = 0;
  bool writing_ ZEROC_GUARDED_BY(mu_) = false;
  bool too_slow_ ZEROC_GUARDED_BY(mu_) = false;
  std::optional<Status> end_ ZEROC_GUARDED_BY(mu_);
};

}  // namespace zeroc
