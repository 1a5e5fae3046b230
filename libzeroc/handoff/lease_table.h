// Decode's side of the hand-off: every lease from its reservation to the return of its blocks.
//
//   reserved --Attach--> receiving --all commits--> verifying --checksums right--> committed --Admit--> admitted
//      |                     |                          |                              |                   |
//      +---------------------+---- expiry, Abort, dead writer, Release, bad bytes -----+                Release
//                            v                                                         v                   v
//                       quarantined --no write can be under way any more-------------> ended <-------------+
//
// Free of I/O, threads and clocks: time is an argument (monotonic nanoseconds), what has to be done is returned as
// actions, in order. Not thread-safe: the service guards it with one mutex and carries the actions out after unlocking.
//
// Promises, for every lease: exactly one ReturnBlocks, and not before every write that the table accepted is over and
// every one-sided writer said Released, committed or has been dead for a while; LeaseReady at most once, only after the
// commits of all ranks named every block once and the checksums of the bytes were right; LeaseFailed at most once,
// never after Admit and never after the owner's own Release.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/comm/transport.h"
#include "libzeroc/handoff/block_table.h"
#include "libzeroc/handoff/messages.h"

namespace zeroc {

enum class LeaseState : std::uint8_t { kReserved, kReceiving, kVerifying, kCommitted, kAdmitted, kQuarantined };
inline constexpr int kLeaseStates = 6;
const char* LeaseStateName(LeaseState state);  // "reserved" ..

struct ExpectedBlock {
  BlockExtent extent;
  std::uint64_t checksum = 0;
};

// What the table saw of the transfer.
struct TransferFacts {
  std::int64_t first_write_ns = 0;   // one-sided writes are not seen: the writer's attach then
  std::int64_t last_write_ns = 0;    // likewise the last commit
  std::int64_t committed_ns = 0;     // last commit
  std::uint64_t bytes_received = 0;  // by active messages; pieces that came twice count twice
};

struct SendMessage {
  PeerId peer = PeerId::kNone;
  EncodedMessage message;
};
// Compare these bytes of the arena (VerifyBlocks) and report by OnVerified. Nobody may write them meanwhile.
struct VerifyLease {
  LeaseKey lease;
  std::vector<ExpectedBlock> blocks;
};
struct LeaseReady {
  LeaseKey lease;
  FirstToken first_token;
  TransferFacts facts;
};
struct LeaseFailed {
  LeaseKey lease;
  Status status;
  bool expired = false;
};
struct ReturnBlocks {
  LeaseKey lease;
};
using LeaseAction = std::variant<SendMessage, VerifyLease, LeaseReady, LeaseFailed, ReturnBlocks>;
using LeaseActions = std::vector<LeaseAction>;

// kDataLoss naming the first block whose checksum differs. Any thread; the only place that reads KV bytes.
Status VerifyBlocks(std::span<const std::byte> arena, std::span<const ExpectedBlock> blocks);

class LeaseTable {
 public:
  struct Options {
    std::int64_t expiry_ns = 30'000'000'000;         // without a sign of life from the writer; vLLM's lease is as long
    std::int64_t lifetime_max_ns = 600'000'000'000;  // from reservation to commit, heartbeats or not
    std::int64_t resend_ns = 1'000'000'000;          // LeaseEnded, while a one-sided writer is silent
    // What a dead or closed connection may still have under way: one-sided writes that the network card holds. Their
    // end cannot be seen from here, so blocks wait this much longer.
    std::int64_t dead_writer_grace_ns = 2'000'000'000;
    // What one Tick adds to that at most: a clock that jumps does not make the card any faster.
    std::int64_t grace_step_ns = 250'000'000;
    std::size_t ended_kept = 4096;  // leases remembered to answer late duplicates
  };

  // seed: random per process, so that a restarted worker repeats neither ids nor generations.
  LeaseTable(const Options& options, std::uint64_t seed);
  ~LeaseTable();

  // The blocks are the lease's until ReturnBlocks. kInvalidArgument when two blocks of the table overlap.
  Result<LeaseKey> Create(const BlockTable& table, std::int64_t now_ns);

