#include "libzeroc/comm/loopback_transport.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <random>
#include <utility>
#include <vector>

namespace zeroc {

using SteadyClock = std::chrono::steady_clock;

class LoopbackWire final : public Wire {
 public:
  LoopbackWire(std::shared_ptr<LoopbackHub> hub, PeerAddress address, Delivery delivery)
      : hub_(std::move(hub)), address_(std::move(address)), delivery_(delivery) {}

  double NowSeconds() const override {
    return std::chrono::duration<double>(SteadyClock::now().time_since_epoch()).count();
  }
  const PeerAddress& LocalAddress() const override { return address_; }

  Status Open(PeerId peer, const PeerAddress& address) override {
    links_[peer] = address;
    return OkStatus();
  }

  Result<Delivery> ChooseDelivery(PeerId, const RemoteArena&) override { return delivery_; }
  std::string Describe(PeerId) const override { return "loopback (in process)"; }

  void SendFrame(PeerId peer, const FrameHeader& header, std::span<const std::byte> payload, Done done) override {
    done(hub_->Deliver(links_[peer], header, payload) ? OkStatus() : Gone());
  }

  void Put(PeerId peer, std::span<const std::byte> local, std::uint64_t remote_offset, Done done) override {
    done(hub_->Put(links_[peer], remote_offset, local) ? OkStatus() : Gone());
  }

  void FlushPuts(PeerId, Done done) override { done(OkStatus()); }

  void Close(PeerId peer, Done closed) override {
    links_.erase(peer);
    closed(OkStatus());
  }

  // Links to `address` (or all, for our own) are dead.
  void Break(TransportCore& core, const PeerAddress& address) {
    std::vector<PeerId> broken;
    for (const auto& [peer, to] : links_) {
      if (to.bytes == address.bytes || address.bytes == address_.bytes) broken.push_back(peer);
    }
    for (const PeerId peer : broken) core.OnLinkFailed(peer, Gone());
  }

 private:
  static Status Gone() { return Unavailable("the peer is gone"); }

  std::shared_ptr<LoopbackHub> hub_;
  PeerAddress address_;
  Delivery delivery_;
  std::map<PeerId, PeerAddress> links_;
};

// ---- hub ----

PeerAddress LoopbackHub::Add(LoopbackTransport* transport) {
  MutexLock lock(mu_);
  PeerAddress address{"loopback:" + std::to_string(next_++)};
  nodes_[address.bytes] = {transport, {}};
  return address;
}

void LoopbackHub::Remove(const PeerAddress& address) {
  {
    MutexLock lock(mu_);
    nodes_.erase(address.bytes);
  }
  Cut(address);
}

void LoopbackHub::Cut(const PeerAddress& address) {
  MutexLock lock(mu_);
  for (auto& [bytes, node] : nodes_) {
    LoopbackTransport* transport = node.transport;
    transport->Post([transport, address](TransportCore& core) { transport->wire_->Break(core, address); });
  }
}

void LoopbackHub::SetArena(const PeerAddress& address, std::span<std::byte> arena) {
  MutexLock lock(mu_);
  nodes_[address.bytes].arena = arena;
}

bool LoopbackHub::Deliver(const PeerAddress& to, const FrameHeader& header, std::span<const std::byte> payload) {
  MutexLock lock(mu_);
  const auto it = nodes_.find(to.bytes);
  if (it == nodes_.end()) return false;
  it->second.transport->Post([header = EncodeFrameHeader(header),
                              data = std::vector<std::byte>(payload.begin(), payload.end())](TransportCore& core) {
    core.OnFrame(header, data);
  });
  return true;
}

bool LoopbackHub::Put(const PeerAddress& to, std::uint64_t offset, std::span<const std::byte> bytes) {
  MutexLock lock(mu_);
  const auto it = nodes_.find(to.bytes);
  if (it == nodes_.end() || it->second.arena.size() < offset + bytes.size()) return false;
  std::memcpy(it->second.arena.data() + offset, bytes.data(), bytes.size());
  return true;
}

// ---- transport ----

Result<std::unique_ptr<LoopbackTransport>> LoopbackTransport::Create(const TransportOptions& options,
                                                                     TransportListener& listener,
                                                                     std::shared_ptr<LoopbackHub> hub,
                                                                     Delivery delivery) {
  ZEROC_RETURN_IF_ERROR(ValidateTransportOptions(options));
  return std::unique_ptr<LoopbackTransport>(new LoopbackTransport(options, listener, std::move(hub), delivery));
}

LoopbackTransport::LoopbackTransport(const TransportOptions& options, TransportListener& listener,
                                     std::shared_ptr<LoopbackHub> hub, Delivery delivery)
    : hub_(std::move(hub)), address_(hub_->Add(this)) {
  wire_ = std::make_unique<LoopbackWire>(hub_, address_, delivery);
  Start(options, listener, *wire_, std::random_device{}());
  thread_ = std::thread([this] { Run(); });
}

LoopbackTransport::~LoopbackTransport() {
  {
    MutexLock lock(queue_mu_);
    stopping_ = true;
  }
  Wake();
  thread_.join();
}

void LoopbackTransport::Wake() {
  MutexLock lock(queue_mu_);
  awake_ = true;
  wake_.NotifyOne();
}

void LoopbackTransport::Run() {
  for (;;) {
    RunCommands();
    core().Settle();
    const double wait = std::min(core().NextDeadlineSeconds() - wire_->NowSeconds(), 1.0);
    const auto until = SteadyClock::now() + std::chrono::duration_cast<SteadyClock::duration>(
                                                std::chrono::duration<double>(std::max(wait, 0.0)));
    MutexLock lock(queue_mu_);
    while (!awake_ && !stopping_) {
      if (!wake_.WaitUntil(queue_mu_, until)) break;
    }
    awake_ = false;
    if (stopping_) break;
  }
  Shutdown([this] { RunCommands(); });
  hub_->Remove(address_);  // no more deliveries; whatever came before is dropped with the queue
}

Result<std::span<std::byte>> LoopbackTransport::AllocateArena(std::uint64_t bytes) {
  if (bytes == 0 || LocalArena().bytes != 0)
    return FailedPrecondition("loopback: the arena is empty or there is one already");
  owned_arena_.reset(new (std::nothrow) Line[(bytes + sizeof(Line) - 1) / sizeof(Line)]());
  if (!owned_arena_)
    return ResourceExhausted("loopback: no memory for an arena of " + std::to_string(bytes) + " bytes");
  const std::span<std::byte> arena(owned_arena_[0].bytes, bytes);
  ZEROC_RETURN_IF_ERROR(RegisterArena(arena));
  return arena;
}

Status LoopbackTransport::RegisterArena(std::span<std::byte> arena) {
  if (arena.empty() || LocalArena().bytes != 0) {
    return FailedPrecondition("loopback: the arena is empty or there is one already");
  }
  hub_->SetArena(address_, arena);
  const RemoteArena published{"loopback", reinterpret_cast<std::uintptr_t>(arena.data()), arena.size()};
  core().SetArena(arena, published);
  return OkStatus();
}

}  // namespace zeroc
