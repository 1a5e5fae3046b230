// Prefill's side of the hand-off: one rank's writes into one lease, from Attach to the last acknowledgement.
//
//   attaching --AttachAck--> streaming --all blocks and the first token--> flushing --> committing --CommitAck--> ended
//       |                        |                                            |              |
//       +------------------------+---- Cancel, LeaseEnded, refused write, timeout, failure --+
//                                v
//                            stopping (own writes end, flush, Released) --LeaseEnded or CommitAck--> ended
//
// Free of I/O, threads and clocks: time is an argument (monotonic nanoseconds), what has to be done is returned as
// actions, in order. Not thread-safe: the service guards each sender with a mutex. Blocks may get ready before the peer
// is up or the lease attached: they are kept and posted later.
//
// Promises: every block is written at most once and named in exactly one commit part; no Commit before the flush of
// every write; no write is posted before the lease is attached or after the sender began to stop; exactly one
// LocalDone, when no write of this sender is under way (the KV may be released then), and exactly one SenderEnded,
// after it.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/comm/transport.h"
#include "libzeroc/handoff/block_table.h"
#include "libzeroc/handoff/messages.h"
#include "libzeroc/kv/sequence_kv.h"

namespace zeroc {

// Blocks of one layer that became final, as indices into SequenceKv::BlocksAt(layer, n_prompt_tokens). Those that are
// present at decode (BlockTable::n_present) are passed over.
struct FinalBlocks {
  int layer = 0;
  std::vector<BlockRange> packed;
  bool sink = false;
  int exact_begin = 0, exact_end = 0;
};

// Post with Transport::Write; report by OnWriteDone.
struct PostWrite {
  std::span<const std::byte> local;
  std::uint64_t remote_offset = 0;
};
struct PostFlush {};  // report by OnFlushDone
struct PostMessage {
  EncodedMessage message;
};
struct ClosePeer {};  // the peer is silent: Transport::Close, which fails every write under way
struct LocalDone {};  // no local byte is referenced any more
struct SenderEnded {
  Status status;  // OK: decode acknowledged the commits
};
using SenderAction = std::variant<PostWrite, PostFlush, PostMessage, ClosePeer, LocalDone, SenderEnded>;
using SenderActions = std::vector<SenderAction>;

struct SenderStats {
  std::int64_t ended_ns = 0;  // acknowledged (or failed)
  std::uint64_t bytes_posted = 0;
  std::uint64_t n_writes = 0;
  std::uint64_t n_blocks = 0;  // posted
};

// How long a link had something of one transfer to carry. Times do not go back.
class BusyTime {
 public:
  void Begin(std::int64_t now_ns) {
    if (!busy_) since_ns_ = now_ns;
    busy_ = true;
  }
  void End(std::int64_t now_ns) {
    total_ns_ = Until(now_ns);
    busy_ = false;
  }
  std::int64_t Until(std::int64_t now_ns) const { return total_ns_ + (busy_ ? now_ns - since_ns_ : 0); }

 private:
  bool busy_ = false;
  std::int64_t since_ns_ = 0;
  std::int64_t total_ns_ = 0;
};

class Sender {
 public:
  struct Options {
    std::uint64_t write_bytes_max = 1 << 20;          // blocks are coalesced up to this
    std::int64_t heartbeat_ns = 5'000'000'000;        // a third of the shortest lease in use, or less
    std::int64_t resend_ns = 1'000'000'000;           // Attach, Commit, Released without an answer
    std::int64_t answer_timeout_ns = 15'000'000'000;  // to an Attach or a Commit; then the sender stops
    std::int64_t stop_timeout_ns = 5'000'000'000;     // for a stop to end in good order; then ClosePeer
    // Both time-outs are this many times longer while a write or flush of ours waits on a link that carries others': it
    // may be in their queue, or be lost.
    int busy_link_factor = 10;
    int flushes_max = 16;  // a flush also reports other jobs' refused writes, and is then repeated
  };

  // `remote` has been checked by the caller against the arena it writes to (CheckPlaces). peer_name is for messages.
  // share: this sender's part of the lease.
  struct Share {
    std::uint16_t rank = 0;
    std::uint16_t n_ranks = 1;
    std::uint32_t n_blocks = 0;  // that this rank writes; all of them with one rank
  };
  Sender(const Options& options, LeaseKey lease, const Share& share, BlockTable remote, std::string peer_name);

  // The connection is usable. Once.
  SenderActions OnPeerUp(Delivery delivery, std::int64_t now_ns);

