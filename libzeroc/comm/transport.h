// Transport: moves bytes between the memories of two workers, and small messages beside them. It knows nothing of KV.
//
// One side (decode) registers one *arena* and publishes its address and the arena's key; the other side (prefill)
// connects and posts writes "local bytes -> offset in the remote arena", a flush, and messages. Both sides can send
// messages on a connection, so a receiver answers on the peer id that the message came with.
//
// Threads. Every method may be called from any thread, also from inside a callback; none waits for a peer. Each
// transport owns one thread; every callback and every TransportListener method runs on it, one at a time, so they must
// not block. (FakeTransport owns no thread: its callbacks run inside FakeNetwork::Step.)
//
// Completion. Each callback given to Write, Flush, Send and Close is called exactly once, also when the peer dies or
// the transport is destroyed (kCancelled). When a Write's callback runs, the local bytes may be reused.
// No order is promised: neither between writes, nor between messages, nor between writes and messages. A message that
// must come after the data is sent from Flush's callback.
//
// Failure. A dead or unreachable peer fails all its pending operations with kUnavailable naming it, then OnPeerFailure
// is called once and the peer id is dead; the same address may be connected again and gives a new id. A peer that is
// merely stopped (SIGSTOP) completes nothing and fails nothing: leases and deadlines are the caller's, Close is always
// bounded.
//
// Delivery. Chosen per peer when it connects, reported by OnPeerUp and Describe, never silently changed:
//   kActiveMessage  writes travel as pieces; the receiver asks TransportListener::AcceptWrite *before* any byte touches
//                   the arena, and tells the writer: its Write fails with kFailedPrecondition when a piece was refused.
//   kPut            one-sided writes into registered memory. The receiver sees nothing and CAN NOT CHECK: a write that
//                   was posted before a lease expired may land after it. Blocks of a lease that did not end with all
//                   its writers' flush must therefore be kept in quarantine until the writer says so or is known to be
//                   dead.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "libzeroc/base/status.h"
#include "libzeroc/comm/probe.h"

namespace zeroc {

// One connection. Never reused within a transport.
enum class PeerId : std::uint64_t { kNone = 0 };

// Where a transport is reached; opaque, carried by RPC. At most kPeerAddressBytesMax.
struct PeerAddress {
  std::string bytes;
};

// What a writer must know of a remote arena; opaque key plus size. base is the arena's address at its owner.
struct RemoteArena {
  std::string key;
  std::uint64_t base = 0;
  std::uint64_t bytes = 0;  // 0: the peer has no arena, only messages can be sent
};

// Which lease a write belongs to; checked by the receiver in kActiveMessage delivery.
struct WriteTag {
  std::uint64_t lease_id = 0;
  std::uint64_t generation = 0;
  friend bool operator==(const WriteTag&, const WriteTag&) = default;
};

enum class Delivery : std::uint8_t { kActiveMessage = 0, kPut = 1 };

inline constexpr std::size_t kPeerAddressBytesMax = 64 << 10;
inline constexpr std::size_t kArenaKeyBytesMax = 64 << 10;
inline constexpr std::size_t kMessageBytesMax = 1 << 20;  // larger data goes through the arena
inline constexpr std::size_t kPeerNameBytesMax = 256;

struct PeerInfo {
  std::string name;       // as given to Connect; for an incoming peer the name of the transport that called
  bool incoming = false;  // the other side connected; it can be sent messages, not written to
  Delivery delivery = Delivery::kActiveMessage;
  std::string description;  // "am over tcp (lo)", "put over posix+cma"
};

// Common to every implementation; out of range is kInvalidArgument when the transport is created.
struct TransportOptions {
  std::string name = "worker";          // told to the peers we connect to; at most kPeerNameBytesMax
  std::uint64_t piece_bytes = 1 << 20;  // 4 KiB to 64 MiB; writes are cut into pieces of it (limits of UCX 1.13 on TCP)
  int pieces_in_flight_max = 8;         // 1 to 1024, per peer; 8 MiB cover 10 GB/s at 0.8 ms
  int connect_timeout_ms = 10'000;      // 1 to 600 000
  int close_timeout_ms = 2'000;         // 1 to 60 000
  int peers_max = 1'024;                // 1 to 65 536, both directions together
};
Status ValidateTransportOptions(const TransportOptions& options);

// Cumulative; measured bandwidth over an interval is the quotient of two differences.
struct PeerStats {
  std::uint64_t bytes_written = 0;  // acknowledged (kActiveMessage) or complete at the sender (kPut)
  double busy_seconds = 0;          // time with at least one write under way
  double round_trip_seconds = 0;    // of a ping when the connection came up; 0 until then, and for incoming peers
  double BytesPerSecond() const { return busy_seconds > 0 ? static_cast<double>(bytes_written) / busy_seconds : 0; }
};

// The receiver's side. All calls come from the transport's thread. Must outlive the transport.
class TransportListener {
 public:
  virtual ~TransportListener() = default;

