// Where a request's answer goes; implemented by the gRPC and the HTTP front.
//
// Called by one thread at a time, in the order Started, Delta.., then exactly one of Final and Error. Error may come
// first. Calls must not block and must not call back into the flow; a sink whose client is gone or too slow calls
// RequestFlow::Cancel from elsewhere and swallows the rest.
#pragma once

#include "libzeroc/base/status.h"
#include "zeroc/v1/inference.pb.h"

namespace zeroc {

// kWorker: a worker failed or was lost, as opposed to a request or a router that cannot be served.
enum class ErrorOrigin { kRequest, kWorker };

class ResponseSink {
 public:
  virtual ~ResponseSink() = default;
  virtual void OnStarted(const v1::Started& started) = 0;
  virtual void OnDelta(const v1::Delta& delta) = 0;
  virtual void OnFinal(const v1::Final& final) = 0;
  virtual void OnError(const Status& status, ErrorOrigin origin) = 0;
};

}  // namespace zeroc
