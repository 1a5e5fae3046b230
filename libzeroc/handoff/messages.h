// The small messages of the hand-off, carried by Transport::Send. P is a prefill rank (the writer), D the decode
// worker.
//
//   Attach     P -> D  I am going to write into this lease; repeated as a heartbeat. No write is posted before its ack.
//   AttachAck  D -> P  status
//   Commit     P -> D  my blocks are in your arena (flushed): their checksums; rank 0 adds the first token. In parts.
//   CommitAck  D -> P  status, once the commits of all ranks were verified (or the lease failed)
//   Abort      P -> D  I give up; stop waiting. Writes may still be under way.
//   Released   P -> D  none of my writes is under way any more, none will follow.
//   LeaseEnded D -> P  the lease is over: stop writing. Also the answer to Released for a lease that did not commit.
//
// All are idempotent: a duplicate is answered again and changes nothing. Byte format: docs/handoff.md.
// Foreign bytes: ParseMessage is bounded, checks every field and never aborts. Any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/comm/transport.h"

namespace zeroc {

struct LeaseKey {
  std::uint64_t lease_id = 0;
  std::uint64_t generation = 0;
  WriteTag tag() const { return {lease_id, generation}; }
  friend bool operator==(const LeaseKey&, const LeaseKey&) = default;
};

// What decode needs to go on after the token that prefill sampled. Random numbers are indexed by (seed, position), so
// this is the sampler's whole state.
struct FirstToken {
  std::int32_t id = 0;
  float logprob = 0;
  std::vector<std::pair<std::int32_t, float>> top;  // at most kTopMax
  std::uint64_t seed = 0;
  std::uint32_t position = 0;  // of the token: the prompt's length
  friend bool operator==(const FirstToken&, const FirstToken&) = default;
};

struct BlockChecksum {
  std::uint32_t block_idx = 0;  // in the lease's block table
  std::uint64_t checksum = 0;   // Checksum64 of the block's bytes
  friend bool operator==(const BlockChecksum&, const BlockChecksum&) = default;
};

struct AttachMessage {
  LeaseKey lease;
  std::uint16_t rank = 0;
  std::uint16_t n_ranks = 1;
  Delivery delivery = Delivery::kActiveMessage;
  std::uint32_t n_prompt_tokens = 0;
  std::uint64_t layout_hash = 0;
};
struct AttachAckMessage {
  LeaseKey lease;
  std::uint16_t rank = 0;
  Status status;
};
struct CommitMessage {
  LeaseKey lease;
  std::uint16_t rank = 0;
  std::uint16_t part = 0;
  std::uint16_t n_parts = 1;
  bool has_first_token = false;  // rank 0, part 0
  FirstToken first_token;
  std::vector<BlockChecksum> blocks;  // at most kCommitBlocksMax
};
struct CommitAckMessage {
  LeaseKey lease;
  std::uint16_t rank = 0;
  Status status;
};
struct AbortMessage {
  LeaseKey lease;
  std::uint16_t rank = 0;
  Status status;  // why; not OK
};
struct ReleasedMessage {
  LeaseKey lease;
  std::uint16_t rank = 0;
};
struct LeaseEndedMessage {
  LeaseKey lease;
  std::uint16_t rank = 0;
  Status status;               // why; not OK
  bool wants_release = false;  // D waits for Released. False in the answer to it, or the two would answer for ever
};

using Message = std::variant<AttachMessage, AttachAckMessage, CommitMessage, CommitAckMessage, AbortMessage,
                             ReleasedMessage, LeaseEndedMessage>;

// Transport message types; never renumber. Index in Message plus kFirstMessageType.
inline constexpr std::uint16_t kFirstMessageType = 0x4b01;

inline constexpr std::uint16_t kRanksMax = 64;
inline constexpr std::size_t kTopMax = 20;
inline constexpr std::size_t kCommitBlocksMax = 65'536;  // 12 bytes each: 768 KiB, below kMessageBytesMax
inline constexpr std::size_t kStatusTextMax = 512;

struct EncodedMessage {
  std::uint16_t type = 0;
  std::string payload;
};
EncodedMessage EncodeMessage(const Message& message);

// kInvalidArgument for an unknown type or version, a field out of range, missing or trailing bytes.
Result<Message> ParseMessage(std::uint16_t type, std::span<const std::byte> payload);

LeaseKey LeaseOf(const Message& message);

}  // namespace zeroc
