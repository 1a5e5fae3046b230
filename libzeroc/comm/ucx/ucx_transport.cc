#include "libzeroc/comm/ucx/ucx_transport.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <future>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "libzeroc/base/check.h"
#include "libzeroc/comm/queued_transport.h"
#include "libzeroc/comm/ucx/ucx_wire.h"

namespace zeroc {
namespace {

// A reply on shared memory or loopback comes within a few microseconds; sleeping and waking costs as much. Longer
// spinning would take the core from the compute threads.
constexpr double kSpinSeconds = 20e-6;
// How long to yield instead, while a shared-memory queue is full: a live peer empties it in less, a stopped one never.
constexpr double kYieldSeconds = 10e-3;

class UcxTransport final : public QueuedTransport {
 public:
  UcxTransport(const UcxTransportOptions& options, TransportListener& listener, std::unique_ptr<UcxWire> wire,
               int wake_fd)
      : wire_(std::move(wire)), wake_fd_(wake_fd) {
    std::random_device random;
    Start(options, listener, *wire_, (static_cast<std::uint64_t>(random()) << 32) | random());
    wire_->SetCore(&core());
    thread_ = std::thread([this] { Run(); });
  }

  ~UcxTransport() override {
    stopping_.store(true);
    Wake();
    thread_.join();
    wire_.reset();
    ::close(wake_fd_);
  }

  Result<std::span<std::byte>> AllocateArena(std::uint64_t bytes) override { return MapArena(nullptr, bytes); }

  Status RegisterArena(std::span<std::byte> arena) override { return MapArena(arena.data(), arena.size()).status(); }

  PeerAddress LocalAddress() const override { return wire_->LocalAddress(); }

 private:
  void Wake() override {
    // One write per sleep: the flag says whether the thread may be asleep.
    if (awake_.exchange(true)) return;
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = ::write(wake_fd_, &one, sizeof one);
  }

  // UCX calls belong to the owner thread, so this one waits for it; the thread never blocks on a peer.
  Result<std::span<std::byte>> MapArena(std::byte* memory, std::uint64_t bytes) {
    ZEROC_CHECK(std::this_thread::get_id() != thread_.get_id());
    std::promise<Result<std::span<std::byte>>> promise;
    auto future = promise.get_future();
    Post([&](TransportCore& core) {
      if (bytes == 0 || core.LocalArena().bytes != 0) {
        promise.set_value(FailedPrecondition("ucx: the arena is empty or there is one already"));
        return;
      }
      auto arena = wire_->MapArena(memory, bytes);
      if (!arena.ok()) {
        promise.set_value(arena.status());
        return;
      }
      core.SetArena(arena->bytes, arena->published);
      promise.set_value(arena->bytes);
    });
    return future.get();
  }

  void Run() {
    double busy_at = wire_->NowSeconds();
    while (!stopping_.load()) {
      bool busy = RunCommands();
      core().Settle();
      busy |= wire_->Progress();
      core().Settle();
      const double now = wire_->NowSeconds();
      if (busy) busy_at = now;
      const double idle = now - busy_at;
      if (idle >= kSpinSeconds && idle < kYieldSeconds && wire_->WaitsForRoom()) {
        std::this_thread::yield();
      } else if (idle >= kSpinSeconds) {
        Sleep(now);
      }
    }
    Shutdown([this] {
      RunCommands();
      wire_->Progress();
    });
  }

  void Sleep(double now) {
    awake_.store(false);
    if (HasCommands() || stopping_.load() || !wire_->Arm()) {
      awake_.store(true);
      return;
    }
    int timeout_ms = wire_->PollTimeoutMs();
    const double deadline = core().NextDeadlineSeconds();
    if (std::isfinite(deadline)) {
      const int until = static_cast<int>(std::ceil(std::clamp(deadline - now, 0.0, 60.0) * 1e3));
      timeout_ms = timeout_ms < 0 ? until : std::min(timeout_ms, until);
    }
    std::vector<pollfd> fds = {{wire_->event_fd(), POLLIN, 0}, {wake_fd_, POLLIN, 0}};
    wire_->AppendWatched(fds);
    ::poll(fds.data(), fds.size(), timeout_ms);
    awake_.store(true);
    std::uint64_t count = 0;
    [[maybe_unused]] const ssize_t got = ::read(wake_fd_, &count, sizeof count);  // non-blocking
  }

  std::unique_ptr<UcxWire> wire_;
  const int wake_fd_;
  std::atomic<bool> awake_{true};
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace

Result<std::unique_ptr<Transport>> CreateUcxTransport(const UcxTransportOptions& options, TransportListener& listener) {
  ZEROC_RETURN_IF_ERROR(ValidateTransportOptions(options));
  if (options.keepalive_interval_ms < 100 || options.keepalive_interval_ms > 60'000) {
    return InvalidArgument("transport options: keepalive_interval_ms = " +
                           std::to_string(options.keepalive_interval_ms) + " is not in 100..60000");
  }
  if (options.tls.empty() || options.net_devices.empty()) {
    return InvalidArgument("transport options: tls and net_devices are lists or 'auto', not empty");
  }
  auto wire = UcxWire::Open(options);
  if (!wire.ok()) return wire.status();
  const int wake_fd = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (wake_fd < 0) return ResourceExhausted("ucx: no event descriptor");
  return std::unique_ptr<Transport>(new UcxTransport(options, listener, std::move(wire).value(), wake_fd));
}

std::string UcxVersion() { return ucp_get_version_string(); }

}  // namespace zeroc
