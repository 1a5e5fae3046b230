// QueuedTransport: the thread-safe face of a TransportCore. Every call becomes a command that the owner runs later, so
// the core and the wire stay single-threaded and callbacks may call anything. Base of all transports.
//
// A queue, not a lock around the library: UCX's own serialised mode would make every caller wait for a progress call
// that may be copying a megabyte, and would run callbacks on whichever thread happened to progress.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "libzeroc/base/mutex.h"
#include "libzeroc/comm/transport.h"
#include "libzeroc/comm/transport_core.h"
#include "libzeroc/comm/wire.h"

namespace zeroc {

class QueuedTransport : public Transport {
 public:
  using Command = std::function<void(TransportCore&)>;

  Result<PeerId> Connect(const PeerAddress& address, const RemoteArena& arena, std::string name) override;
  void Write(PeerId peer, const WriteTag& tag, std::span<const std::byte> local, std::uint64_t remote_offset,
             Callback done) override;
  void Flush(PeerId peer, Callback done) override;
  void Send(PeerId peer, std::uint16_t type, std::span<const std::byte> payload, Callback done) override;
  void Close(PeerId peer, Callback done) override;
  RemoteArena LocalArena() const override { return core_->LocalArena(); }
  Result<PeerInfo> Describe(PeerId peer) const override { return core_->Describe(peer); }
  Result<PeerStats> Stats(PeerId peer) const override { return core_->Stats(peer); }
  const TransportProbe& probe() const override { return core_->probe(); }

  // Any thread: `command` runs on the owner thread.
  void Post(Command command);

 protected:
  QueuedTransport() = default;

  // Once, by the derived class before anything else.
  void Start(const TransportOptions& options, TransportListener& listener, Wire& wire, std::uint64_t seed);

  // Called after a command was queued, outside of the lock.
  virtual void Wake() = 0;

  // Owner thread.
  TransportCore& core() { return *core_; }
  bool RunCommands();  // what is queued now; true if there was something
  bool HasCommands() const;

  // Owner thread, at the end: every peer closed, every callback called. `progress` moves the wire.
  void Shutdown(const std::function<void()>& progress);

  mutable Mutex queue_mu_;

 private:
  std::unique_ptr<TransportCore> core_;
  std::deque<Command> commands_ ZEROC_GUARDED_BY(queue_mu_);
};

}  // namespace zeroc
