#include "services/common/shutdown_signal.h"

#include <cerrno>
#include <csignal>
#include <ctime>

namespace zeroc {
namespace {

sigset_t StopSignals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  return set;
}

}  // namespace

ShutdownSignal::ShutdownSignal() {
  const sigset_t set = StopSignals();
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
}

int ShutdownSignal::Wait() {
  const sigset_t set = StopSignals();
  int signal = 0;
  while (sigwait(&set, &signal) != 0) {
  }
  return signal;
}

int ShutdownSignal::WaitFor(std::chrono::milliseconds timeout) {
  const sigset_t set = StopSignals();
  const auto end = std::chrono::steady_clock::now() + timeout;
  for (;;) {
    const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(end - std::chrono::steady_clock::now());
    if (left.count() <= 0) return 0;
    timespec wait{};
    wait.tv_sec = left.count() / 1'000'000'000;
    wait.tv_nsec = left.count() % 1'000'000'000;
    if (const int signal = sigtimedwait(&set, nullptr, &wait); signal > 0) return signal;
    if (errno != EINTR && errno != EAGAIN) return 0;
  }
}

}  // namespace zeroc