  // A connection is usable in both directions. Operations posted before are queued, so waiting for this is not needed.
  virtual void OnPeerUp(PeerId peer, const PeerInfo& info) = 0;

  // kActiveMessage only. May [offset, offset + bytes) of the arena be written for `tag`? The range is inside the arena
  // already. After `true` the bytes may be under way until OnWriteDone for the same piece: the blocks must not be given
  // to anyone else before that. Exactly one OnWriteDone follows each `true`.
  virtual bool AcceptWrite(PeerId peer, const WriteTag& tag, std::uint64_t offset, std::uint64_t bytes) = 0;

  // The piece is in the arena (OK), or it was accepted and its sender died: the range may be half written.
  virtual void OnWriteDone(PeerId peer, const WriteTag& tag, std::uint64_t offset, std::uint64_t bytes,
                           const Status& status) = 0;

  // `payload` is valid during the call. Foreign bytes. A status that is not OK (unknown type, malformed payload) drops
  // the message, is counted and handed back through OnProtocolError; the connection lives on.
  virtual Status OnMessage(PeerId peer, std::uint16_t type, std::span<const std::byte> payload) = 0;

  // Something foreign was malformed and has been dropped. `peer` may be kNone.
  virtual void OnProtocolError(PeerId peer, const Status& status) = 0;

  // The peer died (kUnavailable), never answered (kDeadlineExceeded), refused the connection (kFailedPrecondition), or
  // closed it (kCancelled). Its pending callbacks have run. Not called for a local Close.
  virtual void OnPeerFailure(PeerId peer, const Status& status) = 0;
};

class Transport {
 public:
  using Callback = std::function<void(const Status&)>;

  virtual ~Transport() = default;  // fails what is pending with kCancelled, tells the peers, bounded

  // Allocates the arena in memory that local peers can map, so that kPut is possible on shared memory. Owned by the
  // transport. Once, before the address is published, not from a callback. kFailedPrecondition if there is an arena,
  // kResourceExhausted.
  virtual Result<std::span<std::byte>> AllocateArena(std::uint64_t bytes) = 0;

  // Registers the caller's memory (device memory, huge pages), which must outlive the transport. Else as AllocateArena.
  virtual Status RegisterArena(std::span<std::byte> arena) = 0;

  virtual PeerAddress LocalAddress() const = 0;

  // bytes == 0 without an arena.
  virtual RemoteArena LocalArena() const = 0;

  // Starts connecting and returns at once; `name` is for messages and logs. kInvalidArgument for oversized or malformed
  // input. Whatever fails later fails the peer: kUnavailable, kDeadlineExceeded, or kFailedPrecondition when `arena` is
  // not what the peer has now (a restarted worker).
  virtual Result<PeerId> Connect(const PeerAddress& address, const RemoteArena& arena, std::string name) = 0;

  // Writes `local` to the peer's arena at `remote_offset`. `local` must stay valid and unchanged until `done`.
  // done: OK; kOutOfRange (nothing was sent); kFailedPrecondition (the receiver refused a piece, or no arena);
  // kUnavailable; kCancelled; kNotFound (no such peer). Zero bytes complete with OK and send nothing.
  virtual void Write(PeerId peer, const WriteTag& tag, std::span<const std::byte> local, std::uint64_t remote_offset,
                     Callback done) = 0;

  // done(OK): every Write posted to the peer before this call is in the remote arena, visible to its owner.
  // Otherwise the first failure among the writes since the last Flush.
  virtual void Flush(PeerId peer, Callback done) = 0;

  // Copies `payload` (at most kMessageBytesMax, else kInvalidArgument). done(OK): handed to the wire, which proves
  // nothing about its arrival; acknowledge in your own protocol. Delivered at most once.
  virtual void Send(PeerId peer, std::uint16_t type, std::span<const std::byte> payload, Callback done) = 0;

  // Fails what is pending with kCancelled, tells the peer if it listens, and forgets it. `done` runs within
  // close_timeout_ms also when the peer is dead or stopped, after which no local bytes are referenced.
  virtual void Close(PeerId peer, Callback done) = 0;

  // kNotFound for a closed, dead or never known peer; kUnavailable while it is still connecting.
  virtual Result<PeerInfo> Describe(PeerId peer) const = 0;
  virtual Result<PeerStats> Stats(PeerId peer) const = 0;

  virtual const TransportProbe& probe() const = 0;
};

}  // namespace zeroc
