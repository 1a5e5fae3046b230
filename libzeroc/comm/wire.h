// Wire: what a TransportCore needs of the world: links to other wires, frames, one-sided puts, a clock.
//
// One link per peer, named by the core's PeerId. Owner thread only. Every Done is called exactly once; it may be called
// before the function that took it returns. A wire never calls into the core from inside a core call, except by a Done.
// Payloads and local bytes must stay valid until their Done.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "libzeroc/base/status.h"
#include "libzeroc/comm/frame.h"
#include "libzeroc/comm/transport.h"

namespace zeroc {

class Wire {
 public:
  using Done = std::function<void(const Status&)>;

  virtual ~Wire() = default;

  virtual double NowSeconds() const = 0;  // monotonic
  virtual const PeerAddress& LocalAddress() const = 0;

  // Makes the link; reachability shows later. Close is due also after a failure that came by OnLinkFailed, but not
  // after a status that is not OK from here.
  virtual Status Open(PeerId peer, const PeerAddress& address) = 0;

  // The link carries frames by now: how writes to `arena` go best. Fails on a malformed key.
  virtual Result<Delivery> ChooseDelivery(PeerId peer, const RemoteArena& arena) = 0;

  // "tcp (lo)", for a link that is open.
  virtual std::string Describe(PeerId peer) const = 0;

  virtual void SendFrame(PeerId peer, const FrameHeader& header, std::span<const std::byte> payload, Done done) = 0;

  // Only after ChooseDelivery gave kPut. Done: the local bytes may be reused.
  virtual void Put(PeerId peer, std::span<const std::byte> local, std::uint64_t remote_offset, Done done) = 0;

  // Done: every put before is in the remote memory.
  virtual void FlushPuts(PeerId peer, Done done) = 0;

  // Breaks the link at once: every open Done of it is called (status not OK), then `closed`, within close_timeout_ms.
  virtual void Close(PeerId peer, Done closed) = 0;
};

}  // namespace zeroc
