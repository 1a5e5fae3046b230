#include "libzeroc/comm/fake_transport.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

constexpr char kPrefix[] = "fake:";

}  // namespace

class FakeWire final : public Wire {
 public:
  FakeWire(FakeNetwork& network, std::string name)
      : network_(network), name_(std::move(name)), address_{kPrefix + name_} {}

  double NowSeconds() const override { return network_.now_; }
  const PeerAddress& LocalAddress() const override { return address_; }

  Status Open(PeerId peer, const PeerAddress& address) override {
    if (!address.bytes.starts_with(kPrefix)) return InvalidArgument("fake: malformed address");
    const std::string to = address.bytes.substr(sizeof kPrefix - 1);
    links_[peer].to = to;
    if (network_.FindNode(to) == nullptr) {
      network_.At(network_.detection_seconds_, name_, [this, peer] { Fail(peer, "no such peer"); });
    }
    return OkStatus();
  }

  Result<Delivery> ChooseDelivery(PeerId, const RemoteArena&) override { return network_.delivery_; }
  std::string Describe(PeerId) const override { return "fake network"; }

  void SendFrame(PeerId peer, const FrameHeader& header, std::span<const std::byte> payload, Done done) override {
    auto packet = std::make_shared<FakeNetwork::Packet>();
    packet->header = header;
    Launch(peer, std::move(packet), payload, std::move(done));
  }

  void Put(PeerId peer, std::span<const std::byte> local, std::uint64_t remote_offset, Done done) override {
    auto packet = std::make_shared<FakeNetwork::Packet>();
    packet->is_put = true;
    packet->remote_offset = remote_offset;
    ++links_[peer].open_puts;
    Launch(peer, std::move(packet), local, std::move(done));
  }

  void FlushPuts(PeerId peer, Done done) override {
    links_[peer].flushes.push_back(std::move(done));
    FlushIfIdle(links_[peer]);
  }

  void Close(PeerId peer, Done closed) override {
    auto node = links_.extract(peer);
    if (!node.empty()) {
      for (auto& [id, open] : node.mapped().open) {
        open.packet->Detach();
        open.done(Cancelled("fake: closed"));
      }
      for (const Done& done : node.mapped().flushes) done(Cancelled("fake: closed"));
    }
    closed(OkStatus());
  }

  // The sender is dead: what it sent must not read its memory any more.
  void DetachAll() {
    for (auto& [peer, link] : links_) {
      for (auto& [id, open] : link.open) open.packet->Detach();
    }
  }

  std::vector<PeerId> LinksTo(const std::string& name) const {
    std::vector<PeerId> found;
    for (const auto& [peer, link] : links_) {
      if (link.to == name) found.push_back(peer);
    }
    return found;
  }
  void FailLinks(const std::vector<PeerId>& peers, const std::string& why) {
    for (const PeerId peer : peers) Fail(peer, why);
  }

  // From here on frames are let go of at once: the transport is being destroyed and nothing steps the network.
  void SetDraining() {
    draining_ = true;
    std::vector<Done> open_dones;
    for (auto& [peer, link] : links_) {
      for (auto& [id, open] : link.open) {
        open.packet->Detach();
        open_dones.push_back(std::move(open.done));
      }
      link.open.clear();
    }
    for (const Done& done : open_dones) done(OkStatus());
  }

 private:
  struct Outstanding {
    std::shared_ptr<FakeNetwork::Packet> packet;
    Done done;
  };
  struct Link {
    std::string to;
    std::map<std::uint64_t, Outstanding> open;
    std::uint64_t next = 0;
    int open_puts = 0;
    std::vector<Done> flushes;
  };

  void Launch(PeerId peer, std::shared_ptr<FakeNetwork::Packet> packet, std::span<const std::byte> local, Done done) {
    Link& link = links_[peer];
    packet->from = name_;
    packet->to = link.to;
    packet->local = local;
    if (draining_) {
      packet->Detach();
      network_.Launch(packet, [](bool) {});
      return done(OkStatus());
    }
    const std::uint64_t id = link.next++;
    link.open[id] = {packet, std::move(done)};
    network_.Launch(packet, [this, peer, id](bool delivered) { Landed(peer, id, delivered); });
  }

  void Landed(PeerId peer, std::uint64_t id, bool delivered) {
    const auto it = links_.find(peer);
    if (it == links_.end()) return;
    auto node = it->second.open.extract(id);
    if (node.empty()) return;
    const bool is_put = node.mapped().packet->is_put;
    // A put that got lost never completes; a lost frame has left its sender all the same.
    if (is_put && !delivered) {
      it->second.open.insert(std::move(node));
      return;
    }
    if (is_put) --it->second.open_puts;
    node.mapped().done(OkStatus());
    if (const auto again = links_.find(peer); again != links_.end()) FlushIfIdle(again->second);
  }

