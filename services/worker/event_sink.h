// Where a worker's core sends the events of one server stream; the RPC edge implements it, tests do too.
#pragma once

#include "libzeroc/base/status.h"

namespace zeroc {

template <typename Event>
class EventSink {
 public:
  virtual ~EventSink() = default;
  // Any thread, in order; never blocks. Calls after End are ignored.
  virtual void Send(Event event) = 0;
  virtual void End(const Status& status) = 0;
};

}  // namespace zeroc
