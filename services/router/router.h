// The running requests of one router, behind both fronts: admission, look-up by id, drain.
//
// Thread-safe. The context outlives the router; destroy it after the fronts and before the workers' connections.
#pragma once

#include <chrono>
#include <cstddef>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "libzeroc/base/mutex.h"
#include "services/router/request_flow.h"

namespace zeroc {

class Router {
 public:
  Router(const FlowContext& context, std::size_t in_flight_max);
  ~Router();  // cancels what runs and waits for it, bounded by reserve_timeout

  // Starts a request; everything else is told to the sink, refusals included (also before this returns):
  // RESOURCE_EXHAUSTED over in_flight_max, UNAVAILABLE while draining, ALREADY_EXISTS for the id of a running request.
  // Never null; Cancel on an ended flow does nothing.
  std::shared_ptr<RequestFlow> Generate(v1::GenerateRequest request, std::optional<Deadline> client_deadline,
                                        std::shared_ptr<ResponseSink> sink, RequestKind kind = RequestKind::kClient);
  // The same for another part of a client's request whose first part was admitted (more choices, more prompts): only
  // CancelAll of a draining router refuses it.
  std::shared_ptr<RequestFlow> GenerateMore(v1::GenerateRequest request, std::shared_ptr<ResponseSink> sink);
  // While it is held, parts of a request are still to come: the router is not idle.
  std::shared_ptr<const void> Hold();
  // kNotFound when no such request runs.
  Status Abort(const std::string& request_id);

  v1::GetModelInfoResponse ModelInfo() const;
  const ServedModel& model() const { return context_.model; }
  // OK when a request could be served now.
  Status Ready() const;

  void StopAccepting();
  // True when nothing runs any more.
  bool WaitIdle(std::chrono::milliseconds timeout);
  void CancelAll(const Status& why);
  std::size_t in_flight() const;
  // At most `others_max` requests run and none waits.
  bool IsIdle(std::size_t others_max) const;

 private:
  enum class Part { kFirst, kMore };
  std::shared_ptr<RequestFlow> StartFlow(v1::GenerateRequest request, std::optional<Deadline> client_deadline,
                                         std::shared_ptr<ResponseSink> sink, RequestKind kind, Part part);
  Status Admit(const std::string& id, const std::shared_ptr<RequestFlow>& flow, Part part);
  void Forget(const std::string& id);
  bool idle() const ZEROC_REQUIRES(mu_) { return running_.empty() && n_held_ == 0; }

  const FlowContext& context_;
  const std::size_t in_flight_max_;
  mutable Mutex mu_;
  CondVar idle_;
  bool draining_ ZEROC_GUARDED_BY(mu_) = false;
  bool closed_ ZEROC_GUARDED_BY(mu_) = false;  // what ran was cancelled
  int n_held_ ZEROC_GUARDED_BY(mu_) = 0;
  std::map<std::string, std::weak_ptr<RequestFlow>> running_ ZEROC_GUARDED_BY(mu_);
};

// 16 random hexadecimal digits.
std::string NewRequestId();

}  // namespace zeroc
