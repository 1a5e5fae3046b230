// LoopbackTransport: the Transport between workers of one process, each with its own thread. For tests and for running
// all workers in one binary; no network, no UCX. Thread-safety as Transport says.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>
#include <thread>

#include "libzeroc/base/mutex.h"
#include "libzeroc/base/status.h"
#include "libzeroc/comm/queued_transport.h"
#include "libzeroc/comm/transport.h"

namespace zeroc {

class LoopbackTransport;
class LoopbackWire;

// The transports that can reach each other. Any thread. Shared by them: it lives until the last is gone.
class LoopbackHub {
 public:
  // Breaks every link to and from `address` without a farewell, as if the process had died. The transport itself lives
  // on and can be connected to again.
  void Cut(const PeerAddress& address);

 private:
  friend class LoopbackTransport;
  friend class LoopbackWire;
  struct Node {
    LoopbackTransport* transport = nullptr;
    std::span<std::byte> arena;
  };

  PeerAddress Add(LoopbackTransport* transport);
  void Remove(const PeerAddress& address);
  void SetArena(const PeerAddress& address, std::span<std::byte> arena);
  bool Deliver(const PeerAddress& to, const FrameHeader& header, std::span<const std::byte> payload);
  bool Put(const PeerAddress& to, std::uint64_t offset, std::span<const std::byte> bytes);

  Mutex mu_;
  std::map<std::string, Node> nodes_ ZEROC_GUARDED_BY(mu_);
  std::uint64_t next_ ZEROC_GUARDED_BY(mu_) = 1;
};

class LoopbackTransport final : public QueuedTransport {
 public:
  // `delivery` is what writers to this process's arenas use. kInvalidArgument for bad options.
  static Result<std::unique_ptr<LoopbackTransport>> Create(const TransportOptions& options, TransportListener& listener,
                                                           std::shared_ptr<LoopbackHub> hub, Delivery delivery);
  ~LoopbackTransport() override;

  Result<std::span<std::byte>> AllocateArena(std::uint64_t bytes) override;
  Status RegisterArena(std::span<std::byte> arena) override;
  PeerAddress LocalAddress() const override { return address_; }

 private:
  friend class LoopbackHub;
  LoopbackTransport(const TransportOptions& options, TransportListener& listener, std::shared_ptr<LoopbackHub> hub,
                    Delivery delivery);
  void Wake() override;
  void Run();

  std::shared_ptr<LoopbackHub> hub_;
  PeerAddress address_;
  std::unique_ptr<LoopbackWire> wire_;
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::unique_ptr<Line[]> owned_arena_;  // aligned as KV blocks are
  bool stopping_ ZEROC_GUARDED_BY(queue_mu_) = false;
  bool awake_ ZEROC_GUARDED_BY(queue_mu_) = false;
  CondVar wake_;
  std::thread thread_;
};

}  // namespace zeroc
