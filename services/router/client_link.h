// From a gRPC call to the flow that answers it: a client that goes away cancels the flow, also when it went away before
// there was one. Internal to the router's gRPC services.
#pragma once

#include <memory>

#include "libzeroc/base/mutex.h"
#include "services/router/request_flow.h"

namespace zeroc {

// Thread-safe.
class ClientLink {
 public:
  void Bind(const std::shared_ptr<RequestFlow>& flow) {
    bool gone = false;
    {
      MutexLock lock(mu_);
      flow_ = flow;
      gone = gone_;
    }
    if (gone) ClientGone();
  }
  void ClientGone(const Status& why = Cancelled("the client has gone")) {
    std::shared_ptr<RequestFlow> flow;
    {
      MutexLock lock(mu_);
      gone_ = true;
      flow = flow_.lock();
    }
    if (flow != nullptr) flow->Cancel(why);
  }

 private:
  Mutex mu_;
  bool gone_ ZEROC_GUARDED_BY(mu_) = false;
  std::weak_ptr<RequestFlow> flow_ ZEROC_GUARDED_BY(mu_);
};

}  // namespace zeroc
