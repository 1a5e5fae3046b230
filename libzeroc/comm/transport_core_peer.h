// What a TransportCore keeps per peer; private to transport_core*.cc.
#pragma once

#include <cstdint>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "libzeroc/comm/transport_core.h"

namespace zeroc {

inline constexpr double kNever = std::numeric_limits<double>::infinity();

inline Status OutOfRange(std::string message) { return Status(StatusCode::kOutOfRange, std::move(message)); }

// offset + bytes may wrap: both are foreign.
inline bool InRange(std::uint64_t offset, std::uint64_t bytes, std::uint64_t size) {
  return offset <= size && bytes <= size - offset;
}

inline std::string Range(std::uint64_t offset, std::uint64_t bytes) {
  std::string text("[");
  text += std::to_string(offset);
  text += ", +";
  text += std::to_string(bytes);
  text += ')';
  return text;
}

struct TransportCore::WriteOp {
  std::uint64_t index = 0;  // order of posting, for flushes
  WriteTag tag;
  std::span<const std::byte> local;
  std::uint64_t remote_offset = 0;
  std::uint64_t posted_bytes = 0;
  int open_pieces = 0;
  Status status;
  Callback done;
};

struct TransportCore::Piece {
  std::shared_ptr<WriteOp> write;
  std::uint64_t bytes = 0;
  double posted_at = 0;
  bool sent = false;   // the wire has let go of the local bytes
  bool acked = false;  // or needs no acknowledgement (put)
};

struct TransportCore::Peer {
  enum class State : std::uint8_t { kConnecting, kUp, kLeaving, kClosing };
  struct FlushOp {
    std::uint64_t barrier = 0;  // waits for the writes with a smaller index
    Callback done;
    bool posted = false;
  };
  struct SendOp {
    std::uint16_t type = 0;
    std::vector<std::byte> payload;
    Callback done;
  };

  PeerId id = PeerId::kNone;
  State state = State::kConnecting;
  PeerInfo info;
  std::uint64_t connection = 0;
  RemoteArena arena;
  double deadline = kNever;  // of connecting, or of leaving

  std::deque<SendOp> queued_sends;  // until the peer is up
  std::unordered_map<std::uint64_t, Callback> sends;
  std::uint64_t next_send = 1;

  std::deque<std::shared_ptr<WriteOp>> queued_writes;  // only the front is partly posted
  std::unordered_map<std::uint64_t, Piece> pieces;
  std::map<std::uint64_t, std::shared_ptr<WriteOp>> writes;  // all that are open, by index
  std::uint64_t next_write = 1;
  std::uint64_t next_sequence = 1;
  std::deque<FlushOp> flushes;
  std::map<std::uint64_t, Status> write_failures;  // since the last flush

  std::vector<AckEntry> acks;
  std::pair<std::uint64_t, double> ping{0, 0};  // sequence, sent at
  double busy_since = 0;
  PeerStats stats;

  Status end;  // why it ends
  bool local_close = false;
  std::vector<Callback> closers;

  bool usable() const { return state == State::kConnecting || state == State::kUp; }
};

}  // namespace zeroc
