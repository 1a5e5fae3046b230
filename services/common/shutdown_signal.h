// SIGTERM and SIGINT as an event that main() waits for.
//
// Make one before any other thread starts: it blocks both signals in the calling thread, and threads inherit that.
// SIGPIPE is ignored from then on (writes to a closed socket are errors, not the end of the process).
#pragma once

#include <chrono>

namespace zeroc {

class ShutdownSignal {
 public:
  ShutdownSignal();
  // The number of the signal that arrived.
  int Wait();
  // The same, or 0 after `timeout`.
  int WaitFor(std::chrono::milliseconds timeout);
};

}  // namespace zeroc
