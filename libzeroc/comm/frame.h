// The frames that transports exchange: a fixed header, then a payload. Little-endian, version in the magic.
//
//   offset  0 magic u32   4 kind u8   5 from_connector u8   6 type u16   8 connection u64   16 sequence u64
//          24 lease u64  32 generation u64  40 offset u64  48 bytes u64
//
// Everything here is pure and takes foreign bytes: a malformed frame is a status, never a crash. Any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/comm/transport.h"

namespace zeroc {

enum class FrameKind : std::uint8_t {
  kHello = 1,     // connector -> acceptor. payload: HelloBody; offset, bytes: the arena that the connector believes in
  kHelloAck = 2,  // acceptor -> connector. The connection is up
  kRefuse = 3,    // acceptor -> connector. payload: reason
  kMessage = 4,   // type, payload
  kPiece = 5,     // sequence, lease, generation, offset, bytes; payload: the bytes
  kAck = 6,       // payload: AckEntry list
  kPing = 7,      // sequence
  kPong = 8,      // sequence
  kBye = 9,       // the sender closes
};

inline constexpr std::size_t kFrameHeaderBytes = 56;
using FrameHeaderBytes = std::array<std::byte, kFrameHeaderBytes>;

struct FrameHeader {
  FrameKind kind = FrameKind::kMessage;
  bool from_connector = false;   // which end of the connection sent it
  std::uint16_t type = 0;        // of a message, the caller's
  std::uint64_t connection = 0;  // random, chosen by the connector
  std::uint64_t sequence = 0;
  WriteTag tag;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;  // of the piece
  friend bool operator==(const FrameHeader&, const FrameHeader&) = default;
};

FrameHeaderBytes EncodeFrameHeader(const FrameHeader& header);
Result<FrameHeader> DecodeFrameHeader(std::span<const std::byte> bytes);  // kInvalidArgument

// Who calls, and where to answer.
struct HelloBody {
  std::string name;
  PeerAddress address;
};
std::vector<std::byte> EncodeHello(const HelloBody& hello);
Result<HelloBody> DecodeHello(std::span<const std::byte> bytes);

enum class PieceVerdict : std::uint8_t { kPlaced = 0, kRefused = 1, kOutOfRange = 2, kFailed = 3 };
struct AckEntry {
  std::uint64_t sequence = 0;
  PieceVerdict verdict = PieceVerdict::kPlaced;
  friend bool operator==(const AckEntry&, const AckEntry&) = default;
};
inline constexpr std::size_t kAckEntriesMax = 1024;  // per frame, 9 bytes each
std::vector<std::byte> EncodeAcks(std::span<const AckEntry> acks);
Result<std::vector<AckEntry>> DecodeAcks(std::span<const std::byte> bytes);

}  // namespace zeroc
