// TransportCore: the protocol of every transport, free of I/O, threads and clocks: handshake, cutting writes into
// pieces, the window, acknowledgements, flushes, failure. Loopback, fake and UCX differ only in the Wire beneath.
//
// Threads: one owner thread, except where a method says "any thread". The owner calls Settle() after each batch of
// calls; it does the deferred work: sending what the window allows, acknowledging, finishing closed peers.
// User callbacks and the listener are called from inside these methods and must not call back into the core: the
// transports put a queue between (queued_transport.h).
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "libzeroc/base/mutex.h"
#include "libzeroc/comm/frame.h"
#include "libzeroc/comm/probe.h"
#include "libzeroc/comm/transport.h"
#include "libzeroc/comm/wire.h"

namespace zeroc {

class TransportCore {
 public:
  using Callback = Transport::Callback;

  // Where an accepted piece goes.
  struct PieceTarget {
    PeerId peer = PeerId::kNone;
    FrameHeader header;
    std::byte* to = nullptr;
  };

  // `seed` makes connection ids; random in the field, fixed in simulations. Options are validated by the caller.
  TransportCore(const TransportOptions& options, TransportListener& listener, Wire& wire, std::uint64_t seed);
  ~TransportCore();

  // Any thread.
  PeerId NewPeerId() { return static_cast<PeerId>(next_peer_.fetch_add(1, std::memory_order_relaxed)); }
  void Announce(PeerId peer, std::string name);  // Describe says "connecting" from here on; Connect follows
  Result<PeerInfo> Describe(PeerId peer) const;
  Result<PeerStats> Stats(PeerId peer) const;
  const TransportProbe& probe() const { return probe_; }
  RemoteArena LocalArena() const;

  // Owner thread from here on. Meanings as in Transport.
  void SetArena(std::span<std::byte> arena, RemoteArena published);
  void Connect(PeerId peer, const PeerAddress& address, RemoteArena arena, std::string name);
  void Write(PeerId peer, const WriteTag& tag, std::span<const std::byte> local, std::uint64_t remote_offset,
             Callback done);
  void Flush(PeerId peer, Callback done);
  void Send(PeerId peer, std::uint16_t type, std::vector<std::byte> payload, Callback done);
  void Close(PeerId peer, Callback done);

  // Closes every peer; over when idle().
  void CloseAll();
  bool idle() const { return peers_.empty(); }

  // From the wire. A piece comes whole through OnFrame, or (rendezvous) by BeginPiece, the wire's own copy to `to`,
  // EndPiece.
  void OnFrame(std::span<const std::byte> header, std::span<const std::byte> payload);
  std::optional<PieceTarget> BeginPiece(std::span<const std::byte> header, std::uint64_t payload_bytes);
  void EndPiece(const PieceTarget& target, const Status& status);
  void OnLinkFailed(PeerId peer, const Status& status);

  void Settle();

  // When Settle has to be called again though nothing happened; infinity if never.
  double NextDeadlineSeconds() const;

 private:
  struct WriteOp;
  struct Piece;
  struct Peer;
  struct Published {
    PeerInfo info;
    PeerStats stats;
    bool up = false;
  };

  Peer* Find(PeerId id);
  Peer* FindConnection(const FrameHeader& header);
  Peer& AddPeer(PeerId id, std::uint64_t connection, bool incoming, std::string name);
  Status NotUsable(PeerId id) const;
  void Reject(const std::string& why, PeerId peer);

  void OnHello(const FrameHeader& header, std::span<const std::byte> payload);
  void OnHelloAck(Peer& peer, const FrameHeader& header);
  void OnMessage(Peer& peer, const FrameHeader& header, std::span<const std::byte> payload);
  void OnAck(Peer& peer, std::span<const std::byte> payload);
  void OnPong(Peer& peer, const FrameHeader& header);
  void OnControl(Peer& peer, const FrameHeader& header, std::span<const std::byte> payload);
  void GoUp(Peer& peer);

  FrameHeader MakeHeader(const Peer& peer, FrameKind kind) const;
  void SendControl(Peer& peer, const FrameHeader& header, std::vector<std::byte> payload, Wire::Done then = nullptr);
  void SendMessageFrame(Peer& peer, std::uint16_t type, std::vector<std::byte> payload, Callback done);

  void Pump(Peer& peer);
  void PostPiece(Peer& peer, const std::shared_ptr<WriteOp>& write);
  void OnPieceSent(PeerId id, std::uint64_t sequence, const Status& status);
  void FinishPieceIfOver(Peer& peer, std::uint64_t sequence);
  void FinishWriteIfOver(Peer& peer, const std::shared_ptr<WriteOp>& write);
  void AdvanceFlushes(Peer& peer);
  void FinishFlush(Peer& peer, const Status& status);
  void SendAcks(Peer& peer);
  void Publish(Peer& peer);

  void Leave(Peer& peer, Status end, FrameHeader last_frame, std::vector<std::byte> payload);
  void BeginClose(Peer& peer, Status end);
  void CheckDeadline(Peer& peer, double now);
  void FinishPeer(PeerId id);

  const TransportOptions options_;
  TransportListener& listener_;
  Wire& wire_;
  TransportProbe probe_;
  std::uint64_t seed_;
  std::atomic<std::uint64_t> next_peer_{1};

  std::span<std::byte> arena_;
  std::map<PeerId, std::unique_ptr<Peer>> peers_;
  std::map<std::pair<std::uint64_t, bool>, PeerId> connections_;  // (connection, we are its connector)
  std::set<PeerId> dirty_;
  std::vector<PeerId> closed_;

  mutable Mutex mu_;
  RemoteArena published_arena_ ZEROC_GUARDED_BY(mu_);
  std::map<PeerId, Published> published_ ZEROC_GUARDED_BY(mu_);
};

}  // namespace zeroc
