// The router's calls to one worker, asynchronous and cancellable; implemented over gRPC, and by fakes in tests.
//
// Thread-safe. Callbacks run on other threads, never inside the call that starts them or inside Cancel; `done` runs
// exactly once, last, also after Cancel and after the connection object is gone. A call ends at its deadline at the
// latest.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>

#include "libzeroc/base/status.h"
#include "zeroc/v1/worker.pb.h"

namespace zeroc {

using Deadline = std::chrono::system_clock::time_point;  // system clock: it is what gRPC carries

class WorkerCall {
 public:
  virtual ~WorkerCall() = default;  // dropping it does not cancel
  virtual void Cancel() = 0;
};

template <typename Response>
using UnaryDone = std::function<void(const Status&, const Response&)>;
template <typename Event>
using OnEvent = std::function<void(const Event&)>;
using StreamDone = std::function<void(const Status&)>;

class WorkerConnection {
 public:
  virtual ~WorkerConnection() = default;

  // Is the worker reachable and serving (grpc.health.v1)?
  virtual void CheckHealth(Deadline deadline, std::function<void(const Status&)> done) = 0;

  // Decode workers.
  virtual std::shared_ptr<WorkerCall> Reserve(const v1::ReserveRequest& request, Deadline deadline,
                                              UnaryDone<v1::ReserveResponse> done) = 0;
  virtual std::shared_ptr<WorkerCall> Generate(const v1::DecodeRequest& request, Deadline deadline,
                                               OnEvent<v1::DecodeEvent> on_event, StreamDone done) = 0;
  virtual void Release(const v1::ReleaseRequest& request, Deadline deadline, StreamDone done) = 0;

  // Prefill workers.
  virtual std::shared_ptr<WorkerCall> Prefill(const v1::PrefillRequest& request, Deadline deadline,
                                              OnEvent<v1::PrefillEvent> on_event, StreamDone done) = 0;
};

using WorkerDialer = std::function<std::shared_ptr<WorkerConnection>(const std::string& address)>;

}  // namespace zeroc
