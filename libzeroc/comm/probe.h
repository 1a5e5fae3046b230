// Counters of one transport, for tests and diagnosis; the workers' metrics page does not show them (docs/metrics.md
// lists what it shows). Written by the transport's thread, read by any.
#pragma once

#include <atomic>
#include <cstdint>

namespace zeroc {

class TransportProbe {
 public:
  struct Snapshot {
    std::uint64_t bytes_written = 0;    // bytes of writes, as sender; acknowledged (am) or complete (put)
    std::uint64_t bytes_received = 0;   // bytes placed in the local arena by active messages; put is not seen
    std::uint64_t pieces_sent = 0;      // pieces of writes posted
    std::uint64_t pieces_received = 0;  // pieces placed in the local arena
    std::uint64_t pieces_rejected = 0;  // pieces refused before the copy: lease, generation or range
    std::uint64_t messages_sent = 0;
    std::uint64_t messages_received = 0;
    std::uint64_t messages_rejected = 0;  // unknown type or malformed payload
    std::uint64_t frames_dropped = 0;     // foreign frames that were malformed or of a connection that is gone
    std::uint64_t peers_failed = 0;       // connections ended by anything but a local Close
  };

  void CountWritten(std::uint64_t bytes) { Add(bytes_written_, bytes); }
  void CountPieceSent() { Add(pieces_sent_, 1); }
  void CountPieceReceived(std::uint64_t bytes) {
    Add(pieces_received_, 1);
    Add(bytes_received_, bytes);
  }
  void CountPieceRejected() { Add(pieces_rejected_, 1); }
  void CountMessageSent() { Add(messages_sent_, 1); }
  void CountMessageReceived() { Add(messages_received_, 1); }
  void CountMessageRejected() { Add(messages_rejected_, 1); }
  void CountFrameDropped() { Add(frames_dropped_, 1); }
  void CountPeerFailed() { Add(peers_failed_, 1); }

  // The fields are read one by one: consistent each, not together.
  Snapshot Read() const {
    const auto get = [](const Counter& counter) { return counter.load(std::memory_order_relaxed); };
    return {get(bytes_written_),   get(bytes_received_), get(pieces_sent_),       get(pieces_received_),
            get(pieces_rejected_), get(messages_sent_),  get(messages_received_), get(messages_rejected_),
            get(frames_dropped_),  get(peers_failed_)};
  }

 private:
  using Counter = std::atomic<std::uint64_t>;
  static void Add(Counter& counter, std::uint64_t n) { counter.fetch_add(n, std::memory_order_relaxed); }

  Counter bytes_written_{0}, bytes_received_{0}, pieces_sent_{0}, pieces_received_{0}, pieces_rejected_{0};
  Counter messages_sent_{0}, messages_received_{0}, messages_rejected_{0}, frames_dropped_{0}, peers_failed_{0};
};

}  // namespace zeroc