  // The bytes stay valid and unchanged until LocalDone. kFailedPrecondition (nothing changed) when the local blocks
  // have another shape than the lease; kInternal when a device does not give its blocks. Takes the blocks to the pool's
  // wire side, which the writes name, and computes their checksums.
  Result<SenderActions> OnBlocksReady(const SequenceKv& kv, const FinalBlocks& blocks, std::int64_t now_ns);
  // Rank 0 only: the commit waits for it.
  SenderActions OnFirstToken(FirstToken token, std::int64_t now_ns);

  SenderActions OnWriteDone(const Status& status, std::int64_t now_ns);
  SenderActions OnFlushDone(const Status& status, std::int64_t now_ns);
  SenderActions OnMessage(const Message& message,
                          std::int64_t now_ns);  // AttachAck, CommitAck, LeaseEnded of this lease
  // The peer died or was closed by ClosePeer. Its pending callbacks may come before or after.
  SenderActions OnPeerFailure(const Status& status, std::int64_t now_ns);

  // The work is not wanted any more, or failed. Idempotent; the first reason counts.
  SenderActions Cancel(const Status& why, std::int64_t now_ns);

  // link_progress_ns: when a write or flush of anybody on this connection was last over. Writes queue behind those of
  // others, and a connection is everybody's: it may not be closed because one transfer has to wait for its turn.
  SenderActions Tick(std::int64_t now_ns, std::int64_t link_progress_ns = 0);

  bool ended() const { return ended_; }
  bool local_done() const { return local_done_; }
  bool stopping() const { return phase_ == Phase::kStopping; }
  const SenderStats& stats() const { return stats_; }
  // Time up to now_ns (not before the latest event) with a write under way; from the last block to the end also with
  // the flush or the commit under way. It is what the wire costs: pauses in which no block was ready are left out.
  std::int64_t WireNs(std::int64_t now_ns) const { return wire_.Until(now_ns); }
  const LeaseKey& lease() const { return lease_; }
  const BlockTable& remote() const { return remote_; }

 private:
  enum class Phase : std::uint8_t { kConnecting, kAttaching, kStreaming, kFlushing, kCommitting, kStopping };
  struct Block {
    std::span<const std::byte> local;  // on the wire side
    std::uint64_t remote_offset = 0;
  };

  Status BindLocal(const SequenceKv& kv);
  Status AddBlocks(const SequenceKv& kv, const BlockTable::Layer& local, const FinalBlocks& blocks);
  void PostBlocks(std::int64_t now_ns, SenderActions* out);
  void Advance(std::int64_t now_ns, SenderActions* out);
  void Send(const Message& message, std::int64_t now_ns, SenderActions* out);
  void SendAttach(std::int64_t now_ns, SenderActions* out);
  void SendCommit(std::int64_t now_ns, SenderActions* out);
  void Stop(const Status& why, std::int64_t now_ns, SenderActions* out);
  void AdvanceStop(std::int64_t now_ns, SenderActions* out);
  void Finish(Status status, std::int64_t now_ns, SenderActions* out);
  bool WaitsForPeer() const;
  bool TimedOut(std::int64_t now_ns, std::int64_t link_progress_ns, std::int64_t timeout_ns) const;

  const Options options_;
  const LeaseKey lease_;
  const Share share_;
  const BlockTable remote_;
  const std::string peer_name_;
  std::vector<BlockExtent> remote_extents_;

  Phase phase_ = Phase::kConnecting;
  Delivery delivery_ = Delivery::kActiveMessage;
  std::optional<BlockTable> local_;  // from the first blocks on
  std::vector<Block> unposted_;
  std::vector<BlockChecksum> checksums_;
  std::vector<bool> block_seen_;  // [n_blocks of the lease]
  bool has_first_token_ = false;
  FirstToken first_token_;

  int writes_pending_ = 0;
  bool flush_pending_ = false;
  bool flushed_ = false;  // after the last write
  int n_flushes_ = 0;
  bool peer_gone_ = false;
  bool attach_sent_ = false;
  bool close_asked_ = false;
  bool released_sent_ = false;
  Status stop_status_;
  bool local_done_ = false;
  bool ended_ = false;

  // A write or flush was over, or the phase began. Answers to heartbeats do not count: a peer may be well while a write
  // of ours is lost.
  std::int64_t last_progress_ns_ = 0;
  std::int64_t last_sent_ns_ = 0;  // of the message that waits for an answer, or of the last heartbeat
  SenderStats stats_;
  BusyTime wire_;
};

// What a prefill worker answers to a message for a lease that it has no sender for (any more): Released to a LeaseEnded
// that waits for it, because a sender lives until none of its writes is under way. Otherwise nothing.
std::optional<EncodedMessage> AnswerWithoutSender(const Message& message);

}  // namespace zeroc