  // May this piece be copied into the arena? O(log extents). The lease must be receiving, the generation right, the
  // peer its writer and not yet committed, and the range inside the lease's own blocks.
  bool AcceptWrite(PeerId peer, const WriteTag& tag, std::uint64_t offset, std::uint64_t bytes, std::int64_t now_ns);
  // Once per accepted piece.
  LeaseActions OnWriteDone(const WriteTag& tag, std::uint64_t bytes, const Status& status, std::int64_t now_ns);

  // From a peer: Attach, Commit, Abort, Released. kInvalidArgument for the types that decode sends.
  Result<LeaseActions> OnMessage(PeerId peer, const Message& message, std::int64_t now_ns);

  // The connection is gone, or was closed by the other side.
  LeaseActions OnPeerFailure(PeerId peer, const Status& status, std::int64_t now_ns);

  LeaseActions OnVerified(const LeaseKey& key, const Status& status, std::int64_t now_ns);

  // The owner runs the request; from here on only Release ends the lease. kFailedPrecondition unless committed.
  Status Admit(const LeaseKey& key);

  // The owner fills the blocks itself and runs the request: a lease without a wire, as after Admit. No writer has come
  // and none can any more. kFailedPrecondition unless reserved.
  Status AdmitLocal(const LeaseKey& key);

  // The owner wants no more of it: finished, cancelled, client gone. Idempotent; an unknown lease gives no actions.
  LeaseActions Release(const LeaseKey& key, const Status& why, std::int64_t now_ns);

  LeaseActions Tick(std::int64_t now_ns);

  bool Knows(const LeaseKey& key) const { return Find(key) != nullptr; }
  std::size_t n_leases() const { return leases_.size(); }
  std::size_t n_in(LeaseState state) const;
  std::uint64_t blocks_in(LeaseState state) const;

 private:
  struct Writer {
    std::uint16_t rank = 0;
    PeerId peer = PeerId::kNone;
    Delivery delivery = Delivery::kActiveMessage;
    std::uint16_t n_parts = 0;  // of its commit; 0: none seen
    std::vector<bool> parts_seen;
    bool committed = false;
    bool quiet = false;            // committed, released or long dead: no write of it is under way
    std::int64_t gone_ns = 0;      // when its connection ended; 0: it lives
    std::int64_t gone_for_ns = 0;  // since then, by ticks
  };
  struct Lease;

  Status AdmitFrom(LeaseState state, const LeaseKey& key);
  Lease* Find(const LeaseKey& key);
  const Lease* Find(const LeaseKey& key) const;
  Writer* FindWriter(Lease& lease, PeerId peer, std::uint16_t rank);

  void OnAttach(PeerId peer, const AttachMessage& message, std::int64_t now_ns, LeaseActions* out);
  Status Attach(Lease& lease, PeerId peer, const AttachMessage& message);
  void OnCommit(PeerId peer, const CommitMessage& message, std::int64_t now_ns, LeaseActions* out);
  Status TakePart(Lease& lease, Writer& writer, const CommitMessage& message);
  void BeginVerify(Lease& lease, std::int64_t now_ns, LeaseActions* out);
  void OnAbort(PeerId peer, const AbortMessage& message, std::int64_t now_ns, LeaseActions* out);
  void OnReleased(PeerId peer, const ReleasedMessage& message, std::int64_t now_ns, LeaseActions* out);

  // Fails or drops a lease that is not admitted: tells owner (unless owner_knows) and writers, then quarantine or end.
  void Fail(Lease& lease, const Status& status, bool owner_knows, bool expired, std::int64_t now_ns, LeaseActions* out);
  void TellWriters(Lease& lease, std::int64_t now_ns, LeaseActions* out);  // LeaseEnded, to those that may still write
  void EndIfQuiet(Lease& lease, LeaseActions* out);
  void End(Lease& lease, LeaseActions* out);
  Status EndedStatus(const LeaseKey& key) const;

  const Options options_;
  std::uint64_t next_id_;
  std::uint64_t next_generation_;
  std::int64_t last_tick_ns_ = 0;
  std::map<std::uint64_t, std::unique_ptr<Lease>> leases_;

  struct Ended {
    std::uint64_t generation = 0;
    Status status;  // OK: it was committed
  };
  std::unordered_map<std::uint64_t, Ended> ended_;
  std::deque<std::uint64_t> ended_order_;
};

}  // namespace zeroc
