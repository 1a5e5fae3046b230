// What tests of transports share: a listener that records, callbacks that are collected, bytes that show where they
// belong.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "libzeroc/base/mutex.h"
#include "libzeroc/comm/transport.h"

namespace zeroc {

// Polls with short sleeps.
bool WaitOnThreads(const std::function<bool()>& condition, double seconds);

// Records what it hears. Leases are refused unless allowed. Any thread.
class RecordingListener : public TransportListener {
 public:
  struct Message {
    PeerId from;
    std::uint16_t type;
    std::vector<std::byte> payload;
  };

  void OnPeerUp(PeerId peer, const PeerInfo& info) override;
  bool AcceptWrite(PeerId peer, const WriteTag& tag, std::uint64_t offset, std::uint64_t bytes) override;
  void OnWriteDone(PeerId peer, const WriteTag& tag, std::uint64_t offset, std::uint64_t bytes,
                   const Status& status) override;
  Status OnMessage(PeerId peer, std::uint16_t type, std::span<const std::byte> payload) override;
  void OnProtocolError(PeerId peer, const Status& status) override;
  void OnPeerFailure(PeerId peer, const Status& status) override;

  void Allow(const WriteTag& tag);
  std::map<PeerId, PeerInfo> up() const;
  std::vector<Message> messages() const;
  std::map<PeerId, Status> failures() const;
  std::vector<Status> protocol_errors() const;
  std::uint64_t accepted() const;
  std::uint64_t written() const;
  std::uint64_t failure_calls() const;

  // `handler` runs on the transport's thread at each message, before it is recorded.
  void SetOnMessage(std::function<void(const Message&)> handler);
  static constexpr std::uint16_t kUnknownType = 999;

 private:
  std::function<void(const Message&)> Handler() const;

  mutable Mutex mu_;
  std::function<void(const Message&)> on_message_ ZEROC_GUARDED_BY(mu_);
  std::set<std::pair<std::uint64_t, std::uint64_t>> allowed_ ZEROC_GUARDED_BY(mu_);
  std::map<PeerId, PeerInfo> up_ ZEROC_GUARDED_BY(mu_);
  std::vector<Message> messages_ ZEROC_GUARDED_BY(mu_);
  std::map<PeerId, Status> failures_ ZEROC_GUARDED_BY(mu_);
  std::vector<Status> protocol_errors_ ZEROC_GUARDED_BY(mu_);
  std::uint64_t accepted_ ZEROC_GUARDED_BY(mu_) = 0;
  std::uint64_t written_ ZEROC_GUARDED_BY(mu_) = 0;
  std::uint64_t failure_calls_ ZEROC_GUARDED_BY(mu_) = 0;
};

// Collects callbacks; shared with them, so it may outlive the test's frame.
class Outcomes {
 public:
  Transport::Callback Next();
  std::uint64_t expected() const { return expected_; }
  std::vector<Status> seen() const;
  bool all() const { return seen().size() >= expected_; }
  // Nothing but OK.
  ::testing::AssertionResult AllOk() const;

 private:
  struct Shared {
    Mutex mu;
    std::vector<Status> seen ZEROC_GUARDED_BY(mu);
  };
  std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();
  std::uint64_t expected_ = 0;
};

// Bytes that depend on seed and place, so that a byte in the wrong place shows.
std::vector<std::byte> PatternBytes(std::uint64_t seed, std::size_t size);
std::vector<std::byte> TextBytes(const std::string& text);

}  // namespace zeroc