  void FlushIfIdle(Link& link) {
    if (link.open_puts > 0) return;
    std::vector<Done> flushes;
    flushes.swap(link.flushes);
    for (const Done& done : flushes) done(OkStatus());
  }

  void Fail(PeerId peer, const std::string& why);

  FakeNetwork& network_;
  const std::string name_;
  const PeerAddress address_;
  std::map<PeerId, Link> links_;
  bool draining_ = false;
};

void FakeWire::Fail(PeerId peer, const std::string& why) {
  FakeTransport* self = network_.FindNode(name_);
  if (self != nullptr && links_.contains(peer)) self->core().OnLinkFailed(peer, Unavailable(why));
}

// ---- network ----

FakeNetwork::FakeNetwork(std::uint64_t seed, Delivery delivery) : rng_(seed), delivery_(delivery) {}
FakeNetwork::~FakeNetwork() { ZEROC_CHECK(nodes_.empty(), nodes_.size()); }

void FakeNetwork::Packet::Detach() {
  if (!copy.empty() || local.empty()) return;
  copy.assign(local.begin(), local.end());
  local = copy;
}

Result<std::unique_ptr<FakeTransport>> FakeNetwork::Create(const TransportOptions& options,
                                                           TransportListener& listener) {
  ZEROC_RETURN_IF_ERROR(ValidateTransportOptions(options));
  if (options.name.empty() || nodes_.contains(options.name)) {
    return InvalidArgument("fake: the name '" + options.name + "' is empty or taken");
  }
  return std::unique_ptr<FakeTransport>(new FakeTransport(*this, options, listener));
}

FakeTransport* FakeNetwork::FindNode(const std::string& name) {
  const auto it = nodes_.find(name);
  return it == nodes_.end() || !it->second->alive_ ? nullptr : it->second;
}

void FakeNetwork::At(double delay_seconds, const std::string& node, std::function<void()> event) {
  events_[{now_ + delay_seconds, next_event_++}] = {node, Incarnation(node), std::move(event)};
}

std::uint64_t FakeNetwork::Incarnation(const std::string& name) {
  const FakeTransport* node = FindNode(name);
  return node == nullptr ? 0 : node->incarnation_;
}

void FakeNetwork::Launch(const std::shared_ptr<Packet>& packet, std::function<void(bool)> landed) {
  std::uniform_real_distribution<double> chance(0, 1);
  const auto delay = [&] {
    return faults_.delay_min_seconds + chance(rng_) * (faults_.delay_max_seconds - faults_.delay_min_seconds);
  };
  FakeFate fate;
  if (script_) fate = script_(packet->from, packet->to, packet->header);
  packet->to_incarnation = Incarnation(packet->to);
  const bool drop = fate.drop || chance(rng_) < faults_.drop_probability;
  const bool duplicate = fate.duplicate || chance(rng_) < faults_.duplicate_probability;
  const double arrival = delay() + fate.extra_delay_seconds;
  const std::string receiver = packet->is_put ? std::string() : packet->to;  // the network card takes puts by itself
  if (duplicate) {
    auto second = std::make_shared<Packet>(*packet);
    second->copy.assign(packet->local.begin(), packet->local.end());
    second->local = second->copy;
    At(arrival + delay(), receiver, [this, second] { Land(*second); });
  }
  if (!drop) At(arrival, receiver, [this, packet] { Land(*packet); });
  // The sender's side lets go once the packet has arrived; a stalled receiver still holds it, so it gets a copy.
  At(arrival, packet->from, [packet, landed = std::move(landed), drop] {
    packet->Detach();
    landed(!drop);
  });
}

void FakeNetwork::Land(const Packet& packet) {
  FakeTransport* to = FindNode(packet.to);
  if (to == nullptr || to->incarnation_ != packet.to_incarnation) return;
  if (!packet.is_put) return to->core().OnFrame(EncodeFrameHeader(packet.header), packet.local);
  ZEROC_CHECK(packet.remote_offset + packet.local.size() <= to->arena_.size(), packet.remote_offset);
  std::memcpy(to->arena_.data() + packet.remote_offset, packet.local.data(), packet.local.size());
}

void FakeNetwork::RunNodes() {
  // Callbacks may create and destroy transports, so the names are taken first.
  std::vector<std::string> names;
  for (const auto& [name, node] : nodes_) names.push_back(name);
  for (const std::string& name : names) {
    FakeTransport* node = FindNode(name);
    if (node == nullptr || node->stalled_) continue;
    node->RunCommands();
    node->core().Settle();
  }
}

double FakeNetwork::NextTimer() const {
  double next = std::numeric_limits<double>::infinity();
  for (const auto& [name, node] : nodes_) {
    if (node->alive_ && !node->stalled_) next = std::min(next, node->core().NextDeadlineSeconds());
  }
  return next;
}

