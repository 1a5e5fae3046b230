#include "libzeroc/comm/transport_testing.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

namespace zeroc {

bool WaitOnThreads(const std::function<bool()>& condition, double seconds) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > until) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  return true;
}

std::vector<std::byte> PatternBytes(std::uint64_t seed, std::size_t size) {
  std::vector<std::byte> bytes(size);
  std::uint64_t x = seed * 0x9e3779b97f4a7c15ull + 1;
  for (std::size_t i = 0; i < size; i += sizeof(x)) {
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    std::memcpy(bytes.data() + i, &x, std::min(sizeof(x), size - i));
  }
  return bytes;
}

std::vector<std::byte> TextBytes(const std::string& text) {
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

// ---- RecordingListener ----

void RecordingListener::OnPeerUp(PeerId peer, const PeerInfo& info) {
  MutexLock lock(mu_);
  up_[peer] = info;
}
bool RecordingListener::AcceptWrite(PeerId, const WriteTag& tag, std::uint64_t, std::uint64_t) {
  MutexLock lock(mu_);
  const bool accept = allowed_.contains({tag.lease_id, tag.generation});
  accepted_ += accept ? 1 : 0;
  return accept;
}
void RecordingListener::OnWriteDone(PeerId, const WriteTag&, std::uint64_t, std::uint64_t, const Status&) {
  MutexLock lock(mu_);
  ++written_;
}
Status RecordingListener::OnMessage(PeerId peer, std::uint16_t type, std::span<const std::byte> payload) {
  if (type == kUnknownType) return Unimplemented("no such message");
  const Message message{peer, type, {payload.begin(), payload.end()}};
  const std::function<void(const Message&)> handler = Handler();
  if (handler) handler(message);
  MutexLock lock(mu_);
  messages_.push_back(message);
  return OkStatus();
}
void RecordingListener::OnProtocolError(PeerId, const Status& status) {
  MutexLock lock(mu_);
  protocol_errors_.push_back(status);
}
void RecordingListener::OnPeerFailure(PeerId peer, const Status& status) {
  MutexLock lock(mu_);
  failures_[peer] = status;
  ++failure_calls_;
}
void RecordingListener::SetOnMessage(std::function<void(const Message&)> handler) {
  MutexLock lock(mu_);
  on_message_ = std::move(handler);
}
std::function<void(const RecordingListener::Message&)> RecordingListener::Handler() const {
  MutexLock lock(mu_);
  return on_message_;
}
void RecordingListener::Allow(const WriteTag& tag) {
  MutexLock lock(mu_);
  allowed_.insert({tag.lease_id, tag.generation});
}
std::map<PeerId, PeerInfo> RecordingListener::up() const {
  MutexLock lock(mu_);
  return up_;
}
std::vector<RecordingListener::Message> RecordingListener::messages() const {
  MutexLock lock(mu_);
  return messages_;
}
std::map<PeerId, Status> RecordingListener::failures() const {
  MutexLock lock(mu_);
  return failures_;
}
std::vector<Status> RecordingListener::protocol_errors() const {
  MutexLock lock(mu_);
  return protocol_errors_;
}
std::uint64_t RecordingListener::accepted() const {
  MutexLock lock(mu_);
  return accepted_;
}
std::uint64_t RecordingListener::written() const {
  MutexLock lock(mu_);
  return written_;
}
std::uint64_t RecordingListener::failure_calls() const {
  MutexLock lock(mu_);
  return failure_calls_;
}

// ---- Outcomes ----

Transport::Callback Outcomes::Next() {
  ++expected_;
  return [shared = shared_](const Status& status) {
    MutexLock lock(shared->mu);
    shared->seen.push_back(status);
  };
}
std::vector<Status> Outcomes::seen() const {
  MutexLock lock(shared_->mu);
  return shared_->seen;
}
::testing::AssertionResult Outcomes::AllOk() const {
  const auto statuses = seen();
  if (statuses.size() != expected_) {
    return ::testing::AssertionFailure() << statuses.size() << " of " << expected_ << " callbacks came";
  }
  for (const Status& status : statuses) {
    if (!status.ok()) return ::testing::AssertionFailure() << status.ToString();
  }
  return ::testing::AssertionSuccess();
}

}  // namespace zeroc
