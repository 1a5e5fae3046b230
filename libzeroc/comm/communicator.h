// Communicator: messages and collectives between the ranks of one group, into memory that the receiver names. It knows
// nothing of KV.
//
// A group lives and dies as one. Whatever goes wrong for one rank (a lost or stopped peer, a deadline that passed, a
// message of another size than expected, Abort, a rank that leaves) aborts the communicator for every rank: each Wait
// for an operation that is not over returns the reason, at once, and then no memory of this rank is read or written any
// more. A new group needs a new communicator.
//
// Memory. Bytes given to Send may not change, those given to Recv may not be looked at, before Wait on the operation
// has returned (with whatever status) or Abort has. A message is a list of pieces on either side, so nothing is copied
// together first; sender and receiver may cut it differently.
//
// Tags name messages. A pair of ranks uses a tag once in each direction in a communicator's life; order does not
// matter. Tags from kReservedTags on are the communicator's own.
//
// Threads. One thread per rank posts, tests and waits; Abort, Check and bytes_sent may be called from any thread.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "libzeroc/base/status.h"

namespace zeroc {

// A send or receive under way. Wait for each exactly once.
enum class CommOp : std::uint64_t {};

// Where the bytes of messages lie: in ordinary memory, or in a device's.
enum class CommMemory : std::uint8_t { kHost, kDevice };

class Communicator {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;
  using Parts = std::vector<std::span<const std::byte>>;  // one message, to be sent
  using Places = std::vector<std::span<std::byte>>;       // where one message goes

  static constexpr std::uint64_t kReservedTags = std::uint64_t{1} << 63;
  static constexpr int kRanksMax = 64;

  virtual ~Communicator() = default;  // aborts what the others still wait for with kCancelled, naming this rank
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  virtual CommMemory memory() const { return CommMemory::kHost; }

  // Return at once. to and from are other ranks. Messages of no bytes are messages.
  CommOp Send(int to, std::uint64_t tag, Parts parts);
  virtual CommOp Recv(int from, std::uint64_t tag, Places places) = 0;

  // OK: a sent message's bytes may be changed (it may still be on its way), a received one is there. Later than
  // `deadline` the communicator is aborted with kDeadlineExceeded, which names the peer that was waited for.
  virtual Status Wait(CommOp op, TimePoint deadline) = 0;
  // Whether Wait would return at once, with whatever status. Before that Wait, as often as one likes.
  virtual bool Test(CommOp op) = 0;
  // All of them, also after the first failure, which it returns.
  Status WaitAll(std::span<const CommOp> ops, TimePoint deadline);

  // The first reason counts. Reaches the other ranks as far as they can be reached. Returns when no memory of this rank
  // is in use any more.
  virtual void Abort(const Status& why) = 0;
  // OK while the group lives, else why it ended. Waits for nothing.
  virtual Status Check() = 0;

  // kDevice: what is posted from now on reads and writes memory behind all work that this stream of the device has been
  // given by then; null: behind nothing, the caller has waited. Received bytes are there when Wait returns, as ever.
  virtual void Follow(void* /*stream*/) {}

  // Every rank's bytes to every rank: ours to all others, rank r's into places[r] (places[rank()] is not used). Sizes
  // may differ, and are known to all. Returns what to wait for: the receives, from rank() - 1, rank() - 2 and so on,
  // then the sends.
  virtual std::vector<CommOp> AllGather(std::uint64_t tag, const Parts& ours, std::vector<Places> places);

  // Bytes of its own for each rank: parts[r] to r, from r into places[r]; [rank()] of either is not used. Returns as
  // AllGather.
  virtual std::vector<CommOp> AllToAll(std::uint64_t tag, std::vector<Parts> parts, std::vector<Places> places);

  // Returns when every rank has called it as often. All ranks take part.
  Status Barrier(TimePoint deadline);

  // Payload bytes of all messages that this rank has posted.
  std::uint64_t bytes_sent() const { return bytes_sent_.load(std::memory_order_relaxed); }

 protected:
  Communicator(int rank, int size);
  virtual CommOp PostSend(int to, std::uint64_t tag, Parts parts) = 0;

 private:
  const int rank_, size_;
  std::uint64_t n_barriers_ = 0;
  std::atomic<std::uint64_t> bytes_sent_ = 0;
};

// Bytes of a message.
std::size_t CountBytes(const Communicator::Parts& parts);
std::size_t CountBytes(const Communicator::Places& places);

// Copies the message's bytes from `offset` of it on into its places. offset + bytes.size() is inside them.
void Scatter(std::span<const std::byte> bytes, std::size_t offset, const Communicator::Places& places);

}  // namespace zeroc