bool FakeNetwork::Step() {
  ++steps_;
  if (const auto it = kills_.find(steps_); it != kills_.end()) {
    for (const std::string& name : it->second) Kill(name);
  }
  RunNodes();
  const auto work_left = [this] {
    return std::any_of(nodes_.begin(), nodes_.end(), [](const auto& entry) {
      return entry.second->alive_ && !entry.second->stalled_ && entry.second->HasCommands();
    });
  };
  if (work_left()) return true;
  const double timer = NextTimer();
  const bool has_event = !events_.empty();
  if (!has_event && timer == std::numeric_limits<double>::infinity()) return false;
  if (!has_event || timer < events_.begin()->first.first) {
    now_ = std::max(now_, timer);
    RunNodes();
    return true;
  }
  auto event = events_.extract(events_.begin());
  now_ = std::max(now_, event.key().first);
  const std::string& name = event.mapped().node;
  FakeTransport* node = FindNode(name);
  const bool alive = node != nullptr && node->incarnation_ == event.mapped().incarnation;
  if (alive && node->stalled_) {
    node->held_.push_back(std::move(event.mapped().run));
  } else if (alive || name.empty()) {
    event.mapped().run();
  }
  RunNodes();
  return true;
}

std::uint64_t FakeNetwork::RunUntilIdle(std::uint64_t steps_max) {
  std::uint64_t made = 0;
  while (made < steps_max && Step()) ++made;
  return made;
}

void FakeNetwork::RunFor(double seconds) {
  bool over = false;
  At(seconds, {}, [&over] { over = true; });
  while (!over && Step()) {
  }
}

void FakeNetwork::Kill(const std::string& name) {
  FakeTransport* node = FindNode(name);
  if (node == nullptr) return;
  node->wire_->DetachAll();
  node->alive_ = false;
  node->held_.clear();
  nodes_.erase(name);  // the name is free for a successor
  std::vector<std::string> others;
  for (const auto& [other, transport] : nodes_) others.push_back(other);
  for (const std::string& other : others) {
    // Only the links that exist now: a successor of the same name is not hurt.
    At(detection_seconds_, other, [this, other, failed = nodes_[other]->wire_->LinksTo(name)] {
      if (FakeTransport* survivor = FindNode(other)) survivor->wire_->FailLinks(failed, "the peer died");
    });
  }
}

void FakeNetwork::Stall(const std::string& name) {
  if (FakeTransport* node = FindNode(name)) node->stalled_ = true;
}

void FakeNetwork::Resume(const std::string& name) {
  FakeTransport* node = FindNode(name);
  if (node == nullptr || !node->stalled_) return;
  node->stalled_ = false;
  for (auto& event : std::exchange(node->held_, {})) At(0, name, std::move(event));
}

void FakeNetwork::Cut(const std::string& a, const std::string& b) {
  for (const auto& [from, to] : {std::pair(a, b), std::pair(b, a)}) {
    At(0, from, [this, from = from, to = to] {
      if (FakeTransport* node = FindNode(from)) node->wire_->FailLinks(node->wire_->LinksTo(to), "the link was cut");
    });
  }
}

// ---- transport ----

FakeTransport::FakeTransport(FakeNetwork& network, const TransportOptions& options, TransportListener& listener)
    : network_(network),
      name_(options.name),
      incarnation_(network.next_incarnation_++),
      wire_(std::make_unique<FakeWire>(network, options.name)) {
  Start(options, listener, *wire_, network.rng_());
  network.nodes_[name_] = this;
}

FakeTransport::~FakeTransport() {
  if (!alive_) return;  // a dead process calls nobody back
  wire_->SetDraining();
  stalled_ = false;
  Shutdown([] {});
  network_.nodes_.erase(name_);
}

Result<std::span<std::byte>> FakeTransport::AllocateArena(std::uint64_t bytes) {
  if (bytes == 0 || !arena_.empty()) return FailedPrecondition("fake: the arena is empty or there is one already");
  owned_arena_.reset(new (std::nothrow) Line[(bytes + sizeof(Line) - 1) / sizeof(Line)]());
  if (!owned_arena_) return ResourceExhausted("fake: no memory for an arena of " + std::to_string(bytes) + " bytes");
  const std::span<std::byte> arena(owned_arena_[0].bytes, bytes);
  ZEROC_RETURN_IF_ERROR(RegisterArena(arena));
  return arena;
}

Status FakeTransport::RegisterArena(std::span<std::byte> arena) {
  if (arena.empty() || !arena_.empty()) return FailedPrecondition("fake: the arena is empty or there is one already");
  arena_ = arena;
  core().SetArena(arena, {"fake", reinterpret_cast<std::uintptr_t>(arena.data()), arena.size()});
  return OkStatus();
}

}  // namespace zeroc
